"""Means over seeds, and shares, worked by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from retain.errors import ConfigError
from retain.intervals import (
    Estimate,
    bootstrap,
    estimate,
    paired,
    paired_shares,
    t_quantile,
    wilson,
)

HALF = 4.302652729911275 * math.sqrt(7 / 3) / math.sqrt(3)  # t(2), 97.5 %, from a table


def ends(found: Estimate | None) -> tuple[float, float | None, float | None]:
    assert found is not None
    return found.mean, found.low, found.high


def test_means_over_seeds() -> None:
    assert ends(estimate([1.0, 2.0, None, 4.0])) == pytest.approx(
        (7 / 3, 7 / 3 - HALF, 7 / 3 + HALF)
    )
    assert estimate([0.5]) == Estimate(0.5, None, None, 1)
    assert estimate([0.5, 0.5]) == Estimate(0.5, 0.5, 0.5, 2)
    assert estimate([]) is estimate([None]) is None
    with pytest.raises(ConfigError, match="no mean"):
        estimate([1.0, math.nan])


def test_pairs_are_of_seeds_that_both_have() -> None:
    ours = {0: 2.0, 1: 3.0, 2: 5.0, 3: 9.0, 4: None}
    assert ends(paired(ours, {2: 1.0, 1: 1.0, 0: 1.0, 4: 1.0})) == pytest.approx(
        (7 / 3, 7 / 3 - HALF, 7 / 3 + HALF)
    )
    assert paired(ours, {7: 1.0}) is None


@pytest.mark.parametrize(
    ("values", "side"),
    [([1.0, 1.1, 1.2], 1), ([-1.0, -1.1, -1.2], -1), ([1.0, -1.0], 0), ([1.0], 0)],
)
def test_which_side_of_nothing(values: list[float], side: int) -> None:
    found = estimate(values)
    assert found is not None and found.sided == side


def test_wilson_intervals() -> None:
    low, high = wilson(0, 200)
    assert low == 0
    assert high == pytest.approx(0.0188, abs=1e-3)
    assert wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(10, 10)
    assert 0.7 < low < 0.73 and high == 1.0


# Student's t at 97.5 %, from printed tables.
PRINTED = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 29: 2.0452, 120: 1.9799}


@pytest.mark.parametrize(("df", "t"), PRINTED.items())
def test_t_quantile(df: int, t: float) -> None:
    assert t_quantile(df) == pytest.approx(t, abs=6e-5)


@pytest.mark.parametrize("level", [0.0, 0.5, 0.9, 0.95, 0.998])
@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 8, 15, 100, 999, 2000, 2001, 50_000])
def test_quantiles_of_t_are_scipy_s(df: int, level: float) -> None:
    from scipy import stats

    want = float(stats.t.ppf((1 + level) / 2, df))
    assert t_quantile(df, level) == pytest.approx(want, rel=1e-9 if df <= 2000 else 2e-6, abs=1e-12)


def test_t_interval_covers_as_often_as_it_says() -> None:
    draw, hits = random.Random(0), 0
    for _ in range(2000):
        found = estimate([draw.gauss(1.0, 2.0) for _ in range(3)])
        assert found and found.low is not None and found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert 0.935 < hits / 2000 < 0.965


def test_bootstrap_of_a_ratio() -> None:
    random_ = random.Random(0)
    parts = [random_.gauss(1, 2) for _ in range(400)]
    low, high = bootstrap(parts, [1] * 400) or (0, 0)
    found = estimate(parts)
    assert found is not None and found.low is not None and found.high is not None
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.03)
    assert (low, high) == bootstrap(parts, [1] * 400)
    assert (low, high) != bootstrap(parts, [1] * 400, seed=1)
    twice = bootstrap([2 * p for p in parts], [2] * 400)
    assert twice == pytest.approx((low, high))
    few = bootstrap(parts[:40], [1] * 40)
    assert few is not None and few[1] - few[0] > 2 * (high - low)


def test_bootstrap_where_rows_do_not_count() -> None:
    assert bootstrap([1, 1, 0], [1, 1, 0]) is None  # all alike
    assert bootstrap([0.1, 0.2, 0.3], [1, 2, 3]) is None
    assert bootstrap([0.4], [1]) is None and bootstrap([0.4, 0], [1, 0]) is None
    assert bootstrap([0.0, 0.0], [0, 0]) is None
    assert bootstrap([], []) is None
    low, high = bootstrap([1, 0, 5, 7], [1, 1, 0, 0], draws=150) or (0, 0)
    assert 0 <= low <= 0.5 < high  # rows of size 0 have no part


@pytest.mark.parametrize("rows", [2, 3, 5, 10])
def test_bootstrap_covers_with_few_rows(rows: int) -> None:
    draw, hits = random.Random(0), 0
    for _ in range(300):
        found = bootstrap([draw.gauss(1, 2) for _ in range(rows)], [1] * rows, draws=300)
        assert found is not None
        hits += found[0] <= 1 <= found[1]
    assert 0.9 < hits / 300 < 0.98


def test_bootstrap_of_many_rows_is_hardly_widened_and_a_share_stays_one() -> None:
    parts = [float(i % 7) for i in range(140)]
    low, high = bootstrap(parts, [1] * 140) or (0, 0)
    random_ = np.random.default_rng(0)
    rows = np.concatenate([random_.integers(0, 140, (100, 140)) for _ in range(10)])
    ends = np.quantile(np.asarray(parts)[rows].mean(1), [0.025, 0.975])
    assert high - low == pytest.approx((ends[1] - ends[0]) * 1.0125, rel=1e-3)
    assert bootstrap([1, 0, 0, 0], [1] * 4) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [((36, 12, 2, 0), 0.0569, 0.3404), ((0, 0, 0, 40), -0.0876, 0.0876)],
)
def test_paired_shares_are_newcombes(
    cells: tuple[int, int, int, int], low: float, high: float
) -> None:
    """The first of Newcombe's own examples (1998, method 10); and pairs of which none differs."""
    both, ours, theirs, neither = cells
    a = [True] * (both + ours) + [False] * (theirs + neither)
    b = [True] * both + [False] * ours + [True] * theirs + [False] * neither
    assert paired_shares(a, b) == pytest.approx((low, high), abs=1e-4)
    assert paired_shares(b, a) == pytest.approx((-high, -low), abs=1e-4)
