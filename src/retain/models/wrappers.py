"""What is wrapped around a model: distributed training, compilation, and PEFT's names."""

from __future__ import annotations

from torch import nn

__all__ = ["canonical", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The model under the wrappers of distributed training and compilation."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in {"DistributedDataParallel", "DataParallel"}:
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def canonical(name: str) -> str:
    """A module's or parameter's name in the base model, without PEFT's wrappers."""
    for prefix in ("base_model.model.", "module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    for wrapper in (".base_layer", ".original_module", ".token_adapter"):
        name = name.replace(wrapper, "")
    return name
