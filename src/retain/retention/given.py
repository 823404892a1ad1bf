"""What a recipe is given, checked before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retain.curvature.curvature import Curvature
from retain.errors import ConfigError, shown, unknown, warn
from retain.retention.budget import check_budget, check_confidence
from retain.retention.filter import Filter
from retain.retention.force import check_strength
from retain.retention.named import Budgets, by_name, check_names
from retain.types import STRENGTH, UPDATES

__all__ = ["PARTS", "check_given", "check_max_rank", "check_parts", "no_curvature"]

PARTS = ("head", "rows", "filter", "force")
"""Of a recipe; see `retain.retention.recipe`."""


def no_curvature(given: object, name: str = "curvature") -> ConfigError:
    """The error for something else that was given where a curvature belongs."""
    return ConfigError(
        f"{name}= takes a curvature",
        got=f"{type(given).__name__} {shown(given, 60)}",
        allowed="what retain.fit_curvature or retain.load_curvature gives",
        fix=f"{name}=retain.load_curvature(path)",
    )


def check_parts(parts: Sequence[str] | None, budget: Budgets | None) -> None:
    """Checks the parts that are named, all of them for None.

    Raises:
        ConfigError: an unknown one; or a budget without the force, which alone would keep it.
    """
    for part in () if parts is None else parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if budget is not None and parts is not None and "force" not in parts:
        raise ConfigError(
            "nothing would keep the budget without the force",
            got=f"a budget, and the parts {', '.join(parts) or 'none'}",
            allowed="force among the parts",
            fix="add force to the parts, or give a strength in place of the budget",
        )


def check_max_rank(most: int | None, rank: int, option: str = "") -> None:
    """Checks the rank that an adapter with `rank` fresh rows a task is cut to.

    Args:
        most: the rank; None for the default.
        rank: fresh rows.
        option: what stands before its name where it is given.

    Raises:
        ConfigError: it is none, or leaves fewer rows to all earlier tasks than to the new one.
    """
    if most is not None and not (isinstance(most, int) and most >= 2 * rank):
        raise ConfigError(
            "max_rank leaves no room for what was learned before",
            got=f"max_rank {shown(most, plain=True)}, rank {rank}",
            allowed="a whole number, twice the rank at least",
            fix=f"{option}max_rank={4 * rank}",
        )


def check_given(
    curvature: Any,
    strength: float,
    *,
    parts: Sequence[str] | None,
    budget: Budgets | None,
    confidence: float | None,
    past: Any,
    update: str,
    filter: Any,
) -> None:
    """Checks what `retain.retention.recipe.Recipe` is given; see there.

    Raises:
        ConfigError: what is no curvature or filter, an unknown part, a value out of range, names
            that differ, or a budget without the force.
    """
    for each in by_name(curvature).values():
        if not isinstance(each, Curvature):
            raise no_curvature(each)
    if past is not None and not isinstance(past, Curvature):
        raise no_curvature(past, "past")
    if filter is not None and not isinstance(filter, Filter):
        raise ConfigError(
            "filter= takes the options of a filter", got=shown(filter), allowed="retain.Filter",
            fix="filter=retain.Filter(gain=1)",
        )  # fmt: skip
    check_parts(parts, budget)
    check_strength(strength)
    if curvature is not None:
        check_names(curvature, budget)
    for nats in by_name(budget).values():
        check_budget(nats)
    check_confidence(confidence, budget)
    if update not in UPDATES:
        raise unknown("update", update, UPDATES)
    if budget is not None and strength != STRENGTH:
        warn(f"the budget finds the strength: strength {strength:g} is not used")
