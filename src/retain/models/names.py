"""The model under its wrappers, and what the names of its parts say."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

__all__ = [
    "ADAPTERS", "canonical", "drawn_layers", "head_of", "inner_model", "layers_of", "of_head",
    "unwrap",
]  # fmt: skip

ADAPTERS = (".lora_", ".modules_to_save.", ".trainable_tokens_")
"""In the names of an adapter's weights, beside those of its base."""


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


def head_of(model: nn.Module) -> Callable[[str], bool]:
    """`of_head` for a model: what was drawn beside its classifier (`drawn_layers`) is new too."""
    drawn = tuple(f"{name}." for name in drawn_layers(model))

    def new(name: str) -> bool:
        return of_head(name) or f"{canonical(name)}.".removeprefix("base_model.").startswith(drawn)

    return new


def drawn_layers(model: nn.Module) -> frozenset[str]:
    """Layers of a classifier, beside its own, whose weights came from no checkpoint, by name.

    Such is the pooler of an encoder that was saved without one: transformers draws it anew at each
    loading. `retain.models.load.load_model` keeps the names; of a model that was loaded in another
    way the marks tell which transformers 5 leaves on what it has read.
    """
    inner = inner_model(model)
    known: frozenset[str] | None = vars(inner).get("retain_drawn")
    if known is not None or "ForSequenceClassification" not in type(inner).__name__:
        return known or frozenset()
    # What was packed or replaced since then has lost its mark.
    plain = {n: p for n, p in inner.named_parameters() if type(p) is nn.Parameter}
    unread = {canonical(n) for n, p in plain.items() if not hasattr(p, "_is_hf_initialized")}
    return (
        layers_of(inner, unread) if any(canonical(n) not in unread for n in plain) else frozenset()
    )


def layers_of(model: nn.Module, missing: Collection[str]) -> frozenset[str]:
    """The layers of missing weights, for `drawn_layers`.

    Those of the classifier, of the blocks and tables that a base consists of, and those that had
    some of their weights are left out.
    """
    own: dict[str, list[str]] = {}
    for name in [canonical(n) for n, _ in model.named_parameters()]:
        if not any(part in name for part in ADAPTERS):
            own.setdefault(name.rpartition(".")[0], []).append(name)
    return frozenset(
        layer for layer, names in own.items()
        if layer and all(name in missing for name in names)
        and not of_head(layer)
        and not any(part.isdecimal() for part in layer.split("."))
        and not any(other.startswith(f"{layer}.") for other in own)
        and not isinstance(model.get_submodule(layer), nn.Embedding)
    )  # fmt: skip
