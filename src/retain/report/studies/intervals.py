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


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (modified Lentz)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 300):
        for part in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + part * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + part / c
            c = c if abs(c) > tiny else tiny
            value *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return value


def _beyond(t: float, df: int) -> float:
    """The probability that |T| > t for Student's t with `df` degrees of freedom."""
    a, b, x = df / 2, 0.5, df / (df + t * t)
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1.0 - x) / b


def t_quantile(df: int, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = `level` for `df` >= 1 degrees of freedom."""
    low, high = 1e-6, 1e6
    while high / low > 1 + 1e-13:
        middle = math.sqrt(low * high)
        if _beyond(middle, df) > 1.0 - level:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


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
