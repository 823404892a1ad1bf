"""The base model: the same modules with the adapter switched off, where that is the base.

PEFT's own ``disable_adapter`` makes all of an adapter trainable again on leaving it (also an A that
is held, or that its user has frozen), unmerges what is merged, and knows nothing of what an adapter
has changed besides. Here nothing but the layers' switches is touched, and what off would not
undo is either undone (`retain.models.saved.load_adapter` keeps the base's weights, and
`retain.models.taken` those of a start) or refused.

Off is not the model that was there before where

- the initialisation takes its share out of the base's weights (`retain.models.taken`);
- weights of the base train beside the adapter, or came with it from its file: embeddings, biases,
  norms (not those in ``modules_to_save`` or ``trainable_token_indices``: there PEFT keeps both);
- the adapter is merged into the base, or repeats its layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from retain.errors import ModelError
from retain.models.adapters.originals import Swap, swapped
from retain.models.names import of_head
from retain.models.taken import start_of, taken_out
from retain.models.wrappers import canonical, unwrap

__all__ = [
    "adapter_off",
    "base_to_sample",
    "carries_adapter",
    "check_on",
    "exactly_off",
    "left_on",
    "switched_off",
]

Left = tuple[str, str]
"""What stays on when an adapter is switched off, and what to do about it."""

KINDS = {
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA",
    "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT",
    "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "TINYLORA", "TRAINABLE_TOKENS",
    "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
"""PEFT's kinds in layers whose base is what it was when they are off (those of prompts all are)."""

_TO_LOAD = (
    "save the adapter, and load it on the base model with retain.models.saved.load_adapter, "
    "which keeps the base's weights (retain eval does)"
)

_TO_SEE = "fit the curvature, or measure once, before training: the adapter's start is kept then"


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """The base model: the same modules with the adapter switched off.

    What is trainable, in training mode and active stays as it is; it may be nested. A model that an
    adapter of the study is attached to (``model.retain_adapter``, see
    `retain.models.adapters.base`) is switched off by that; any other must be PEFT's.

    Raises:
        ModelError: a model without an adapter, or whose adapter cannot be switched off so that the
            base is what it was.
    """
    inner: Any = unwrap(model)
    attached = vars(inner).get("retain_adapter")
    if attached is not None:
        with attached.off():
            yield inner
        return
    if not carries_adapter(inner):
        raise ModelError(
            "the model has no adapter to switch off",
            got=type(inner).__name__,
            allowed="a peft.PeftModel",
            fix="measure the model that carries the adapter",
        )
    with exactly_off(inner):
        yield inner


@contextmanager
def exactly_off(model: nn.Module) -> Iterator[None]:
    """`switched_off`, with the base's own weights in their places, or an error."""
    kept: list[Swap] | None = vars(model).get("retain_originals")
    start = start_of(model) if kept is None and taken_out(model) else None
    done = kept if start is None else start
    left = left_on(model, None if done is None else {id(p) for p, _ in done})
    if left is not None:
        raise ModelError(
            "with its adapter switched off, the model is not its base",
            got=left[0],
            allowed="an adapter beside a base that stays as it is",
            fix=left[1],
        )
    with swapped(done or ()), switched_off(model, all_of_it=start is None):
        yield


@contextmanager
def base_to_sample(model: nn.Module) -> Iterator[None]:
    """Inside it the model writes as its base does, with or without an adapter.

    Raises:
        ModelError: see `adapter_off`.
    """
    if not carries_adapter(model):
        yield
        return
    with adapter_off(model):
        yield


def check_on(model: nn.Module) -> None:
    """Refuses a model whose adapter is switched off: what is measured of it would be the base.

    Raises:
        ModelError: it is.
    """
    inner: Any = unwrap(model)
    layers = [m for m in inner.modules() if isinstance(m, _SWITCHED)]
    if any(layer._disable_adapters for layer in layers):
        raise ModelError(
            "the adapter is switched off",
            got="layers of PEFT that are disabled",
            allowed="an adapter that is on",
            fix="model.enable_adapter_layers()",
        )


