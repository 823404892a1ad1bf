"""Curvature files: safetensors, with a description and a digest in the header.

The tensors are ``blocks/<layer>/<tensor>``, ``anchor/<layer>/{B,A}`` (or ``/W``) and
``links/<number>/<tensor>``. A tensor that several blocks share is stored once; the description says
who else reads it. The digest covers the description and each tensor's name, type, shape and bytes,
so a flipped bit is found on loading.

A digest says that a file is as it was written, not that what was written is sound. So on loading
each tensor must be one that the description calls for, of its shape, of floating point, and
finite; and each block says whether its tensors are sound, with no direction of negative curvature,
whose penalty would pay for drift. That costs a few passes over each tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from retain.curvature.blocks.registry import names, structure_of
from retain.curvature.blocks.tridiagonal import check_chain
from retain.curvature.info import CurvatureInfo
from retain.curvature.operator import BlockOperator, unpack
from retain.data.tensors import read_tensors
from retain.documents import parse_json
from retain.errors import ArtifactError, shown
from retain.files import whole_file

__all__ = ["curvature_file", "digest_of", "read_curvature", "save_curvature", "save_tensors"]

FORMAT = "retain.curvature/1"

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def save_curvature(curvature: BlockOperator, path: str | Path) -> Path:
    """Writes a curvature file; an older file of that name stays until the new one is whole.

    Raises:
        OutputError: the place cannot be written, or the disk is full.
    """
    path = Path(path).expanduser()
    tensors, alias = _stored(curvature)
    described = {
        "format": FORMAT,
        "info": curvature.info.to_dict(),
        "alias": alias,
        "shapes": {name: list(block.shape) for name, block in curvature.blocks.items()},
        "links": [[i, j, link.weight] for (i, j), link in curvature.links.items()],
    }
    # In the order of the blocks, and one entry alone: safetensors writes several in random order,
    # and one curvature shall be the same bytes each time.
    described["digest"] = digest_of(json.dumps(described), tensors)
    save_tensors(path, tensors, {"retain": json.dumps(described)}, "the curvature")
    return path


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], what: str
) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        OutputError: the place cannot be written, or the disk is full; `what` says of which.
    """
    with whole_file(path, what) as scratch:
        try:
            save_file(tensors, scratch, metadata)
        except SafetensorError as error:  # safetensors wraps the system's error
            raise OSError(str(error)) from error


def _stored(curvature: BlockOperator) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and the names that stand for a tensor stored under another name."""
    tensors: dict[str, Tensor] = {}
    alias: dict[str, str] = {}
    stored: dict[int, str] = {}
    for name, tensor in curvature.tensors().items():
        # Empty tensors, which have no address, are never one.
        known = stored.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if known == name:
            tensors[name] = tensor.detach().cpu().contiguous()
        else:
            alias[name] = known
    for layer, kept in curvature.anchor.items():
        for short, tensor in zip(("B", "A") if len(kept) == 2 else ("W",), kept, strict=True):
            tensors[f"anchor/{layer}/{short}"] = tensor.detach().cpu().contiguous().clone()
    return tensors, alias


def digest_of(text: str, tensors: Mapping[str, Tensor]) -> str:
    """A digest of a text and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def curvature_file(path: str | Path) -> Path:
    """The path of a curvature, which is there.

    Raises:
        ArtifactError: there is no such file.
    """
    path = Path(path).expanduser()
    if not _is_file(path):
        raise ArtifactError(
            "no such curvature file",
            got=path,
            allowed="a file written by retain fit",
            fix="check the path, or run retain fit",
        )
    return path


def read_curvature(path: str | Path) -> BlockOperator:
    """Reads a curvature file; checks its digest, and that it can be a curvature.

    Raises:
        ArtifactError: no such file, not a curvature file, truncated, altered, or with contents
            that no fit has.
    """
    path = curvature_file(path)
    try:
        tensors, metadata = read_tensors(path)
        text = metadata["retain"]
        described = parse_json(text, nan=True)  # an error that is not known, in older files
        if described["format"] != FORMAT:
            raise _damaged(path, f"format {shown(described['format'])}", f"format {FORMAT!r}")
        digest = metadata.get("digest")  # of 0.1.0; now it is inside
        if digest is None:
            digest = described.pop("digest")
            text = json.dumps(described)
        if digest != digest_of(text, tensors):
            raise _damaged(path, "contents that do not match their digest", "an unaltered file")
        return _read(described, tensors)
    except KeyError as error:
        raise _damaged(path, f"no {shown(error.args[0])}", "a whole curvature file") from error
    except (SafetensorError, ValueError, TypeError, LookupError, OSError, MemoryError) as error:
        raise _damaged(path, str(error)[:300], "a whole curvature file") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except ValueError:  # a NUL in the name
        return False


