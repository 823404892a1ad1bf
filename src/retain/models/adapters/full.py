"""Full fine-tuning: every weight of the base model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from retain.errors import ModelError
from retain.models.adapters.base import Adapter, Options, check_plain, size_of
from retain.models.adapters.folder import (
    check_base,
    read_config,
    read_options,
    read_tensors,
    same_base,
    write_adapter,
)
from retain.models.adapters.originals import Originals

__all__ = ["Full", "FullOptions"]

_TYPE = "FULL"


class FullOptions(Options):
    """Options of full fine-tuning.

    Attributes:
        embeddings: train the embedding tables too, and an output head that is tied to one.
    """

    embeddings: bool = True


class Full(Adapter):
    """The model itself, with a copy of the weights it came with.

    The copy has the base's precision and device, so the weights take twice their memory. Weights
    in bfloat16 lose steps below 1/256 of their size; train in float32 where it matters.
    """

    kind: ClassVar[str] = "full"
    schema: ClassVar[type[Options]] = FullOptions

    @classmethod
    def attach(cls, base: nn.Module, *, seed: int = 0, **options: Any) -> Self:
        """See `Adapter.attach`; options as in `FullOptions`. Nothing is random."""
        chosen = cls.check(options)
        _make_trainable(base, chosen)
        return cls(base, chosen.model_dump(), size_of(base))

    def __init__(self, model: nn.Module, options: dict[str, Any], size: int = 0) -> None:
        super().__init__(model, options, size)
        self.base = same_base(model)
        self.originals = Originals(model, self.parameters())

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        """See `Adapter.off`. The original weights take the places of the trained ones."""
        with self.originals.swapped(self.model):
            yield self.model

    def save(self, folder: Path, base: str) -> Path:
        """See `Adapter.save`: all trained weights, whole."""
        config = {"peft_type": _TYPE, "base_model_name_or_path": base, **self.options}
        return write_adapter(folder, {**config, "base_fingerprint": self.base}, self.parameters())

    @classmethod
    def load(cls, base: nn.Module, folder: Path) -> Self:
        """See `Adapter.load`."""
        config = read_config(folder, _TYPE)
        chosen = read_options(config, FullOptions, folder)
        _make_trainable(base, chosen)
        check_base(base, config, folder)
        tensors = read_tensors(
            folder, _TYPE, {n: p for n, p in base.named_parameters() if p.requires_grad}
        )
        full = cls(base, chosen.model_dump(), size_of(base))
        full.restore(tensors)
        return full


def _make_trainable(base: nn.Module, options: FullOptions) -> None:
    check_plain(base)
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
