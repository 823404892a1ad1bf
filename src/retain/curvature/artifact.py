"""Curvature files: safetensors, with a description and a digest in the header.

The tensors are ``blocks/<layer>/<tensor>``, ``anchor/<layer>/{B,A}`` (or ``/W``) and
``links/<number>/<tensor>``. A tensor that several blocks share is stored once; the description says
who else reads it. The digest covers the description and each tensor's name, type, shape and bytes,
so a flipped bit is found on loading.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.diagonal import DiagonalBlock
from retain.curvature.blocks.eigen import EigenBlock
from retain.curvature.blocks.factor import Factor, factor_from
from retain.curvature.blocks.identity import IdentityBlock
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.blocks.offdiagonal import Link
from retain.curvature.check import check_curvature, check_described, check_tensors
from retain.curvature.curvature import Curvature
from retain.curvature.info import CurvatureInfo
from retain.data.tensors import read_tensors
from retain.documents import parse_json
from retain.errors import ArtifactError, shown
from retain.files import whole_file

__all__ = ["digest_of", "load_curvature", "save_curvature"]

FORMAT = "retain.curvature/1"

PARTS: tuple[set[str], ...] = ({""}, {".scale"}, {".vectors", ".diagonal", ".bound"})
"""The endings of the names of a factor's tensors."""


def save_curvature(curvature: Curvature, path: str | Path) -> Path:
    """Writes a curvature file; an older file of that name stays until the new one is whole.

    Raises:
        OutputError: the place cannot be written, or the disk is full.
    """
    path = Path(path).expanduser()
    tensors, alias = _flatten(curvature)
    shapes = {name: list(block.shape) for name, block in curvature.blocks.items()}
    described = {
        "format": FORMAT,
        "info": curvature.info.to_dict(),
        "alias": alias,
        "shapes": shapes,
        "links": [[i, j, link.weight] for (i, j), link in curvature.links.items()],
    }
    # In the order of the blocks, and one entry alone: safetensors writes several in random order,
    # and one curvature shall be the same bytes each time.
    described["digest"] = digest_of(json.dumps(described), tensors)
    metadata = {"retain": json.dumps(described)}
    with whole_file(path, "the curvature") as scratch:
        try:
            save_file(tensors, scratch, metadata=metadata)
        except SafetensorError as error:  # safetensors wraps the system's error
            raise OSError(str(error)) from error
    return path


def load_curvature(path: str | Path) -> Curvature:
    """Reads a curvature file; checks its digest, and that it can be a curvature.

    Raises:
        ArtifactError: no such file, not a curvature file, truncated, altered, or with contents
            that no fit has: see `retain.curvature.check`.
    """
    path = Path(path).expanduser()
    if not _is_file(path):
        raise ArtifactError(
            "no such curvature file",
            got=path,
            allowed="a file written by retain fit",
            fix="check the path, or run retain fit",
        )
    try:
        tensors, metadata = read_tensors(path)
        text = metadata["retain"]
        described = parse_json(text)
        if described["format"] != FORMAT:
            raise _damaged(path, f"format {shown(described['format'])}", f"format {FORMAT!r}")
        digest = metadata.get("digest")  # of 0.1.0; now it is inside
        if digest is None:
            digest = described.pop("digest")
            text = json.dumps(described)
        if digest != digest_of(text, tensors):
            raise _damaged(path, "contents that do not match their digest", "an unaltered file")
        check_tensors(tensors)
        curvature = _rebuild(check_described(described), described, tensors)
        check_curvature(curvature, tensors)
        return curvature
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


def _flatten(curvature: Curvature) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and the names that stand for a tensor stored under another name."""
    named: dict[str, Tensor] = {}
    for layer, block in curvature.blocks.items():
        named |= {f"blocks/{layer}/{short}": t for short, t in block.tensors().items()}
    for number, link in enumerate(curvature.links.values()):
        named |= {f"links/{number}/inputs": link.inputs, f"links/{number}/outputs": link.outputs}
    tensors: dict[str, Tensor] = {}
    alias: dict[str, str] = {}
    stored: dict[int, str] = {}
    for name, tensor in named.items():
        # Empty tensors, which have no address, are never one.
        known = stored.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if known == name:
            tensors[name] = tensor.detach().cpu().contiguous()
        else:
            alias[name] = known
    for layer, kept in curvature.anchor.items():
        for short, tensor in zip(_anchor_names(len(kept)), kept, strict=True):
            tensors[f"anchor/{layer}/{short}"] = tensor.detach().cpu().contiguous().clone()
    return tensors, alias


def _anchor_names(count: int) -> tuple[str, ...]:
    return ("B", "A") if count == 2 else ("W",)


def _rebuild(
    info: CurvatureInfo, described: dict[str, Any], tensors: dict[str, Tensor]
) -> Curvature:
    alias: dict[str, str] = described["alias"]
    for name, known in alias.items():
        tensors[name] = tensors[known]
    known_factors: dict[tuple[str, ...], Factor] = {}

    def factor(prefix: str, size: int) -> Factor:
        """One object for all blocks that read the same tensors."""
        ends = ("", ".scale", ".vectors", ".diagonal", ".bound")
        names = [prefix + end for end in ends if prefix + end in tensors]
        if {n.removeprefix(prefix) for n in names} not in PARTS:
            raise ValueError(f"{shown(prefix, plain=True)} is missing, or a part of it")
        key = tuple(sorted(alias.get(n, n) for n in names))
        if key not in known_factors:
            found = {n.removeprefix(prefix): tensors[n] for n in names}
            known_factors[key] = factor_from(found, size)
        return known_factors[key]

    def matrix(name: str) -> Tensor:
        if tensors[name].dim() != 2:
            raise ValueError(f"{shown(name, plain=True)} is no matrix")
        return tensors[name]

    blocks: dict[str, Block] = {}
    for layer, (d_out, d_in) in described["shapes"].items():
        get = f"blocks/{layer}/".__add__
        if info.structure == "diagonal":
            blocks[layer] = DiagonalBlock(matrix(get("values")))
        elif info.structure == "identity":
            blocks[layer] = IdentityBlock(tensors[get("scale")], (d_out, d_in))
        elif info.structure == "ekfac":
            blocks[layer] = EigenBlock(*(matrix(get(n)) for n in ("inputs", "outputs", "values")))
        else:
            sides = factor(get("inputs"), d_in), factor(get("outputs"), d_out)
            blocks[layer] = KroneckerBlock(*sides)
    links = {
        (i, j): Link(tensors[f"links/{n}/inputs"], tensors[f"links/{n}/outputs"], weight)
        for n, (i, j, weight) in enumerate(described.get("links", []))
    }
    anchor: dict[str, tuple[Tensor, ...]] = {}
    for layer in sorted({name.split("/")[1] for name in tensors if name.startswith("anchor/")}):
        names = _anchor_names(1 if f"anchor/{layer}/W" in tensors else 2)
        anchor[layer] = tuple(tensors[f"anchor/{layer}/{short}"] for short in names)
    return Curvature(blocks, anchor, info, links)


def digest_of(text: str, tensors: dict[str, Tensor]) -> str:
    """A digest of a text and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
