"""``a + b``: two curvatures in one, at the memory of one.

Both must be of one model, structure, space and layers, and have one anchor (`reanchored` moves
one). Then their quadratics add, and so do their predicted nats.

- identity, diagonal: exact.
- kfac, shampoo, activation, tridiagonal: the sum of two Kronecker products is none. Kept is the
  product nearest to it in the Frobenius norm: with vectors ``g_i = vec G_i`` and ``s_i = vec S_i``
  the rearranged sum ``g_1 s_1^T + g_2 s_2^T`` has rank two, and its best rank-one part has
  ``G = a_1 G_1 + a_2 G_2``, ``S = b_1 S_1 + b_2 S_2`` with (a, b) from a 2 x 2 eigenproblem (Van
  Loan and Pitsianis 1993). All inner products of semi-definite matrices are non-negative, so a and
  b are too (Perron), and the result is semi-definite. Each block is then scaled to the exact trace.
  Layers that share S have common coefficients, and still share it after. In a tri-diagonal chain
  the links take the geometric means of their ends' coefficients: a congruence of the joint second
  moments, so the chain stays semi-definite.
- ekfac: the eigenvectors of the summed factors, with the exact diagonal of the sum in that basis.

``info.merge_loss`` is the relative error ``||a + b - kept|| / ||a + b||`` in the Frobenius norm of
the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.diagonal import DiagonalBlock
from retain.curvature.blocks.eigen import EigenBlock
from retain.curvature.blocks.eigh import eigh
from retain.curvature.blocks.factor import Factor, inner
from retain.curvature.blocks.identity import IdentityBlock
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.blocks.offdiagonal import Link
from retain.curvature.curvature import Curvature
from retain.curvature.displacement import anchor_of
from retain.curvature.info import CurvatureInfo
from retain.errors import MismatchError
from retain.models.fingerprint import fingerprint
from retain.models.forward import no_autocast

__all__ = ["merge", "reanchored"]


class _Weights(NamedTuple):
    """A merged block's ``G = sum outputs_n G_n`` and ``S = sum inputs_n S_n``."""

    outputs: list[float]
    inputs: list[float]


@no_autocast()
def merge(a: Curvature, b: Curvature) -> Curvature:
    """The sum of two curvatures.

    Raises:
        MismatchError: they are not of one kind, one model, or one anchor.
    """
    _check(a, b)
    structure = a.info.structure
    blocks: dict[str, Block]
    links: dict[tuple[str, str], Link] = {}
    weights: dict[str, _Weights] = {}
    lost, whole = 0.0, 0.0
    if structure in ("identity", "diagonal"):
        blocks = {n: _exact(a.blocks[n], b.blocks[n]) for n in a.blocks}
        if structure == "identity":  # one number for all
            scale = next(iter(blocks.values())).tensors()["scale"]
            blocks = {n: IdentityBlock(scale, block.shape) for n, block in blocks.items()}
    else:
        blocks = {}
        for names in _groups(a):
            ours: Any = [a.blocks[n] for n in names]
            theirs: Any = [b.blocks[n] for n in names]
            found: Any
            if structure == "ekfac":
                found, squares = _eigen(ours, theirs)
            else:
                found, squares, ways = _nearest(ours, theirs)
                weights |= dict(zip(names, ways, strict=True))
            blocks |= dict(zip(names, found, strict=True))
            lost, whole = lost + squares[0], whole + squares[1]
        blocks = {n: blocks[n] for n in a.blocks}
        links = {pair: _link(a, b, pair, weights, blocks) for pair in a.links}
    info = _info(a.info, b.info, (lost / whole) ** 0.5 if whole > 0 else 0.0)
    return Curvature(blocks, a.anchor, info, links)


@no_autocast()
def reanchored(curvature: Curvature, model: nn.Module) -> Curvature:
    """The same blocks around the model's present weights: the online Laplace step.

    Args:
        curvature: of weight space, or of adapter space at the model's rank.
        model: the model that carries the adapter, after training.
    """
    sites = curvature.bind(model)
    info = replace(curvature.info, model=fingerprint(model))  # a full model's base has moved too
    moved = Curvature(curvature.blocks, {}, info, curvature.links)
    moved.anchor = anchor_of(moved, sites)
    return moved


