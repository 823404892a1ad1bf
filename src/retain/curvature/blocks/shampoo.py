"""Shampoo's product: ``S = E[J^T J]``, ``G = E[J J^T] / E ||J||^2`` over sequences.

With ``J = sum_t g_t x_t^T``, this is one step of power iteration towards the Kronecker product that
is nearest to the Fisher (Morwani et al. 2024, arXiv 2406.17748), and its trace is true by itself.
Each input is weighted by the gradients that it meets, so massive activations without gradient do
not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.estimator import Estimator, calibration, flat
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.blocks.linalg import eigh
from retain.curvature.blocks.observation import Observation
from retain.curvature.blocks.ranks import SEQUENCE, sketch_rank
from retain.curvature.blocks.structure import Ranks, Structure

if TYPE_CHECKING:
    from retain.models.skeleton import Outline

__all__ = ["STRUCTURE", "ShampooEstimator"]


class ShampooEstimator(Estimator):
    """Streams ``E[J^T J]`` and ``E[J J^T]`` of each layer through Gram matrices over positions.

    ``J J^T = sum_{t,t'} g_t (x_t . x_t') g_t'^T``: no J is built. For a sketch the rows are
    those of ``(x x^T)^(1/2) g``, whose squares sum to the same.
    """

    def update(self, seen: Observation) -> None:
        gram_x, gram_g = seen.grams
        self._side(f"outputs/{seen.name}", seen.gradients, gram_x, seen.weight)
        self._side(f"inputs/{seen.name}", seen.inputs, gram_g, seen.weight)

    def _side(self, key: str, rows: Tensor, gram: Tensor, weight: float) -> None:
        if sketch_rank(rows.shape[-1], self.layout.rank) is not None:
            self.moment(key, flat(_root(gram) @ rows), weight)
        else:
            self.product(key, flat(rows), flat(gram @ rows), weight)

    def finish(self, predictions: int, traces: Mapping[str, float]) -> dict[str, Block]:
        blocks: dict[str, Block] = {}
        for name in self.layout.shared:
            s, g = self.factor(f"inputs/{name}", 1.0), self.factor(f"outputs/{name}", 1.0)
            s = s.scaled(calibration(s.trace(), traces[name]))
            blocks[name] = KroneckerBlock(s, g.scaled(calibration(g.trace(), 1.0)))
        return blocks


def _root(gram: Tensor) -> Tensor:
    values, vectors = eigh(gram)
    root: Tensor = values.clamp(min=0).sqrt()[..., None] * vectors.mT
    return root


def _products(model: Outline, rank: Ranks) -> int:
    """Of the Gram matrices with the rows, ``T d`` a side; a sketch needs roots, ``5.5 T^2``."""
    t = SEQUENCE
    sides = [side for shape in model.layers.values() for side in shape]
    return sum(t * d + (0 if rank(d) is None else 11 * t * t // 2) for d in sides)


STRUCTURE = Structure(
    KroneckerBlock,
    ShampooEstimator,
    inputs="own",
    outputs=True,
    grams=True,
    extra_work=_products,
)
