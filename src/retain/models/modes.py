"""Put a model into evaluation mode, as it is by itself, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from retain.errors import ModelError
from retain.models.host import no_autocast, own_forwards

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module, *, checkpoint: bool = False) -> Iterator[None]:
    """Evaluation mode (no dropout, no autocast); afterwards all is as it was.

    4-bit layers of bitsandbytes stay in training mode, which is nothing to them but this: on a CPU
    their first evaluation repacks them for inference, and no gradient passes them any more.

    Args:
        model: any module.
        checkpoint: let gradient checkpointing work. transformers checkpoints only layers that
            are in training mode, so those layers, and none of the modules inside them, are put
            into it.

    Raises:
        ModelError: the model runs under autocast alone, as its layers differ in precision.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for module in model.modules():
            four_bit = type(module).__name__ == "Linear4bit"
            if four_bit or (checkpoint and getattr(module, "gradient_checkpointing", False)):
                module.training = True
        with no_autocast(), own_forwards(model):
            yield
    except RuntimeError as error:
        kinds = _kinds(model)
        if len(kinds) > 1 and any(part in str(error) for part in _OF_DTYPES):
            raise ModelError(
                "the model's layers differ in precision, and do not run without autocast",
                got=f"weights in {', '.join(kinds)}",
                allowed="layers that take each other's outputs",
                fix="model.to(torch.bfloat16), or model.float()",
            ) from error
        raise
    finally:
        for module, mode in modes:
            module.training = mode


_OF_DTYPES = ("same dtype", "expected scalar type", "should be the same", "must match the dtype")
"""Parts of what torch says where two precisions meet."""


def _kinds(model: nn.Module) -> list[str]:
    """The floating precisions of a model's weights."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return sorted(str(kind).removeprefix("torch.") for kind in found)
