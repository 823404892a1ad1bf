"""Placing labels beside points so that they do not cover one another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Box", "calm_corner", "place", "spread"]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; `y` is its smaller coordinate, whichever way y points."""

    x: float
    y: float
    w: float
    h: float

    def overlap(self, other: Box) -> float:
        """The area shared with another box."""
        w = min(self.x + self.w, other.x + other.w) - max(self.x, other.x)
        h = min(self.y + self.h, other.y + other.h) - max(self.y, other.y)
        return max(0.0, w) * max(0.0, h)

    def outside(self, bounds: Box) -> float:
        """The area that lies out of bounds."""
        return self.w * self.h - self.overlap(bounds)


def _candidates(x: float, y: float, w: float, h: float) -> list[Box]:
    boxes = []
    for far in (9.0, 16.0, 26.0, 40.0, 56.0, 72.0):
        boxes += [
            Box(x + far, y - h / 2, w, h),
            Box(x - far - w, y - h / 2, w, h),
            Box(x - w / 2, y - far - h, w, h),
            Box(x - w / 2, y + far, w, h),
            Box(x + far * 0.7, y - far * 0.7 - h, w, h),
            Box(x + far * 0.7, y + far * 0.7, w, h),
            Box(x - far * 0.7 - w, y - far * 0.7 - h, w, h),
            Box(x - far * 0.7 - w, y + far * 0.7, w, h),
            Box(x + 8 - w, y - far - h, w, h),
            Box(x + 8 - w, y + far, w, h),
            Box(x - 8, y - far - h, w, h),
            Box(x - 8, y + far, w, h),
        ]
    return boxes


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    obstacles: Sequence[Box] = (),
) -> list[Box]:
    """A box for each label, the first ones placed first.

    Covering a label or leaving the bounds costs most, then covering an obstacle, then
    distance from the point.
    """
    placed: list[Box] = []
    for (x, y), (w, h) in zip(anchors, sizes, strict=True):
        best, least = Box(x, y, w, h), float("inf")
        for rank, box in enumerate(_candidates(x, y, w, h)):
            cost = rank + 20.0 * box.outside(bounds)
            cost += sum(20.0 * box.overlap(other) for other in placed)
            cost += sum(3.0 * box.overlap(other) for other in obstacles)
            if cost < least:
                best, least = box, cost
        placed.append(best)
    return placed


def calm_corner(w: float, h: float, bounds: Box, obstacles: Sequence[Box]) -> Box:
    """The corner where a box of this size covers the least; the upper left one if it can."""
    left, right = bounds.x + 8, bounds.x + bounds.w - w - 8
    low, high = bounds.y + 8, bounds.y + bounds.h - h - 8
    corners = [Box(x, y, w, h) for x, y in ((left, low), (right, high), (right, low), (left, high))]
    return min(corners, key=lambda box: sum(box.overlap(other) for other in obstacles))


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart, in the same order."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    out = list(wanted)
    for _ in range(50):
        moved = False
        for a, b in itertools.pairwise(order):
            short = gap - (out[b] - out[a])
            if short > 1e-6:
                out[a] -= short / 2
                out[b] += short / 2
                moved = True
        if not moved:
            break
    return out
