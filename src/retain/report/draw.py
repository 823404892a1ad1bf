"""Turns the figures into Vega for the page, and into PNG and SVG for documents."""

from __future__ import annotations

import copy
import json
import re
import struct
import zlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from retain.files import whole_file
from retain.report.axes import Panel

__all__ = ["MARK", "asset", "compiled", "picture", "png", "svg", "write_figure"]

MARK = "drawn by retain report"
"""What every picture holds, and what tables in a file end in."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_CONFIG: dict[str, Any] = {
    "font": _FONT,
    "background": "var(--card)",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)", "titleColor": "var(--ink)", "gridColor": "var(--grid)",
        "domainColor": "var(--axis)", "tickColor": "var(--axis)", "labelFontSize": 11.5,
        "titleFontSize": 12.5, "titleFontWeight": "normal", "labelPadding": 5,
        "labelSeparation": 5,
    },
    "axisX": {"titleAnchor": "end", "titlePadding": 8},
    "axisY": {
        "titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleX": -38, "titleY": -12,
        "domain": False, "ticks": False, "minExtent": 38,
    },
    "axisTop": {"labelColor": "var(--muted)"},
    "legend": {"labelColor": "var(--ink)", "labelFontSize": 12, "symbolSize": 70, "offset": 8,
               "orient": "bottom", "symbolOpacity": 1},
    "title": {"color": "var(--ink)", "anchor": "start", "fontSize": 14, "frame": "group"},
    "concat": {"spacing": 34},
}  # fmt: skip
_EDGE = {"stroke": {"value": "var(--card)"}, "strokeWidth": {"value": 5},
         "strokeJoin": {"value": "round"}}  # fmt: skip
_PLACES = {
    "anchor": ["right", "left", "top", "bottom", "top-right", "bottom-right", "top-left",
               "bottom-left", "top", "bottom"],
    "offset": [10, 10, 9, 9, 7, 7, 7, 7, 20, 20],
}  # fmt: skip


@cache
def asset(name: str) -> str:
    """A file of the package as text."""
    return resources.files("retain.report").joinpath(name).read_text(encoding="utf-8")


_ROOM = "isFinite(containerSize()[0]) ? containerSize()[0] - 50 : width"
"""Of a figure as wide as its container, without its axis: the same before its layout and after."""


def _arrange(scope: dict[str, Any], width: str, height: str, room: str = "") -> None:
    """What Vega can do and Vega-Lite cannot ask for, in place.

    The marks called "names" find places of their own, each with an edge that parts it from a line
    behind it, and a legend has the columns that fit into the `room`, the width where none is said.
    A width that the layout changes would give more rows than the layout has left a place for.
    """
    fit = f"max(1, floor(({room or width}) / 132))"
    for legend in scope.get("legends", []):
        legend |= {"columns": {"signal": fit}, "labelLimit": {"signal": f"{width} / {fit} - 26"}}
    for place, mark in reversed(list(enumerate(scope.get("marks", [])))):
        look = mark["encode"]["update"] if "encode" in mark else {}
        if mark["type"] == "group":
            sides = [look.get(side, {}).get("signal") for side in ("width", "height")]
            _arrange(mark, *(sides if all(sides) else (width, height)))
        elif mark.get("name", "").startswith("names"):
            for side in "xy":
                look[side]["offset"] = {"field": f"d{side}"}
            del look["description"]  # the marks are described
            size = [{"signal": width}, {"signal": height}]
            mark |= {"aria": False, "transform": [{"type": "label", "size": size, **_PLACES}]}
            edge = copy.deepcopy(mark) | {"name": f"edges_of_{mark['name']}"}
            edge["encode"]["update"] |= _EDGE
            scope["marks"].insert(place, edge)


def compiled(chart: Any) -> dict[str, Any]:
    """The chart as Vega, its colours still by name."""
    spec = chart.to_dict(validate=False) | {"config": _CONFIG}
    vega: dict[str, Any] = vl_convert.vegalite_to_vega(spec)
    _arrange(vega, "width", "height", _ROOM if "fit" in str(vega.get("autosize")) else "")
    return vega


def _coloured(vega: dict[str, Any]) -> dict[str, Any]:
    """The spec with the colours of the light theme."""
    css = asset("style.css")
    light = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]+)", css[: css.index("@media")]))
    text = re.sub(r"var\((--[\w-]+)\)", lambda found: light[found[1]], json.dumps(vega))
    out: dict[str, Any] = json.loads(text)
    return out


def picture(
    panels: Sequence[Panel], *, size: tuple[int, int] = (430, 270)
) -> dict[str, Any] | None:
    """The panels for documents side by side, as Vega; None where there are none."""
    shown = [
        panel.chart.properties(width=size[0], height=size[1], title=panel.title)
        for panel in panels
        if panel.document
    ]
    if not shown:
        return None
    joined = alt.concat(*shown, columns=2).resolve_scale(color="independent", shape="independent")
    return _coloured(compiled(joined.properties(padding=14)))


def write_figure(path: Path, chart: Any) -> None:
    """Write any chart in the report's style as PNG."""
    with whole_file(path, "a figure") as scratch:
        scratch.write_bytes(png(_coloured(compiled(chart.properties(padding=14)))))


def svg(vega: dict[str, Any]) -> str:
    """A picture as SVG."""
    return f"{vl_convert.vega_to_svg(vega)}\n<!-- {MARK} -->\n"


def png(vega: dict[str, Any], note: str = "") -> bytes:
    """A picture as PNG; a note is kept inside, so that a check can tell a stale picture."""
    data = bytes(vl_convert.vega_to_png(vega, scale=1.6))
    body = b"tEXtDescription\0" + f"{MARK} {note}".encode("latin-1", "replace")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:-12] + chunk + data[-12:]
