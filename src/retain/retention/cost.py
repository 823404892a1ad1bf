"""What the recipe holds beside a curvature, by arithmetic on the shapes of the layers.

In float32, for LoRA of rank r in every layer and a curvature whose wide inputs are sketches of k
directions (`retain.curvature.blocks.ranks.sketch_rank`), beside which the rows' are sketches of
k / 2:

- **filter**, once for all layers that read one input of size d: d^2 (half of it where hardware has
  bfloat16's products and d is 512 at least, `retain.retention.wiener.Whole.rounded`), or of
  sketches ``m d + 2 d + 2 m^2`` with m = 3 k / 2 (`retain.retention.wiener.Thin`); d is at least
  2 k there.
- **copies** of a layer's A, ``2 r d_in``: as it is in the filter's precision, and as it was.
- **gradients** of A before and after the filter, ``2 r d_in`` from a backward pass to the
  optimiser's step.
- **start**: what is held at most while the filter is made, beside the curvature: the rows' second
  moments while they are streamed, d^2, or l columns and a diagonal in float64, ``l d + 2 d``; or
  those and the old ones in their unit, ``2 d^2`` or ``m d + 2 d``, with the filter that comes of
  them. What a batch of inputs takes in float64 while it is decomposed, some 1.5 GiB where there
  are many, and the model's own forward pass come on top.

The filter's inputs are read by the base model in its own precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retain.curvature.blocks.ranks import sketch_columns, sketch_rank
from retain.types import FactorRank

__all__ = ["Held", "held", "rows_rank"]

_FLOAT = 4  # bytes


def rows_rank(k: int) -> int:
    """Directions of the rows' sketch beside a source's of k: half as many.

    Of SmolLM2 with k = 64, what A reads of the old behind its filter is 1.31 times what it reads
    behind that of whole moments, where rows of 64 directions leave 1.29; of the new, 0.96 and 0.97.
    """
    return max(1, k // 2)


@dataclass(frozen=True)
class Held:
    """Bytes that the recipe holds on the device beside plain LoRA and the curvature.

    Attributes:
        filter: of all inputs.
        copies: of the layers' A.
        gradients: of A, in a step.
        start: held at most while the filter is made, the filter in it.
    """

    filter: int
    copies: int
    gradients: int
    start: int

    @property
    def step(self) -> int:
        """In a step."""
        return self.filter + self.copies + self.gradients


def held(
    layers: Mapping[str, tuple[int, int]],
    shared: Mapping[str, str],
    *,
    rank: int,
    factor_rank: FactorRank = "auto",
) -> Held:
    """What the recipe holds; see the module.

    Args:
        layers: layer -> (d_out, d_in).
        shared: layer -> the first layer with the same input.
        rank: of the adapter, r.
        factor_rank: k, as for `retain.fit_curvature`.
    """
    made = streamed = moments = 0
    for name, (_, d) in layers.items():
        if shared[name] != name:
            continue
        k = sketch_rank(d, factor_rank)
        if k is None:
            made, streamed, moments = made + d * d, streamed + d * d, moments + 2 * d * d
        else:
            m = k + rows_rank(k)
            made += m * d + 2 * d + 2 * m**2
            streamed += sketch_columns(d, rows_rank(k)) * d + 2 * d
            moments += m * d + 2 * d
    a = sum(rank * d_in for _, d_in in layers.values())
    start = max(streamed, moments + made) + a
    return Held(*(_FLOAT * n for n in (made, 2 * a, 2 * a, start)))
