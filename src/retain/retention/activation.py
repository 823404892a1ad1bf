"""Activation retention: the inputs' second moments alone, without labels or gradients."""

from __future__ import annotations

from retain.retention.curved import Fitted
from retain.types import Structure

__all__ = ["Activation"]


class Activation(Fitted):
    """See `retain.curvature.blocks.activation`; arguments as in `Fitted`. No label is read."""

    name = "activation"
    structure: Structure = "activation"
