"""The data that the figures of the page are drawn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from retain.report.studies.cells import Cell, Group
from retain.report.studies.intervals import Estimate
from retain.report.studies.metrics import METRICS
from retain.report.studies.names import names, series, slug

__all__ = ["group_ids", "payload"]


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _estimate(found: Estimate | None) -> list[float | int | None] | None:
    if found is None:
        return None
    return [_round(found.mean), _round(found.low), _round(found.high), found.n]


def _cell(cell: Cell, group: Group, name: str, shared: str, colour: int) -> dict[str, Any]:
    alone = group.pooled
    return {
        "name": name,
        "series": shared,
        "colour": colour,
        "adapter": cell.adapter,
        "method": cell.label,
        "strength": cell.strength,
        "plain": cell.plain,
        "held": cell.held,
        "stores": cell.stores,
        "n": cell.seeds,
        "m": {m.key: _estimate(cell.mean(m.key)) for m in METRICS if group.has(m.key)},
        "seen": [] if alone else [_estimate(found) for found in cell.curve("seen")],
        "kl": [] if alone else [_estimate(found) for found in cell.curve("kl")],
        "matrix": [] if alone else [[_estimate(found) for found in row] for row in cell.matrix()],
    }


def group_ids(groups: Sequence[Group]) -> list[str]:
    """A name for each group that is fit for a file and an attribute, each once."""
    out: list[str] = []
    for group in groups:
        base = slug(f"{group.study} {group.model} {group.order}") or "group"
        name, more = base, 2
        while name in out:
            name, more = f"{base}-{more}", more + 1
        out.append(name)
    return out


def payload(groups: Sequence[Group]) -> str:
    """The data as JSON that may stand inside an HTML element."""
    made = []
    for name, group in zip(group_ids(groups), groups, strict=True):
        shared = series(group)
        plain = next((s for s, c in zip(shared, group.cells, strict=True) if c.plain), None)
        coloured = [s for s in dict.fromkeys(shared) if s != plain]
        cells = [
            _cell(cell, group, own, one, coloured.index(one) if one != plain else 0)
            for cell, own, one in zip(group.cells, names(group), shared, strict=True)
        ]
        made.append(
            {
                "id": name,
                "title": group.title,
                "study": group.study,
                "tasks": group.tasks,
                "pooled": group.pooled,
                "learned": group.learned,
                "has": [m.key for m in METRICS if group.has(m.key)],
                "cells": cells,
            }
        )
    about = {m.key: {"name": m.name, "unit": m.unit, "better": m.better} for m in METRICS}
    text = json.dumps(
        {"groups": made, "metrics": about},
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
