"""What the figures share: a panel, their data, axes, tool tips, and names beside marks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from retain.intervals import Estimate

__all__ = [
    "LEAST", "Panel", "Row", "axis", "data", "ends", "limits", "names_beside", "scale_of", "tips",
]  # fmt: skip

Row = dict[str, Any]
LEAST = 4.0
"""Points that an axis of scores spans at least."""
SPREAD = 12.0
"""Means above 0 that differ by more than this factor stand on a logarithmic axis."""


@dataclass(frozen=True)
class Panel:
    """One figure.

    Attributes:
        key: names its file.
        part: what it stands below on the page.
        title, caption: for people.
        chart: in Vega-Lite, by Altair; as wide as its container where it has no width.
        rows: the numbers that are drawn.
        wide: alone in its row.
        document: whether it is in the picture for documents.
    """

    key: str
    part: str
    title: str
    caption: str
    chart: Any
    rows: list[Row]
    wide: bool = False
    document: bool = True


def data(rows: Sequence[Row]) -> Any:
    """A chart of the rows, without a mark yet; as text they are neither copied nor checked."""
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    return alt.Chart(alt.InlineData(values=text, format=alt.JsonDataFormat(type="json")))


def axis(ticks: Sequence[float] | None = None, **more: Any) -> alt.Axis:
    """An axis with these ticks, or with some of Vega's choice."""
    chosen = {"tickCount": 6} if ticks is None else {"values": list(ticks), "format": "~g"}
    return alt.Axis(**chosen, **more)


def tips(**named: str) -> list[alt.Tooltip]:
    """A tool tip: the title of each field."""
    return [alt.Tooltip(f"{field}:N", title=title) for field, title in named.items()]


def ends(found: Estimate, factor: float, key: str) -> Row:
    """An estimate as the columns KEY, KEY_low and KEY_high."""
    low = found.mean if found.low is None else found.low
    high = found.mean if found.high is None else found.high
    return {key: factor * found.mean, f"{key}_low": factor * low, f"{key}_high": factor * high}


def limits(found: Sequence[Estimate], factor: float, unit: str) -> tuple[float, float]:
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
    floor = -0.04 * (high - low + 2 * pad) if min(means) >= 0 else low - pad
    return max(low - pad, floor), high + pad


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` above 0 to `high`."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    parts = (1, 2, 5) if len(tens) <= 3 else (1, 3) if len(tens) <= 4 else (1,)
    every = [float(f"{m}e{k}") for k in tens for m in parts]
    return [v for v in every if low * 0.999 <= v <= high * 1.001]


def scale_of(
    found: Sequence[Estimate], factor: float = 1.0, unit: str = "", *, bend: bool = False
) -> tuple[alt.Scale, list[float] | None]:
    """The scale of an axis, whose values are `factor` times those drawn, and its ticks or None.

    With `bend` it is logarithmic where the means spread much, and linear near 0 where one is 0.
    """
    means = [factor * e.mean for e in found]
    above = [m for m in means if m > 0]
    if not (bend and above and min(means) >= 0 and max(above) > SPREAD * min(above)):
        return alt.Scale(domain=limits(found, factor, unit), nice=False, zero=False), None
    least, high = max(min(above), max(above) * 1e-3), max(above) * 1.6
    if len(above) < len(means):
        scale = alt.Scale(type="symlog", constant=least, domain=[0, high], nice=False)
        return scale, [0.0, *round_ticks(least, high)]
    low = min(above) / 1.6
    return alt.Scale(type="log", domain=[low, high], nice=False), round_ticks(low, high)


def names_beside(points: Sequence[Row], x: alt.X, y: alt.Y) -> Any:
    """The names of marks; `retain.report.draw` finds places where none covers another.

    Rows without a name stand around each mark, so that no other name is put there.
    """
    around = ((-5, 0), (5, 0), (0, -5), (0, 5))
    rows = [{**p, "dx": 0, "dy": 0} for p in points]
    rows += [{**p, "name": "", "dx": dx, "dy": dy} for p in points for dx, dy in around]
    kept = [{k: row[k] for k in ("x", "y", "name", "dx", "dy")} for row in rows]
    text = data(kept).mark_text(fontSize=11.5, fill="var(--ink)")
    return text.encode(x=x, y=y, text="name:N").properties(name="names")
