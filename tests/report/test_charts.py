"""The figures: what is drawn, along which axes, and as Vega."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from synthetic import (
    METHODS,
    TASKS,
    group_of,
    make_adapters,
    make_long,
    make_result,
    make_run,
    make_softening,
    make_study,
    make_wide,
)

from retain.intervals import Estimate
from retain.report.axes import LEAST, limits, scale_of
from retain.report.cells import Group, groups
from retain.report.charts import has_course, panels
from retain.report.draw import asset, compiled, picture, png, svg
from retain.report.metrics import number
from retain.report.results import Result, study_of
from retain.report.soften import soften_pictures
from retain.report.training import smooth


def _of_result() -> Group:
    return groups([study_of(Result.model_validate(make_result()))])[0]


def _alone(*values: float) -> list[Estimate]:
    return [Estimate(value, None, None, 1) for value in values]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (0.0521, "0.0521"), (9.1, "9.10"), (-0.015, "-0.0150"), (412.0, "412"),
        (134515008.0, "1.35e8"), (0.00000712, "7.12e-6"),
    ],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_a_tenth_of_a_point_does_not_fill_a_picture() -> None:
    low, high = limits(_alone(0.036, 0.038), 100.0, "points")
    assert (low + high) / 2 == pytest.approx(3.7)
    assert high - low == pytest.approx(LEAST)
    low, high = limits(_alone(0.036, 0.038), 1.0, "nats")
    assert low < 0.036 < 0.038 < high < 0.039
    low, high = limits(_alone(0.1, 0.5), 100.0, "points")
    assert low < 10 and high > 50 and high - low < 46


def test_wide_intervals_do_not_dwarf_the_means() -> None:
    wide = [Estimate(1.0, -50.0, 52.0, 3), Estimate(2.0, 1.9, 2.1, 3)]
    low, high = limits(wide, 1.0, "nats")
    assert -1 < low < 1 < 2 < high < 3


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.1, 0.5], None),
        ([0.01, 0.5], "log"),
        ([0.0, 0.01, 0.5], "symlog"),
        ([-0.1, 0.01, 2], None),
    ],
)
def test_axes_bend_where_values_spread(values: list[float], kind: str | None) -> None:
    scale, ticks = scale_of(_alone(*values), bend=True)
    found = scale.to_dict()
    assert found.get("type") == kind
    low, high = found["domain"]
    assert all(low <= value <= high for value in values)
    assert (ticks is None) == (kind is None)
    if ticks:
        assert 2 <= len(ticks) <= 11 and ticks == sorted(ticks)
        assert all(low <= tick <= high for tick in ticks)
        assert (ticks[0] == 0) == (kind == "symlog")


def test_smooth_keeps_short_runs_and_ends() -> None:
    assert smooth([2.0, 1.0]) == [2.0, 1.0]
    long = [float(i % 2) for i in range(100)]
    assert smooth(long)[0] == long[0]
    assert 0.3 < smooth(long)[50] < 0.7


def test_a_course_of_two_points_is_not_drawn() -> None:
    data = make_study()
    whole = group_of(data)
    assert has_course(whole, "seen") and has_course(whole, "kl")
    for run in data["runs"]:
        last = len(run["tasks"]) - 1
        for i, row in enumerate(run["matrix"]):
            row[:] = [s if i in (j, last) else None for j, s in enumerate(row)]
        run["retention"] = run["retention"][-1:]
    ends = group_of(data)
    assert sum(e is not None for e in ends.cells[0].curve("seen")) == 2
    assert not has_course(ends, "seen") and not has_course(ends, "kl")


@pytest.mark.parametrize("share", [0.0073, 0.02])
def test_scores_are_drawn_against_shares_where_these_differ(share: float) -> None:
    """Two ways of plain training of one size would be two points above each other."""
    again = ("fitted", *METHODS[0][1:])
    runs = [make_run(TASKS, METHODS[0], 0), make_run(TASKS, again, 0, share=share)]
    keys = [panel.key for panel in panels(group_of({**make_study(), "runs": runs}))]
    assert ("average-share" in keys) is (share == 0.02)


@pytest.mark.parametrize("length", [2, 4])
def test_each_task_has_one_tick_for_each_place(length: int) -> None:
    """Vega has more ticks than there are whole numbers, and rounded their labels."""
    runs = [make_run(TASKS[:length], METHODS[0], seed) for seed in range(2)]
    drawn = {panel.key: panel for panel in panels(group_of({"name": "s", "runs": runs}))}
    spec = drawn["task-1"].chart.to_dict(validate=False)
    ticks = [layer["encoding"]["x"]["axis"]["values"] for layer in _layers(spec)]
    assert ticks and all(values == list(range(length + 1)) for values in ticks)


def _layers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of a chart that have an axis below."""
    inner = [one for layer in spec.get("layer", []) for one in _layers(layer)]
    return inner or [spec] * ("axis" in spec.get("encoding", {}).get("x", {}))


