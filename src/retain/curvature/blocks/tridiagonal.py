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

In a sum, links take the geometric means of their ends' coefficients (see
`retain.curvature.blocks.kronecker`): a congruence of the joint second moments, so the chain stays
semi-definite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.estimator import Layout, calibration, flat
from retain.curvature.blocks.factor import diagonal_of
from retain.curvature.blocks.kronecker import KroneckerBlock, KroneckerEstimator
from retain.curvature.blocks.linalg import leading, slack
from retain.curvature.blocks.observation import Observation
from retain.curvature.blocks.structure import Structure
from retain.errors import shown

__all__ = ["STRUCTURE", "OffDiagonal", "TridiagonalEstimator", "check_chain"]

Weights = tuple[list[float], list[float]]


@dataclass(frozen=True)
class OffDiagonal:
    """The blocks (i, j) and (j, i): ``F_ij(D_j) = w G_ij D_j S_ij^T`` and its transpose.

    Attributes:
        inputs: S_ij, [d_in_i, d_in_j].
        outputs: G_ij, [d_out_i, d_out_j].
        weight: w, which keeps the whole chain positive semi-definite.
    """

    inputs: Tensor
    outputs: Tensor
    weight: float

    @property
    def T(self) -> OffDiagonal:
        """The transpose, F_ji."""
        return OffDiagonal(self.inputs.T, self.outputs.T, self.weight)

    def thin(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """``F_ij (left @ right)`` as thin factors, for left [d_out_j, k] and right [k, d_in_j]."""
        here = self.inputs.device  # the neighbour may lie on another one
        return self.weight * (self.outputs @ left.to(here)), right.to(here) @ self.inputs.T

    def matvec(self, d: Tensor) -> Tensor:
        """``F_ij d`` for d [d_out_j, d_in_j]."""
        return self.weight * (self.outputs @ d.to(self.outputs.device) @ self.inputs.T)

    def to_dense(self) -> Tensor:
        """``w G_ij (x) S_ij`` on row-major vectors."""
        return self.weight * torch.kron(self.outputs, self.inputs)

    def scaled(self, c: float) -> OffDiagonal:
        """``c`` times it."""
        return OffDiagonal(self.inputs, c * self.outputs, self.weight)

    def plus(
        self, other: OffDiagonal, ends: tuple[Block, Block], weights: tuple[Weights, Weights]
    ) -> OffDiagonal:
        """The link of two merged blocks, by the same congruence as theirs.

        Args:
            other: that of the other fit.
            ends: the merged blocks.
            weights: see `Merged.weights`, for each of them.
        """
        one, two = ends
        assert isinstance(one, KroneckerBlock)
        assert isinstance(two, KroneckerBlock)
        g, s = (
            [(p * q) ** 0.5 for p, q in zip(*w, strict=True)] for w in zip(*weights, strict=True)
        )
        shared = one.inputs is two.inputs
        inputs = one.inputs.dense() if shared else s[0] * self.inputs + s[1] * other.inputs
        outputs = g[0] * self.outputs + g[1] * other.outputs
        return OffDiagonal(inputs, outputs, self.weight)


class TridiagonalEstimator(KroneckerEstimator):
    """Streams K-FAC's factors, and the moments between neighbours."""

    together: ClassVar[bool] = True

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._pairs = list(pairwise(layout.shared))
        self._held: dict[str, Observation] = {}  # those that still wait for a neighbour
        self._open: dict[str, int] = {}

    def update(self, seen: Observation) -> None:
        super().update(seen)
        name = seen.name
        pairs = [pair for pair in self._pairs if name in pair]
        self._held[name], self._open[name] = seen, len(pairs)
        for i, j in pairs:
            if i in self._held and j in self._held:
                self._link(self._held[i], self._held[j])
                self._open[i] -= 1
                self._open[j] -= 1
        for each in [n for n in self._held if not self._open[n]]:
            del self._held[each]

    def _link(self, a: Observation, b: Observation) -> None:
        if a.inputs.shape[:2] != b.inputs.shape[:2]:
            # A pooled layer beside one that sees all positions, if not in each batch.
            self.state[f"apart/{a.name}"] = torch.ones(())
            return
        i, j, here = a.name, b.name, a.gradients.device
        self.product(f"link/outputs/{i}", flat(a.gradients), flat(b.gradients).to(here), a.weight)
        if a.first and self.layout.shared[i] != self.layout.shared[j]:
            self.product(f"link/inputs/{i}", flat(a.inputs), flat(b.inputs).to(here))

    def finish(self, predictions: int, traces: Mapping[str, float]) -> dict[str, Block]:
        shared = self.layout.shared
        found = {n: float(self.state[f"outputs/{n}"].trace()) for n in shared}
        blocks = super().finish(predictions, traces)
        sides = {n: b for n, b in blocks.items() if isinstance(b, KroneckerBlock)}
        # Roots of what each summed G was multiplied by.
        roots = {n: calibration(found[n], b.outputs.trace()) ** 0.5 for n, b in sides.items()}
        pairs = [(i, j) for i, j in pairwise(shared) if f"apart/{i}" not in self.state]
        for (i, j), weight in _weights(pairs).items():
            outputs = self.state.pop(f"link/outputs/{i}").mul_(roots[i] * roots[j])
            if shared[i] == shared[j]:
                inputs = sides[i].inputs.dense()
            else:
                inputs = self.state.pop(f"link/inputs/{i}")
                inputs.div_(float(self.state[f"positions/{shared[i]}"]))
            self.links[i, j] = OffDiagonal(inputs, outputs, weight)
        return blocks


def _weights(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """The weight of each pair: a block with two neighbours gives half of itself to either."""
    pairs = list(pairs)
    right, left = {i for i, _ in pairs}, {j for _, j in pairs}
    return {
        (i, j): (0.5 if i in left else 1.0) ** 0.5 * (0.5 if j in right else 1.0) ** 0.5
        for i, j in pairs
    }


def check_chain(blocks: Mapping[str, Block], links: Mapping[tuple[str, str], OffDiagonal]) -> None:
    """Links tie neighbours, and none is larger than what keeps the chain semi-definite.

    Raises:
        ValueError: one does not, or is; the message names it.
    """
    if not set(links) <= set(pairwise(blocks)):
        raise ValueError("links between blocks that are no neighbours")
    most = _weights(links)
    for number, (pair, link) in enumerate(links.items()):
        where = f"links/{number}"
        if not (isinstance(link.weight, int | float) and 0 <= link.weight <= 1):
            raise ValueError(f"{where} of the weight {shown(link.weight)}")
        if link.weight > most[pair] * (1 + 1e-6):
            raise ValueError(f"{where} of the weight {link.weight:g}, more than {most[pair]:g}")
        for side in ("inputs", "outputs"):
            _check_side(
                f"{where}/{side}", getattr(link, side), blocks[pair[0]], blocks[pair[1]], side
            )


def _check_side(where: str, m: Tensor, one: Block, two: Block, side: str) -> None:
    """``<u, G_ij v>^2 <= <u, G_ii u> <v, G_jj v>``, entry by entry and along the largest."""
    a, b = getattr(one, side), getattr(two, side)
    if list(m.shape) != [a.size, b.size]:
        raise ValueError(f"{where} of the shape {list(m.shape)}, not {[a.size, b.size]}")
    most = (diagonal_of(a).clamp(min=0).sqrt()[:, None]) * diagonal_of(b).clamp(min=0).sqrt()
    room = 16 * slack(m) * float(most.max())
    u, v = leading(m)
    value = float(u @ (m @ v))
    bound = float(u @ a.matmul(u[:, None])[:, 0]) * float(v @ b.matmul(v[:, None])[:, 0])
    along = value - (1 + 16 * slack(m)) * math.sqrt(max(bound, 0.0))
    if max(float((m.abs() - most).max()), along) > room:
        raise ValueError(f"{where} is larger than its ends allow")


STRUCTURE = Structure(
    KroneckerBlock,
    TridiagonalEstimator,
    inputs="shared",
    outputs=True,
    links=True,
    sketches=False,
)