def _exact(a: Block, b: Block) -> Block:
    if isinstance(a, IdentityBlock) and isinstance(b, IdentityBlock):
        return IdentityBlock(a.scale + b.scale, a.shape)
    assert isinstance(a, DiagonalBlock)
    assert isinstance(b, DiagonalBlock)
    return DiagonalBlock(a.values + b.values)


def _groups(curvature: Curvature) -> list[list[str]]:
    """Names of blocks that share their input side."""
    groups: dict[int, list[str]] = {}
    for name, block in curvature.blocks.items():
        side = block.inputs if isinstance(block, KroneckerBlock | EigenBlock) else block
        groups.setdefault(id(side), []).append(name)
    return list(groups.values())


def _nearest(
    a: list[KroneckerBlock], b: list[KroneckerBlock]
) -> tuple[list[KroneckerBlock], tuple[float, float], list[_Weights]]:
    """Blocks of one shared S; (squared loss, squared norm); what each was made with."""
    s = _gram([a[0].inputs], [b[0].inputs])
    g = _gram([x.outputs for x in a], [x.outputs for x in b])
    # In units of each factor's own size, so that rounding does not depend on scales.
    unit_s, unit_g = s.diagonal().sqrt(), g.diagonal().sqrt()
    weight = unit_s * unit_g  # of each of the two products; one that is zero has no say
    unit_s, unit_g = (u.where(weight > 0, torch.ones_like(u)) for u in (unit_s, unit_g))
    of_g = of_s = torch.ones_like(weight)
    if bool(weight.any()):
        sn, gn = s / unit_s / unit_s[:, None], g / unit_g / unit_g[:, None]
        values, vectors = torch.linalg.eig((weight[:, None] * sn * weight) @ gn)
        top = vectors[:, values.real.argmax()].real.abs()
        of_g = top / unit_g
        of_s = (gn @ top) * weight / unit_s / (top @ gn @ top)
    inputs = a[0].inputs.scaled(float(of_s[0])).plus(b[0].inputs.scaled(float(of_s[1])))
    blocks, weights, lost, whole = [], [], 0.0, 0.0
    for x, y in zip(a, b, strict=True):
        outputs = x.outputs.scaled(float(of_g[0])).plus(y.outputs.scaled(float(of_g[1])))
        found = inputs.trace() * outputs.trace()
        scale = (x.trace() + y.trace()) / found if found > 0 else 0.0
        block = KroneckerBlock(inputs, outputs.scaled(scale))
        blocks.append(block)
        weights.append(_Weights((of_g * scale).tolist(), of_s.tolist()))
        ways = (x, y, block)
        signs = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
        gram = torch.tensor(
            [[inner(p.inputs, q.inputs) * inner(p.outputs, q.outputs) for q in ways] for p in ways],
            dtype=torch.float64,
        )
        lost += max(float(signs @ gram @ signs), 0.0)
        whole += float(gram[:2, :2].sum())
    return blocks, (lost, whole), weights


def _gram(a: Sequence[Factor], b: Sequence[Factor]) -> Tensor:
    """Inner products of two stacks of factors, 2 x 2."""
    pairs = [(a, a), (a, b), (b, a), (b, b)]
    values = [sum(inner(x, y) for x, y in zip(p, q, strict=True)) for p, q in pairs]
    return torch.tensor(values, dtype=torch.float64).reshape(2, 2)


def _link(
    a: Curvature,
    b: Curvature,
    pair: tuple[str, str],
    weights: Mapping[str, _Weights],
    blocks: Mapping[str, Block],
) -> Link:
    """The merged link of two merged blocks, by the same congruence as theirs."""
    i, j = pair
    x, y, one, two = a.links[pair], b.links[pair], blocks[i], blocks[j]
    assert isinstance(one, KroneckerBlock)
    assert isinstance(two, KroneckerBlock)
    g = [(p * q) ** 0.5 for p, q in zip(weights[i].outputs, weights[j].outputs, strict=True)]
    s = [(p * q) ** 0.5 for p, q in zip(weights[i].inputs, weights[j].inputs, strict=True)]
    shared = one.inputs is two.inputs
    inputs = one.inputs.dense() if shared else s[0] * x.inputs + s[1] * y.inputs
    return Link(inputs, g[0] * x.outputs + g[1] * y.outputs, x.weight)


