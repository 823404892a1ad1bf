"""Axes and label placement."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from retain.report.labels import Box, place, spread
from retain.report.layout import scatter
from retain.report.scales import Scale, fit, number
from retain.report.schema import Result
from retain.report.series import smooth, tradeoff


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0521, "0.0521"),
        (9.1, "9.10"),
        (-0.015, "-0.0150"),
        (412.0, "412"),
        (134515008.0, "1.35e8"),
        (0.00000712, "7.12e-6"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("values", [[0.0, 0.005, 0.5], [0.2, 0.3], [0.0], [], [3.0, 3.0]])
def test_axes_hold_their_values(values: list[float]) -> None:
    fitted = fit(values, bendable=True)
    scale = Scale(fitted.lo, fitted.hi, 0.0, 400.0, fitted.bend)
    pixels = [scale(value) for value in sorted(values)]
    assert all(0.0 <= pixel <= 400.0 for pixel in pixels)
    assert pixels == sorted(pixels)
    ticks = scale.ticks(40.0)
    assert 2 <= len(ticks) <= 11
    assert all(b - a > 39.0 for a, b in itertools.pairwise(map(scale, ticks)))


@pytest.mark.parametrize("size", [(820, 430, 13.5), (356, 340, 12.0)])
def test_labels_do_not_overlap(result: dict[str, Any], size: tuple[int, int, float]) -> None:
    width, height, font = size
    plan = scatter(tradeoff(Result.model_validate(result)), Box(0, 0, width, height), font)
    assert plan
    boxes = [spot.label for spot in plan.points] + [plan.better]
    for a, b in itertools.combinations(boxes, 2):
        assert a.overlap(b) == 0


def test_crowded_labels() -> None:
    boxes = place([(100.0, 100.0)] * 5, [(60.0, 14.0)] * 5, Box(0, 0, 300, 300))
    assert all(a.overlap(b) == 0 for a, b in itertools.combinations(boxes, 2))


def test_spread() -> None:
    low, high = spread([10.0, 11.0], 12.0)
    assert high - low == pytest.approx(12.0)
    assert spread([50.0, 10.0], 12.0) == [50.0, 10.0]


def test_smooth_keeps_short_runs_and_ends() -> None:
    short = [(1.0, 2.0), (2.0, 1.0)]
    assert smooth(short) == short
    long = [(float(i), float(i % 2)) for i in range(100)]
    assert smooth(long)[0] == long[0]
    assert 0.3 < smooth(long)[50][1] < 0.7
