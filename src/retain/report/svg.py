"""The figures as inline SVG, coloured by the page's CSS so that they suit light and dark."""

from __future__ import annotations

from html import escape

from retain.report.labels import Box
from retain.report.layout import Lines, PlacedPoint, Scatter, lines, scatter
from retain.report.scales import Scale, number
from retain.report.series import Run, Tradeoff
from retain.report.softening import SoftCurve, soft_plan, standalone

__all__ = ["kl_svg", "loss_svg", "soften_svg", "tradeoff_svg"]

Dots = list[tuple[float, float]]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _points(dots: Dots) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in dots)


class _Drawing:
    """Collects the elements of one SVG."""

    def __init__(self, width: int, height: int, font: float, about: str) -> None:
        self.font = font
        self.parts = [
            f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-size="{_n(font)}" role="img" aria-label="{escape(about)}">'
        ]

    def line(self, a: tuple[float, float], b: tuple[float, float], css: str) -> None:
        self.parts.append(
            f'<line class="{css}" x1="{_n(a[0])}" y1="{_n(a[1])}" x2="{_n(b[0])}" y2="{_n(b[1])}"/>'
        )

    def path(self, dots: Dots, css: str) -> None:
        if len(dots) > 1:
            self.parts.append(f'<polyline class="{css}" points="{_points(dots)}"/>')

    def circle(self, x: float, y: float, r: float, css: str, title: str = "") -> None:
        tip = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(
            f'<circle class="{css}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}">{tip}</circle>'
        )

    def text(self, x: float, y: float, text: str, css: str, anchor: str = "start") -> None:
        """Text whose middle lies at height `y`."""
        self.parts.append(
            f'<text class="{css}" x="{_n(x)}" y="{_n(y + 0.35 * self.font)}" '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )

    def axes(self, frame: Box, x: Scale, y: Scale, names: tuple[str, str], percent: bool) -> None:
        """Grid, ticks and the names of both axes."""
        low = frame.y + frame.h
        for value in y.ticks(3.2 * self.font):
            height = y(value)
            self.line((frame.x, height), (frame.x + frame.w, height), "grid")
            label = f"{100 * value:g}%" if percent else f"{value:g}"
            self.text(frame.x - 7, height, label, "tick", "end")
        for value in x.ticks(3.6 * self.font):
            self.line((x(value), low), (x(value), low + 4), "axis")
            self.text(x(value), low + 6 + 0.7 * self.font, f"{value:g}", "tick", "middle")
        self.line((frame.x, low), (frame.x + frame.w, low), "axis")
        self.text(2, 0.75 * self.font, names[1], "name")
        self.text(frame.x + frame.w, low + 6 + 2.2 * self.font, names[0], "name", "end")

    def done(self) -> str:
        return "".join(self.parts) + "</svg>"


def _frame(width: int, height: int, font: float, right: float) -> Box:
    left, top, bottom = 3.6 * font, 2.2 * font, 3.6 * font
    return Box(left, top, width - left - right, height - top - bottom)


def _better(draw: _Drawing, box: Box) -> None:
    """The word and an arrow to the upper left."""
    x, y, tip = box.x + 3, box.y + 4, 0.9 * draw.font
    draw.line((x + tip, y + tip), (x, y), "arrow")
    draw.path([(x, y + 6), (x, y), (x + 6, y)], "arrow")
    draw.text(x + tip + 5, box.y + box.h / 2, "better", "better")


def _mark(draw: _Drawing, spot: PlacedPoint) -> None:
    css = f"c-{spot.point.role}"
    if spot.x_bar:
        draw.line((spot.x_bar[0], spot.y), (spot.x_bar[1], spot.y), f"bar {css}")
    if spot.y_bar:
        draw.line((spot.x, spot.y_bar[0]), (spot.x, spot.y_bar[1]), f"bar {css}")
    if spot.point.chosen:
        draw.circle(spot.x, spot.y, 10, f"ring {css}")
    draw.circle(spot.x, spot.y, 6, f"dot {css}", spot.point.title)


