"""The base model: the same modules with the adapter switched off, where that is the base.

PEFT's own ``disable_adapter`` makes all of an adapter trainable again on leaving it (also an A that
is held, or that its user has frozen), unmerges what is merged, and knows nothing of what an adapter
has changed besides. Here nothing but the layers' switches is touched, and what they do not undo is
either undone (originals take the places of what was changed) or refused.

Off is not the model that was there before where

- the initialisation takes its share out of the base's weights: PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA.
  There the fresh adapter and what is left of W together are the base, ``W' + s B_0 A_0``, so the
  base is the model with its adapter on, at B_0 and A_0 (`start_of`);
- weights of the base train beside the adapter, or came with it from its file: embeddings, biases,
  norms (not those in ``modules_to_save`` or ``trainable_token_indices``: there PEFT keeps both).
  Of a file, `retain.models.saved.load_adapter` keeps the base's weights;
- the adapter is merged into the base, or repeats its layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from retain.compat import marked_off
from retain.errors import ModelError
from retain.models.names import canonical, head_of, unwrap
from retain.models.sites import LoraSite, disabled, row_norms

__all__ = [
    "BESIDE",
    "KINDS",
    "Swap",
    "adapter_off",
    "base_to_sample",
    "check_on",
    "exactly_off",
    "left_on",
    "start_of",
    "swapped",
    "switched_off",
    "taken_out",
]

Swap = tuple[nn.Parameter, Tensor]
"""A parameter, and what takes its place."""

Pair = tuple[Tensor, Tensor]
"""B and A of a layer."""

KINDS = {
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA",
    "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT",
    "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "TINYLORA", "TRAINABLE_TOKENS",
    "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
"""PEFT's kinds in layers whose base is what it was when they are off (those of prompts all are)."""

BESIDE = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
"""LoRA's initialisations that leave the base's weights alone."""

_TO_LOAD = (
    "save the adapter, and load it on the base model with retain.models.saved.load_adapter, "
    "which keeps the base's weights (retain eval does)"
)

_TO_SEE = (
    "keep the adapter in float32, as PEFT does by default, and fit the curvature, or measure once, "
    "before training: its start is kept then"
)

_HALF = (torch.bfloat16, torch.float16)


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
    if not _carries_adapter(inner):
        raise ModelError(
            "the model has no adapter to switch off",
            got=type(inner).__name__,
            allowed="a peft.PeftModel",
            fix="measure the model that carries the adapter",
        )
    attached = vars(inner).get("retain_adapter")
    with exactly_off(inner) if attached is None else attached.off():
        yield inner


