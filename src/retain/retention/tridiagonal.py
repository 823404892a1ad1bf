"""The tri-diagonal Laplace: K-FAC with links between neighbouring layers (arXiv 2512.17720)."""

from __future__ import annotations

from retain.retention.curved import Fitted
from retain.types import Structure

__all__ = ["Tridiagonal"]


class Tridiagonal(Fitted):
    """The tri-diagonal form that is positive by construction; see `Fitted` for the arguments."""

    name = "tridiagonal"
    structure: Structure = "tridiagonal"
