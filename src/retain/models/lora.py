"""LoRA adapters through PEFT: attach a fresh one, or give one that has learned fresh rows."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from retain.errors import ConfigError, ModelError
from retain.models.names import drawn_layers, of_head
from retain.models.off import Pair, Swap, left_on, start_of
from retain.models.saved import check_peft
from retain.models.sites import LoraSite, lora_sites

__all__ = ["attach_lora", "drawn", "grow_lora", "task_of"]


def attach_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> PeftModel:
    """Puts a fresh LoRA adapter (B = 0) on a model; A is drawn from `seed`.

    Args:
        model: a base model of transformers.
        rank: r.
        alpha: numerator of the scaling, ``2 * rank`` by default.
        dropout: on the adapter's input.
        targets: PEFT's ``target_modules``: names, or ``all-linear``.
        seed: of the draw of A. The global random state is left as it was.

    Raises:
        ConfigError: a rank below 1, a dropout that is no probability, or targets that the model
            does not have or PEFT cannot wrap.
    """
    if not 0 <= dropout < 1:
        raise ConfigError(
            "the dropout is no probability", got=dropout, allowed="0 to below 1", fix="dropout=0.05"
        )
    if rank < 1:
        raise ConfigError(
            "the LoRA rank is too small", got=rank, allowed="1 or more", fix="--rank 16"
        )
    kind = task_of(model)
    if isinstance(targets, str) and targets.isidentifier():
        targets = [targets]  # a name; PEFT would read it as a pattern of whole paths
    names = [name for name, _ in model.named_modules()]
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    # PEFT trains some layers of a classifier whole, by the ends of their names: no LoRA on them.
    # DistilBERT's pre_classifier is one, though it is not the last layer.
    heads = [name for name in names if of_head(name.rsplit(".", 1)[-1])]
    # What was drawn beside the classifier is as new, and trained and saved as it is.
    new = sorted(drawn_layers(model)) if kind == "SEQ_CLS" else []
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=heads + new if kind == "SEQ_CLS" and targets == "all-linear" else None,
        modules_to_save=new or None,
        task_type=kind,
    )
    absent = "not found in the base model"  # in PEFT's words
    try:
        for target in [] if isinstance(targets, str) else targets:  # PEFT lets some be unknown
            if not any(f".{name}".endswith(f".{target}") for name in names):
                raise ValueError(f"{target} {absent}")
        return drawn(model, config, seed)
    except (ValueError, TypeError, re.error) as error:
        reason = " ".join(str(error).split())
        lost = absent in reason
        taken = sorted(name for name in linear if lost or f"'{name}'" not in reason)
        raise ConfigError(
            f"the adapter's targets are not {'in the model' if lost else 'for LoRA'}",
            got=targets if lost else f"{targets}: {reason}",
            allowed=", ".join(["all-linear", *taken] if targets != "all-linear" else taken),
            fix="name linear layers of this model",
        ) from error


def task_of(model: nn.Module) -> str | None:
    """PEFT's ``task_type`` of a base model; None for one that it has no name for."""
    names = {"SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM"}
    return next((task for part, task in names.items() if part in type(model).__name__), None)


def drawn(model: nn.Module, config: Any, seed: int, name: str = "default") -> PeftModel:
    """The model with an adapter drawn from a seed; the global random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft: PeftModel = get_peft_model(
            model, config, adapter_name=name, autocast_adapter_dtype=False
        )
    return peft


def grow_lora(
    model: PeftModel,
    rank: int = 16,
    *,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
) -> PeftModel:
    """The same model with its LoRA, and fresh rows of A behind the old ones, with B = 0.

    The update ``scaling B A`` is what it was. The given model is spent: its base is in the new one.

    Args:
        model: with a LoRA of one rank and scaling.
        rank: fresh rows.
        factors: (B [d_out, r], A [r, d_in]) by layer to put in place of the old ones, of any one
            rank; see `retain.retention.soften.truncate`.
        seed: of PEFT's draw of A.

    Raises:
        ConfigError: no rows to add.
        ModelError: no PeftModel; layers of several ranks, DoRA, biases of B, new tokens, or several
            adapters.
    """
    if rank < 1:
        raise ConfigError("too few rows to add", got=rank, allowed="1 or more", fix="rank=16")
    check_peft(model)
    sites = lora_sites(model)
    if len(model.peft_config) > 1:
        raise ModelError(
            "the model carries several adapters, and only one can grow",
            got=", ".join(model.peft_config),
            allowed="one adapter",
            fix="save the others and take them off: model.delete_adapter(name)",
        )
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
    config.rank_pattern, config.alpha_pattern = {}, {}  # all layers are alike, and stay so
    config.r = kept + rank
    config.lora_alpha = scaling * (config.r**0.5 if config.use_rslora else config.r)
    dtype, places = sites[0].a.dtype, {site.name: site.a.device for site in sites}
    whole = {
        layer: {key: value.clone() for key, value in module.original_module.state_dict().items()}
        for layer, module in _trained_whole(model).items()
    }  # unloading puts what was trained in their place
    known, left = vars(model).get("retain_originals"), left_on(model)
    values = {id(p): value for p, value in start_of(model) or ()}
    began: dict[str, Pair] = {
        s.name: (values[id(s.b)], values[id(s.a)]) for s in sites if id(s.a) in values
    }
    grown = drawn(model.unload(), config, seed, name)
    if known is not None:  # of a base that an adapter has changed, see `retain.models.off`
        grown.retain_originals = known
    elif left is not None and (not began or sites[0].rank > config.r):
        grown.retain_left = left  # type: ignore[assignment]
    for layer, module in _trained_whole(grown).items():
        module.original_module.load_state_dict(whole[layer])
    with torch.no_grad():
        for site in lora_sites(grown):
            b, a = old[site.name]
            site.lora_a.to(places[site.name], dtype)
            site.lora_b.to(places[site.name], dtype)
            site.a[:kept], site.b[:, :kept] = a.to(site.a), b.to(site.b)
        if began and "retain_left" not in vars(grown):
            grown.retain_start = _grown_start(lora_sites(grown), began)  # type: ignore[assignment]
    return grown


def _grown_start(sites: Sequence[LoraSite], began: Mapping[str, Pair]) -> list[Swap]:
    """Where an adapter that began in the base's weights is the base, with rows that are behind."""
    start: list[Swap] = []
    for site in sites:
        b, a = torch.zeros_like(site.b), site.a.detach().clone()
        for whole, part in ((b.T, began[site.name][0].T), (a, began[site.name][1])):
            whole[: len(part)] = part.to(whole)
        start += [(site.b, b), (site.a, a)]
    return start


def _trained_whole(model: PeftModel) -> dict[str, ModulesToSaveWrapper]:
    """The layers that PEFT trains whole, such as a new classification head, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
