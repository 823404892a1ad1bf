"""Adapters whose start in the base's weights PEFT cannot make again when it loads them.

``pissa_niter_4`` and ``corda`` are drawn anew or not made, ``lora_ga`` leaves the base whole, and
an adapter that has grown (`retain.grow_lora`) has fresh rows beside such a start. What they have
learned is ``B A - B_0 A_0``, which is plain LoRA of twice the rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.errors import warn

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["as_plain", "cannot_repeat"]

_ONCE = ("pissa_niter", "corda", "lora_ga")


def cannot_repeat(start: Any) -> bool:
    """Whether an ``init_lora_weights`` is one that PEFT does not make again."""
    return str(start).lower().startswith(_ONCE)


def as_plain(model: PeftModel, name: str, weights: Path) -> dict[str, Any]:
    """Makes plain LoRA of an adapter whose start PEFT cannot make again, where it was seen.

    Args:
        model: with the adapter.
        name: of the adapter.
        weights: the file with its own weights, which is written anew.

    Returns:
        What is other in its configuration; nothing of an adapter that may stay as it is.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from retain.models.off import BESIDE, start_of

    config: Any = model.peft_config[name]
    init, start = str(getattr(config, "init_lora_weights", True)).lower(), start_of(model)
    grown = init in BESIDE and (start is not None or _on_another(model))
    if not (grown or cannot_repeat(init)):
        return {}
    if start is None or config.use_dora:
        unseen = "the start was not seen before training, or was another adapter's"
        why = unseen if start is None else "it has use_dora"
        warn(
            "the adapter is saved as it is, and will not be this model when it is loaded: it began "
            "in the base's weights, as PEFT does not make it again, and it cannot be written as "
            f"plain LoRA, for {why}"
        )
        return {}
    began = {id(p): value for p, value in start}
    tensors = load_file(weights)
    for own, parameter in model.named_parameters():
        if id(parameter) in began:
            key = own.removesuffix(f".{name}.weight") + ".weight"
            value = began[id(parameter)].cpu()
            of_a = ".lora_A." in key
            tensors[key] = torch.cat([tensors[key], value if of_a else -value], 0 if of_a else 1)
    save_file(tensors, weights, metadata={"format": "pt"})
    more = 2**0.5 if config.use_rslora else 2  # so that the scaling stays
    return {
        "r": 2 * config.r, "lora_alpha": more * config.lora_alpha, "init_lora_weights": True,
        "rank_pattern": {key: 2 * r for key, r in (config.rank_pattern or {}).items()},
        "alpha_pattern": {key: more * a for key, a in (config.alpha_pattern or {}).items()},
        "corda_config": None, "lora_ga_config": None,
    }  # fmt: skip


def _on_another(model: PeftModel) -> bool:
    """Whether an adapter is on weights that an earlier start has changed, as far as was seen."""
    known = {id(p) for p, _ in vars(model).get("retain_originals") or ()}
    layers: list[Any] = [m for m in model.modules() if getattr(m, "lora_A", None)]
    changed = any(id(getattr(m.get_base_layer(), "weight", None)) in known for m in layers)
    return changed or not vars(model).keys().isdisjoint(("retain_start", "retain_left"))
