"""Several sources with a bound each: curvatures, budgets and probes by name.

One source has no name. What is by name stands in mappings with the same names::

    RetentionCallback({"facts": a, "formats": b}, budget={"facts": 0.02, "formats": 0.01})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from retain.curvature.curvature import Curvature
from retain.curvature.merge import same_anchor
from retain.errors import ConfigError, MismatchError, shown

__all__ = [
    "ALONE", "Budgets", "Curvatures", "alone", "by_name", "check_names", "check_together", "named",
]  # fmt: skip

ALONE = ""
"""The name of the one source that has none."""

Curvatures = Curvature | Mapping[str, Curvature]
Budgets = float | Mapping[str, float]

T = TypeVar("T")


def by_name(value: T | Mapping[str, T] | None) -> dict[str, T]:
    """What is given by name; what is given alone under `ALONE`; of None nothing."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {ALONE: value}


def alone(values: Mapping[str, T]) -> T | Mapping[str, T] | None:
    """What `by_name` gives the mapping of."""
    return values[ALONE] if tuple(values) == (ALONE,) else values or None


def named(key: str, name: str) -> str:
    """``key/name``; of the one without a name the key."""
    return f"{key}/{name}" if name else key


def check_names(curvature: object, budget: object, **others: object) -> None:
    """Checks that curvatures and budgets, and what else is by name, have the same names.

    Of the others those of one name may be missing.

    Raises:
        ConfigError: a name for one and none for the other, other names, or no name at all.
    """
    fix = 'RetentionCallback({"facts": a, "code": b}, budget={"facts": 0.02, "code": 0.01})'
    if not any(isinstance(v, Mapping) for v in (curvature, budget, *others.values())):
        return
    if not isinstance(curvature, Mapping) or not isinstance(budget, Mapping):
        raise ConfigError(
            "what is held by name needs a curvature and a budget for each name",
            got=f"curvature: {_kind(curvature)}; budget: {_kind(budget)}",
            allowed="two mappings with the same names, or neither",
            fix=fix,
        )
    names = list(budget)
    if not names or not all(isinstance(n, str) and n.strip() and n.isprintable() for n in names):
        raise ConfigError(
            "the budgets have no names", got=shown(names), allowed="texts, one at least", fix=fix
        )
    for what, value in (("curvatures", curvature), *others.items()):
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"named budgets have each its own {what}", got=_kind(value),
                allowed=f"{what} of {', '.join(names)}", fix=fix,
            )  # fmt: skip
        odd = sorted(map(str, value.keys() - budget.keys()))
        missing = [] if what != "curvatures" else [n for n in names if n not in value]
        if odd or missing:
            raise ConfigError(
                f"the {what} have other names than the budgets",
                got=f"{', '.join(odd) or 'none'} too many; {', '.join(missing) or 'none'} missing",
                allowed=", ".join(names),
                fix=fix,
            )


def check_together(curvatures: Mapping[str, Curvature]) -> None:
    """Checks that several curvatures are around one point: the weights go back to one alone.

    Raises:
        MismatchError: they are not.
    """
    (first, a), *others = curvatures.items()
    for name, b in others:
        if a.info.space != b.info.space or not same_anchor(a, b):
            raise MismatchError(
                "named curvatures are to be around one point",
                got=f"{first} and {name} in {a.info.space} and {b.info.space} space, "
                "or around other weights",
                allowed="one space and one anchor",
                fix="fit them all before training, with the same settings",
            )


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"by name ({', '.join(map(str, value)) or 'none'})"
    if value is None or value == ():
        return "none"
    return shown(value, 40) if isinstance(value, int | float | str) else "one"
