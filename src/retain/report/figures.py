"""The figures as PNG files, drawn by matplotlib on a canvas measured in points."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retain.report.labels import Box
from retain.report.layout import Lines, lines, scatter
from retain.report.scales import Scale
from retain.report.schema import Result
from retain.report.series import tradeoff, training
from retain.report.softening import SoftCurve, soft_plan

__all__ = ["COLOURS", "soften_png", "tradeoff_png", "training_png"]

COLOURS = {"base": "#6b7280", "lora": "#d9822b", "retain": "#2563a8"}
_INK, _MUTED, _GRID = "#1f2937", "#5b6472", "#e5e7eb"
_TEXT = {"base": "#565d69", "lora": "#a85a10", "retain": "#1d4f88"}
_DPI = 160


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure whose data units are points, y downwards."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    return figure, axes


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI, metadata={"Software": None})
    return out.getvalue()


def _text(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    plain: dict[str, Any] = {"va": "center", "fontsize": 10, "color": _INK, "parse_math": False}
    axes.text(x, y, text, **(plain | style))


def _axes(
    axes: Axes, frame: Box, x: Scale, y: Scale, names: tuple[str, str], percent: bool = False
) -> None:
    low = frame.y + frame.h
    for value in y.ticks(32):
        axes.plot([frame.x, frame.x + frame.w], [y(value)] * 2, color=_GRID, lw=0.8, zorder=0)
        label = f"{100 * value:g}%" if percent else f"{value:g}"
        _text(axes, frame.x - 6, y(value), label, ha="right", color=_MUTED, fontsize=9.5)
    for value in x.ticks(38):
        axes.plot([x(value)] * 2, [low, low + 3], color=_MUTED, lw=0.8)
        _text(axes, x(value), low + 11, f"{value:g}", ha="center", color=_MUTED, fontsize=9.5)
    axes.plot([frame.x, frame.x + frame.w], [low, low], color=_MUTED, lw=0.8)
    _text(axes, frame.x + frame.w, low + 27, names[0], ha="right")
    _text(axes, frame.x - 34, frame.y - 14, names[1])


def _nothing(axes: Axes, width: float, height: float, text: str) -> None:
    _text(axes, width / 2, height / 2, text, ha="center", color=_MUTED, fontsize=12)


def _clean(text: str) -> str:
    return " ".join(text.split())


def tradeoff_png(result: Result) -> bytes:
    """Target score against nats forgotten, one point a model."""
    trade = tradeoff(result)
    width, height = 576.0, 370.0
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure, axes = _figure(width, height)
        plan = scatter(trade, Box(48, 62, width - 64, height - 104), 10.5)
        title = f"What was learned against what was forgotten: {result.task.name}"
        _text(axes, 14, 20, _clean(title), fontsize=12.5, fontweight="bold")
        if plan is None:
            _nothing(axes, width, height, "no score and KL were recorded")
            return _png(figure)
        names = ("forgotten: KL to the base, nats per token", trade.y_label)
        _axes(axes, plan.frame, plan.x, plan.y, names, percent=not trade.by_loss)
        blue = COLOURS["retain"]
        if len(plan.path) > 1:
            axes.plot(*zip(*plan.path, strict=True), color=blue, lw=1.2, alpha=0.4, zorder=1)
        box = plan.better
        axes.annotate(
            "",
            xy=(box.x + 2, box.y + 3),
            xytext=(box.x + 14, box.y + 15),
            arrowprops={"arrowstyle": "->", "color": _MUTED, "lw": 1.3},
        )
        _text(axes, box.x + 17, box.y + box.h / 2, "better", color=_MUTED, fontstyle="italic")
        for spot in plan.points:
            colour = COLOURS[spot.point.role]
            if spot.lead:
                ends = ([spot.x, spot.lead[0]], [spot.y, spot.lead[1]])
                axes.plot(*ends, color=_MUTED, lw=0.6, zorder=1)
            if spot.x_bar:
                axes.plot(spot.x_bar, [spot.y] * 2, color=colour, lw=1.4, alpha=0.6, zorder=2)
            if spot.y_bar:
                axes.plot([spot.x] * 2, spot.y_bar, color=colour, lw=1.4, alpha=0.6, zorder=2)
            dot: dict[str, Any] = {"marker": "o", "ls": "", "zorder": 3}
            if spot.point.chosen:
                ring = dot | {"ms": 16, "mfc": "none", "mec": colour, "mew": 1.6}
                axes.plot([spot.x], [spot.y], **ring)
            axes.plot([spot.x], [spot.y], color=colour, ms=9, mec="white", mew=1, **dot)
            label = spot.label
            _text(
                axes,
                label.x + label.w / 2,
                label.y + label.h / 2,
                spot.text,
                ha="center",
                color=_TEXT[spot.point.role],
                fontweight="bold" if spot.point.chosen else "normal",
                zorder=4,
            )
        return _png(figure)


def _run_lines(axes: Axes, plan: Lines) -> None:
    for drawn in plan.runs:
        colour = COLOURS[drawn.run.role]
        if len(drawn.faint) > 1:
            axes.plot(*zip(*drawn.faint, strict=True), color=colour, lw=0.8, alpha=0.3)
        if len(drawn.strong) > 1:
            axes.plot(*zip(*drawn.strong, strict=True), color=colour, lw=1.8)
        if drawn.dots:
            axes.plot(
                *zip(*drawn.dots, strict=True), "o", color=colour, ms=5.5, mec="white", mew=0.8
            )
        _text(axes, *drawn.label, drawn.run.label, color=_TEXT[drawn.run.role])


def training_png(result: Result) -> bytes:
    """Loss, and predicted against measured KL, over steps."""
    runs = training(result)
    width, height = 720.0, 340.0
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure, axes = _figure(width, height)
        panels = (
            (False, "Training loss", "nats per token; faint: each step; strong: moving mean"),
            (
                True,
                "Forgetting while training",
                "KL, nats per token; line predicted, dots measured",
            ),
        )
        for i, (kl, title, name) in enumerate(panels):
            left = i * width / 2
            frame = Box(left + 48, 62, width / 2 - 124, height - 104)
            _text(axes, left + 14, 20, title, fontsize=12.5, fontweight="bold")
            plan = lines(runs, frame, 10.0, kl=kl)
            if plan is None:
                _nothing(axes, 2 * left + width / 2, height, "not recorded")
                continue
            if not kl and not any(drawn.faint for drawn in plan.runs):
                name = "nats per token"
            _axes(axes, frame, plan.x, plan.y, ("step", name))
            _run_lines(axes, plan)
        return _png(figure)


def soften_png(curve: SoftCurve) -> bytes:
    """What softening keeps against what it leaves forgotten."""
    width, height = 576.0, 370.0
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure, axes = _figure(width, height)
        plan = soft_plan(curve, Box(48, 62, width - 64, height - 104), 10.5)
        _text(axes, 14, 20, "A finished adapter, softened", fontsize=12.5, fontweight="bold")
        names = ("forgotten: KL to the base, nats per token", "learning kept (predicted)")
        _axes(axes, plan.frame, plan.x, plan.y, names, percent=True)
        for line in plan.lines:
            colour, wide = COLOURS[line.role], 0.9 if line.faint else 1.8
            axes.plot(*zip(*line.line, strict=True), color=colour, lw=wide)
            for bar, (_, y) in zip(line.bars, line.line, strict=False):
                axes.plot(bar, [y] * 2, color=colour, lw=1.4, alpha=0.6)
            dot: dict[str, Any] = {"ls": "", "marker": "o", "mec": "white", "mew": 0.8}
            size = 4.0 if line.faint else 6.0
            axes.plot(*zip(*line.line, strict=True), color=colour, ms=size, **dot)
            x, y = line.legend
            axes.plot([x - 22, x - 6], [y, y], color=colour, lw=wide)
            _text(axes, x, y, line.name, color=_TEXT[line.role])
        ring: dict[str, Any] = {"marker": "o", "ms": 14, "mfc": "none", "mew": 1.6, "ls": ""}
        axes.plot([plan.chosen[0]], [plan.chosen[1]], mec=COLOURS["retain"], **ring)
        box = plan.label
        middle = (box.x + box.w / 2, box.y + box.h / 2)
        bold: dict[str, Any] = {"ha": "center", "color": _TEXT["retain"], "fontweight": "bold"}
        _text(axes, *middle, plan.text, **bold)
        return _png(figure)
