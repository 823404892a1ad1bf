"""What `RetentionCallback` was told before version 0.2, and what it is called now."""

from __future__ import annotations

import warnings
from typing import Any

from retain.errors import ConfigError, unknown
from retain.retention.filter import Filter

__all__ = ["Start", "parts_of"]


def parts_of(start: Any, given: Filter | None) -> tuple[tuple[str, ...], Filter | None]:
    """The parts that a `start` of earlier versions stands for."""
    warnings.warn(
        "start is now parts: parts=['force'] holds by the force alone, and filter= has the "
        "filter's options",
        DeprecationWarning,
        stacklevel=3,
    )
    if start is None:
        return ("force",), None
    if start == "wiener":
        start = Filter()
    if not isinstance(start, Filter):
        raise _no_start(start)
    return ("rows", "filter", "force"), given or start


def Start(kind: str = "wiener", **options: Any) -> Filter:
    """Before 0.2, the options of the filter; now `retain.Filter`.

    Raises:
        ConfigError: one of the other starts, which lost to the filter and are gone.
    """
    warnings.warn("retain.Start is now retain.Filter", DeprecationWarning, stacklevel=2)
    if kind != "wiener":
        raise _no_start(kind)
    return Filter(**options)


def _no_start(kind: object) -> ConfigError:
    if kind not in ("discriminant", "principal", "null", "random"):
        return unknown("start", str(kind), ("wiener",))
    return ConfigError(
        "this start of A lost to the filter, and is gone",
        got=f"start={kind!r}",
        allowed="the filter, or the force alone",
        fix="leave start out, or parts=['force']",
    )
