"""Whether the recipe has its filter: for a model, its curvatures, its rows and its optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from retain.curvature.blocks.factor import SketchFactor
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.curvature import Curvature
from retain.errors import ConfigError, MismatchError, ModelError, SourceError
from retain.models.names import unwrap
from retain.models.sites import lora_sites
from retain.retention.fresh_rows import fresh_rows
from retain.retention.loader import RowReader
from retain.retention.named import Curvatures, by_name

__all__ = ["NO_STRENGTH", "check_filter", "why_left_out", "why_no_filter", "why_no_inputs"]

BEGAN_WITHOUT = "the training began without one"
"""Why a training that goes on has no filter, which cannot be made any more."""

NO_STRENGTH = "the strength is 0"
"""Why there is no filter where nothing is to be held, which needs no warning."""

SECOND_POINT = "a schedule-free optimiser keeps a second point of A, which no filter acts on"
"""Why there is no filter beside such an optimiser (`retain.retention.optimizers.keeps_two`)."""

STALE = "the adapter is not fresh"
"""Why there is no filter for an adapter that has learned something, and has no fresh rows."""

WIDEST = 8192
"""Values that a layer reads, up to which the recipe has a whole filter for it: 256 MiB each."""


def why_left_out(
    model: nn.Module,
    curvature: Curvatures | None,
    past: Curvature | None,
    rows: RowReader | None,
    progress: Mapping[str, Any] | None,
    *,
    named: bool,
    acts: bool,
    two_points: bool,
    fresh: bool,
) -> str | None:
    """Why the recipe leaves out the filter that is among its parts; None where it acts.

    Args:
        model: with its adapter.
        curvature: of the source, or several by name.
        past: that of the tasks before.
        rows: reads the training data; None where they cannot be read.
        progress: of a training that goes on, which has a filter where it had one.
        named: whether it is asked for by name, and so refused where it is not possible.
        acts: whether the parts act at all.
        two_points: whether the optimiser is schedule-free.
        fresh: of one that is named, whether its rows have to be fresh.

    Raises:
        ConfigError: a training that goes on had one, and there are no rows to make it of.
        ModelError: it is named, and the adapter does not allow it.
        MismatchError: it is named, and the curvature does not allow it.
        SourceError: it is named, and there are no rows.
    """
    if named:
        check_filter(model, curvature, past, rows, fresh=fresh)
        return None
    if progress is None:
        if not acts:
            return NO_STRENGTH
        return SECOND_POINT if two_points else why_no_filter(model, curvature, past, rows)
    if not progress.get("filter"):
        reason: str = progress.get("why_no_filter", BEGAN_WITHOUT)
        if reason == NO_STRENGTH and acts:  # now it has one
            return f"{BEGAN_WITHOUT}, for its strength was 0"
        return reason
    if two_points:
        return SECOND_POINT
    if rows is None:
        raise ConfigError(
            "the training that goes on had a filter, which is made of its rows again",
            got="no rows",
            allowed="the rows that it reads",
            fix="rows=loader, as where it began; parts=['force'] goes on without a filter",
        )
    return None


def check_filter(
    model: nn.Module,
    curvature: Curvatures | None,
    past: Curvature | None,
    rows: RowReader | None,
    *,
    fresh: bool,
) -> None:
    """Refuses a filter that is asked for and cannot be made; with `fresh`, one without fresh rows.

    Raises:
        ModelError: the adapter does not allow it.
        MismatchError: a curvature does not allow it.
        SourceError: there are no rows.
    """
    sites = lora_sites(model, sharded=True)
    if not all(site.a.requires_grad for site in sites):
        raise ModelError(
            "a filter is for an A that trains",
            got="A with requires_grad=False",
            allowed="LoRA whose A trains",
            fix="leave the filter out, so that the force acts alone",
        )
    if fresh and fresh_rows(sites) is None:
        raise ModelError(
            "a filter needs fresh rows of the adapter",
            got="a LoRA whose B is not 0",
            allowed="B = 0 as PEFT attaches it, in the last rows at least",
            fix="retain.grow_lora(model), or leave the filter out",
        )
    reason = why_no_inputs(curvature, past, limited=False)
    if reason is not None:
        raise MismatchError(
            "no filter can be made from this curvature",
            got=reason,
            allowed="one with input sides, such as kfac in weight space",
            fix="leave the filter out, so that the force acts alone",
        )
    if rows is None:
        raise SourceError(
            "a filter reads the training data",
            got="none",
            allowed="the rows that the model is to learn",
            fix="give rows, or leave the filter out",
        )


def why_no_filter(
    model: nn.Module,
    curvature: Curvatures | None,
    past: Curvature | None = None,
    rows: RowReader | None = None,
) -> str | None:
    """Why the recipe leaves the filter out, before the first step; None where it does not."""
    try:
        sites = lora_sites(model, sharded=True)
    except ModelError as error:
        return error.what
    if not all(site.a.requires_grad for site in sites):
        return "A does not train"
    stale = None if fresh_rows(sites) is not None else _why_not_fresh(model)
    whole = [h for h in by_name(curvature).values() if h.info.space == "weight"]
    if stale is not None and (stale != STALE or any(h.around_adapter for h in whole)):
        return stale
    reason = why_no_inputs(curvature, past) or stale  # which may be why no rows were added
    if reason is not None:
        return reason
    if rows is None:
        return "there are no rows to read"
    if not rows(1, 0):
        return "the trainer's batches hold no input_ids of two tokens or more"
    return None


def _why_not_fresh(model: nn.Module) -> str:
    configs: dict[str, Any] = getattr(unwrap(model), "peft_config", None) or {}
    for config in configs.values():
        given = getattr(config, "init_lora_weights", True)
        if given is False or str(given).lower() not in ("true", "none", "gaussian", "eva"):
            return f"init_lora_weights={given!r} begins with a B that is not 0"
    return STALE


def why_no_inputs(
    curvature: Curvatures | None, past: Curvature | None = None, *, limited: bool = True
) -> str | None:
    """Why no filter can be made from these curvatures; None where one can.

    That of the tasks before may be around a tuned model. Where it is limited, a layer may read
    `WIDEST` values at most.
    """
    for held in (*by_name(curvature).values(), past):
        if held is None:
            continue
        if held.info.space != "weight" or (held.around_adapter and held is not past):
            return "the curvature is not of the base model's weights"
        most = 0
        for block in held.blocks.values():
            if not isinstance(block, KroneckerBlock):
                return f"structure {held.info.structure} does not tell what a layer reads"
            if not isinstance(block.inputs, SketchFactor):
                most = max(most, block.inputs.size)
        if limited and most > WIDEST:
            return (
                f"a layer reads {most} values, and a filter has as many rows and columns; "
                "with a curvature of sketched factors (rank=256) it has fewer"
            )
    return None
