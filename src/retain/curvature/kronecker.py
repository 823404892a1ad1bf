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

import torch
from torch import Tensor

from retain.curvature.block import Block, Thin, solve_two_sided
from retain.curvature.record import Record

__all__ = ["KroneckerBlock", "KroneckerEstimator", "ShampooEstimator"]


class KroneckerBlock(Block):
    """F(D) = G D S.

    Args:
        inputs: S, [d_in, d_in]; may be shared by several blocks.
        outputs: G, [d_out, d_out], which carries the block's scale.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.shape = (outputs.shape[0], inputs.shape[0])
        self._eigen: dict[str, tuple[Tensor, Tensor]] = {}

    def tensors(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "outputs": self.outputs}

    def to(self, device: torch.device) -> KroneckerBlock:
        return KroneckerBlock(self.inputs.to(device), self.outputs.to(device))

    def matvec(self, d: Tensor) -> Tensor:
        return self.outputs @ d @ self.inputs

    def thin(self, left: Tensor, right: Tensor) -> Thin:
        gl, rs = self.outputs @ left, right @ self.inputs
        outer, inner = left.T @ gl, rs @ right.T
        return Thin(0.5 * (outer * inner.T).sum(), gl @ inner, outer @ rs)

    def prox(self, d: Tensor, tau: float) -> Tensor:
        return solve_two_sided(self._eigh("outputs"), self._eigh("inputs"), d, tau)

    def prox_left(self, b: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        cs = c @ self.inputs
        p, q = self._eigh("outputs"), _eigh(cs @ c.T)
        pull = None
        if b0.shape[1]:
            pull = (p[0][:, None] * (p[1].T @ b0)) @ (a0 @ cs.T @ q[1])
        return solve_two_sided(p, q, b, tau, pull)

    def prox_right(self, a: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        gc = self.outputs @ c
        p, q = _eigh(c.T @ gc), self._eigh("inputs")
        pull = None
        if b0.shape[1]:
            pull = (p[1].T @ gc.T @ b0) @ ((a0 @ q[1]) * q[0])
        return solve_two_sided(p, q, a, tau, pull)

    def to_dense(self) -> Tensor:
        return torch.kron(self.outputs, self.inputs)

    def trace(self) -> float:
        return float(self.outputs.trace() * self.inputs.trace())

    def _eigh(self, side: str) -> tuple[Tensor, Tensor]:
        if side not in self._eigen:  # once: a proximal run asks at each step
            self._eigen[side] = _eigh(getattr(self, side))
        return self._eigen[side]


class KroneckerEstimator:
    """Streams S, G and the true trace of each layer; see `Record` for what arrives.

    Args:
        shared: layer -> the layer whose input it shares (itself, when it shares none).
        calibrate: scale each block to its true trace.
    """

    def __init__(self, shared: dict[str, str], *, calibrate: bool = True) -> None:
        self.shared, self.calibrate = shared, calibrate
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.positions: dict[str, int] = {}
        self.traces: dict[str, float] = {}

    def update(self, record: Record) -> None:
        """Takes one layer's inputs and gradients of one backward pass."""
        x, g, name = record.inputs, record.gradients, record.name
        if record.first and self.shared[name] == name:
            _accumulate(self.inputs, name, _flat(x).T @ _flat(x))
            self.positions[name] = self.positions.get(name, 0) + record.positions
        _accumulate(self.outputs, name, (_flat(g).T @ _flat(g)) * record.weight)
        if self.calibrate:
            trace = float(record.traces.sum()) * record.weight
            self.traces[name] = self.traces.get(name, 0.0) + trace

    def finish(self, predictions: int) -> dict[str, Block]:
        """The blocks; `predictions` is the number of predicted tokens that were seen."""
        means = {name: s / self.positions[name] for name, s in self.inputs.items()}
        blocks: dict[str, Block] = {}
        for name, total in self.outputs.items():
            s, g = means[self.shared[name]], total / predictions
            if self.calibrate:
                found = float(s.trace() * g.trace())
                g = g * (self.traces[name] / predictions / found) if found > 0 else g
            blocks[name] = KroneckerBlock(s, g)
        return blocks


class ShampooEstimator:
    """Streams ``E[J^T J]`` and ``E[J J^T]`` of each layer through Gram matrices over positions.

    ``J J^T = sum_{t,t'} g_t (x_t . x_t') g_t'^T``: no J is built.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.traces: dict[str, float] = {}

    def update(self, record: Record) -> None:
        """Takes one layer's inputs and gradients of one backward pass."""
        x, g, name = record.inputs, record.gradients, record.name
        xg, gx = (x @ x.mT) @ g, (g @ g.mT) @ x
        _accumulate(self.outputs, name, (_flat(g).T @ _flat(xg)) * record.weight)
        _accumulate(self.inputs, name, (_flat(x).T @ _flat(gx)) * record.weight)
        trace = float(record.traces.sum()) * record.weight
        self.traces[name] = self.traces.get(name, 0.0) + trace

    def finish(self, predictions: int) -> dict[str, Block]:
        """The blocks; `predictions` is the number of predicted tokens that were seen."""
        blocks: dict[str, Block] = {}
        for name, outputs in self.outputs.items():
            s, g = self.inputs[name] / predictions, outputs / (self.traces[name] or 1.0)
            blocks[name] = KroneckerBlock(0.5 * (s + s.T), 0.5 * (g + g.T))
        return blocks


def _flat(x: Tensor) -> Tensor:
    """[batch, seq, d] as [batch * seq, d]."""
    return x.reshape(-1, x.shape[-1])


def _accumulate(into: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in into:
        into[name] += value
    else:
        into[name] = value


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix.double() if matrix.shape[0] <= 64 else matrix)
    return values.to(matrix.dtype), vectors.to(matrix.dtype)
