"""Block tri-diagonal K-FAC over the chain of layers (of A_1, B_1, A_2, B_2, ... in adapter space).

K-FAC's blocks stand on the diagonal, and beside it those of neighbours,
``F_ij = G_ij (x) S_ij`` with ``G_ij = E[g_i g_j^T]`` and ``S_ij = E[x_i x_j^T]`` at equal positions
(the B-Tri-KFAC of arXiv 2512.17720 over the chain of LoRA factors).

Cutting a positive semi-definite matrix to its three middle diagonals does not keep it so, and a
penalty that is negative somewhere pays for drift. Here it is so by construction. The 2 x 2 matrix
of a pair, ``[[F_ii, F_ij], [F_ji, F_jj]]``, is positive semi-definite (a block Schur product of two
second moments), and so is any congruence of it. Each inner layer gives half of its own block to
the pair on its left and half to that on its right; an end gives all to its one pair. The chain is
the sum of its pairs, scaled by these shares:

    F = sum over pairs of [[a_i F_ii, w F_ij], [w F_ji, b_j F_jj]],   w = sqrt(a_i b_j),

so the diagonal is K-FAC's own, and the off-diagonal has w = 1/2 inside a chain, sqrt(1/2) at its
ends and 1 in a chain of two. No smaller loss holds for all long chains: for scalar blocks that
are all one, w may be at most ``1 / (2 cos(pi / (n + 1)))``, which falls to 1/2.

At B = 0 the gradient at each A's output is zero, so in adapter space all links vanish and what is
left is block-diagonal K-FAC. In weight space they do not vanish.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.estimator import Fitted, Layout, calibration, flat
from retain.curvature.blocks.kronecker import KroneckerBlock, KroneckerEstimator
from retain.curvature.blocks.observation import Record
from retain.curvature.blocks.offdiagonal import Link

__all__ = ["TridiagonalEstimator"]


class TridiagonalEstimator(KroneckerEstimator):
    """Streams K-FAC's factors, and the moments between neighbours."""

    together: ClassVar[bool] = True

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._pairs = list(pairwise(layout.shared))
        self._held: dict[str, Record] = {}  # those that still wait for a neighbour
        self._open: dict[str, int] = {}

    def update(self, record: Record) -> None:
        super().update(record)
        name = record.name
        pairs = [pair for pair in self._pairs if name in pair]
        self._held[name], self._open[name] = record, len(pairs)
        for i, j in pairs:
            if i in self._held and j in self._held:
                self._link(self._held[i], self._held[j])
                self._open[i] -= 1
                self._open[j] -= 1
        for each in [n for n in self._held if not self._open[n]]:
            del self._held[each]

    def _link(self, a: Record, b: Record) -> None:
        if a.inputs.shape[:2] != b.inputs.shape[:2]:
            # A pooled layer beside one that sees all positions, if not in each batch.
            self.state[f"apart/{a.name}"] = torch.ones(())
            return
        i, j = a.name, b.name
        self.product(f"link/outputs/{i}", flat(a.gradients), flat(b.gradients), a.weight)
        if a.first and self.layout.shared[i] != self.layout.shared[j]:
            self.product(f"link/inputs/{i}", flat(a.inputs), flat(b.inputs))

    def finish(self, predictions: int, traces: Mapping[str, float]) -> Fitted:
        shared = self.layout.shared
        names = list(shared)
        found = {n: float(self.state[f"outputs/{n}"].trace()) for n in names}
        fitted = super().finish(predictions, traces)
        roots = {n: _root(found[n], fitted.blocks[n]) for n in names}
        pairs = [(i, j) for i, j in pairwise(names) if f"apart/{i}" not in self.state]
        right, left = {i for i, _ in pairs}, {j for _, j in pairs}
        links = {}
        for i, j in pairs:
            weight = (0.5 if i in left else 1.0) ** 0.5 * (0.5 if j in right else 1.0) ** 0.5
            outputs = self.state.pop(f"link/outputs/{i}").mul_(roots[i] * roots[j])
            if shared[i] == shared[j]:
                block = fitted.blocks[i]
                assert isinstance(block, KroneckerBlock)
                inputs = block.inputs.dense()
            else:
                inputs = self.state.pop(f"link/inputs/{i}")
                inputs.div_(float(self.state[f"positions/{shared[i]}"]))
            links[i, j] = Link(inputs, outputs, weight)
        return Fitted(fitted.blocks, links)


def _root(found: float, block: Block) -> float:
    """Root of what a block's summed G, of this trace, was multiplied by."""
    assert isinstance(block, KroneckerBlock)
    return math.sqrt(calibration(found, block.outputs.trace()))
