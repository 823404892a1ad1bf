"""Whether what a curvature file holds can be a curvature: checked when it is loaded.

A digest says that a file is as it was written, not that what was written is sound. Here each tensor
is one that the description calls for, of its shape, of floating point, and finite; and each factor
is symmetric and has no direction of negative curvature, whose penalty would pay for drift.

The cost is a few passes over each tensor. Up to `EXACT` wide, a factor's smallest eigenvalue is
computed; a wider one is tried: its diagonal and 2 x 2 minors, and the smallest Ritz value of a few
Lanczos steps, which finds any eigenvalue that is far below zero for the size of the others.
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

from retain.curvature.block import Block
from retain.curvature.curvature import Curvature
from retain.curvature.diagonal import DiagonalBlock
from retain.curvature.eigen import EigenBlock
from retain.curvature.factor import DenseFactor, Factor, SketchFactor, diagonal_of
from retain.curvature.identity import IdentityBlock
from retain.curvature.info import CurvatureInfo, part
from retain.curvature.kronecker import KroneckerBlock
from retain.errors import shown

__all__ = ["check_curvature", "check_described", "check_tensors"]

EXACT = 512
"""Widest factor whose eigenvalues are computed."""

STEPS = 12
"""Lanczos steps for a wider one."""


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
        _check_dense(where, each.matrix)
    elif isinstance(each, SketchFactor):
        size, k = each.vectors.shape if each.vectors.dim() == 2 else (0, 0)
        if each.diagonal.shape != (size,) or each.bound.numel() != 1 or k > size:
            raise ValueError(f"{where}: parts of a sketch that do not fit each other")
        _check_above(f"{where}.diagonal", each.diagonal)
        _check_above(f"{where}.bound", each.bound)
    elif isinstance(each, Factor):
        scale = each.tensors()[".scale"]
        if scale.numel() != 1:
            raise ValueError(f"{where}.scale of the shape {list(scale.shape)}, not one number")
        _check_above(f"{where}.scale", scale)
    elif isinstance(each, DiagonalBlock):
        _check_above(where, each.values)
    elif each.numel() == 1 and each.dim() == 0:
        _check_above(where, each)
    else:
        _check_basis(where, each)


def _check_above(where: str, values: Tensor) -> None:
    if values.numel() and float(values.min()) < 0:
        raise ValueError(f"{where} is negative: {float(values.min()):.3g}")


def _check_dense(where: str, s: Tensor) -> None:
    """Symmetric and positive semi-definite, but for rounding."""
    if s.dim() != 2 or s.shape[0] != s.shape[1]:
        raise ValueError(f"{where} of the shape {list(s.shape)}, no square")
    if not s.numel():
        return
    largest = float(s.abs().max())
    slack = _slack(s) * largest
    if float((s - s.T).abs_().max()) > slack:
        raise ValueError(f"{where} is not symmetric")
    if float(s.diagonal().min()) < -slack:
        raise ValueError(f"{where} is negative: {float(s.diagonal().min()):.3g}")
    wide = s if s.dtype == torch.float64 else s.float()
    lowest = _lowest(wide)
    # Of the largest eigenvalue, which is at least the largest entry and at most the trace.
    if lowest < -_slack(s) * float(wide.diagonal().sum()):
        raise ValueError(f"{where} has a negative eigenvalue: {lowest:.3g}")


def _slack(s: Tensor) -> float:
    """What rounding may leave, relative to a matrix's largest entries."""
    return min(64 * max(torch.finfo(s.dtype).eps, 1e-9), 0.02)


def _lowest(s: Tensor) -> float:
    """The smallest eigenvalue; for a wide matrix a value that it is not above."""
    if len(s) <= EXACT:
        return float(torch.linalg.eigvalsh(s.double())[0])
    root = s.diagonal().clamp(min=0).sqrt()
    # Of a positive semi-definite matrix each 2 x 2 minor is: |s_ij| <= sqrt(s_ii s_jj).
    excess = float((s.abs() - root[:, None] * root).max())
    if excess > _slack(s) * float(root.max()) ** 2:
        return -excess
    random = torch.Generator().manual_seed(0)
    v = torch.randn(len(s), generator=random, dtype=torch.float64).to(s.dtype)
    basis = [v / v.norm()]
    for _ in range(STEPS):
        w = s @ basis[-1]
        q = torch.stack(basis)
        for _ in range(2):  # twice is enough to be orthogonal
            w = w - q.T @ (q @ w)
        if float(w.norm()) < 1e-6 * float(root.max()) ** 2:
            break
        basis.append(w / w.norm())
    q = torch.stack(basis)
    inner = (q @ (s @ q.T)).double()
    return float(torch.linalg.eigvalsh((inner + inner.T) / 2)[0])


def _check_basis(where: str, u: Tensor) -> None:
    """Orthogonal, tried on two random vectors."""
    if u.dim() != 2 or u.shape[0] != u.shape[1]:
        raise ValueError(f"{where} of the shape {list(u.shape)}, no square")
    wide = u if u.dtype == torch.float64 else u.float()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(len(u), 2, generator=random, dtype=torch.float64).to(wide.dtype)
    apart = float((wide.T @ (wide @ x) - x).abs().max())
    if apart > 1e3 * max(torch.finfo(u.dtype).eps, 1e-9) * max(float(x.norm()), 1.0):
        raise ValueError(f"{where} is no orthogonal basis")


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
        slack = 16 * _slack(m) * float(most.max())
        if float((m.abs() - most).max()) > slack:
            raise ValueError(f"{where}/{side} is larger than its ends allow")
        u, v = _leading(m)
        value = float(u @ (m @ v))
        bound = float(u @ a.matmul(u[:, None])[:, 0]) * float(v @ b.matmul(v[:, None])[:, 0])
        if value > (1 + 16 * _slack(m)) * math.sqrt(max(bound, 0.0)) + slack:
            raise ValueError(f"{where}/{side} is larger than its ends allow")


def _leading(m: Tensor) -> tuple[Tensor, Tensor]:
    """About the singular vectors of the largest singular value."""
    random = torch.Generator().manual_seed(0)
    v = torch.randn(m.shape[1], generator=random, dtype=torch.float64).to(m.dtype)
    u = m @ v
    for _ in range(4):
        u = m @ (v / v.norm().clamp(min=torch.finfo(m.dtype).tiny))
        v = m.T @ (u / u.norm().clamp(min=torch.finfo(m.dtype).tiny))
    tiny = torch.finfo(m.dtype).tiny
    return u / u.norm().clamp(min=tiny), v / v.norm().clamp(min=tiny)


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
