"""Intervals of shares, and of means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from retain.errors import ConfigError

__all__ = ["Interval", "mean_interval", "paired_interval", "wilson"]


class Interval(NamedTuple):
    """A mean and its 95 % interval; ``low`` and ``high`` are None for a single value."""

    mean: float
    low: float | None
    high: float | None


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), within 0 and 1."""
    if n < 1:
        return 0.0, 1.0
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over seeds and Student's t-interval, ``mean ± t(n - 1) · s / √n``.

    Args:
        values: one a seed; `s` is their standard deviation with n - 1 in the denominator.
        level: how much the interval covers.

    Raises:
        ConfigError: no values, or one that is not finite.
    """
    n = len(values)
    if not n or not all(math.isfinite(v) for v in values):
        raise ConfigError(
            "no mean of these values",
            got=list(values),
            allowed="one finite number at least",
            fix="leave out what is missing",
        )
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None)
    from scipy.stats import t

    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf((1 + level) / 2, n - 1)) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def paired_interval(
    values: Sequence[float], reference: Sequence[float], level: float = 0.95
) -> Interval:
    """Mean and t-interval of the differences ``values - reference`` of the same seeds.

    Args:
        values: one a seed.
        reference: of the same seeds, in the same order.
        level: how much the interval covers.

    Raises:
        ConfigError: as many of one as of the other are not given, or none.
    """
    if len(values) != len(reference):
        raise ConfigError(
            "values that cannot be paired",
            got=f"{len(values)} and {len(reference)}",
            allowed="the same seeds of both",
            fix="keep the seeds that both have",
        )
    return mean_interval([v - r for v, r in zip(values, reference, strict=True)], level)
