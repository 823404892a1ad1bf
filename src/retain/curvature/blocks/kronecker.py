"""K-FAC: ``F = G (x) S``, a factor for a layer's outputs, one for its inputs.

Then ``0.5 <D, F D> = 0.5 tr(D^T G D S)``. From a layer's inputs x_t and output gradients g_t at the
positions t of a sequence, ``S = E[x x^T]`` and ``G = E[g g^T]`` over positions (Martens and Grosse
2015, arXiv 1503.05671; the 'expand' setting of arXiv 2311.00636). Calibration scales each block so
that its trace is the true one, ``E ||sum_t g_t x_t^T||^2`` per prediction. Without it a language
model's block can be far too stiff: the first token's huge activations meet tiny gradients, which a
product of two averages cannot see.

**Sums.** The sum of two Kronecker products is none. Kept is the product nearest to it in the
Frobenius norm: with vectors ``g_i = vec G_i`` and ``s_i = vec S_i`` the rearranged sum
``g_1 s_1^T + g_2 s_2^T`` has rank two, and its best rank-one part has ``G = a_1 G_1 + a_2 G_2``,
``S = b_1 S_1 + b_2 S_2`` with (a, b) from a 2 x 2 eigenproblem (Van Loan and Pitsianis 1993). All
inner products of semi-definite matrices are non-negative, so a and b are too (Perron), and the
result is semi-definite. Each block is then scaled to the exact trace. Layers that share S have
common coefficients, and still share it after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block, Merged, Reader, Thin
from retain.curvature.blocks.estimator import Estimator, calibration, flat
from retain.curvature.blocks.factor import FLAT, DenseFactor, Factor, SketchFactor, Spectrum, inner
from retain.curvature.blocks.observation import Observation
from retain.curvature.blocks.structure import Structure

__all__ = ["STRUCTURE", "KroneckerBlock", "KroneckerEstimator", "rank_of"]


class KroneckerBlock(Block):
    """F(D) = G D S.

    Args:
        inputs: S, of size d_in; may be shared by several blocks.
        outputs: G, of size d_out, which carries the block's scale.
    """

    def __init__(self, inputs: Factor | Tensor, outputs: Factor | Tensor) -> None:
        self.inputs = DenseFactor(inputs) if isinstance(inputs, Tensor) else inputs
        self.outputs = DenseFactor(outputs) if isinstance(outputs, Tensor) else outputs
        self.shape = (self.outputs.size, self.inputs.size)

    def factors(self) -> dict[str, Factor]:
        """S and G, by their names."""
        return {"inputs": self.inputs, "outputs": self.outputs}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{k}{end}": t for k, f in self.factors().items() for end, t in f.tensors().items()}

    @classmethod
    def unpack(cls, read: Reader, shape: tuple[int, int]) -> KroneckerBlock:
        return cls(read.factor("inputs", shape[1]), read.factor("outputs", shape[0]))

    def check(self, where: str, sound: set[int]) -> None:
        for name, factor in self.factors().items():
            if id(factor) not in sound:
                sound.add(id(factor))
                factor.check(f"{where}/{name}")

    def matvec(self, d: Tensor) -> Tensor:
        return self.inputs.matmul(self.outputs.matmul(d).T).T

    def thin(self, left: Tensor, right: Tensor) -> Thin:
        return _thin(self.outputs, self.inputs, left, right)

    def prox(self, d: Tensor, tau: float) -> Tensor:
        # One side is diagonalised, and the other solves a shifted system for each of its vectors.
        if isinstance(self.inputs, DenseFactor) and (
            self.inputs.size <= self.outputs.size or not isinstance(self.outputs, DenseFactor)
        ):
            values, vectors = self.inputs.eigen()
            y = d @ vectors
            return self.outputs.solve(y, tau * values, torch.zeros_like(y)) @ vectors.T
        values, vectors = self.outputs.eigen()
        y = d.T @ vectors
        return vectors @ self.inputs.solve(y, tau * values, torch.zeros_like(y)).T

    def prox_left(self, b: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        return _prox(self.outputs, self.inputs, b, c, b0, a0, tau)

    def prox_right(self, a: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        return _prox(self.inputs, self.outputs, a.T, c.T, a0.T, b0.T, tau).T

    def _basis(self) -> tuple[Tensor, Tensor] | None:
        """The eigenvectors of G and of S, where both are whole.

        In their basis all products of a proximal step are with diagonals: the weights are turned
        into it and back, and that is all that is read of G and S.
        """
        if isinstance(self.inputs, DenseFactor) and isinstance(self.outputs, DenseFactor):
            return self.outputs.eigen()[1], self.inputs.eigen()[1]
        return None

    def turned(self, b0: Tensor, a0: Tensor) -> tuple[Tensor, Tensor]:
        basis = self._basis()
        return (b0, a0) if basis is None else (basis[0].T @ b0, a0 @ basis[1])

    def prox_both(
        self, b: Tensor, a: Tensor, scaling: float, anchor: tuple[Tensor, Tensor],
        taus: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        basis = self._basis()
        if basis is None:
            return super().prox_both(b, a, scaling, anchor, taus)
        (u, v), (b0, a0) = basis, anchor
        g, s = Spectrum(self.outputs.eigen()[0]), Spectrum(self.inputs.eigen()[0])
        x, y = u.T @ b, a @ v
        if taus[0]:
            x = _prox(g, s, x, scaling * y, b0, a0, taus[0])
            b = u @ x
        if taus[1]:
            y = _prox(s, g, y.T, (scaling * x).T, a0.T, b0.T, taus[1]).T
            a = y @ v.T
        value = _thin(g, s, torch.cat([scaling * x, -b0], 1), torch.cat([y, a0])).value
        return b, a, value

    def to_dense(self) -> Tensor:
        return torch.kron(self.outputs.dense(), self.inputs.dense())

    def trace(self) -> float:
        return self.outputs.trace() * self.inputs.trace()

    def scaled(self, c: float, made: dict[int, Tensor] | None = None) -> KroneckerBlock:
        return KroneckerBlock(self.inputs, self.outputs.scaled(c))

    @property
    def shared(self) -> object:
        return self.inputs

    @classmethod
    def merge(cls, a: Sequence[KroneckerBlock], b: Sequence[KroneckerBlock]) -> Merged:
        s = _gram([a[0].inputs], [b[0].inputs])
        g = _gram([x.outputs for x in a], [x.outputs for x in b])
        of_g, of_s = _nearest(g, s)
        inputs = a[0].inputs.scaled(float(of_s[0])).plus(b[0].inputs.scaled(float(of_s[1])))
        blocks, weights, lost, norm = [], [], 0.0, 0.0
        for x, y in zip(a, b, strict=True):
            outputs = x.outputs.scaled(float(of_g[0])).plus(y.outputs.scaled(float(of_g[1])))
            scale = calibration(inputs.trace() * outputs.trace(), x.trace() + y.trace())
            block = cls(inputs, outputs.scaled(scale))
            blocks.append(block)
            weights.append(((of_g * scale).tolist(), of_s.tolist()))
            three = (x, y, block)
            gram = _gram(*([z.inputs] for z in three)) * _gram(*([z.outputs] for z in three))
            signs = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
            lost += max(float(signs @ gram @ signs), 0.0)
            norm += float(gram[:2, :2].sum())
        return Merged(blocks, lost, norm, weights)


def _thin(g: Factor | Spectrum, s: Factor | Spectrum, left: Tensor, right: Tensor) -> Thin:
    """Value and gradients of ``G (x) S`` at ``D = left @ right``."""
    gl, rs = g.matmul(left), s.matmul(right.T).T
    outer, inner_ = left.T @ gl, rs @ right.T
    return Thin(0.5 * (outer * inner_.T).sum(), gl @ inner_, outer @ rs)


def _prox(
    g: Factor | Spectrum, s: Factor | Spectrum,
    b: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float,
) -> Tensor:  # fmt: skip
    """The X of ``X + tau G (X c - b0 a0) S c^T = b``."""
    cs = s.matmul(c.T).T
    q, v = DenseFactor(cs @ c.T).eigen()
    alive = q > FLAT * q.max()  # where q vanishes, so does the anchor's pull
    pull = tau * b0 @ ((a0 @ cs.T @ v) * alive)
    return g.solve(b @ v, tau * q, pull) @ v.T


def _gram(*stacks: Sequence[Factor]) -> Tensor:
    """Inner products of stacks of factors."""
    values = [[sum(inner(x, y) for x, y in zip(p, q, strict=True)) for q in stacks] for p in stacks]
    return torch.tensor(values, dtype=torch.float64)


def _nearest(g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of the nearest product, from the inner products of both sides, 2 x 2 each.

    In units of each factor's own size, so that rounding does not depend on scales.
    """
    unit_s, unit_g = s.diagonal().sqrt(), g.diagonal().sqrt()
    weight = unit_s * unit_g  # of each of the two products; one that is zero has no say
    if not bool(weight.any()):
        return torch.ones_like(weight), torch.ones_like(weight)
    unit_s, unit_g = (u.where(weight > 0, torch.ones_like(u)) for u in (unit_s, unit_g))
    sn, gn = s / unit_s / unit_s[:, None], g / unit_g / unit_g[:, None]
    values, vectors = torch.linalg.eig((weight[:, None] * sn * weight) @ gn)
    top = vectors[:, values.real.argmax()].real.abs()
    return top / unit_g, (gn @ top) * weight / unit_s / (top @ gn @ top)


def rank_of(blocks: Iterable[Block]) -> int | None:
    """The rank of the sketches among the factors; None where all are whole."""
    sides = (s for b in blocks if isinstance(b, KroneckerBlock) for s in (b.inputs, b.outputs))
    # Of a sketch without vectors nothing is left but its diagonal, which is whole.
    return next(
        (n for s in sides if isinstance(s, SketchFactor) and (n := s.vectors.shape[1])), None
    )


class KroneckerEstimator(Estimator):
    """Streams S and G of each layer."""

    def update(self, seen: Observation) -> None:
        if seen.first:
            self.input_moment(seen)
        self.moment(f"outputs/{seen.name}", flat(seen.gradients), seen.weight)

    def finish(self, predictions: int, traces: Mapping[str, float]) -> dict[str, Block]:
        blocks: dict[str, Block] = {}
        for name, s in self.input_factors().items():
            g = self.factor(f"outputs/{name}", 1.0)
            scale = 1 / predictions
            if self.layout.calibrate:
                scale = calibration(s.trace() * g.trace(), traces[name])
            blocks[name] = KroneckerBlock(s, g.scaled(scale))
        return blocks


STRUCTURE = Structure(KroneckerBlock, KroneckerEstimator, inputs="shared", outputs=True)
