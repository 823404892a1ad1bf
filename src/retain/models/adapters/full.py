"""Full fine-tuning: every weight of the base model is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import nn

from retain.errors import ModelError
from retain.models.adapters.base import Adapter, Options

__all__ = ["Full", "FullOptions"]


class FullOptions(Options):
    """Options of full fine-tuning.

    Attributes:
        embeddings: train the embedding tables too, and an output head that is tied to one.
    """

    embeddings: bool = True


class Full(Adapter):
    """The model itself, with a copy of the weights it came with. Nothing is random.

    The copy has the base's precision and device, so the weights take twice their memory. Weights
    in bfloat16 lose steps below 1/256 of their size; train in float32 where it matters.
    """

    kind: ClassVar[str] = "full"
    schema: ClassVar[type[Options]] = FullOptions
    peft_type: ClassVar[str | None] = "FULL"

    @classmethod
    def put_on(cls, base: nn.Module, options: FullOptions, seed: int) -> nn.Module:
        """See `Adapter.put_on`."""
        for name, parameter in base.named_parameters():
            if not parameter.is_floating_point():
                raise ModelError(
                    "quantised weights cannot be trained",
                    got=f"{name} in {parameter.dtype}",
                    allowed="a base model in floating point",
                    fix="load it without quantisation, or take another kind of adapter",
                )
            parameter.requires_grad_(True)
        for module in base.modules():
            if isinstance(module, nn.Embedding) and not options.embeddings:
                module.requires_grad_(False)
        return base

    def changed(self) -> Iterable[nn.Parameter]:
        """All that is trained."""
        return self.parameters().values()
