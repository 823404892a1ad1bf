"""``a + b``: two curvatures in one, at the memory of one.

Both must be of one model, structure, space and layers, and have one anchor (`retain.reanchored`
moves one). Then their quadratics add, and so do their predicted nats. Sums of ``identity`` and
``diagonal`` are exact; what others keep is said where they are defined. ``info.merge_loss`` is the
relative error ``||a + b - kept|| / ||a + b||`` in the Frobenius norm of the blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from retain.curvature.info import CurvatureInfo
from retain.curvature.operator import BlockOperator
from retain.errors import MismatchError
from retain.models.forward import no_autocast

__all__ = ["merge", "same_anchor", "square"]

_Operator = TypeVar("_Operator", bound=BlockOperator)


@no_autocast()
def merge(a: _Operator, b: _Operator) -> _Operator:
    """The sum of two curvatures.

    Raises:
        MismatchError: they are not of one kind, one model, or one anchor.
    """
    _check(a, b)
    found: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    lost, norm = 0.0, 0.0
    for names in a.groups():
        ours, theirs = ([c.blocks[n] for n in names] for c in (a, b))
        merged = type(ours[0]).merge(ours, theirs)
        found |= dict(zip(names, merged.blocks, strict=True))
        weights |= dict(zip(names, merged.weights, strict=False))
        lost, norm = lost + merged.lost, norm + merged.norm
    blocks = {n: found[n] for n in a.blocks}
    links = {
        (i, j): link.plus(b.links[i, j], (blocks[i], blocks[j]), (weights[i], weights[j]))
        for (i, j), link in a.links.items()
    }
    loss = (lost / norm) ** 0.5 if norm > 0 else 0.0
    info = _info(a.info, b.info, loss, _error(a, b))
    return type(a)(blocks, a.anchor, info, links)


def _error(a: BlockOperator, b: BlockOperator) -> float:
    """Relative standard error of the sum's trace: both are measured apart, and their traces add."""
    x, y = (sum(block.trace() for block in c.blocks.values()) for c in (a, b))
    if not x + y > 0:
        return max(a.info.error, b.info.error)
    return float(((a.info.error * x) ** 2 + (b.info.error * y) ** 2) ** 0.5 / (x + y))


def _info(a: CurvatureInfo, b: CurvatureInfo, loss: float, error: float) -> CurvatureInfo:
    notes = sorted({*a.note.split(" + "), *b.note.split(" + ")})
    return replace(
        a,
        tokens=a.tokens + b.tokens,
        predictions=a.predictions + b.predictions,
        sequences=a.sequences + b.sequences,
        seed=min(a.seed, b.seed),
        samples=min(a.samples, b.samples),
        max_length=max(a.max_length, b.max_length),
        error=error,
        share=min(a.share, b.share),
        share_error=max(a.share_error, b.share_error),
        note=" + ".join(notes),
        merged=a.merged + b.merged,
        merge_loss=loss,
    )


def _check(a: BlockOperator, b: BlockOperator) -> None:
    x, y = a.info, b.info
    for what, mine, theirs in (
        ("structures", x.structure, y.structure),
        ("spaces", x.space, y.space),
        ("Fishers", x.fisher, y.fisher),
        ("temperatures", x.temperature, y.temperature),
        ("ranks of sketches", x.rank or None, y.rank or None),  # of diagonals 0 in older files
        ("base models", x.model, y.model),
        ("layers", x.shapes(), y.shapes()),
        ("scalings", _scalings(x), _scalings(y)),
        ("sharing of inputs", sorted(map(sorted, a.groups())), sorted(map(sorted, b.groups()))),
        ("links", sorted(a.links), sorted(b.links)),
    ):
        if mine != theirs:
            got = f"{mine} and {theirs}" if not isinstance(mine, dict | list) else "two kinds"
            raise MismatchError(
                f"curvatures of different {what} do not add",
                got=got,
                allowed=f"the same {what}",
                fix="fit both with the same settings",
            )
    if not same_anchor(a, b):
        raise MismatchError(
            "curvatures around different anchors do not add",
            got="two anchors",
            allowed="one",
            fix="move the older one: retain.reanchored(curvature, model)",
        )


def _scalings(info: CurvatureInfo) -> dict[str, float]:
    """Layer -> the scaling that a curvature of A and B belongs to; one of weights is of any."""
    return {n: site[3] for n, site in info.sites.items()} if info.space == "adapter" else {}


def same_anchor(a: BlockOperator, b: BlockOperator) -> bool:
    """Whether two anchors are the same point (in weight space, however it is split)."""
    for name in {*a.anchor, *b.anchor}:
        x, y = a.anchor.get(name), b.anchor.get(name)
        if a.info.space == "adapter" or (x and len(x) == 1) or (y and len(y) == 1):
            if x is None or y is None or not all(map(torch.equal, x, y)):
                return False
            continue
        pairs = [pair for pair in (x, y) if pair is not None]
        flip = torch.cat([pairs[0][0], *(-pair[0] for pair in pairs[1:])], 1)
        apart = square(flip, torch.cat([pair[1] for pair in pairs], 0))
        if apart > 1e-10 * sum(square(*pair) for pair in pairs):
            return False
    return True


def square(left: Tensor, right: Tensor) -> float:
    """``|left @ right|^2``, Frobenius, in float64."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum())
