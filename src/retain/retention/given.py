"""What a recipe is given, checked before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retain.curvature.curvature import Curvature
from retain.errors import ConfigError, shown, warn
from retain.retention.bounds import (
    check_budget,
    check_confidence,
    check_parts,
    check_strength,
    check_update,
)
from retain.retention.filter import Filter
from retain.retention.named import Budgets, by_name, check_names
from retain.types import STRENGTH

__all__ = ["check_curvature", "check_given", "no_curvature"]


def no_curvature(given: object, name: str = "curvature") -> ConfigError:
    """The error for something else that was given where a curvature belongs."""
    return ConfigError(
        f"{name}= takes a curvature",
        got=f"{type(given).__name__} {shown(given, 60)}",
        allowed="what retain.fit_curvature or retain.load_curvature gives",
        fix=f"{name}=retain.load_curvature(path)",
    )


def check_curvature(given: object, name: str = "curvature") -> None:
    """Refuses anything else, such as the path of a curvature.

    Raises:
        ConfigError: see `no_curvature`.
    """
    if not isinstance(given, Curvature):
        raise no_curvature(given, name)


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
        check_curvature(each)
    if past is not None:
        check_curvature(past, "past")
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
    check_update(update)
    if budget is not None and strength != STRENGTH:
        warn(f"the budget finds the strength: strength {strength:g} is not used")
