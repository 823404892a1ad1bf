"""Where a model stands relative to a curvature: whether it is the curvature's own, how far each
weight is from the anchor, and the implicit step back.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from retain.curvature.info import describe, part
from retain.curvature.operator import BlockOperator
from retain.curvature.stack import Move, total
from retain.errors import MismatchError, RetainWarning
from retain.models.fingerprint import alike, fingerprint, near, signature
from retain.models.names import unwrap
from retain.models.sites import LinearSite, LoraSite, Site, base_layers

__all__ = [
    "Anchors",
    "Displacements",
    "anchor_of",
    "anchors_for_steps",
    "check_sites",
    "constants",
    "has_update",
    "proximal",
    "site_tensor",
    "whole_weights",
]


def site_tensor(site: Site) -> Tensor:
    """A tensor of the site's: its device is where the curvature must be."""
    return site.a if isinstance(site, LoraSite) else site.weight


def check_sites(curvature: BlockOperator, model: nn.Module, sites: Sequence[Site]) -> None:
    """Checks that a curvature belongs to a model with these layers.

    Raises:
        MismatchError: another base model, other layers, or (adapter space) another rank.
    """
    info = curvature.info
    found, want = describe(sites), info.sites
    whole = isinstance(sites[0], LinearSite)  # whose base weights are those that train
    mine, theirs = fingerprint(model), info.model
    if mine != theirs and not whole:
        own = signature(model, base_layers(sites)) if info.weights else ""
        if not _stored_otherwise(info.weights, own):
            raise _another_base(model, mine, theirs, near(info.weights, own))
    if set(found) != set(want) or any(found[n][:2] != want[n][:2] for n in want):
        odd = sorted(set(found) ^ set(want)) or [n for n in want if found[n][:2] != want[n][:2]]
        raise MismatchError(
            "the curvature belongs to an adapter on other layers",
            got=f"{len(found)} layers, the first that differs is {odd[0]}",
            allowed=f"the {len(want)} layers it was fitted on",
            fix="fit the curvature again"
            if whole
            else "use the same target_modules, or fit the curvature on the adapter's layers: "
            f"--targets takes whole names too, with commas between, such as {next(iter(found))}",
        )
    if whole and any(len(curvature.anchor.get(name, ())) != 1 for name in want):
        raise MismatchError(
            "the curvature knows no weights to hold a fully trained model at",
            got="one that was fitted on a LoRA model",
            allowed="one that was fitted on the plain model",
            fix="fit the curvature on this model",
        )
    if info.space == "adapter":
        for name, shape in want.items():
            if found[name][2:] != shape[2:]:
                raise MismatchError(
                    "an adapter-space curvature belongs to one rank and scaling",
                    got=f"r={found[name][2]:g}, scaling={found[name][3]:g} at {name}",
                    allowed=f"r={shape[2]:g}, scaling={shape[3]:g}",
                    fix="use that rank, or fit with space='weight', which fits any rank",
                )


def _stored_otherwise(theirs: str, mine: str) -> bool:
    """Whether the signatures are of the same weights, quantised or not, which it says."""
    if not alike(theirs, mine):
        return False
    stored, here = (text.partition(":")[0] for text in (theirs, mine))
    warnings.warn(
        f"the curvature was measured on these weights stored as {stored}, and here they are "
        f"{here}: predicted nats are those of the {stored} weights, so measure the divergence too",
        RetainWarning,
        stacklevel=4,
    )
    return True


def _another_base(model: nn.Module, mine: str, theirs: str, close: bool) -> MismatchError:
    """What to say of a model with another fingerprint; its linear layers may be close by."""
    what, fix = "the curvature belongs to another base model", "fit the curvature on this model"
    got = f"a model with fingerprint {mine}"
    configs = getattr(unwrap(model), "peft_config", None) or {}
    biases = {getattr(config, "bias", None) or "none" for config in configs.values()} - {"none"}
    if close and biases:
        what += ", or to this one before an adapter trained its biases"
        got += f", and an adapter of bias={sorted(biases)[0]!r}"
        fix = "train LoRA with bias='none'"
    elif close:
        what += ", or to this one in another precision"
        got += f", in {str(next(model.parameters()).dtype).removeprefix('torch.')}"
        fix = (
            "load the model in the precision the curvature was fitted in (of one checkpoint "
            f"float16 is another base than float32 and bfloat16), or {fix}"
        )
    return MismatchError(what, got=got, allowed=theirs, fix=fix)


