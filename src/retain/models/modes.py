"""Put a model into evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module, *, checkpoint: bool = False) -> Iterator[None]:
    """Evaluation mode (no dropout); afterwards each module's mode is what it was.

    4-bit layers of bitsandbytes stay in training mode, which is nothing to them but this: on a CPU
    their first evaluation repacks them for inference, and no gradient passes them any more.

    Args:
        model: any module.
        checkpoint: let gradient checkpointing work. transformers checkpoints only layers that
            are in training mode, so those layers, and none of the modules inside them, are put
            into it.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for module in model.modules():
            four_bit = type(module).__name__ == "Linear4bit"
            if four_bit or (checkpoint and getattr(module, "gradient_checkpointing", False)):
                module.training = True
        yield
    finally:
        for module, mode in modes:
            module.training = mode