def base_to_sample(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """`adapter_off` for a model with an adapter; one without is its base."""
    return adapter_off(model) if _carries_adapter(unwrap(model)) else nullcontext(model)


@contextmanager
def exactly_off(model: nn.Module) -> Iterator[None]:
    """`switched_off`, with the base's own weights in their places, or an error."""
    kept: list[Swap] | None = vars(model).get("retain_originals")
    start = start_of(model) if kept is None else None
    originals = kept if start is None else start
    left = left_on(model, None if originals is None else {id(p) for p, _ in originals})
    if left is not None:
        raise ModelError(
            "with its adapter switched off, the model is not its base",
            got=left[0],
            allowed="an adapter beside a base that stays as it is",
            fix=left[1],
        )
    with swapped(originals or ()), switched_off(model, all_of_it=start is None):
        yield


@contextmanager
def swapped(pairs: Iterable[Swap]) -> Iterator[None]:
    """Puts other values in the places of parameters' own; afterwards they are what they were.

    They are swapped in as the parameters' data, so that whatever holds a parameter (an optimiser, a
    tied layer, a graph whose backward pass is still to come) goes on with it.
    """
    found = [(p, p.data, value.to(p.data)) for p, value in pairs]
    try:
        for p, _, value in found:
            p.data = value
        yield
    finally:
        for p, data, _ in found:
            p.data = data


@contextmanager
def switched_off(model: nn.Module, *, all_of_it: bool = True) -> Iterator[None]:
    """Switches the adapter's layers off and nothing else; a prompt's model runs its base alone.

    If not `all_of_it`, LoRA of linear layers stays on, and what is beside it is off: layers that
    are trained whole, tokens, embeddings.
    """
    inner: Any = unwrap(model)
    layers = [m for m in _switches(inner) if all_of_it or not getattr(m, "lora_A", None)]
    whole = isinstance(inner, PeftModel)
    prompted = whole and inner.active_peft_config.is_prompt_learning
    names = [n for n in ("forward", "generate") if prompted and hasattr(inner.base_model, n)]
    own = {n: vars(inner)[n] for n in names if n in vars(inner)}
    try:
        for name in names:
            setattr(inner, name, getattr(inner.base_model, name))
        with marked_off(inner) if whole else nullcontext(), disabled(layers):
            yield
    finally:
        for name in names:
            vars(inner).pop(name, None)
        vars(inner).update(own)


def check_on(model: nn.Module) -> None:
    """Raises `ModelError` where the adapter is off: what is measured would be the base."""
    if any(layer._disable_adapters for layer in _switches(unwrap(model))):
        raise ModelError(
            "the adapter is switched off",
            got="layers of PEFT that are disabled",
            allowed="an adapter that is on",
            fix="model.enable_adapter_layers()",
        )


def _switches(model: nn.Module) -> list[Any]:
    """The layers that have a switch: PEFT's, and bottlenecks."""
    return [m for m in model.modules() if hasattr(m, "_disable_adapters")]


def _carries_adapter(model: nn.Module) -> bool:
    """Whether a model carries an adapter: ours, or PEFT's, by `PeftModel` or by transformers."""
    ours = "retain_adapter" in vars(model)
    return ours or isinstance(model, PeftModel) or bool(_switches(model))


def left_on(model: nn.Module, kept: Collection[int] | None = None) -> tuple[str, str] | None:
    """What of an adapter stays on when it is switched off, and what to do; None where nothing does.

    Args:
        model: PEFT's.
        kept: of weights whose originals are put in their places, the ``id``; None where none are.
    """
    inner: Any = unwrap(model)
    if any(m.merged for m in inner.modules() if isinstance(m, BaseTunerLayer)):
        return "an adapter that is merged into the base's weights", "model.unmerge_adapter()"
    configs = _configs(inner)
    for config in configs:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in KINDS and not config.is_prompt_learning:
            return f"an adapter of the kind {kind}", f"take one of {', '.join(sorted(KINDS))}"
        if getattr(config, "layer_replication", None):
            return "layers that the adapter repeats", "leave layer_replication out"
        if getattr(config, "kasa_config", None):
            return "kasa_config, which cuts the base's weights", "leave kasa_config out"
    if kept is None:
        grown: tuple[str, str] | None = vars(inner).get("retain_left")
        if grown is not None:
            return grown
        taken = taken_out(inner)
        gone = taken is None and "retain_start" in vars(inner)  # with an adapter that was deleted
        if gone or (taken is not None and len(configs) > 1):
            return (
                "an adapter beside one that has changed the base's weights, or after it",
                "attach it to the base model as it is loaded, and alone",
            )
        if taken is not None:
            fix = _TO_LOAD if taken.startswith(("pissa", "olora")) else _TO_SEE
            return f"init_lora_weights={taken!r}, which changes the base's weights", fix
        brought = {id(p) for p, _ in vars(inner).get("retain_originals") or ()}
        names = [canonical(n) for n, p in inner.named_parameters() if id(p) in brought]
        if names:
            return f"weights of the base that came with it, such as {names[0]}", _TO_LOAD
    biased = any((getattr(c, "bias", None) or "none") != "none" for c in configs)
    ours, prefix = _adapters_own(inner), getattr(getattr(inner, "base_model", None), "prefix", "")
    of_head = head_of(inner)
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


def _configs(model: nn.Module) -> list[Any]:
    return list((getattr(unwrap(model), "peft_config", None) or {}).values())


def taken_out(model: nn.Module) -> str | None:
    """The initialisation that has changed the base's weights; None where none has."""
    given = (str(getattr(c, "init_lora_weights", True)).lower() for c in _configs(model))
    return next((init for init in given if init not in BESIDE), None)


def start_of(model: nn.Module, anchor: Mapping[str, Pair] | None = None) -> list[Swap] | None:
    """Of an adapter that took its start out of the base's weights, A and B as they began.

    With DoRA, also the magnitudes with which they are the base: the norms of its rows.

    PEFT does not keep them. They are kept here the first time that the adapter is seen as it was
    made, which shows in its form: the columns of B_0 are orthogonal, and so are the rows of A_0 but
    for OLoRA, whose A_0 is triangular, and CorDA. On a base in half precision PEFT has rounded them
    to it and keeps them in float32, where the first step takes them off its grid. An adapter that
    is itself in half precision is never taken for a start: training might not show in it.

    Args:
        model: with its adapter.
        anchor: B and A by layer where a curvature of this model was fitted, which are kept if they
            have that form.

    Returns:
        None for any other model, where the adapter had been trained before it was seen, and where
        another one is active.
    """
    inner: Any = unwrap(model)
    kept: list[Swap] | None = vars(inner).get("retain_start")
    kind = taken_out(inner)
    if kept is None and kind is None:
        return None
    sites = [
        LoraSite(canonical(path), layer, name, layer.scaling[name])
        for path, layer in inner.named_modules() if isinstance(layer, LoraLayer)
        for name in layer.active_adapters if name in layer.lora_A
    ]  # fmt: skip
    own = [p for site in sites for p in (site.b, site.a)]
    if kept is not None:
        return kept if {id(p) for p, _ in kept} >= {id(p) for p in own} and own else None
    if kind is None or len(inner.peft_config) != 1 or not sites:
        return None
    found: list[Tensor] = []
    for site in sites:
        began = (site.b, site.a) if anchor is None else anchor.get(site.name)
        pair = began and _as_made(site, began[0].detach(), began[1].detach(), kind)
        if pair is None:
            return None
        found += [value.clone() for value in pair]
    start = list(zip(own, found, strict=True))
    with swapped(start):
        for site in sites:
            if site.dora:
                layer: Any = site.layer
                start.append((layer.lora_magnitude_vector[site.adapter].weight, row_norms(site)))
    inner.retain_start = start
    return list(start)


def _as_made(site: LoraSite, b: Tensor, a: Tensor, kind: str) -> Pair | None:
    """B [d_out, r] and A [r, d_in] of a layer where they have the form that they are made in."""
    layer: Any = site.layer
    base: torch.dtype = layer.get_base_layer().weight.dtype
    if {a.dtype, b.dtype, site.a.dtype, site.b.dtype} & set(_HALF) or a.shape != site.a.shape:
        return None
    if kind == "olora" and bool(a.tril(-1).any()):
        return None
    one = kind == "olora" or kind.startswith("corda")
    if all(map(_orthogonal, [b] if one else [b, a.T])):
        return b, a
    if base not in _HALF:
        return None
    rounded = b.to(base).to(b.dtype), a.to(base).to(a.dtype)
    near = (torch.allclose(t, r, rtol=1e-6, atol=0.0) for t, r in zip((b, a), rounded, strict=True))
    made = all(near) and all(_orthogonal(t, base) for t in ([b] if one else [b, a.T]))
    return rounded if made else None


def _orthogonal(columns: Tensor, rounded: torch.dtype = torch.float32) -> bool:
    """Whether the columns of a matrix are orthogonal to each other, but for rounding.

    What rounding to half precision adds to a product is random, and small beside a bound.
    """
    wide = columns.double()
    unit = wide / wide.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    gram, allowed = unit.T @ unit, 50 * torch.finfo(torch.float32).eps
    off = (gram - torch.diag(gram.diagonal())).abs()
    if rounded in _HALF:  # each value by eps / 2 at most: six standard deviations of the sum
        spread = (unit.square().T @ unit.square()).sqrt()
        spread *= 6 * (2 / 3) ** 0.5 * torch.finfo(rounded).eps / 2
        return bool((off <= allowed + spread).all())
    return float(off.max()) <= allowed