def whole_weights(curvature: BlockOperator, site: Site) -> list[tuple[str, nn.Parameter, Tensor]]:
    """(block, weight, its value at the anchor) of what moves as a whole matrix.

    Of LoRA in weight space nothing does: there the update is a product.
    """
    kept = curvature.anchor.get(site.name, ())
    if isinstance(site, LinearSite):
        return [(site.name, site.weight, kept[0])]
    if curvature.info.space == "weight":
        return []
    names = (part(site.name, "lora_B"), part(site.name, "lora_A"))
    return list(zip(names, (site.b, site.a), kept, strict=True))


@dataclass(frozen=True)
class Displacements:
    """Displacements by block name: thin ones, and full ones, D itself."""

    thin: dict[str, Move] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, curvature: BlockOperator, sites: Sequence[Site]) -> Displacements:
        """The present displacements, full ones in the blocks' precision."""
        found = cls()
        for site in sites:
            for name, weight, start in whole_weights(curvature, site):
                found.full[name] = weight.detach().to(start.dtype) - start
            if isinstance(site, LoraSite) and curvature.info.space == "weight":
                a, b = site.a.detach(), site.b.detach()
                kept = curvature.anchor.get(site.name, ())
                pair = (kept[0], kept[1]) if len(kept) == 2 else None
                found.thin[site.name] = Move(site.scaling, b, a, _dtype_of(curvature, site), pair)
        return found


def constants(
    curvature: BlockOperator, sites: Sequence[LoraSite], rows: slice
) -> dict[str, tuple[Tensor, Tensor]]:
    """In weight space, what of each layer's displacement does not move while some rows train.

    Args:
        curvature: whose blocks' precision and anchor.
        sites: the layers.
        rows: of A, and columns of B, that train.

    Returns:
        By layer L [d_out, k] and R [k, d_in], whose product it is; k is 0 where the other rows are
        the anchor's own.
    """
    found = {}
    for site in sites:
        a, b, b0, a0 = _thin(curvature, site)
        rest = torch.ones(len(a), dtype=torch.bool, device=a.device)
        rest[rows] = False
        left, right = site.scaling * b[:, rest], a[rest]
        if torch.equal(left, b0) and torch.equal(right, a0):
            left, right = left[:, :0], right[:0]
        else:
            left, right = torch.cat([left, -b0], 1), torch.cat([right, a0])
        found[site.name] = left, right
    return found


def anchor_of(curvature: BlockOperator, sites: Sequence[Site]) -> dict[str, tuple[Tensor, ...]]:
    """The present weights as an anchor. In weight space, LoRA layers with no update need none.

    Nor do those whose B A is 0 but for rounding, as ``orthogonal`` and ``mica`` begin in float32.
    """
    anchor: dict[str, tuple[Tensor, ...]] = {}
    for site in sites:
        dtype = _dtype_of(curvature, site)
        if isinstance(site, LinearSite):
            anchor[site.name] = (site.weight.detach().to(dtype, copy=True),)
            continue
        a, b = site.a.detach().to(dtype, copy=True), site.b.detach().to(dtype, copy=True)
        if curvature.info.space == "adapter":
            anchor[site.name] = (b, a)
        elif bool(b.any()) and has_update(b, a, 16 * torch.finfo(torch.float32).eps):
            anchor[site.name] = (site.scaling * b, a)
    return anchor


def has_update(b: Tensor, a: Tensor, rounding: float) -> bool:
    """Whether B A is more than 0 by more than its relative rounding.

    PEFT's ``orthogonal`` has a B that is not 0 and an A whose rows cancel it, ``mica`` an A of 0.
    """
    b, a = b.cpu().double(), a.cpu().double()
    left, right = b.T @ b, a @ a.T
    size = float(left.trace() * right.trace())
    return float((left * right).sum()) > rounding**2 * size


