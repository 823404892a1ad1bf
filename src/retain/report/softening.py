"""The curve of `retain soften`: what is kept of the learning against what is forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from retain.report.labels import Box, place
from retain.report.scales import Scale, fit, number, short
from retain.report.schema import Role

__all__ = ["SoftCurve", "SoftLine", "SoftPlan", "soft_plan", "standalone"]

Dots = list[tuple[float, float]]
_KINDS: tuple[tuple[str, Role, str], ...] = (
    ("scaled", "base", "scaled as a whole, predicted"),
    ("scaled_measured", "base", "scaled as a whole, measured"),
    ("softened", "retain", "softened, predicted"),
    ("measured", "lora", "softened, measured"),
)


@dataclass(frozen=True)
class SoftCurve:
    """Pairs of (nats per token, share of the learning kept), from the adapter itself downwards.

    Attributes:
        dots: of each kind of line; where nothing was measured, none of those.
        intervals: of measured nats, by kind.
        chosen: the one that was written.
    """

    dots: dict[str, Dots]
    intervals: dict[str, Dots]
    chosen: tuple[float, float]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> SoftCurve:
        """The curve of a `soften.json`."""
        chosen = record["chosen"]
        points = sorted([*record["curve"], chosen], key=lambda p: -p["nats"])
        known = [p for p in points if p["measured"]]
        kept = {"measured": "learned", "scaled_measured": "scaled"}
        dots = {
            "softened": [(p["nats"], p["learned"]) for p in points],
            "scaled": [(p["nats"], p["scaled"]) for p in points],
        }
        dots |= {k: [(p[k]["kl"], p[share]) for p in known] for k, share in kept.items()}
        ends = {k: [(p[k]["kl_interval"][0], p[k]["kl_interval"][1]) for p in known] for k in kept}
        return cls(dots, ends, (chosen["nats"], chosen["learned"]))


@dataclass(frozen=True)
class SoftLine:
    """One line in pixels, what its dots say, and its row of the legend; a faint one is thin."""

    role: Role
    name: str
    faint: bool
    line: Dots
    titles: list[str]
    bars: Dots
    legend: tuple[float, float]


@dataclass(frozen=True)
class SoftPlan:
    """The figure in pixels, y downwards."""

    frame: Box
    x: Scale
    y: Scale
    lines: list[SoftLine]
    chosen: tuple[float, float]
    label: Box
    text: str


def soft_plan(curve: SoftCurve, frame: Box, font: float) -> SoftPlan:
    """Lays the curve out; the legend is in the lower right, where no curve goes."""
    shown = [kind for kind in _KINDS if curve.dots[kind[0]]]
    every = [dot for key, *_ in shown for dot in curve.dots[key]]
    ends = [end for bars in curve.intervals.values() for bar in bars for end in bar]
    wide, high = fit([*(a for a, _ in every), *ends], bendable=True), fit([b for _, b in every])
    x = Scale(wide.lo, wide.hi, frame.x + 10, frame.x + frame.w, wide.bend)
    y = Scale(high.lo, high.hi, frame.y + frame.h - 10, frame.y)
    foot = frame.y + frame.h - 10 - 1.6 * font * len(shown)
    left = frame.x + frame.w - 0.55 * font * max(len(name) for *_, name in shown) - 8
    lines = []
    for row, (key, role, name) in enumerate(shown):
        dots, up = curve.dots[key], len(shown) - row - 0.5
        lines.append(
            SoftLine(
                role=role,
                name=name,
                faint=key == "scaled",
                line=[(x(a), y(b)) for a, b in dots],
                titles=[f"{name}: {number(a)} nats per token, {_kept(b)}" for a, b in dots],
                bars=[(x(low), x(top)) for low, top in curve.intervals.get(key, [])],
                legend=(left, foot + 1.6 * font * up),
            )
        )
    chosen = (x(curve.chosen[0]), y(curve.chosen[1]))
    text = f"{short(curve.chosen[0])} nats, {_kept(curve.chosen[1])}"
    taken = [Box(a - 5, b - 5, 10, 10) for line in lines for a, b in line.line]
    taken += [
        Box(low, height - 3, top - low, 6)
        for line in lines
        for (low, top), (_, height) in zip(line.bars, line.line, strict=False)
    ]
    taken += [Box(left - 24, foot, frame.w, 1.6 * font * len(shown))]
    size = (0.62 * font * len(text), 1.2 * font)
    (label,) = place([chosen], [size], frame, taken)
    return SoftPlan(frame, x, y, lines, chosen, label, text)


def _kept(share: float) -> str:
    return f"{short(100 * share)}% kept"


def standalone(svg: str, width: float, height: float) -> str:
    """An SVG of the report as a file of its own: with the page's colours and a background."""
    css = resources.files("retain.report").joinpath("style.css").read_text(encoding="utf-8")
    colours = css[: css.index("* {")]
    marks = css[css.index("svg {") : css.index(".answers")]
    head, _, rest = svg.partition(">")
    back = f'<rect width="{width:g}" height="{height:g}" fill="var(--card)"/>'
    face = "svg { font-family: system-ui, sans-serif; }"
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}><style>{colours}{marks}{face}</style>{back}{rest}\n"
