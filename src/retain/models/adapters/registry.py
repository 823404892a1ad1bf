"""The kinds of adapter, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from retain.errors import unknown
from retain.models.adapters.base import Adapter
from retain.models.adapters.bottleneck import BottleneckAdapter
from retain.models.adapters.full import Full
from retain.models.adapters.lora import Lora
from retain.models.adapters.osf import OSF
from retain.models.adapters.prefix import Prefix

__all__ = ["ADAPTERS", "adapter_kind", "attach_adapter"]

ADAPTERS: dict[str, type[Adapter]] = {
    kind.kind: kind for kind in (Lora, Full, BottleneckAdapter, Prefix, OSF)
}


def adapter_kind(kind: str) -> type[Adapter]:
    """The class of a kind of adapter, whose `Adapter.check` needs no model; or a ConfigError."""
    if kind not in ADAPTERS:
        raise unknown("adapter kind", kind, ADAPTERS)
    return ADAPTERS[kind]


def attach_adapter(base: nn.Module, kind: str, seed: int = 0, **options: Any) -> Adapter:
    """Attaches a fresh adapter of a kind in `ADAPTERS` to a base model; see `Adapter.attach`."""
    return adapter_kind(kind).attach(base, seed=seed, **options)
