"""The figures of a group as one PNG, drawn by matplotlib from the numbers of the page."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from retain.report.studies.cells import Cell, Group
from retain.report.studies.fronts import fronts, has_sweeps
from retain.report.studies.intervals import Estimate
from retain.report.studies.metrics import metric
from retain.report.studies.names import names, series
from retain.report.studies.spots import Spot, ends, label_spots

__all__ = ["group_png", "has_course", "has_picture"]

_COLOURS = (
    "#2563a8", "#2e8b57", "#7b4fb0", "#c23b4b", "#14868c", "#8a5a2b", "#c2539b", "#767c1c",
    "#5f6b7a", "#34439f", "#4d6b3c", "#a0522d",
)  # fmt: skip
_ABREAST = 3  # names of a legend in each column of panels
_PLAIN, _INK, _MUTED, _GRID = "#d9822b", "#1f2937", "#5b6472", "#e5e7eb"
_MARKS = "osD^v"
_DPI = 140
LEAST = 4.0
"""Points that an axis of scores spans at least."""


class _Style:
    """Colour and mark of each cell, the same as on the page."""

    def __init__(self, group: Group) -> None:
        self.shared = dict(zip(map(id, group.cells), series(group), strict=True))
        plain = {self.shared[id(cell)] for cell in group.cells if cell.plain}
        self.order = [s for s in dict.fromkeys(self.shared.values()) if s not in plain]

    def of(self, cell: Cell) -> dict[str, Any]:
        shared = self.shared[id(cell)]
        place = self.order.index(shared) if shared in self.order else None
        colour = _PLAIN if place is None else _COLOURS[place % len(_COLOURS)]
        mark = "o" if place is None else _MARKS[place % 5]
        fill = "white" if cell.stores else colour
        return {
            "color": colour,
            "marker": mark,
            "mfc": fill,
            "mec": colour if cell.stores else "white",
            "mew": 1.5 if cell.stores else 0.8,
        }


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=10)
    axes.set_xlabel(x, fontsize=9.5, color=_INK, loc="right")
    axes.set_ylabel(y, fontsize=9.5, color=_INK, loc="top")
    axes.grid(axis="y", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)


def _round_ticks(axis: Axis, parts: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Ticks of a logarithmic axis at round numbers, written plainly."""
    axis.set_major_locator(LogLocator(subs=parts))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _factor(key: str) -> float:
    return 100.0 if metric(key).unit in ("points", "%") else 1.0


def _bars(found: Estimate, factor: float) -> list[list[float]] | None:
    if found.low is None or found.high is None:
        return None
    return [[factor * (found.mean - found.low)], [factor * (found.high - found.mean)]]


def _limits(found: list[Estimate], factor: float, unit: str) -> tuple[float, float]:
    """Ends that hold all means and, as far as they do not dwarf them, the intervals.

    Differences of a tenth of a point are not to fill a picture.
    """
    means = [factor * e.mean for e in found]
    low, high = min(means), max(means)
    room = (high - low) or abs(high) or 1.0
    for e in found:
        if e.low is not None and e.high is not None:
            low = min(low, max(factor * e.low, min(means) - 0.6 * room))
            high = max(high, min(factor * e.high, max(means) + 0.6 * room))
    pad = 0.06 * ((high - low) or 1.0)
    if unit == "points":
        pad = max(pad, (LEAST - (high - low)) / 2)
    return low - pad, high + pad