def test_the_numbers_that_are_drawn() -> None:
    group = group_of(make_study())
    drawn = {panel.key: panel.rows for panel in panels(group)}
    assert list(drawn) == [
        "forgetting-learning", "kl-learning", "course-seen", "course-kl", "matrix-a", "matrix-b",
        *(f"task-{i}" for i in range(1, 5)),
    ]  # fmt: skip
    for row, cell in zip(drawn["forgetting-learning"], group.cells, strict=True):
        x, y = cell.mean("learning"), cell.mean("forgetting")
        assert x and y
        assert (row["x"], row["y"]) == pytest.approx((100 * x.mean, 100 * y.mean))
        if y.low is not None:
            assert row["y_low"] == pytest.approx(100 * y.low)
    assert [row["stores"] for row in drawn["kl-learning"]].count(True) == 1
    shown = {row["name"] for row in drawn["course-seen"]}
    assert "K-FAC 10" in shown and "K-FAC 100" not in shown, "the best strength of each method"
    plain = [row for row in drawn["matrix-a"] if row["name"] == "plain LoRA"]
    assert len(plain) == 5 * 4 and sum(row["learned"] for row in plain) == 4
    curve = group.cells[0].curve("kl")
    found = [row["y"] for row in drawn["course-kl"] if row["name"] == "plain LoRA"]
    assert found == [e.mean for e in curve if e]


def test_a_training_is_drawn_with_its_predictions() -> None:
    drawn = {panel.key: panel.rows for panel in panels(_of_result())}
    assert list(drawn) == ["kl-learning", "loss", "kl"]
    assert {row["name"] for row in drawn["loss"]} == {"plain LoRA", "retention 100"}
    assert len(drawn["loss"]) == 2 * 64
    assert [row["kind"] for row in drawn["kl"]].count("measured") == 2 * 8


@pytest.mark.parametrize("key", ["loss", "kl"])
def test_strengths_of_one_colour_have_each_a_line_of_its_training(key: str) -> None:
    (panel,) = [panel for panel in panels(_of_result()) if panel.key == key]
    lines = [m for m in compiled(panel.chart)["marks"] if m["type"] == "group"]
    assert lines
    for line in lines:
        assert "name" in line["from"]["facet"]["groupby"]


@pytest.mark.parametrize("data", [make_study(), make_adapters(), make_wide(), make_long(), None])
def test_vega_draws_all(data: dict[str, Any] | None) -> None:
    group = group_of(data) if data else _of_result()
    found = panels(group)
    assert found
    for panel in found:
        vega = compiled(panel.chart)
        assert set(re.findall(r"var\((--\w+)\)", json.dumps(vega))) <= set(
            re.findall(r"(--\w+): #", asset("style.css"))
        )
    drawn = picture(found)
    assert drawn
    text = svg(drawn)
    assert "var(" not in text and "NaN" not in text
    for panel in found:
        assert (panel.title in text) is panel.document


def test_names_in_a_picture_do_not_cover_one_another() -> None:
    group = group_of(make_wide())
    (panel,) = [p for p in panels(group) if p.key == "kl-learning"]
    drawn = picture([panel])
    assert drawn
    named = {row["name"] for row in panel.rows}
    boxes, edges = [], []
    for found in re.finditer(r"<text([^>]*)>([^<]+)</text>", svg(drawn)):
        look, text = found.groups()
        at = re.search(r"translate\(([-\d.]+),([-\d.]+)\)", look)
        if text in named and at and 'opacity="0"' not in look and 'font-size="11.5px"' in look:
            align = re.search(r'text-anchor="(\w+)"', look)
            wide = 5.0 * len(text)
            left = {"middle": wide / 2, "end": wide}.get(align[1] if align else "start", 0.0)
            kept = edges if 'stroke="' in look else boxes
            kept.append((float(at[1]) - left, float(at[2]), wide))
    assert len(boxes) >= 8
    assert edges == boxes  # behind each name, so that no line crosses it
    for (x, y, w), (u, v, z) in itertools.combinations(boxes, 2):
        assert abs(y - v) > 8 or x + w < u or u + z < x


def test_a_softening_is_drawn() -> None:
    made = soften_pictures(make_softening())
    assert list(made) == ["soften.svg", "soften.png"]
    text = made["soften.svg"].decode()
    assert "0.1 nats, 70% kept" in text and "softened, measured" in text
    assert made["soften.png"].startswith(b"\x89PNG")


def test_a_picture_keeps_its_note() -> None:
    drawn = picture(panels(_of_result()))
    assert drawn
    first = png(drawn, "numbers abc")
    assert b"numbers abc" in first and first == png(drawn, "numbers abc")
    assert int.from_bytes(first[16:20]) >= 1200
