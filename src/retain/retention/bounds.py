"""What settings of a recipe may be; without torch, so that a wrong one is told at once."""

from __future__ import annotations

from collections.abc import Sequence

from retain.errors import ConfigError, check_number, shown, unknown
from retain.types import STRENGTH, STRONGEST, UPDATES

__all__ = [
    "PARTS", "check_budget", "check_confidence", "check_max_rank", "check_parts", "check_strength",
    "check_update",
]  # fmt: skip

PARTS = ("head", "rows", "filter", "force")
"""Of a recipe; see `retain.retention.recipe`."""


def check_strength(strength: float) -> None:
    """Raises `ConfigError` unless the strength is a number from 0 to `STRONGEST`."""
    check_number("the strength is no strength", strength, f"strength={STRENGTH:g}")
    if strength > STRONGEST:
        raise ConfigError(
            "the strength is too large", got=strength, allowed=f"0 to {STRONGEST:g}",
            fix=f"strength={STRENGTH:g}",
        )  # fmt: skip


def check_update(update: str) -> None:
    """Raises `ConfigError` unless it is a way in which a force acts."""
    if update not in UPDATES:
        raise unknown("update", update, UPDATES)


def check_budget(nats: float) -> None:
    """Raises `ConfigError` unless the budget is a finite number above 0."""
    check_number("the budget is no budget", nats, "budget=0.05 nats per token", positive=True)


def check_confidence(confidence: float | None, budget: object) -> None:
    """Checks with which confidence a budget is kept.

    Args:
        confidence: None for the mean of what is measured.
        budget: what it is of; None without one.

    Raises:
        ConfigError: it is not from 0.5 to 0.999, or there is no budget.
    """
    if confidence is None:
        return
    if budget is None:
        raise ConfigError(
            "a confidence is that of a budget", got="a confidence without one",
            allowed="both, or neither", fix="budget=0.05, confidence=0.95",
        )  # fmt: skip
    check_number(
        "the confidence is out of range", confidence, "confidence=0.95", least=0.5, most=0.999
    )


def check_parts(parts: Sequence[str] | None, budget: object) -> None:
    """Checks the parts that are named, all of them for None.

    Raises:
        ConfigError: no list, or an unknown one; or a budget without the force, which alone would
            keep it.
    """
    if isinstance(parts, str):
        given = [part.strip() for part in parts.split(",")]
        raise ConfigError(
            "parts= takes a list of names", got=shown(parts), allowed=", ".join(PARTS),
            fix=f"parts={given}",
        )  # fmt: skip
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
