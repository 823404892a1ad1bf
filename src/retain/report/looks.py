"""How the cells of a group look in its figures: names, colours and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from retain.report.axes import Row
from retain.report.cells import Cell, Group
from retain.report.names import names, series

__all__ = ["COLOURS", "PLAIN", "Look"]

COLOURS = [f"var(--s{i})" for i in range(12)]
PLAIN = "var(--lora)"
_SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down")


class Look:
    """Name, colour and shape of each cell of a group, the same in all its figures."""

    def __init__(self, group: Group) -> None:
        self.series = dict(zip(map(id, group.cells), series(group), strict=True))
        self.names = dict(zip(map(id, group.cells), names(group), strict=True))
        plain = {self.series[id(cell)] for cell in group.cells if cell.plain}
        others = [s for s in dict.fromkeys(self.series.values()) if s not in plain]
        self.looks = dict.fromkeys(plain, (PLAIN, "circle"))
        self.looks |= {s: (COLOURS[i % 12], _SHAPES[i % 5]) for i, s in enumerate(others)}

    def row(self, cell: Cell, **more: Any) -> Row:
        """A row of a figure's data about a cell."""
        about = {
            "name": self.names[id(cell)],
            "series": self.series[id(cell)],
            "strength": cell.strength,
            "stores": cell.stores,
            "plain": cell.plain,
            "seeds": cell.seeds,
        }
        return about | more

    def of(self, rows: Sequence[Row], *, legend: bool = True) -> dict[str, Any]:
        """Colour and shape of the series in the rows, as encodings."""
        there = {row["series"] for row in rows}
        shown = {name: look for name, look in self.looks.items() if name in there}
        colours, shapes = zip(*shown.values(), strict=True)
        more: dict[str, Any] = {"title": None} if legend else {"title": None, "legend": None}
        scales = [alt.Scale(domain=list(shown), range=list(r)) for r in (colours, shapes)]
        return {
            "color": alt.Color("series:N", scale=scales[0], **more),
            "shape": alt.Shape("series:N", scale=scales[1], **more),
        }
