"""The model under its wrappers, and what the names of its parts say."""

from __future__ import annotations

from typing import Any

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

__all__ = ["canonical", "inner_model", "of_head", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The model under the wrappers of distributed training and compilation."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in {"DistributedDataParallel", "DataParallel"}:
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def inner_model(model: nn.Module) -> Any:
    """The model of transformers under the wrappers of training and of PEFT."""
    inner: Any = unwrap(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def canonical(name: str) -> str:
    """A module's or parameter's name in the base model, without wrappers of PEFT or compilation."""
    name = name.replace("_orig_mod.", "")  # each block may be compiled by itself
    for prefix in ("base_model.model.", "module."):
        name = name.removeprefix(prefix)
    for wrapper in (".base_layer", ".original_module", ".token_adapter"):
        name = name.replace(wrapper, "")
    return name


def of_head(name: str) -> bool:
    """Whether a module or parameter is part of a new classification head, which PEFT trains whole.

    PEFT compares the ends of names, so DistilBERT's ``pre_classifier`` is one, as it should be.
    """
    return any(part.endswith(tuple(SEQ_CLS_HEAD_NAMES)) for part in name.split("."))
