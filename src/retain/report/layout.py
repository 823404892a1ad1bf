"""Where things go in a figure, in pixels with y downwards, for the SVG and the PNG alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from retain.report.labels import Box, calm_corner, place, spread
from retain.report.scales import Scale, fit
from retain.report.series import Point, Run, Tradeoff, smooth

__all__ = ["Lines", "PlacedPoint", "RunLines", "Scatter", "lines", "scatter"]

Dots = list[tuple[float, float]]


@dataclass(frozen=True)
class PlacedPoint:
    """A point, its error bars (pixel ends), its label and the box of that."""

    point: Point
    text: str
    x: float
    y: float
    x_bar: tuple[float, float] | None
    y_bar: tuple[float, float] | None
    label: Box

    @property
    def lead(self) -> tuple[float, float] | None:
        """The end of a leader line, where the label lies far from the point."""
        box = self.label
        x = min(max(self.x, box.x), box.x + box.w)
        y = min(max(self.y, box.y), box.y + box.h)
        return (x, y) if abs(x - self.x) + abs(y - self.y) > 24 else None


@dataclass(frozen=True)
class Scatter:
    """The trade-off figure; `path` joins the held points by strength."""

    frame: Box
    x: Scale
    y: Scale
    points: list[PlacedPoint]
    path: Dots
    better: Box


def _pixels(scale: Scale, frame: Box, *, upright: bool) -> Scale:
    if upright:
        return Scale(scale.lo, scale.hi, frame.y + frame.h, frame.y, scale.bend)
    return Scale(scale.lo, scale.hi, frame.x, frame.x + frame.w, scale.bend)


def _ends(scale: Scale, interval: tuple[float, float] | None) -> tuple[float, float] | None:
    if interval is None or interval[0] == interval[1]:
        return None
    return scale(interval[0]), scale(interval[1])


def _inset(frame: Box, pad: float) -> Box:
    return Box(frame.x + pad, frame.y, frame.w - pad, frame.h - pad)


def _beside(path: Dots) -> list[Box]:
    """Small boxes along a path, for labels to keep clear of."""
    boxes = []
    for (ax, ay), (bx, by) in itertools.pairwise(path):
        parts = max(1, round(max(abs(bx - ax), abs(by - ay)) / 5))
        for k in range(parts):
            share = (k + 0.5) / parts
            boxes.append(Box(ax + share * (bx - ax) - 3, ay + share * (by - ay) - 3, 6, 6))
    return boxes


def scatter(trade: Tradeoff, frame: Box, font: float) -> Scatter | None:
    """Lay the trade-off out in a frame; None where there is nothing to draw."""
    points = trade.points
    if not points:
        return None
    x = fit([v for p in points for v in (p.x, *(p.x_interval or ()))], bendable=True)
    y = fit([v for p in points for v in (p.y, *(p.y_interval or ()))], zero=not trade.by_loss)
    pad = 10.0
    x = _pixels(x, _inset(frame, pad), upright=False)
    y = _pixels(y, _inset(frame, pad), upright=True)
    if trade.by_loss:  # less is better: turn the axis over, so that better stays up
        y = Scale(y.lo, y.hi, y.end, y.start)

    spots = [(x(p.x), y(p.y)) for p in points]
    x_bars = [_ends(x, p.x_interval) for p in points]
    y_bars = [_ends(y, p.y_interval) for p in points]
    held = sorted(
        (i for i, p in enumerate(points) if p.role == "retain"),
        key=lambda i: points[i].strength or 0.0,
    )
    path = [spots[i] for i in held]
    taken = _beside(path)
    for p, (px, py) in zip(points, spots, strict=True):
        reach = 12.0 if p.chosen else 8.0
        taken.append(Box(px - reach, py - reach, 2 * reach, 2 * reach))
    for (px, py), across, upright in zip(spots, x_bars, y_bars, strict=True):
        if across:
            taken.append(Box(min(across), py - 2, abs(across[1] - across[0]), 4))
        if upright:
            taken.append(Box(px - 2, min(upright), 4, abs(upright[1] - upright[0])))
    narrow = frame.w < 400
    texts = [p.label.removeprefix("strength ") if narrow else p.label for p in points]
    better = calm_corner(5.2 * font, 1.7 * font, frame, taken)
    first = sorted(range(len(points)), key=lambda i: (not points[i].chosen, i))
    boxes = place(
        [spots[i] for i in first],
        [
            ((0.63 if points[i].chosen else 0.57) * font * len(texts[i]) + 3, font * 1.15)
            for i in first
        ],
        Box(frame.x + 2, frame.y, frame.w - 2, frame.h - 2),
        [*taken, better],
    )
    label = dict(zip(first, boxes, strict=True))
    placed = [
        PlacedPoint(p, texts[i], *spots[i], x_bars[i], y_bars[i], label[i])
        for i, p in enumerate(points)
    ]
    return Scatter(frame, x, y, placed, path, better)


@dataclass(frozen=True)
class RunLines:
    """One run in pixels: a faint and a strong line, dots, and where its label goes."""

    run: Run
    faint: Dots
    strong: Dots
    dots: Dots
    label: tuple[float, float]


@dataclass(frozen=True)
class Lines:
    """A training figure."""

    frame: Box
    x: Scale
    y: Scale
    runs: list[RunLines]


def _thin(pairs: Dots, most: int = 500) -> Dots:
    """At most about `most` of the pairs, evenly, the last one kept."""
    every = -(-len(pairs) // most)
    return pairs if every <= 1 else [*pairs[:-1][::every], pairs[-1]]


def lines(runs: Sequence[Run], frame: Box, font: float, *, kl: bool) -> Lines | None:
    """Lay out the loss, or predicted and measured KL; None where there is nothing to draw."""
    shown = [run for run in runs if (run.predicted or run.measured if kl else run.loss)]
    if not shown:
        return None
    pairs = [p for run in shown for p in (run.predicted + run.measured if kl else run.loss)]
    steps = [step for step, _ in pairs]
    x = _pixels(Scale(0.0, max(*steps, 1.0)), frame, upright=False)
    y = _pixels(fit([value for _, value in pairs], bendable=kl), frame, upright=True)

    def dots(series: Dots) -> Dots:
        return [(x(step), y(value)) for step, value in series]

    drawn = []
    for run in shown:
        faint = [] if kl else dots(_thin(run.loss))
        strong = dots(_thin(run.predicted if kl else smooth(run.loss)))
        if strong == faint:
            faint = []
        drawn.append((run, faint, strong, dots(run.measured) if kl else []))
    ends = [(strong or marks)[-1] for _, _, strong, marks in drawn]
    heights = spread([end[1] for end in ends], font * 1.4)
    out = [
        RunLines(*parts, label=(frame.x + frame.w + 9, height))
        for parts, height in zip(drawn, heights, strict=True)
    ]
    return Lines(frame, x, y, out)
