"""Whether what a curvature file holds can be a curvature: checked when it is loaded.

A digest says that a file is as it was written, not that what was written is sound. Here each tensor
is one that the description calls for, of its shape, of floating point, and finite; and each factor
is symmetric and has no direction of negative curvature, whose penalty would pay for drift.

The cost is a few passes over each tensor: see `retain.curvature.blocks.definite`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, ValidationError, create_model
from torch import Tensor

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.definite import check_above, check_basis, check_dense, leading, slack
from retain.curvature.blocks.diagonal import DiagonalBlock
from retain.curvature.blocks.eigen import EigenBlock
from retain.curvature.blocks.factor import DenseFactor, Factor, SketchFactor, diagonal_of
from retain.curvature.blocks.identity import IdentityBlock
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.curvature import Curvature
from retain.curvature.info import CurvatureInfo, part
from retain.errors import shown

__all__ = ["check_curvature", "check_described", "check_tensors"]


def _default(field: Field[Any]) -> Any:
    """As pydantic wants it: ``...`` where there is none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return ... if field.default is MISSING else field.default


_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_INFO: Any = create_model(  # type: ignore[call-overload]
    "_INFO",
    __config__=_STRICT,
    **{
        field.name: (get_type_hints(CurvatureInfo)[field.name], _default(field))
        for field in fields(CurvatureInfo)
    },
)


