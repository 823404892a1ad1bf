"""Kronecker-factored Fisher: ``F = G (x) S``, a factor for a layer's outputs, one for its inputs.

Then ``0.5 <D, F D> = 0.5 tr(D^T G D S)``. Two ways to the factors, from the inputs x_t and the
output gradients g_t of a layer at the positions t of a sequence, with ``J = sum_t g_t x_t^T``:

**kfac**: ``S = E[x x^T]``, ``G = E[g g^T]`` over positions (Martens and Grosse 2015, arXiv
1503.05671; the 'expand' setting of arXiv 2311.00636). Calibration scales each block so that its
trace is the true one, ``E ||J||^2`` per prediction. Without it a language model's block can be
far too stiff: the first token's huge activations meet tiny gradients, which a product of two
averages cannot see.

**shampoo**: ``S = E[J^T J]``, ``G = E[J J^T] / E ||J||^2`` over sequences. This is one step of
power iteration towards the Kronecker product that is nearest to the Fisher (Morwani et al.
2024, arXiv 2406.17748), and its trace is true by itself. Each input is weighted by the gradients
that it meets, so massive activations without gradient do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block, MoveFactor, Thin
from retain.curvature.blocks.eigh import eigh
from retain.curvature.blocks.estimator import Estimator, Fitted, calibration, flat
from retain.curvature.blocks.factor import FLAT, DenseFactor, Factor, SketchFactor
from retain.curvature.blocks.observation import Record
from retain.curvature.fit.settings import sketch_rank

__all__ = ["KroneckerBlock", "KroneckerEstimator", "ShampooEstimator", "rank_of"]


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
        return {"inputs": self.inputs, "outputs": self.outputs}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{k}{end}": t for k, f in self.factors().items() for end, t in f.tensors().items()}

    def moved(self, move: MoveFactor, tensor: Callable[[Tensor], Tensor]) -> KroneckerBlock:
        return KroneckerBlock(move(self.inputs), move(self.outputs))

    def matvec(self, d: Tensor) -> Tensor:
        return self.inputs.matmul(self.outputs.matmul(d).T).T

    def thin(self, left: Tensor, right: Tensor) -> Thin:
        gl, rs = self.outputs.matmul(left), self.inputs.matmul(right.T).T
        outer, inner = left.T @ gl, rs @ right.T
        return Thin(0.5 * (outer * inner.T).sum(), gl @ inner, outer @ rs)

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

    def to_dense(self) -> Tensor:
        return torch.kron(self.outputs.dense(), self.inputs.dense())

    def trace(self) -> float:
        return self.outputs.trace() * self.inputs.trace()

    def scaled(self, c: float) -> KroneckerBlock:
        return KroneckerBlock(self.inputs, self.outputs.scaled(c))


def _prox(g: Factor, s: Factor, b: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
    """The X of ``X + tau G (X c - b0 a0) S c^T = b``."""
    cs = s.matmul(c.T).T
    q, v = DenseFactor(cs @ c.T).eigen()
    alive = q > FLAT * q.max()  # where q vanishes, so does the anchor's pull
    pull = tau * b0 @ ((a0 @ cs.T @ v) * alive)
    return g.solve(b @ v, tau * q, pull) @ v.T


def rank_of(blocks: Iterable[Block]) -> int | None:
    """The rank of the sketches among the factors; None where all are whole."""
    sides = (s for b in blocks if isinstance(b, KroneckerBlock) for s in (b.inputs, b.outputs))
    return next((s.vectors.shape[1] for s in sides if isinstance(s, SketchFactor)), None)


class KroneckerEstimator(Estimator):
    """Streams S and G of each layer."""

    def update(self, record: Record) -> None:
        name, shared = record.name, self.layout.shared
        if record.first and shared[name] == name:
            self.moment(f"inputs/{name}", flat(record.inputs))
            self.add(f"positions/{name}", torch.tensor(record.source.positions))
        self.moment(f"outputs/{name}", flat(record.gradients), record.weight)

    def finish(self, predictions: int, traces: Mapping[str, float]) -> Fitted:
        shared = self.layout.shared
        inputs = {
            name: self.factor(f"inputs/{name}", 1 / float(self.state[f"positions/{name}"]))
            for name in shared
            if shared[name] == name
        }
        blocks: dict[str, Block] = {}
        for name, first in shared.items():
            blocks[name] = self.block(name, inputs[first], predictions, traces)
        return Fitted(blocks)

    def block(
        self, name: str, s: Factor, predictions: int, traces: Mapping[str, float]
    ) -> KroneckerBlock:
        """One layer's block, calibrated if wanted."""
        g = self.factor(f"outputs/{name}", 1.0)
        found = s.trace() * g.trace()
        if self.layout.calibrate:
            return KroneckerBlock(s, g.scaled(calibration(found, traces[name])))
        return KroneckerBlock(s, g.scaled(1 / predictions))


class ShampooEstimator(Estimator):
    """Streams ``E[J^T J]`` and ``E[J J^T]`` of each layer through Gram matrices over positions.

    ``J J^T = sum_{t,t'} g_t (x_t . x_t') g_t'^T``: no J is built. For a sketch the rows are
    those of ``(x x^T)^(1/2) g``, whose squares sum to the same.
    """

    def update(self, record: Record) -> None:
        x, g, name = record.inputs, record.gradients, record.name
        gram_x, gram_g = record.grams
        self._side(f"outputs/{name}", g, gram_x, record.weight)
        self._side(f"inputs/{name}", x, gram_g, record.weight)

    def _side(self, key: str, rows: Tensor, gram: Tensor, weight: float) -> None:
        if sketch_rank(rows.shape[-1], self.layout.rank) is not None:
            self.moment(key, flat(_root(gram) @ rows), weight)
        else:
            self.product(key, flat(rows), flat(gram @ rows), weight)

    def finish(self, predictions: int, traces: Mapping[str, float]) -> Fitted:
        blocks: dict[str, Block] = {}
        for name in self.layout.shared:
            s, g = self.factor(f"inputs/{name}", 1.0), self.factor(f"outputs/{name}", 1.0)
            s = s.scaled(calibration(s.trace(), traces[name]))
            blocks[name] = KroneckerBlock(s, g.scaled(calibration(g.trace(), 1.0)))
        return Fitted(blocks)


def _root(gram: Tensor) -> Tensor:
    values, vectors = eigh(gram)
    root: Tensor = values.clamp(min=0).sqrt()[..., None] * vectors.mT
    return root
