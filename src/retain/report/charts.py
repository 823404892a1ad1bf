"""The figures of a group, declared once for the page and for pictures of documents.

Colours are written as ``var(--name)``, the names of style.css; `retain.report.draw` and the page
put those of a theme in.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import altair as alt

from retain.intervals import Estimate
from retain.report.axes import (
    Panel,
    Row,
    axis,
    data,
    ends,
    names_beside,
    round_ticks,
    scale_of,
    tips,
)  # fmt: skip
from retain.report.cells import Cell, Group
from retain.report.fronts import fronts, has_sweeps
from retain.report.looks import COLOURS, PLAIN, Look
from retain.report.metrics import MISSING, Metric, metric
from retain.report.training import training

__all__ = ["has_course", "panels"]

TRADE, ALONG, MATRIX, TASKS = "The trade-off", "Along the sequence", "Accuracy matrices", "tasks"
_INK, _CARD, _MUTED = "var(--ink)", "var(--card)", "var(--muted)"
_DASH = alt.condition("datum.stores", alt.value([6, 4]), alt.value([1, 0]))
_HEAVY = alt.condition("datum.plain", alt.value(3.0), alt.value(1.8))
_POINTS = metric("average")


def _front_line(points: Sequence[Row], x: Metric, y: Metric) -> list[Row]:
    """The corners of the front: points without stored data that none beats on both axes."""
    good = [p for p in points if not p["stores"]]

    def beats(a: Row, b: Row) -> bool:
        gains = (x.better * (a["x"] - b["x"]), y.better * (a["y"] - b["y"]))
        return bool(min(gains) >= 0 and max(gains) > 0)

    top = sorted((p for p in good if not any(beats(q, p) for q in good)), key=lambda p: p["x"])
    turns = [
        (one["x"], two["y"]) if x.better > 0 else (two["x"], one["y"])
        for one, two in itertools.pairwise(top)
    ]
    corners = [(p["x"], p["y"]) for p in top]
    path = [c for pair in itertools.zip_longest(corners, turns) for c in pair if c]
    return [{"x": a, "y": b, "at": i} for i, (a, b) in enumerate(path)]


def _scatter(group: Group, look: Look, kx: str, ky: str, caption: str) -> Panel | None:
    """One mark a cell, with the intervals of both metrics."""
    mx, my = metric(kx), metric(ky)
    alone = kx == "share"  # of ways of tuning, which have no strengths
    cells = [cell for cell in group.cells if not (alone and cell.held)]
    found = [(c, a, b) for c in cells if (a := c.mean(kx)) and (b := c.mean(ky))]
    found = [entry for entry in found if entry[1].mean > 0 or not alone]
    if not found:
        return None
    sx, x_ticks = scale_of([a for _, a, _ in found], mx.factor, mx.unit, bend=alone)
    sy, y_ticks = scale_of([b for _, _, b in found], my.factor, my.unit, bend=ky == "kl")
    points = [
        look.row(cell, x_text=mx.text(a), y_text=my.text(b))
        | ends(a, mx.factor, "x")
        | ends(b, my.factor, "y")
        for cell, a, b in found
    ]
    if y_ticks:  # a logarithmic axis has no place for an end at or below 0
        points = [p | {"y_low": max(p["y_low"], y_ticks[0] / 10)} for p in points]
    x = alt.X("x:Q", title=mx.title, scale=sx, axis=axis(x_ticks, grid=False))
    y = alt.Y("y:Q", title=my.title, scale=sy, axis=axis(y_ticks))
    marked = look.of(points)
    base = data(points).encode(x=x, y=y, color=marked["color"])
    rule = base.mark_rule(strokeWidth=1.3, opacity=0.4, clip=True)
    layers = [rule.encode(y=alt.Y("y_low:Q"), y2="y_high:Q")]
    if not alone:
        layers.append(rule.encode(x=alt.X("x_low:Q"), x2="x_high:Q"))
        thin = base.mark_line(strokeWidth=1.4, opacity=0.45, clip=True)
        layers.append(thin.encode(order="strength:Q"))
        dashed = data(_front_line(points, mx, my)).encode(x=x, y=y, order="at:Q")
        layers.append(dashed.mark_line(stroke=_MUTED, strokeDash=[5, 4], clip=True))
    ring = base.transform_filter("datum.plain").mark_point(size=260, strokeWidth=1.5)
    said = tips(name="method", x_text=mx.name, y_text=my.name, seeds="seeds")
    marks = base.mark_point(filled=True, size=85, opacity=1).encode(
        shape=marked["shape"], tooltip=said
    )
    hollow = base.transform_filter("datum.stores").mark_point(filled=True, size=26, opacity=1)
    hollow = hollow.encode(shape=marked["shape"], color=alt.value(_CARD))
    first = sorted(points, key=lambda p: (not p["plain"], my.better * -p["y"]))
    layers += [ring, marks, hollow, names_beside(first, x, y)]
    against = {"share": "the trained share", "loss": "test loss"}.get(kx, "learning")
    title, wide = f"{my.name} against {against}", len(points) > 10
    chart = alt.layer(*layers)
    return Panel(f"{ky}-{kx}", TRADE, title, caption, chart, points, wide)


def _fronts(group: Group) -> Panel | None:
    """The best score of each family within a budget of nats; the best family first."""
    found = fronts(group)
    known = [(f, f.area.mean) for f in found if f.area is not None and f.points]
    if not has_sweeps(found) or not known:
        return None
    least = min(cost for f, _ in known for points in f.points for cost, _ in points if cost > 0)
    limit = known[0][0].limit
    steps = [least * (limit / least) ** (i / 200) for i in range(201)]
    free = itertools.chain(COLOURS, itertools.repeat(_MUTED))
    colours: dict[str, str] = {}
    rows: list[Row] = []
    for f, area in sorted(known, key=lambda entry: -entry[1]):
        name = f"{f.name}{' (stores data)' if f.stores else ''}  {100 * area:.1f}"
        colours[name] = PLAIN if f.diff is None else next(free)
        about = {"series": name, "stores": f.stores, "plain": f.diff is None}
        rows += [about | {"x": k, "y": 100 * f.score(k)} for k in steps]
    scale = alt.Scale(type="log", domain=[least, limit], nice=False)
    ticks = axis(round_ticks(least, limit), grid=False)
    range_ = alt.Scale(domain=list(colours), range=list(colours.values()))
    line = data(rows).mark_line(interpolate="step-after").encode(
        x=alt.X("x:Q", title=metric("kl").title, scale=scale, axis=ticks),
        y=alt.Y("y:Q", title=_POINTS.title, scale=alt.Scale(zero=False), axis=axis()),
        color=alt.Color("series:N", title=None, scale=range_),
        strokeDash=_DASH, strokeWidth=_HEAVY, tooltip=tips(series="family"),
    )  # fmt: skip
    caption = (
        "The best average score of a family's settings within a budget of KL to the base; beside "
        "each name its mean over all budgets."
    )
    title = "Best score within a budget (mean over budgets)"
    return Panel("front", TRADE, title, caption, line, rows, wide=True)


def _lines(rows: Sequence[Row], look: Look, x: alt.X, y: alt.Y, what: str, key: str = "") -> Any:
    """A line a cell; a click on the legend, which is there with a `key`, picks one out."""
    marked = look.of(rows, legend=bool(key))
    base = data(rows).encode(x=x, y=y, color=marked["color"], detail="name:N")
    line = base.mark_line(clip=True).encode(strokeDash=_DASH, strokeWidth=_HEAVY)
    marks = base.mark_point(filled=True, opacity=1, size=48 if key else 22).encode(
        shape=marked["shape"],
        tooltip=tips(name="method", y_text=what, when="when", seeds="seeds"),
    )
    if not key:
        return alt.layer(line, marks)
    pick = alt.selection_point(f"pick_{key}", fields=["series"], bind="legend")
    faint = alt.condition(pick, alt.value(1.0), alt.value(0.12))
    return alt.layer(line.encode(opacity=faint), marks.encode(opacity=faint)).add_params(pick)


def _best_of_series(group: Group, look: Look) -> list[Cell]:
    """One cell a series: the strength with the best average score."""
    best: dict[str, tuple[float, Cell]] = {}
    for cell in group.cells:
        score, one = cell.mean("average"), look.series[id(cell)]
        if score is not None and (one not in best or score.mean > best[one][0]):
            best[one] = score.mean, cell
    return [cell for _, cell in best.values()]


def has_course(group: Group, kind: str) -> bool:
    """Whether there is more to follow than the first task and the last."""
    known = max(sum(e is not None for e in cell.curve(kind)) for cell in group.cells)
    return known >= min(3, group.length)


def _when(group: Group, place: int) -> str:
    if place == 0:
        return "before learning"
    return (
        f"after {group.tasks[place - 1]} (task {place})" if group.named else f"after task {place}"
    )


def _places(group: Group) -> list[str]:
    """What was learned at each place, with its number."""
    tasks = enumerate(group.tasks, 1)
    return [f"{i}. {task}" if group.named else f"task {i}" for i, task in tasks]


def _course(group: Group, look: Look, kind: str, title: str, caption: str) -> Panel | None:
    """The mean score of the tasks so far ("seen"), or the KL ("kl"), along the tasks."""
    m = metric("kl" if kind == "kl" else "average")
    cells = _best_of_series(group, look)
    found = [(c, i, e) for c in cells for i, e in enumerate(c.curve(kind), 1) if e is not None]
    if not found or not has_course(group, kind):
        return None
    rows = [
        look.row(cell, x=place, y_text=m.text(e), when=_when(group, place), seeds=e.n)
        | ends(e, m.factor, "y")
        for cell, place, e in found
    ]
    means = [Estimate(e.mean, None, None, 1) for _, _, e in found]
    scale, ticks = scale_of(means, m.factor, m.unit, bend=kind == "kl")
    across = alt.Scale(domain=[1, group.length], nice=False, padding=10)
    places = axis([float(i) for i in range(1, group.length + 1)], grid=False, labelOverlap=True)
    x = alt.X("x:Q", title="tasks learned", axis=places, scale=across)
    y = alt.Y("y:Q", title=m.unit, scale=scale, axis=axis(ticks))
    chart = _lines(rows, look, x, y, title, kind)
    return Panel(f"course-{kind}", ALONG, title, caption, chart, rows)


def _each_task(group: Group, look: Look) -> list[Panel]:
    """The score of each task along the sequence; all panels span the same."""
    tables = [(cell, cell.matrix()) for cell in _best_of_series(group, look)]
    columns = [
        [(c, i, e) for c, table in tables for i, row in enumerate(table) if (e := row[j])]
        for j in range(group.length)
    ]
    means = [[100 * e.mean for _, _, e in column] for column in columns]
    room = 1.12 * max([2.0, *(max(span) - min(span) for span in means if span)])
    out = []
    for j, (task, column, span) in enumerate(zip(_places(group), columns, means, strict=True)):
        if not span:
            continue
        rows = [
            look.row(cell, x=i, y=100 * e.mean, y_text=_POINTS.text(e), seeds=e.n)
            | {"when": _when(group, i), "task": task}
            for cell, i, e in column
        ]
        low = (min(span) + max(span) - room) / 2
        low = low if min(span) < 0 else max(0.0, low)  # no axis below a score of 0
        across = alt.Scale(domain=[0, group.length], padding=6)
        upright = alt.Scale(domain=[low, low + room], nice=False, zero=False)
        places = axis(range(group.length + 1), grid=False, labelOverlap=True)
        x = alt.X("x:Q", title=None, axis=places, scale=across)
        y = alt.Y("y:Q", title=None, axis=alt.Axis(tickCount=4), scale=upright)
        learned = data([{"x": j + 1}]).mark_rule(stroke=_MUTED, strokeDash=[2, 4]).encode(x=x)
        chart = alt.layer(learned, _lines(rows, look, x, y, task)).properties(height=150)
        out.append(Panel(f"task-{j + 1}", TASKS, task, "", chart, rows, document=False))
    return out


def _matrix(group: Group, look: Look, first: Cell | None, key: str, caption: str) -> Panel | None:
    """The accuracy matrix of one method, which a menu chooses."""
    tables = {look.names[id(cell)]: table for cell in group.cells if (table := cell.matrix())}
    if first is None or not tables:
        return None
    learned = group.tasks if group.named else _places(group)
    after = ["before", *_places(group)]
    many = group.length > 6
    rows: list[Row] = []
    for name, table in tables.items():
        for (i, row), (j, task) in itertools.product(enumerate(table), enumerate(learned)):
            e, new = row[j], table[j + 1][j] if i > j + 1 else None
            about: Row = {"name": name, "after": after[i], "task": task, "when": _when(group, i)}
            about["y_text"], about["learned"] = _POINTS.text(e), i == j + 1
            about["change"] = f"{100 * (e.mean - new.mean):+.1f} points" if new and e else ""
            full = MISSING if e is None else _POINTS.pair(e)[0]
            about["shown"] = f"{100 * e.mean:.0f}" if many and e else full
            rows.append(about | {"y": 100 * e.mean if e else None})
    known = [row["y"] for row in rows if row["y"] is not None] or [0.0]
    low, high = min(known), max(known)
    plain: dict[str, Any] = {"domain": False, "ticks": False, "labelLimit": 110}
    top = alt.Axis(orient="top", labelAngle=-38 if many else 0, labelOverlap=False, **plain)
    menu = alt.binding_select(options=list(tables), name="Method ")
    pick = alt.param(f"matrix_{key}", value=look.names[id(first)], bind=menu)
    base = data(rows).transform_filter(f"datum.name == matrix_{key}").encode(
        x=alt.X("task:N", title=None, sort=None, axis=top),
        y=alt.Y("after:N", title=None, sort=None, axis=alt.Axis(**plain)),
        tooltip=tips(task="task", y_text="score", when="when", change="since it was learned"),
    )  # fmt: skip
    heat = alt.Scale(domain=[low, max(high, low + 1)], range=["var(--cold)", "var(--hot)"])
    shade = (
        base.transform_filter("datum.y !== null")
        .mark_rect(cornerRadius=3, stroke=_CARD, strokeWidth=2)
        .encode(color=alt.Color("y:Q", legend=None, scale=heat))
    )
    ink = alt.condition(
        f"datum.y > {low + 0.45 * (high - low):.6g}", alt.value(_CARD), alt.value(_INK)
    )
    band: dict[str, Any] = {"width": {"band": 0.86}, "height": {"band": 0.8}}
    frame = base.transform_filter("datum.learned").mark_rect(
        fillOpacity=0, strokeWidth=1.6, cornerRadius=2, **band
    )
    text = base.mark_text(fontSize=11 if many else 12.5).encode(text="shown:N", color=ink)
    chart = alt.layer(shade, frame.encode(stroke=ink), text).add_params(pick)
    chart = chart.properties(height=alt.Step(30), **({"width": alt.Step(30)} if many else {}))
    return Panel(f"matrix-{key}", MATRIX, "Accuracy matrix", caption, chart, rows, document=False)


def panels(group: Group) -> list[Panel]:
    """All figures of a group that have something to show."""
    look, learned = Look(group), group.learned
    made: list[Panel | None] = [_fronts(group)]
    for key in ("forgetting", "kl") if len(group.cells) > 1 else ():
        made.append(_scatter(
            group, look, learned, key,
            "One mark for each adapter, method and strength, with 95 % intervals; those that reach "
            "the edge go on beyond it. Plain LoRA wears a ring, hollow marks keep rows of earlier "
            "tasks, thin lines join the strengths of a method. Dashed: the front, where no method "
            "without stored data is better on both axes.",
        ))  # fmt: skip
    if len({cell.mean("share") for cell in group.cells if not cell.held} - {None}) > 1:
        made.append(_scatter(
            group, look, "share", "loss" if learned == "loss" else "average",
            "Each way of tuning without a retention method, by the share of the base model's "
            "parameters that it trains.",
        ))  # fmt: skip
    if group.length > 1:
        best = "Of each method the strength with the best average score. "
        means = "Mean over the tasks learned until then."
        made.append(_course(group, look, "seen", "Mean score of the tasks so far", best + means))
        moved = "KL to the base on held-out source text."
        made.append(_course(group, look, "kl", "KL to the base", best + moved))
        others = [c for c in _best_of_series(group, look) if not c.plain and not c.stores]
        top = max(others, key=lambda c: e.mean if (e := c.mean("average")) else 0.0, default=None)
        drawn = "" if group.named else " Seeds draw the order: task 1 is what each learned first."
        made += [
            _matrix(group, look, cell, key, about)
            for cell, key, about in (
                (group.plain or top, "a", f"Row by row the model learns one more task.{drawn}"),
                (top if group.plain else None, "b", "Both pictures share their colours."),
            )
        ]
        made += _each_task(group, look)
    made += training(group, look)
    return [panel for panel in made if panel is not None]
