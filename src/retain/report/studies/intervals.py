"""Means over seeds with 95 % intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Estimate", "estimate", "paired", "t_quantile"]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds; the ends of its interval are None for one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def sided(self) -> int:
        """-1 or 1 where the whole interval lies on that side of 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def t_quantile(df: int, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = `level` for `df` >= 1 degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, df))


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and 95 % t-interval of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    n = len(known)
    if not n:
        return None
    mean = math.fsum(known) / n
    if n == 1:
        return Estimate(mean, None, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in known) / (n - 1)
    half = t_quantile(n - 1) * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, n)


def paired(
    ours: Mapping[int | None, float | None], plain: Mapping[int | None, float | None]
) -> Estimate | None:
    """The mean difference, ours less plain, over the seeds that both have."""
    pairs = [(ours[seed], plain[seed]) for seed in ours if seed in plain]
    return estimate([a - b for a, b in pairs if a is not None and b is not None])
