"""Put a model into evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module, *, checkpoint: bool = False) -> Iterator[None]:
    """Evaluation mode (no dropout); afterwards each module's mode is what it was.

    Args:
        model: any module.
        checkpoint: let gradient checkpointing work. transformers checkpoints only layers that
            are in training mode, so those layers, and none of the modules inside them, are put
            into it.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for module in model.modules() if checkpoint else ():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        yield
    finally:
        for module, mode in modes:
            module.training = mode
