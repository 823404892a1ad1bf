"""A LoRA with rows to spare: what it has learned stays as it is beside fresh rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from retain.errors import ConfigError, ModelError
from retain.models.adapter import drawn, lora_sites
from retain.models.off import left_on

__all__ = ["grow_lora"]


def grow_lora(
    model: PeftModel,
    rank: int = 16,
    *,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
) -> PeftModel:
    """The same model with its LoRA, and fresh rows of A behind the old ones, with B = 0.

    The update ``scaling B A`` is what it was, since the scaling is. The given model is spent: its
    base is in the new one.

    Args:
        model: with a LoRA of one rank and scaling.
        rank: fresh rows.
        factors: (B [d_out, r], A [r, d_in]) by layer to put in place of the old ones, of any one
            rank; see `retain.retention.soften.truncate`.
        seed: of PEFT's draw of A.

    Raises:
        ConfigError: no rows to add.
        ModelError: layers of several ranks, DoRA, biases of B, or new tokens.
    """
    if rank < 1:
        raise ConfigError("too few rows to add", got=rank, allowed="1 or more", fix="rank=16")
    sites = lora_sites(model)
    if len({(site.rank, site.scaling) for site in sites}) > 1:
        raise ModelError(
            "the adapter's layers are not of one rank",
            got="a LoRA with rank_pattern or alpha_pattern",
            allowed="one rank and one alpha for all layers",
            fix="merge it into the model, and attach a fresh one",
        )
    old = {s.name: (s.b.detach().clone(), s.a.detach().clone()) for s in sites}
    old |= dict(factors or {})
    kept, scaling, name = next(iter(old.values()))[1].shape[0], sites[0].scaling, sites[0].adapter
    config: Any = copy.deepcopy(model.peft_config[name])
    more = [n for n in ("use_dora", "lora_bias", "trainable_token_indices") if getattr(config, n)]
    if more:
        raise ModelError(
            "the adapter has more than A and B, which has no fresh part",
            got=more[0],
            allowed="plain LoRA",
            fix="merge it into the model, and attach a fresh one",
        )
    config.inference_mode, config.init_lora_weights = False, True  # B = 0, the base as it is
    config.r = kept + rank
    config.lora_alpha = scaling * (config.r**0.5 if config.use_rslora else config.r)
    dtype, device = sites[0].a.dtype, sites[0].a.device
    whole = {
        layer: {key: value.clone() for key, value in module.original_module.state_dict().items()}
        for layer, module in _whole(model).items()
    }  # unloading puts what was trained in their place
    known, left = vars(model).get("retain_originals"), left_on(model)
    grown = drawn(model.unload(), config, seed, name)
    if known is not None:  # of a base that an adapter has changed, see `retain.models.off`
        grown.retain_originals = known
    elif left is not None:
        grown.retain_left = left  # type: ignore[assignment]
    for layer, module in _whole(grown).items():
        module.original_module.load_state_dict(whole[layer])
    with torch.no_grad():
        for site in lora_sites(grown):
            b, a = old[site.name]
            site.lora_a.to(device, dtype)
            site.lora_b.to(device, dtype)
            site.a[:kept], site.b[:, :kept] = a.to(site.a), b.to(site.b)
    return grown


def _whole(model: PeftModel) -> dict[str, ModulesToSaveWrapper]:
    """The layers that PEFT trains whole, such as a new classification head, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
