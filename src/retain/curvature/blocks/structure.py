"""What a structure is made of; see `retain.curvature.blocks.registry`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.estimator import Estimator

if TYPE_CHECKING:
    from retain.models.skeleton import Outline

__all__ = ["Ranks", "Structure"]

Ranks = Callable[[int], int | None]
"""What a factor of a size is sketched to; None where it is kept whole."""


@dataclass(frozen=True)
class Structure:
    """A way to store a curvature: how it is estimated, what is kept, and what that costs.

    Attributes:
        block: of one layer.
        estimator: makes the blocks.
        inputs: whose factors of size d_in are kept: one for all layers with the same input
            (``shared``), one of each layer (``own``), or ``none``.
        outputs: whether a factor of size d_out is kept of each layer.
        entries: whether d_out x d_in numbers are kept of each layer.
        scalars: single numbers: ``one`` for all layers, or one of ``each``.
        sketches: whether wide factors can be sketched; True where there are none.
        links: whether blocks of neighbouring layers are tied.
        grams: whether the Gram matrices over positions are always needed, not for traces alone.
        extra_work: multiply-adds a source token of the fit beside the passes and the sums that
            are kept.
    """

    block: type[Block]
    estimator: type[Estimator]
    inputs: Literal["shared", "own", "none"] = "none"
    outputs: bool = False
    entries: bool = False
    scalars: Literal["none", "one", "each"] = "none"
    sketches: bool = True
    links: bool = False
    grams: bool = False
    extra_work: Callable[[Outline, Ranks], int] = lambda _model, _rank: 0

    @property
    def factors(self) -> bool:
        """Whether there are factors at all."""
        return self.outputs or self.inputs != "none"