def _scatter(axes: Axes, group: Group, style: _Style, kx: str, ky: str) -> None:
    pairs = [(cell, cell.mean(kx), cell.mean(ky)) for cell in group.cells]
    points = [(c, x, y) for c, x, y in pairs if x is not None and y is not None]
    if kx == "share":
        points = [point for point in points if not point[0].held and point[1].mean > 0]
    mx, my = metric(kx), metric(ky)
    against = {"share": "trained share", "loss": "test loss"}.get(kx, "learning")
    title = f"{my.name} against {against}"
    _dress(axes, title, f"{mx.name} ({mx.unit})", f"{my.name} ({my.unit})")
    if not points:
        return
    fx, fy = _factor(kx), _factor(ky)
    positive = all(y.mean > 0 for _, _, y in points)
    if kx == "share":
        axes.set_xscale("log")
        _round_ticks(axes.xaxis, (1.0, 3.0))
        shares = [fx * x.mean for _, x, _ in points]
        axes.set_xlim(min(shares) / 2, max(shares) * 2)
    else:
        axes.set_xlim(*_limits([x for _, x, _ in points], fx, mx.unit))
    low, high = min(y.mean for *_, y in points), max(y.mean for *_, y in points)
    if ky == "kl" and positive and high > 12 * low:
        axes.set_yscale("log")
        _round_ticks(axes.yaxis)
        axes.set_ylim(low / 1.6, high * 1.6)
    else:
        axes.set_ylim(*_limits([y for *_, y in points], fy, my.unit))
    for cell, x, y in points:
        look = style.of(cell)
        spot = ([fx * x.mean], [fy * y.mean])
        across = None if kx == "share" else _bars(x, fx)
        axes.errorbar(
            *spot, _bars(y, fy), across, fmt="none", ecolor=look["color"], alpha=0.45, lw=1.2
        )
        axes.plot(*spot, ms=7.5, ls="", zorder=3, **look)
        if cell.plain:
            axes.plot(*spot, "o", ms=14, mfc="none", mec=_PLAIN, mew=1.4, zorder=3)
    named = dict(zip(map(id, group.cells), names(group), strict=True))
    points.sort(key=lambda p: (not p[0].plain, -my.better * p[2].mean))  # the first find room
    label_spots(
        axes,
        [
            Spot(named[id(c)], (fx * x.mean, fy * y.mean), ends(x, fx), ends(y, fy))
            for c, x, y in points
        ],
        _INK,
    )


def _fronts(axes: Axes, group: Group) -> None:
    """The best score of each family within a budget of nats; the best family first."""
    found = [f for f in fronts(group) if f.area is not None and f.points]
    costs = [cost for f in found for points in f.points for cost, _ in points if cost > 0]
    least, limit = min(costs), found[0].limit
    steps = [least * (limit / least) ** (i / 400) for i in range(401)]
    ranked = sorted(found, key=lambda f: -f.area.mean if f.area else 0.0)
    colours = iter(_COLOURS)
    for front in ranked:
        plain = front.diff is None
        axes.step(
            steps, [100 * front.score(k) for k in steps], where="post",
            color=_PLAIN if plain else next(colours, _MUTED), lw=2.6 if plain else 1.6,
            ls="--" if front.stores else "-",
            label=f"{front.name}{' (stores data)' if front.stores else ''}  "
            f"{100 * front.area.mean if front.area else 0:.1f}",
        )  # fmt: skip
    axes.set_xscale("log")
    _round_ticks(axes.xaxis)
    axes.set_xlim(least, limit)
    _dress(
        axes, "Best score within a budget (mean over budgets)", "KL to the base (nats per token)",
        "Average score (points)",
    )  # fmt: skip
    axes.legend(
        loc="lower right", fontsize=7.5, frameon=True, framealpha=0.9, edgecolor="none",
        labelcolor=_INK, handlelength=1.6, labelspacing=0.25, borderpad=0.2,
    )  # fmt: skip


def _shown(group: Group, style: _Style) -> list[Cell]:
    """One cell a series: the strength with the best average score."""
    best: dict[str, Cell] = {}
    for cell in group.cells:
        score, old = cell.mean("average"), best.get(style.shared[id(cell)])
        before = old.mean("average") if old else None
        if score is not None and (before is None or score.mean > before.mean):
            best[style.shared[id(cell)]] = cell
    return list(best.values())


