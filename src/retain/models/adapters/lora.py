"""LoRA: low-rank updates of linear layers (Hu et al., arXiv 2106.09685), through PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import nn

from retain.models.adapters.base import Adapter, Options, check_plain, size_of
from retain.models.lora import attach_lora
from retain.models.off import exactly_off
from retain.models.saved import check_adapter, load_adapter

__all__ = ["Lora", "LoraOptions"]


class LoraOptions(Options):
    """Options of LoRA.

    Attributes:
        rank: r.
        alpha: numerator of the scaling alpha / r, ``2 * rank`` by default.
        dropout: on the adapter's input.
        targets: names of linear layers, or ``all-linear``.
    """

    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"


class Lora(Adapter):
    """``W x + (alpha / r) B A x`` with the pre-trained W frozen and B = 0 at first.

    It is saved as a plain PEFT folder. A new head is PEFT's ``modules_to_save``.
    """

    kind: ClassVar[str] = "lora"
    schema: ClassVar[type[Options]] = LoraOptions

    @classmethod
    def put_on(cls, base: nn.Module, options: LoraOptions, seed: int) -> nn.Module:
        """See `Adapter.put_on`."""
        return attach_lora(base, seed=seed, **options.model_dump())

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        """See `Adapter.off`."""
        with exactly_off(self.model):
            yield self.model

    @classmethod
    def load(cls, base: nn.Module, folder: Path) -> Self:
        """See `Adapter.load`. Any plain LoRA folder of PEFT will do."""
        check_plain(base)
        config, size, training = check_adapter(folder), size_of(base), base.training
        with torch.random.fork_rng():  # PEFT draws weights before it reads them
            model = load_adapter(base, folder)
        for name in model.peft_config:
            model.peft_config[name].inference_mode = False
            model.set_requires_grad(name)
        targets = config.get("target_modules") or "all-linear"
        options: dict[str, Any] = {
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "dropout": config.get("lora_dropout", 0.0),
            "targets": targets if isinstance(targets, str) else sorted(targets),
        }
        return cls(model.train(training), options, size)
