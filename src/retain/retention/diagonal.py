"""EWC: the diagonal of the Fisher (Kirkpatrick et al. 2017, arXiv 1612.00796), held online."""

from __future__ import annotations

from retain.retention.curved import Fitted
from retain.types import Structure

__all__ = ["Diagonal"]


class Diagonal(Fitted):
    """Elastic weight consolidation; see `Fitted` for the arguments.

    In weight space the diagonal is that of the update's Fisher, in adapter space that of A and B.
    """

    name = "diagonal"
    structure: Structure = "diagonal"