def tradeoff_svg(trade: Tradeoff, width: int, height: int, font: float) -> str | None:
    """Target score against nats forgotten; None where nothing is known."""
    plan: Scatter | None = scatter(trade, _frame(width, height, font, 0.8 * font), font)
    if plan is None:
        return None
    draw = _Drawing(width, height, font, f"{trade.y_label} against nats per token forgotten")
    names = ("forgotten: KL to the base, nats per token", trade.y_label)
    draw.axes(plan.frame, plan.x, plan.y, names, percent=not trade.by_loss)
    draw.path(plan.path, "link c-retain")
    _better(draw, plan.better)
    for spot in plan.points:
        if spot.lead:
            draw.line((spot.x, spot.y), spot.lead, "lead")
        _mark(draw, spot)
    for spot in plan.points:
        strong = " strong" if spot.point.chosen else ""
        box = spot.label
        middle = (box.x + box.w / 2, box.y + box.h / 2)
        draw.text(*middle, spot.text, f"label{strong} c-{spot.point.role}", "middle")
    return draw.done()


def _runs(plan: Lines, draw: _Drawing, y_name: str) -> None:
    draw.axes(plan.frame, plan.x, plan.y, ("step", y_name), percent=False)
    for drawn in plan.runs:
        draw.path(drawn.faint, f"faint c-{drawn.run.role}")
    for drawn in plan.runs:
        css = f"c-{drawn.run.role}"
        draw.path(drawn.strong, f"run {css}")
        for (x, y), (step, value) in zip(drawn.dots, drawn.run.measured, strict=False):
            tip = f"{drawn.run.label}, step {step:g}: {number(value)} nats per token measured"
            draw.circle(x, y, 4, f"dot {css}", tip)
        draw.text(*drawn.label, drawn.run.label, f"label {css}")


def loss_svg(runs: list[Run], width: int, height: int, font: float) -> str | None:
    """The training loss over steps; None where no run logged it."""
    plan = lines(runs, _frame(width, height, font, 6.6 * font), font, kl=False)
    if plan is None:
        return None
    draw = _Drawing(width, height, font, "training loss over steps")
    _runs(plan, draw, "loss, nats per token")
    return draw.done()


def kl_svg(runs: list[Run], width: int, height: int, font: float) -> str | None:
    """Predicted and measured KL over steps; None where no run logged either."""
    plan = lines(runs, _frame(width, height, font, 6.6 * font), font, kl=True)
    if plan is None:
        return None
    draw = _Drawing(width, height, font, "predicted and measured KL to the base over steps")
    _runs(plan, draw, "KL to the base, nats per token")
    return draw.done()


def soften_svg(curve: SoftCurve, width: int, height: int, font: float) -> str:
    """What softening keeps against what it leaves forgotten, as a file of its own."""
    plan = soft_plan(curve, _frame(width, height, font, 0.8 * font), font)
    draw = _Drawing(width, height, font, "learning kept against nats per token forgotten")
    names = ("forgotten: KL to the base, nats per token", "learning kept (predicted)")
    draw.axes(plan.frame, plan.x, plan.y, names, percent=True)
    for line in plan.lines:
        css = f"c-{line.role}"
        draw.path(line.line, f"link {css}" if line.faint else f"run {css}")
        for (low, high), (_, y) in zip(line.bars, line.line, strict=False):
            draw.line((low, y), (high, y), f"bar {css}")
        for (x, y), title in zip(line.line, line.titles, strict=True):
            draw.circle(x, y, 3 if line.faint else 4, f"dot {css}", title)
        x, y = line.legend
        draw.path([(x - 22, y), (x - 6, y)], f"link {css}" if line.faint else f"run {css}")
        draw.text(x, y, line.name, f"label {css}")
    draw.circle(*plan.chosen, 9, "ring c-retain", plan.text)
    box = plan.label
    middle = (box.x + box.w / 2, box.y + box.h / 2)
    draw.text(*middle, plan.text, "label strong c-retain", "middle")
    return standalone(draw.done(), width, height)