def _lines(axes: Axes, group: Group, style: _Style, kind: str) -> None:
    factor = 1.0 if kind == "kl" else 100.0
    positive: list[float] = []
    for cell in _shown(group, style):
        look = style.of(cell)
        known = [(i + 1, e) for i, e in enumerate(cell.curve(kind)) if e is not None]
        if known:
            xs, ys = [i for i, _ in known], [factor * e.mean for _, e in known]
            wide = 2.6 if cell.plain else 1.6
            axes.plot(xs, ys, ls="--" if cell.stores else "-", lw=wide, ms=5, **look)
            positive += ys
    if kind == "kl" and positive and min(positive) > 0 and max(positive) > 12 * min(positive):
        axes.set_yscale("log")
        _round_ticks(axes.yaxis)
    axes.set_xticks(range(1, len(group.tasks) + 1))
    title = "KL to the base" if kind == "kl" else "Mean score of the tasks so far"
    _dress(axes, title, "tasks learned", "nats per token" if kind == "kl" else "points")


def _panels(group: Group, style: _Style) -> list[tuple[str, str, str]]:
    """What there is to draw: the kind of panel and what it shows."""
    first = group.learned
    panels: list[tuple[str, str, str]] = []
    if has_sweeps(fronts(group)):
        panels.append(("front", "", ""))
    for key in ("forgetting", "kl"):
        if len(group.cells) > 1 and group.has(first) and group.has(key):
            panels.append(("scatter", first, key))
    bare = {cell.mean("share") for cell in group.cells if not cell.held} - {None}
    score = "loss" if first == "loss" else "average"
    if len(bare) > 1 and group.has(score):
        panels.append(("scatter", "share", score))
    if group.length > 1 and _shown(group, style):
        panels += [("lines", kind, "") for kind in ("seen", "kl") if has_course(group, kind)]
    return panels


def has_course(group: Group, kind: str) -> bool:
    """Whether there is more to follow than the first task and the last."""
    known = max(sum(e is not None for e in cell.curve(kind)) for cell in group.cells)
    return known >= min(3, group.length)


def has_picture(group: Group) -> bool:
    """Whether there is anything to draw."""
    return bool(_panels(group, _Style(group)))


def group_png(group: Group, digest: str) -> bytes | None:
    """The figures of a group; None where nothing is done.

    Args:
        group: what to draw.
        digest: of the numbers, kept inside the file so that a check can tell a stale picture.
    """
    style = _Style(group)
    panels = _panels(group, style)
    if not panels:
        return None
    columns, rows = min(2, len(panels)), (len(panels) + 1) // 2
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "text.parse_math": False}):
        lines = -(-len(set(style.shared.values())) // (_ABREAST * columns))
        under = 0.25 + 0.19 * lines  # inches of legend
        size = (5.6 * columns, 3.9 * rows + under)
        figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        foot = under / size[1]
        grid = figure.add_gridspec(
            rows, columns, left=0.85 / size[0], right=1 - 0.2 / size[0], top=1 - 0.4 / size[1],
            bottom=foot + 0.5 / size[1], wspace=0.24, hspace=0.42,
        )  # fmt: skip
        for i, (kind, a, b) in enumerate(panels):
            axes = figure.add_subplot(grid[i // 2, i % 2])
            if kind == "front":
                _fronts(axes, group)
            elif kind == "scatter":
                _scatter(axes, group, style, a, b)
            else:
                _lines(axes, group, style, a)
        _legend(figure, group, style, columns)
        out = io.BytesIO()
        said = {"Software": None, "Description": f"numbers sha256 {digest}"}
        figure.savefig(out, format="png", dpi=_DPI, metadata=said)
    return out.getvalue()


def _legend(figure: Figure, group: Group, style: _Style, columns: int) -> None:
    first: dict[str, Cell] = {}
    for cell in group.cells:
        first.setdefault(style.shared[id(cell)], cell)
    handles = [
        Line2D(
            [], [], ls="", ms=7, label=name + (" (stores data)" if cell.stores else ""),
            **style.of(cell),
        )
        for name, cell in first.items()
    ]  # fmt: skip
    rows = -(-len(handles) // (_ABREAST * columns))
    figure.legend(
        handles=handles, loc="lower center", ncols=-(-len(handles) // rows), frameon=False,
        fontsize=9, handletextpad=0.2, columnspacing=1.2, labelcolor=_INK,
    )  # fmt: skip
