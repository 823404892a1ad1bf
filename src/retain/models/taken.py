"""Adapters that take their start out of the base's weights: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA.

There the fresh adapter and what is left of W together are the base, ``W' + s B_0 A_0``, so the base
is the model with its adapter on, at B_0 and A_0. PEFT does not keep them. They are kept here the
first time that the adapter is seen as it was made, which shows in its form: in all five the columns
of B_0 are orthogonal, and the rows of A_0 too but for OLoRA, whose A_0 is triangular, and CorDA.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from retain.models.adapters.originals import Swap
from retain.models.wrappers import unwrap

__all__ = ["BESIDE", "start_of", "taken_out"]

BESIDE = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
"""LoRA's initialisations that leave the base's weights alone."""


def taken_out(model: nn.Module) -> str | None:
    """The initialisation that has changed the base's weights; None where none has."""
    configs: dict[str, Any] = getattr(unwrap(model), "peft_config", None) or {}
    for config in configs.values():
        given = str(getattr(config, "init_lora_weights", True)).lower()
        if given not in BESIDE:
            return given
    return None


def start_of(model: nn.Module) -> list[Swap] | None:
    """A and B of all layers with the values that they began with, kept from the first call on.

    Args:
        model: with one such adapter.

    Returns:
        None where the adapter had been trained before it was seen.
    """
    inner: Any = unwrap(model)
    kept: list[Swap] | None = vars(inner).get("retain_start")
    if kept is not None:
        return kept
    kind, configs = taken_out(inner), getattr(inner, "peft_config", None) or {}
    if kind is None or len(configs) != 1:
        return None
    name = next(iter(configs))
    layers: list[Any] = [
        m for m in inner.modules() if isinstance(m, LoraLayer) and name in m.lora_A
    ]
    pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in layers]
    if not pairs or not all(_as_made(a.detach(), b.detach(), kind) for a, b in pairs):
        return None
    found: list[Swap] = [(p, p.detach().clone()) for pair in pairs for p in pair]
    inner.retain_start = found
    return found


def _as_made(a: Tensor, b: Tensor, kind: str) -> bool:
    """Whether A [r, d_in] and B [d_out, r] have the form that they are made in."""
    if kind == "olora":
        return _orthogonal(b) and not bool(a.tril(-1).any())
    return _orthogonal(b) and (kind.startswith("corda") or _orthogonal(a.T))


def _orthogonal(columns: Tensor) -> bool:
    """Whether the columns of a matrix are orthogonal to each other, but for rounding."""
    eps = torch.finfo(columns.dtype).eps
    wide = columns.double()
    unit = wide / wide.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    gram = unit.T @ unit
    apart = gram - torch.diag(gram.diagonal())
    return float(apart.abs().max()) <= 50 * eps