def carries_adapter(model: nn.Module) -> bool:
    """Whether a model carries an adapter of PEFT's, by `PeftModel` or by transformers."""
    inner = unwrap(model)
    return isinstance(inner, PeftModel) or any(isinstance(m, _SWITCHED) for m in inner.modules())


_SWITCHED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
"""The layers of PEFT that have a switch."""


@contextmanager
def switched_off(model: nn.Module, *, all_of_it: bool = True) -> Iterator[None]:
    """Switches PEFT's layers off and nothing else; a prompt's model runs its base alone.

    Args:
        model: PEFT's.
        all_of_it: else LoRA stays on, and what is trained whole beside it is off.
    """
    inner: Any = unwrap(model)
    kinds = _SWITCHED if all_of_it else AuxiliaryTrainingWrapper
    layers: list[Any] = [m for m in inner.modules() if isinstance(m, kinds)]
    before = [layer._disable_adapters for layer in layers]
    whole = isinstance(inner, PeftModel)
    prompted = whole and inner.active_peft_config.is_prompt_learning
    names = [n for n in ("forward", "generate") if prompted and hasattr(inner.base_model, n)]
    own = {n: vars(inner)[n] for n in names if n in vars(inner)}
    was = whole and inner._adapters_disabled
    try:
        for layer in layers:
            layer._disable_adapters = True
        for name in names:
            setattr(inner, name, getattr(inner.base_model, name))
        if whole:
            inner._adapters_disabled = True
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off
        for name in names:
            vars(inner).pop(name, None)
        vars(inner).update(own)
        if whole:
            inner._adapters_disabled = was


def left_on(model: nn.Module, kept: Collection[int] | None = None) -> Left | None:
    """What of an adapter stays on when it is switched off; None where nothing does.

    Args:
        model: PEFT's.
        kept: of weights whose originals are put in their places, the ``id``; None where none are.
    """
    inner: Any = unwrap(model)
    layers = [m for m in inner.modules() if isinstance(m, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        return "an adapter that is merged into the base's weights", "model.unmerge_adapter()"
    configs: dict[str, Any] = getattr(inner, "peft_config", None) or {}
    for config in configs.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in KINDS and not config.is_prompt_learning:
            return f"an adapter of the kind {kind}", f"take one of {', '.join(sorted(KINDS))}"
        if getattr(config, "layer_replication", None):
            return "layers that the adapter repeats", "leave layer_replication out"
    if kept is None:
        grown: Left | None = vars(inner).get("retain_left")
        if grown is not None:
            return grown
        taken = taken_out(inner)
        if taken is not None:
            fix = _TO_LOAD if taken.startswith(("pissa", "olora")) else _TO_SEE
            return f"init_lora_weights={taken!r}, which changes the base's weights", fix
        brought = {id(p) for p, _ in vars(inner).get("retain_originals") or ()}
        names = [canonical(n) for n, p in inner.named_parameters() if id(p) in brought]
        if names:
            return f"weights of the base that came with it, such as {names[0]}", _TO_LOAD
    biased = any((getattr(c, "bias", None) or "none") != "none" for c in configs.values())
    ours, prefix = _adapters_own(inner), getattr(getattr(inner, "base_model", None), "prefix", "")
    trained = [
        canonical(name)
        for name, p in inner.named_parameters()
        if (p.requires_grad or (biased and kept is None and name.endswith(".bias")))
        and id(p) not in (kept or ())
        and id(p) not in ours
        and not (prefix and prefix in name)
        and not name.startswith("prompt_encoder.")
        and not of_head(name)
    ]
    if trained:
        return (
            f"weights of the base that train beside it: {len(trained)}, such as {trained[0]}",
            "freeze them; or train them in modules_to_save, where PEFT keeps the base's too",
        )
    return None


def _adapters_own(model: nn.Module) -> set[int]:
    """Of PEFT's layers, all parameters but those of the modules that they are around."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base: Any = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            base = module.original_module
        else:
            continue
        found |= {id(p) for p in module.parameters()} - {id(p) for p in base.parameters()}
    return found