def _dtype_of(curvature: BlockOperator, site: Site) -> torch.dtype:
    """The precision of a site's block."""
    adapter = curvature.info.space == "adapter"
    name = part(site.name, "lora_B") if adapter else site.name
    return curvature.dtype_of(name)


def _thin(curvature: BlockOperator, site: LoraSite) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B and the anchor's B_0, A_0, which may be of rank 0, in the block's precision."""
    dtype = _dtype_of(curvature, site)
    a, b = site.a.detach().to(dtype), site.b.detach().to(dtype)
    kept = curvature.anchor.get(site.name, ())
    b0, a0 = kept if len(kept) == 2 else (b[:, :0], a[:0])
    return a, b, b0, a0


Anchors = Mapping[str, tuple[Tensor, Tensor]]


def anchors_for_steps(
    curvature: BlockOperator, sites: Sequence[Site], rows: slice = slice(None)
) -> Anchors:
    """For `proximal` while some rows train: where each LoRA layer's pull leads, made once.

    It holds while the other rows and the anchor stay.

    Args:
        curvature: of weight space; in another there are none.
        sites: the layers.
        rows: of A, and columns of B, that train.
    """
    if curvature.info.space != "weight":
        return {}
    lora = [site for site in sites if isinstance(site, LoraSite)]
    with torch.no_grad():
        return {
            name: curvature.blocks[name].turned(-left, right)
            for name, (left, right) in constants(curvature, lora, rows).items()
        }


def proximal(
    curvature: BlockOperator,
    sites: Sequence[Site],
    steps: dict[int, float],
    rows: slice = slice(None),
    anchors: Anchors | None = None,
) -> Tensor | None:
    """One implicit step of the quadratic q, in place: of each layer first B, then A.

    Each half solves its own convex problem exactly, ``X = argmin 0.5 ||X - X'||^2 + tau q(X)``, so
    q never grows, whatever the steps. Where blocks are linked, such steps would let neighbours run
    away against each other. There q is not the quadratic but its bound, twice the blocks without
    the links: each pair of a tri-diagonal chain is below twice its own diagonal.

    Args:
        curvature: whose quadratic.
        sites: the layers.
        steps: ``id`` of a parameter -> its tau, the step times the strength; 0 where missing.
        rows: of LoRA's A, and columns of B, that move; weight space alone.
        anchors: `anchors_for_steps` of these rows, where it was called before.

    Returns:
        The quadratic after it, where it takes no further read of the factors; of weights that are
        kept in less precision, before they are rounded.
    """
    bound = 2.0 if curvature.links else 1.0
    anchors = anchors_for_steps(curvature, sites, rows) if anchors is None else anchors
    values: list[Tensor | None] = []

    def tau(parameter: Tensor) -> float:
        return bound * steps.get(id(parameter), 0.0) if parameter.requires_grad else 0.0

    with torch.no_grad():
        for site in sites:
            for name, weight, start in whole_weights(curvature, site):
                values.append(None)
                if tau(weight):
                    d = weight.detach().to(start.dtype) - start
                    weight.copy_(start + curvature.blocks[name].prox(d, tau(weight)))
            if isinstance(site, LoraSite) and curvature.info.space == "weight":
                dtype, taus = _dtype_of(curvature, site), (tau(site.b), tau(site.a))
                b, a, value = curvature.blocks[site.name].prox_both(
                    site.b.detach()[:, rows].to(dtype), site.a.detach()[rows].to(dtype),
                    site.scaling, anchors[site.name], taus,
                )  # fmt: skip
                values.append(value)
                if taus[0]:
                    site.b[:, rows] = b.to(site.b.dtype)
                if taus[1]:
                    site.a[rows] = a.to(site.a.dtype)
    known = [value for value in values if value is not None]
    return total(known) if known and len(known) == len(values) and not curvature.links else None
