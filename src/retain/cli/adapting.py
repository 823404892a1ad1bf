"""The adapter of a training run: fresh, or that of the run before with fresh rows."""

from __future__ import annotations

from typing import Any

from retain.cli.common import Screen
from retain.cli.continuing import Chain, check_state
from retain.config import RunConfig
from retain.errors import MismatchError

__all__ = ["adapted", "start_of"]


def adapted(
    base: Any, config: RunConfig, chain: Chain | None, source: Any, past: Any, screen: Screen
) -> Any:
    """The model with a fresh adapter, or with that of the run to continue from.

    Args:
        base: the base model.
        config: of the run.
        chain: what the earlier run has left, or None.
        source: the curvature of the source text, of that run.
        past: the curvature of the tasks before, of that run.
        screen: where to say what is cut.

    Raises:
        MismatchError: the state is not that of the adapter, or no filter can be made.
    """
    from retain.models.lora import attach_lora
    from retain.models.saved import load_adapter

    if chain is None:
        return attach_lora(base, **config.adapter.model_dump())
    model = load_adapter(base, chain.adapter)
    check_state(past, model, chain)
    model = _grown(model, config, chain, source, past, screen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model


def start_of(config: RunConfig, model: Any, curvature: Any, past: Any) -> tuple[Any, str | None]:
    """The start of A, and why there is no filter; None where there is one or none was wanted."""
    from retain.training.start import FILTER, Start, why_no_filter

    kind: str | None = config.start
    reason = None
    if kind is None and _filters(config):
        reason = why_no_filter(model, curvature, past)
        kind = FILTER if reason is None else None
    if kind in (None, "random"):
        return None, reason
    return Start(kind, gain=config.gain, weight=config.weight), reason


def _filters(config: RunConfig) -> bool:
    """Whether the run has a filter, if its curvature allows it."""
    from retain.training.start import FILTER

    c = config
    return c.start == FILTER or (
        c.start is None and c.method == "auto" and bool(c.strength or c.budget is not None)
    )


def _grown(model: Any, c: RunConfig, chain: Chain, source: Any, past: Any, screen: Screen) -> Any:
    """The adapter of the run before, with fresh rows for a filter; cut first if it is large."""
    from retain.curvature.merge import reanchored
    from retain.models.lora import grow_lora
    from retain.models.sites import lora_sites
    from retain.retention.soften.truncate import truncated
    from retain.training.start import FILTER, why_no_inputs

    reason = why_no_inputs(source)
    if reason is not None and c.start == FILTER:
        raise MismatchError(
            "no filter can be made for this run",
            got=reason,
            allowed="a source curvature with input sides, such as kfac in weight space",
            fix="leave --start out, so that the force acts alone",
        )
    if not _filters(c) or reason is not None:
        return model
    sites, factors = lora_sites(model), None
    fresh, most = c.adapter.rank, c.max_rank or 4 * c.adapter.rank
    if sites[0].rank + fresh > most:
        felt = reanchored(source, model) + reanchored(past, model)
        factors, lost = truncated(sites, felt, most - fresh)
        screen.note(
            f"the adapter is cut from rank {sites[0].rank} to {most - fresh}, and loses "
            f"{lost:.2%} of what the curvature feels of it; max_rank={most}"
        )
    return grow_lora(model, fresh, factors=factors, seed=c.adapter.seed + len(chain.runs))
