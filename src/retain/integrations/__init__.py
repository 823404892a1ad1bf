"""Retention in trainers that make their own trainer object: see docs/trainers.md."""

from retain.integrations.fitting import FittingCallback

__all__ = ["FittingCallback"]
