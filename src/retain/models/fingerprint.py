"""Tells base models apart, so that a curvature is never used beside another one."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from retain.models.names import canonical, unwrap

__all__ = ["fingerprint"]

_SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """A short hash of the base model under a model's adapter.

    It covers each frozen parameter's name, shape and 64 of its values, rounded to bfloat16 (so
    that the same checkpoint loaded in float32 or bfloat16 has the same fingerprint). Adapter
    weights, trained copies of modules (PEFT's ``modules_to_save``) and new tokens are left out.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(
        unwrap(model).named_parameters(), key=lambda kv: canonical(kv[0])
    ):
        if any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_")):
            continue
        digest.update(f"{canonical(name)}:{tuple(parameter.shape)};".encode())
        if parameter.is_floating_point() and parameter.numel():
            flat = parameter.detach().reshape(-1)
            step = max(1, flat.numel() // _SAMPLES)
            values = flat[::step][:_SAMPLES].to(torch.bfloat16).view(torch.int16).cpu()
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]
