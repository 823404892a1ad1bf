"""The curve of ``retain soften``: what is kept of the learning against what is forgotten.

As a picture, and as a table of its points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import altair as alt
from pydantic import Field

from retain.intervals import Estimate
from retain.records import Part, Retention
from retain.report.axes import Panel, Row, axis, data, names_beside, scale_of, tips
from retain.report.cells import short_name
from retain.report.draw import picture, png, svg
from retain.report.metrics import number, short
from retain.report.tables import Column, Entry, Table
from retain.report.tables import Row as Line

__all__ = [
    "SOFTEN", "Softening", "soften_panel", "soften_pictures", "soften_table", "soften_title",
]  # fmt: skip

SOFTEN = "retain.soften/1"
_KINDS: tuple[tuple[str, str, list[float]], ...] = (
    ("scaled as a whole, predicted", "var(--axis)", [2, 3]),
    ("scaled as a whole, measured", "var(--base)", [1, 0]),
    ("softened, predicted", "var(--s0)", [1, 0]),
    ("softened, measured", "var(--lora)", [1, 0]),
)


class _Measured(Retention):
    after: int = 0


class _Point(Part):
    nats: float
    learned: float
    scaled: float
    measured: _Measured | None = None
    scaled_measured: _Measured | None = None


class Softening(Part):
    """What the report shows of a ``soften.json``."""

    schema_name: Literal["retain.soften/1"] = Field(alias="schema")
    created: str | None = None
    unit: str = "nats per token"
    model: dict[str, Any] = Field({})
    chosen: _Point
    curve: list[_Point]


def _row(kind: int, nats: float, kept: float, ends: Any = None) -> Row:
    low, high = ends or (nats, nats)
    said = f"{number(nats)} nats per token, {short(100 * kept)}% kept"
    return {
        "name": _KINDS[kind][0], "x": nats, "y": 100 * kept, "x_low": low, "x_high": high,
        "said": said,
    }  # fmt: skip


def soften_panel(found: Softening) -> Panel:
    """Learning kept against nats forgotten, as predicted and, where it was, as measured."""
    points = sorted([*found.curve, found.chosen], key=lambda p: -p.nats)
    rows = []
    for p in points:
        rows += [_row(0, p.nats, p.scaled), _row(2, p.nats, p.learned)]
        for kind, moved, kept in ((1, p.scaled_measured, p.scaled), (3, p.measured, p.learned)):
            if moved is not None and moved.kl is not None:
                rows.append(_row(kind, moved.kl, kept, moved.kl_interval))
    along = [Estimate(row["x"], row["x_low"], row["x_high"], 1) for row in rows]
    scale, ticks = scale_of(along, bend=True)
    x = alt.X("x:Q", title="forgotten: KL to the base (nats per token)", scale=scale,
              axis=axis(ticks, grid=False))  # fmt: skip
    y = alt.Y("y:Q", title="learning kept, as predicted (%)", axis=axis(),
              scale=alt.Scale(domain=[0, 104], nice=False))  # fmt: skip
    there = [kind for kind in _KINDS if any(row["name"] == kind[0] for row in rows)]
    kinds, dashes = [kind[0] for kind in there], [kind[2] for kind in there]
    scale = alt.Scale(domain=kinds, range=[kind[1] for kind in there])
    color = alt.Color("name:N", title=None, scale=scale)
    dash = alt.StrokeDash("name:N", legend=None, scale=alt.Scale(domain=kinds, range=dashes))
    base = data(rows).encode(x=x, y=y, color=color)
    line = base.mark_line(strokeWidth=2, clip=True).encode(strokeDash=dash, order="x:Q")
    rule = base.mark_rule(strokeWidth=1.4, opacity=0.5, clip=True)
    rule = rule.encode(x=alt.X("x_low:Q"), x2="x_high:Q")
    marks = base.mark_point(filled=True, size=45, opacity=1)
    marks = marks.encode(tooltip=tips(name="line", said="point"))
    one = found.chosen
    text = f"{short(one.nats)} nats, {short(100 * one.learned)}% kept"
    chosen = [{"x": one.nats, "y": 100 * one.learned, "name": text, "plain": False}]
    ring = data(chosen).mark_point(size=260, stroke="var(--s0)", strokeWidth=1.8)
    chart = alt.layer(line, rule, marks, ring.encode(x=x, y=y), names_beside(chosen, x, y))
    caption = (
        "The adapter itself is at the upper right, ringed what was written. Learning is measured "
        f"as {found.unit}."
    )
    return Panel("soften", "", "A finished adapter, softened", caption, chart, rows)


def soften_title(found: Softening) -> str:
    """What the part of a report about it is called."""
    return f"Softening of an adapter of {short_name(str(found.model.get('name', '?')))}"


def soften_table(found: Softening) -> Table:
    """What was written, and the points of the curve; no KL where none was measured."""
    named = [("written", found.chosen), *((f"{i}", p) for i, p in enumerate(found.curve, 1))]
    rows = [
        Line(name, "", [
            Entry(number(p.nats), value=p.nats), _share(p.learned), _moved(p.measured),
            _share(p.scaled), _moved(p.scaled_measured),
        ])
        for name, p in named
    ]  # fmt: skip
    nats = "nats per token"
    head = [
        Column("Point"), Column("Forgotten, predicted", nats), Column("Softened: kept", "%"),
        Column("Softened: measured KL", nats), Column("Scaled: kept", "%"),
        Column("Scaled: measured KL", nats),
    ]  # fmt: skip
    kept = [i for i in range(5) if any(row.entries[i].value is not None for row in rows)]
    head = [head[0], *(head[i + 1] for i in kept)]
    rows = [Line(row.name, "", [row.entries[i] for i in kept]) for row in rows]
    about = (
        "Kept: of the learning, as predicted. Scaled (dotted): the whole adapter times one number, "
        "to as many predicted nats"
    )
    if len(kept) > 3:
        about += ". Below a measured KL its 95 % interval"
    return Table("curve", "The curve", about, head, rows)


def _share(kept: float) -> Entry:
    return Entry(short(100 * kept), value=100 * kept)


def _moved(measured: Retention | None) -> Entry:
    if measured is None or measured.kl is None:
        return Entry()
    low, high = measured.kl_interval or (None, None)
    ends = "" if low is None or high is None else f"[{number(low)}, {number(high)}]"
    return Entry(number(measured.kl), value=measured.kl, low=low, high=high, ends=ends)


def soften_pictures(record: Mapping[str, Any]) -> dict[str, bytes]:
    """``soften.svg`` and ``soften.png`` of the record of a softening."""
    vega = picture([soften_panel(Softening.model_validate(record))], size=(600, 330))
    assert vega is not None
    return {"soften.svg": svg(vega).encode(), "soften.png": png(vega)}