def check_described(described: Any) -> CurvatureInfo:
    """The description's own parts.

    Args:
        described: the JSON of the file's header, unchecked.

    Raises:
        ValueError: one is missing, or of another type; the message says which.
    """
    for name, kind in (("info", dict), ("alias", dict), ("shapes", dict), ("links", list)):
        if not isinstance(described.get(name, [] if name == "links" else None), kind):
            raise ValueError(f"no {name} in its description")
    try:
        _INFO.model_validate(described["info"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {shown(first['input'], 60)}: {first['msg']}") from None
    info = CurvatureInfo(**described["info"])  # numbers as they are: pydantic makes 4 of them 4.0
    for name in ("tokens", "predictions", "sequences", "samples", "max_length", "merged"):
        if not 0 <= getattr(info, name) < 1 << 63:
            raise ValueError(f"{name}: {shown(getattr(info, name))}")
    for name in ("error", "share", "share_error", "temperature", "merge_loss"):
        if not (math.isfinite(getattr(info, name)) and getattr(info, name) >= 0):
            raise ValueError(f"{name}: {getattr(info, name)}")
    if not info.sites:
        raise ValueError("no layers")
    for name, site in info.sites.items():
        whole = len(site) == 4 and all(math.isfinite(n) and n == int(n) for n in site[:3])
        if not whole or min(site[:2]) < 1 or site[2] < 0 or not math.isfinite(site[3]):
            raise ValueError(f"layer {shown(name)}: {shown(site)}")
    _check_shapes(described["shapes"], info)
    return info


def _check_shapes(shapes: Mapping[str, Any], info: CurvatureInfo) -> None:
    for name, shape in shapes.items():
        if shape != _shapes(info).get(name):
            raise ValueError(f"block {shown(name)} of the shape {shown(shape)}, which no layer has")
    missing = [
        name
        for name in _shapes(info)
        if name not in shapes and not (info.space == "adapter" and name.endswith(".lora_A"))
    ]
    if missing:
        raise ValueError(f"no block {shown(missing[0])}")


def _shapes(info: CurvatureInfo) -> dict[str, list[int]]:
    """Block -> [d_out, d_in], for all layers."""
    found: dict[str, list[int]] = {}
    for name, (d_out, d_in, rank, _) in info.sites.items():
        if info.space == "adapter":
            found[part(name, "lora_A")] = [int(rank), int(d_in)]
            found[part(name, "lora_B")] = [int(d_out), int(rank)]
        else:
            found[name] = [int(d_out), int(d_in)]
    return found


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Each is of floating point, and finite.

    Raises:
        ValueError: one is not; the message names it.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{shown(name)} of {tensor.dtype}")
        if tensor.numel() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
            raise ValueError(f"{shown(name)} is not finite")


def check_curvature(curvature: Curvature, held: Mapping[str, Tensor]) -> None:
    """The parts fit one another, none is negative, and no tensor is left over.

    Args:
        curvature: as it was put together from the file.
        held: all tensors of the file, by name.

    Raises:
        ValueError: they do not; the message names the tensor.
    """
    info, shapes = curvature.info, _shapes(curvature.info)
    used: set[int] = set()
    done: set[int] = set()
    dtypes: dict[torch.dtype, str] = {}
    for name, block in curvature.blocks.items():
        place = f"blocks/{name}"
        if list(block.shape) != shapes[name]:
            raise ValueError(f"{place} of the shape {list(block.shape)}, not {shapes[name]}")
        for short, tensor in block.tensors().items():
            used.add(id(tensor))
            dtypes.setdefault(tensor.dtype, f"{place}/{short}")
        if len(dtypes) > 1:
            raise ValueError(" and ".join(f"{where} of {dtype}" for dtype, where in dtypes.items()))
        for where, each in _parts(block, place):
            if id(each) not in done:
                done.add(id(each))
                _check_part(where, each)
    for number, (pair, link) in enumerate(curvature.links.items()):
        used |= {id(link.inputs), id(link.outputs)}
        _check_link(curvature, f"links/{number}", pair)
    _check_chain(curvature)
    for name, kept in curvature.anchor.items():
        used |= {id(t) for t in kept}
        _check_anchor(info, name, [list(t.shape) for t in kept])
    if info.space == "adapter" and set(curvature.anchor) != set(info.sites):
        raise ValueError("anchor: not of all layers")
    for name, tensor in held.items():
        if id(tensor) not in used:
            raise ValueError(f"{shown(name)} belongs to no block")


def _parts(block: Block, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(block, KroneckerBlock):
        yield f"{place}/inputs", block.inputs
        yield f"{place}/outputs", block.outputs
    elif isinstance(block, EigenBlock):
        yield f"{place}/inputs", block.inputs
        yield f"{place}/outputs", block.outputs
        yield f"{place}/values", block.inner
    elif isinstance(block, DiagonalBlock):
        yield f"{place}/values", block
    elif isinstance(block, IdentityBlock):
        yield f"{place}/scale", block.scale


def _check_part(where: str, each: Any) -> None:
    if isinstance(each, DenseFactor):
        check_dense(where, each.matrix)
    elif isinstance(each, SketchFactor):
        size, k = each.vectors.shape if each.vectors.dim() == 2 else (0, 0)
        if each.diagonal.shape != (size,) or each.bound.numel() != 1 or k > size:
            raise ValueError(f"{where}: parts of a sketch that do not fit each other")
        check_above(f"{where}.diagonal", each.diagonal)
        check_above(f"{where}.bound", each.bound)
    elif isinstance(each, Factor):
        scale = each.tensors()[".scale"]
        if scale.numel() != 1:
            raise ValueError(f"{where}.scale of the shape {list(scale.shape)}, not one number")
        check_above(f"{where}.scale", scale)
    elif isinstance(each, DiagonalBlock):
        check_above(where, each.values)
    elif each.numel() == 1 and each.dim() == 0:
        check_above(where, each)
    else:
        check_basis(where, each)


def _check_anchor(info: CurvatureInfo, name: str, shapes: list[list[int]]) -> None:
    if name not in info.sites:
        raise ValueError(f"anchor/{shown(name, plain=True)} belongs to no layer")
    d_out, d_in = map(int, info.sites[name][:2])
    k = shapes[0][-1] if shapes[0] else 0
    good = shapes == [[d_out, d_in]] if len(shapes) == 1 else shapes == [[d_out, k], [k, d_in]]
    if not good or (info.space == "adapter" and k != int(info.sites[name][2])):
        raise ValueError(f"anchor/{name} of the shapes {shown(shapes)}")


def _check_link(curvature: Curvature, where: str, pair: tuple[str, str]) -> None:
    """A link is no larger than its two ends allow: ``<u, G_ij v>^2 <= <u, G_ii u> <v, G_jj v>``."""
    link = curvature.links[pair]
    ends = [curvature.blocks.get(name) for name in pair]
    if not all(isinstance(end, KroneckerBlock) for end in ends):
        raise ValueError(f"{where} between blocks that there are not")
    if not (isinstance(link.weight, int | float) and 0 <= link.weight <= 1):
        raise ValueError(f"{where} of the weight {shown(link.weight)}")
    for side in ("inputs", "outputs"):
        a, b = (getattr(end, side) for end in ends)
        m = getattr(link, side)
        if list(m.shape) != [a.size, b.size]:
            raise ValueError(f"{where}/{side} of the shape {list(m.shape)}, not {[a.size, b.size]}")
        most = (diagonal_of(a).clamp(min=0).sqrt()[:, None]) * diagonal_of(b).clamp(min=0).sqrt()
        room = 16 * slack(m) * float(most.max())
        if float((m.abs() - most).max()) > room:
            raise ValueError(f"{where}/{side} is larger than its ends allow")
        u, v = leading(m)
        value = float(u @ (m @ v))
        bound = float(u @ a.matmul(u[:, None])[:, 0]) * float(v @ b.matmul(v[:, None])[:, 0])
        if value > (1 + 16 * slack(m)) * math.sqrt(max(bound, 0.0)) + room:
            raise ValueError(f"{where}/{side} is larger than its ends allow")


def _check_chain(curvature: Curvature) -> None:
    """Links tie neighbours alone, and each weighs what keeps the chain semi-definite."""
    if not curvature.links:
        return
    names = list(curvature.blocks)
    if curvature.info.structure != "tridiagonal" or not set(curvature.links) <= set(
        pairwise(names)
    ):
        raise ValueError("links between blocks that are no neighbours")
    right, left = {i for i, _ in curvature.links}, {j for _, j in curvature.links}
    for number, ((i, j), link) in enumerate(curvature.links.items()):
        want = ((0.5 if i in left else 1.0) * (0.5 if j in right else 1.0)) ** 0.5
        if link.weight > want * (1 + 1e-6):
            raise ValueError(f"links/{number} of the weight {link.weight:g}, more than {want:g}")