def _damaged(path: Path, got: str, allowed: str) -> ArtifactError:
    return ArtifactError(
        "the curvature file is damaged or is none",
        got=f"{path}: {got}",
        allowed=allowed,
        fix="fit it again, or copy it again",
    )


def _read(described: Any, tensors: dict[str, Tensor]) -> BlockOperator:
    """A curvature from its description and tensors, both checked.

    Raises:
        KeyError, ValueError: a part is missing, left over or unsound; the message names it.
    """
    links = described.get("links", [])
    for name, kind in (("info", dict), ("alias", dict), ("shapes", dict)):
        if not isinstance(described.get(name), kind):
            raise ValueError(f"no {name} in its description")
    if not isinstance(links, list):
        raise ValueError("no links in its description")
    info = _info(described["info"])
    structure = structure_of(info.structure)
    shapes = {name: tuple(shape) for name, shape in described["shapes"].items()}
    _check_shapes(shapes, info)
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{shown(name)} of {tensor.dtype}")
        if tensor.numel() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
            raise ValueError(f"{shown(name)} is not finite")
    named = tensors | {name: tensors[known] for name, known in described["alias"].items()}
    kinds = {name: (structure.block, shape) for name, shape in shapes.items()}
    blocks, found = unpack(kinds, [((i, j), weight) for i, j, weight in links], named)
    curvature = BlockOperator(blocks, _anchor(named, info), info, found)
    _check(curvature, tensors)
    return curvature


def _info(found: dict[str, Any]) -> CurvatureInfo:
    info = CurvatureInfo.from_dict(found)
    if info.structure not in names():
        raise ValueError(f"structure: {shown(info.structure)}: not one of {', '.join(names())}")
    return info


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], info: CurvatureInfo) -> None:
    want = info.shapes()
    for name, shape in shapes.items():
        if shape != want.get(name):
            raise ValueError(f"block {shown(name)} of the shape {shown(shape)}, which no layer has")
    for name in want:
        if name not in shapes and not (info.space == "adapter" and name.endswith(".lora_A")):
            raise ValueError(f"no block {shown(name)}")


def _anchor(tensors: Mapping[str, Tensor], info: CurvatureInfo) -> dict[str, tuple[Tensor, ...]]:
    anchor: dict[str, tuple[Tensor, ...]] = {}
    for layer in sorted({name.split("/")[1] for name in tensors if name.startswith("anchor/")}):
        parts = ("W",) if f"anchor/{layer}/W" in tensors else ("B", "A")
        anchor[layer] = kept = tuple(tensors[f"anchor/{layer}/{short}"] for short in parts)
        if layer not in info.sites:
            raise ValueError(f"anchor/{shown(layer, plain=True)} belongs to no layer")
        d_out, d_in, rank = map(int, info.sites[layer][:3])
        shapes = [list(t.shape) for t in kept]
        k = shapes[0][-1] if shapes[0] else 0
        want = [[d_out, d_in]] if len(kept) == 1 else [[d_out, k], [k, d_in]]
        if shapes != want or (info.space == "adapter" and k != rank):
            raise ValueError(f"anchor/{layer} of the shapes {shown(shapes)}")
    if info.space == "adapter" and set(anchor) != set(info.sites):
        raise ValueError("anchor: not of all layers")
    return anchor


def _check(curvature: BlockOperator, held: Mapping[str, Tensor]) -> None:
    """The blocks are sound and of one precision, and no tensor is left over."""
    shapes, sound = curvature.info.shapes(), set[int]()
    dtypes: dict[torch.dtype, str] = {}
    for name, block in curvature.blocks.items():
        where = f"blocks/{name}"
        if block.shape != shapes[name]:
            raise ValueError(f"{where} of the shape {list(block.shape)}, not {list(shapes[name])}")
        for short, tensor in block.tensors().items():
            dtypes.setdefault(tensor.dtype, f"{where}/{short}")
        if len(dtypes) > 1:
            raise ValueError(" and ".join(f"{place} of {d}" for d, place in dtypes.items()))
        block.check(where, sound)
    if curvature.links:
        if not structure_of(curvature.info.structure).links:
            raise ValueError("links between blocks that are no neighbours")
        check_chain(curvature.blocks, curvature.links)
    used = {id(t) for t in curvature.tensors().values()}
    used |= {id(t) for kept in curvature.anchor.values() for t in kept}
    for name, tensor in held.items():
        if id(tensor) not in used:
            raise ValueError(f"{shown(name)} belongs to no block")
