"""The figures of one training: its loss, and the KL as it was predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from retain.intervals import Estimate
from retain.report.axes import Panel, Row, axis, data, scale_of, tips
from retain.report.cells import Group
from retain.report.looks import Look
from retain.report.metrics import short

__all__ = ["smooth", "training"]


def smooth(values: Sequence[float]) -> list[float]:
    """A moving average over about a twelfth of the run; short runs are left alone."""
    half = len(values) // 24
    reach = [min(half, i) for i in range(len(values))]  # a falling start stays where it is
    windows = [values[i - r : i + r + 1] for i, r in enumerate(reach)]
    return [sum(window) / len(window) for window in windows]


def training(group: Group, look: Look) -> list[Panel]:
    """Loss and KL over the steps of plain LoRA and the chosen method, or of the first few runs."""
    cells = [group.plain, group.chosen] if group.chosen else group.cells
    found = [(cell, cell.runs[0].history) for cell in cells if cell and cell.runs]
    loss: list[Row] = []
    moved: list[Row] = []
    for cell, log in [entry for entry in found if entry[1]][:6]:
        steps = sorted(log, key=lambda step: step.step)
        known = [(s.step, s.loss) for s in steps if s.loss is not None]
        means = smooth([value for _, value in known])
        for (step, value), mean in zip(known, means, strict=True):
            loss.append(look.row(cell, x=step, y=value, mean=mean, y_text=short(value)))
        for s in steps:
            for kind, moves in (("predicted", s.predicted), ("measured", s.measured)):
                if moves is not None:
                    moved.append(look.row(cell, x=s.step, y=moves, kind=kind, y_text=short(moves)))
    out = []
    x = alt.X("x:Q", title="step", axis=axis(grid=False, format="d"), scale=alt.Scale(nice=False))
    if loss:
        base = data(loss).encode(x=x, color=look.of(loss)["color"], detail="name:N")
        y = alt.Y("y:Q", title="nats per token", axis=axis())
        faint = base.mark_line(strokeWidth=1, opacity=0.35).encode(y=y)
        said = tips(name="method", y_text="loss", x="step")
        strong = base.mark_line(strokeWidth=2.2).encode(y=alt.Y("mean:Q"), tooltip=said)
        about = "Faint: every logged step; strong: the moving average."
        chart = alt.layer(faint, strong)
        out.append(Panel("loss", "Training", "Loss", about, chart, loss))
    if moved:
        scale, ticks = scale_of([Estimate(r["y"], None, None, 1) for r in moved], bend=True)
        base = data(moved).encode(
            x=x,
            y=alt.Y("y:Q", title="nats per token", scale=scale, axis=axis(ticks)),
            color=look.of(moved)["color"],
            detail="name:N",
            tooltip=tips(name="method", kind="KL", y_text="nats per token", x="step"),
        )
        line = base.transform_filter("datum.kind == 'predicted'").mark_line(strokeWidth=2.2)
        dots = base.transform_filter("datum.kind == 'measured'").mark_point(filled=True, opacity=1)
        about = "KL to the base. Line: as the curvature predicts it; dots: as it was measured."
        chart = alt.layer(line, dots)
        out.append(Panel("kl", "Training", "Forgetting while training", about, chart, moved))
    return out
