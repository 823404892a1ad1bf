"""Means over seeds, and shares, worked by hand."""

from __future__ import annotations

import math

import pytest

from retain.errors import ConfigError
from retain.intervals import Estimate, estimate, paired, wilson

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
    narrow = estimate([1.0, 2.0, 4.0], level=0.5)
    assert narrow is not None and narrow.high is not None and narrow.high < 7 / 3 + HALF
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