def _eigen(
    a: list[EigenBlock], b: list[EigenBlock]
) -> tuple[list[EigenBlock], tuple[float, float]]:
    """EK-FAC blocks of one shared input basis; (squared loss, squared norm)."""

    def sides(blocks: list[EigenBlock]) -> Tensor:
        weights = sum(x.values.sum(0) for x in blocks)
        return (blocks[0].inputs * weights) @ blocks[0].inputs.T

    basis_in = eigh(sides(a) + sides(b))[1].contiguous()
    out, lost, whole = [], 0.0, 0.0
    for x, y in zip(a, b, strict=True):
        parts = [(z.outputs * z.values.sum(1)) @ z.outputs.T for z in (x, y)]
        basis_out = eigh(parts[0] + parts[1])[1].contiguous()
        parts = [
            (basis_out.T @ z.outputs).square() @ z.values @ (z.inputs.T @ basis_in).square()
            for z in (x, y)
        ]
        values = parts[0] + parts[1]
        out.append(EigenBlock(basis_in, basis_out, values))
        between = (x.outputs.T @ y.outputs).square() @ y.values @ (y.inputs.T @ x.inputs).square()
        norm = x.values.square().sum() + y.values.square().sum() + 2 * (x.values * between).sum()
        whole += float(norm)
        lost += max(float(norm - values.square().sum()), 0.0)
    return out, (lost, whole)


def _info(a: CurvatureInfo, b: CurvatureInfo, loss: float) -> CurvatureInfo:
    notes = sorted({*a.note.split(" + "), *b.note.split(" + ")})
    total = a.predictions + b.predictions
    error = ((a.error * a.predictions) ** 2 + (b.error * b.predictions) ** 2) ** 0.5 / total
    return replace(
        a,
        tokens=a.tokens + b.tokens,
        predictions=total,
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


def _check(a: Curvature, b: Curvature) -> None:
    """Raises `MismatchError` unless the two can be added."""
    x, y = a.info, b.info
    for what, mine, theirs in (
        ("structures", x.structure, y.structure),
        ("spaces", x.space, y.space),
        ("Fishers", x.fisher, y.fisher),
        ("temperatures", x.temperature, y.temperature),
        ("ranks of sketches", x.rank, y.rank),
        ("base models", x.model, y.model),
        ("layers", {n: s[:2] for n, s in x.sites.items()}, {n: s[:2] for n, s in y.sites.items()}),
        ("sharing of inputs", sorted(map(sorted, _groups(a))), sorted(map(sorted, _groups(b)))),
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
    if not _same_anchor(a, b):
        raise MismatchError(
            "curvatures around different anchors do not add",
            got="two anchors",
            allowed="one",
            fix="move the older one: retain.reanchored(curvature, model)",
        )


def _same_anchor(a: Curvature, b: Curvature) -> bool:
    """Whether two anchors are the same point (in weight space, however it is split)."""
    for name in {*a.anchor, *b.anchor}:
        x, y = a.anchor.get(name), b.anchor.get(name)
        if a.info.space == "adapter" or (x and len(x) == 1) or (y and len(y) == 1):
            if x is None or y is None or not all(map(torch.equal, x, y)):
                return False
            continue
        pairs = [pair for pair in (x, y) if pair is not None]
        flip = torch.cat([pairs[0][0], *(-pair[0] for pair in pairs[1:])], 1)
        apart = _size(flip, torch.cat([pair[1] for pair in pairs], 0))
        if apart > 1e-10 * sum(_size(*pair) for pair in pairs):
            return False
    return True


def _size(left: Tensor, right: Tensor) -> float:
    """``|| left @ right ||^2``."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum())
