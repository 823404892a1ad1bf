"""K-FAC: ``F = S (x) G`` for each layer, held online (Ritter et al. 2018, arXiv 1805.07810)."""

from __future__ import annotations

from typing import Any

from retain.errors import unknown
from retain.retention.curved import Fitted
from retain.types import Structure

__all__ = ["KFAC"]

KINDS = ("kfac", "shampoo", "ekfac")


class KFAC(Fitted):
    """Kronecker-factored Laplace.

    Args:
        strength: see `Fitted`, as the other arguments.
        structure: ``kfac``, ``shampoo`` or ``ekfac``; see docs/curvature.md.
        **options: of `Fitted`.

    Raises:
        ConfigError: another structure, or a value out of range.
    """

    name = "kfac"

    def __init__(
        self, strength: float = 10.0, *, structure: Structure = "kfac", **options: Any
    ) -> None:
        if structure not in KINDS:
            raise unknown("structure", structure, KINDS)
        self.structure = structure
        super().__init__(strength, **options)
