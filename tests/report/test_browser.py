"""The page in a real browser."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_chromium
from synthetic import (
    fail,
    make_adapters,
    make_eval,
    make_long,
    make_result,
    make_softening,
    make_study,
    make_wide,
    scoreless,
)

from retain.report import write_report

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (1440, 390)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium is installed (package chromium, or RETAIN_CHROMIUM)")
    made = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    data = {"study": make_study(), "adapters": make_adapters(), "long": make_long()}
    data |= {"wide": make_wide(), "scoreless": scoreless(), "result": make_result()}
    data |= {"eval": make_eval(), "soften": make_softening(), "failed": make_study("failed")}
    data["failed"]["runs"] = [fail(run, "no memory") for run in make_study()["runs"]]
    data["holes"] = make_study("holes")
    for run in data["holes"]["runs"]:
        run["retention"] = []
        run["before"] = [None for _ in run["before"]]
    files = {name: folder / f"{name}.json" for name in data}
    for name, path in files.items():
        path.write_text(json.dumps(data[name]), encoding="utf-8")
    given = {name: [path] for name, path in files.items()} | {"all": [*files.values()]}
    given["demo"] = [ROOT / "benchmarks" / "results" / "demo.json"]
    return {name: write_report(g, folder / f"{name}.html")[0] for name, g in given.items()}


def _open(browser: Browser, page: Path, width: int = 1440, *, dark: bool = False) -> None:
    """Opens a page and waits until all figures that can be seen are drawn."""
    browser.open(page, width, dark=dark)
    _drawn(browser)


def _drawn(browser: Browser) -> None:
    seen = "[...document.querySelectorAll('.plot')].filter((p) => p.offsetWidth)"
    for _ in range(200):
        if browser.js(f"{seen}.every((p) => p.querySelector('svg.marks'))"):
            return
        time.sleep(0.05)
    raise AssertionError("a figure is not drawn")


def _sound(browser: Browser) -> None:
    assert browser.complaints() == []
    assert browser.requests() == []
    wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = browser.js(wide)
    assert scroll <= client


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "name",
    [
        "study",
        "adapters",
        "long",
        "wide",
        "all",
        "holes",
        "scoreless",
        "result",
        "eval",
        "soften",
        "demo",
    ],
)
def test_opens_without_complaint_or_sideways_scroll(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    _open(browser, pages[name], width)
    _sound(browser)
    browser.js("document.querySelectorAll('details.part').forEach((d) => { d.open = true; })")
    _drawn(browser)
    _sound(browser)
    sizes = browser.js(
        "[...document.querySelectorAll('svg.marks')].map((s) => [s.clientWidth, s.clientHeight])"
    )
    assert sizes and all(w > 150 and h > 80 for w, h in sizes), sizes


def test_only_failures_leave_the_tables(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["failed"], 390)
    _sound(browser)
    assert browser.js("document.querySelectorAll('figure').length") == 0
    assert browser.js("document.querySelectorAll('.failed li').length") > 20


_OVERLAPS = """
[...document.querySelectorAll('svg.marks .names_marks')].flatMap((g) => {
  const texts = [...g.querySelectorAll('text')]
    .filter((t) => t.textContent && getComputedStyle(t).opacity !== '0');
  return texts.flatMap((a, i) => texts.slice(i + 1).filter((b) => {
    const [r, s] = [a.getBoundingClientRect(), b.getBoundingClientRect()];
    return r.left < s.right - 1 && s.left < r.right - 1 && r.top < s.bottom - 3
      && s.top < r.bottom - 3;
  }).map((b) => [a.textContent, b.textContent]));
})
"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["study", "adapters", "wide", "demo"])
def test_names_in_the_pictures_do_not_overlap(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    _open(browser, pages[name], width)
    named = browser.js(
        "[...document.querySelectorAll('.names_marks text')].map((t) => t.textContent)"
    )
    assert any(text.startswith("plain LoRA") or text == "lora" for text in named)
    assert browser.js(_OVERLAPS) == []


_CUT = """
[...document.querySelectorAll('svg.marks')].flatMap((svg) => {
  const whole = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('.role-legend text')].filter((t) =>
    t.getBoundingClientRect().bottom > whole.bottom + 1).map((t) => t.textContent);
})
"""
_TOUCHING = """
[...document.querySelectorAll('svg.marks .role-axis-label')].flatMap((g) => {
  const boxes = [...g.querySelectorAll('text')]
    .filter((t) => getComputedStyle(t).opacity !== '0').map((t) => t.getBoundingClientRect());
  return boxes.slice(1).map((b, i) => [boxes[i], b])
    .filter(([a, b]) => Math.abs(a.top - b.top) < 1 && b.left < a.right + 4).map(([a]) => a.left);
})
"""


@pytest.mark.parametrize("size", [5e-3, 3e-5])
def test_long_numbers_leave_room_for_legends_and_ticks(
    browser: Browser, tmp_path: Path, size: float
) -> None:
    """The axis of 0.000004 made the figure narrower after the legend's columns were counted."""
    data = scoreless()
    for i, run in enumerate(data["runs"]):
        run["losses"] = [30.64 + 0.01 * (i % 8)]
        run["retention"][-1]["kl"] *= size
    path = tmp_path / "study.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    _open(browser, write_report([path], tmp_path / "report.html")[0], 390)
    assert browser.js("document.querySelectorAll('.role-legend text').length") >= 3
    assert browser.js(_CUT) == []
    assert browser.js(_TOUCHING) == []


def _column(browser: Browser, at: int) -> list[str]:
    rows: list[str] = browser.js(
        "[...document.querySelector('table.sortable').tBodies[0].rows]"
        f".map((r) => r.cells[{at}].dataset.value ?? r.cells[{at}].textContent)"
    )
    return rows


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_sort(browser: Browser, pages: dict[str, Path], width: int) -> None:
    _open(browser, pages["adapters"], width)
    heads = browser.js(
        "[...document.querySelector('table.sortable').tHead.rows[0].cells]"
        ".map((c) => c.querySelector('span').textContent)"
    )
    at = heads.index("KL to the base")
    start = _column(browser, at)
    assert "" in start
    button = f"table.sortable thead th:nth-child({at + 1}) button"
    state = f"document.querySelector({json.dumps(button)}).closest('th').getAttribute('aria-sort')"
    known = [float(v) for v in start if v]
    for said, wanted in (("descending", sorted(known)[::-1]), ("ascending", sorted(known))):
        browser.click(button)
        assert browser.js(state) == said
        found = _column(browser, at)
        assert [float(v) for v in found[:-1]] == wanted
        assert found[-1] == "", "what was not measured comes last both ways"
    browser.click(button)
    assert browser.js(state) == "none"
    assert _column(browser, at) == start
    browser.js("document.querySelector('table.sortable thead th:first-child button').focus()")
    browser.key("Enter")
    first = "document.querySelector('table.sortable thead th').getAttribute('aria-sort')"
    assert browser.js(first) == "ascending"
    assert "none" in browser.js(state)
    _sound(browser)


def test_tool_tips(browser: Browser, pages: dict[str, Path]) -> None:
    _open(browser, pages["study"])
    marks = "#forgetting-learning-made-up-fixture-135m-a svg.marks .mark-symbol.role-mark path"
    browser.hover(f"{marks}[aria-label*='plain LoRA']")
    tip = browser.js("document.querySelector('#vg-tooltip-element').innerText")
    assert "plain LoRA" in tip and "17.2 ± 1.9 points" in tip
    _sound(browser)


def test_a_menu_shows_the_matrix_of_another_method(
    browser: Browser, pages: dict[str, Path]
) -> None:
    _open(browser, pages["study"])
    figure = "#matrix-b-made-up-fixture-135m-a"
    texts = f"[...document.querySelectorAll('{figure} .mark-text.role-mark text')]"
    browser.choose(f"{figure} select", "replay")
    time.sleep(0.3)
    scores = [t for t in browser.js(f"{texts}.map((t) => t.textContent)") if t]
    assert len(scores) == 5 * 4
    table = browser.js(
        "[...document.querySelectorAll('table.sortable')[2].tBodies[0].rows]"
        ".find((r) => r.cells[0].textContent.startsWith('replay')).innerText"
    )
    assert [text.partition(" ±")[0] for text in table.split("\t")[1:]] == scores[-4:]


def test_a_click_on_a_legend_picks_a_method_out(browser: Browser, pages: dict[str, Path]) -> None:
    _open(browser, pages["study"])
    figure = "#course-seen-made-up-fixture-135m-a"
    faint = (
        f"[...document.querySelectorAll('{figure} .mark-line path')]"
        ".filter((p) => getComputedStyle(p).opacity < 0.5).length"
    )
    assert browser.js(faint) == 0
    browser.click(f"{figure} .role-legend-symbol path")
    time.sleep(0.3)
    assert browser.js(faint) == 7  # all lines but one


def test_themes(browser: Browser, pages: dict[str, Path]) -> None:
    page = "getComputedStyle(document.body).backgroundColor"
    mark = (
        "[...document.querySelectorAll('svg.marks .mark-symbol.role-mark path')]"
        ".map((p) => p.getAttribute('fill'))"
    )
    _open(browser, pages["study"])
    light: Any = browser.js(page), "#2e8b57" in browser.js(mark), "#6cc792" in browser.js(mark)
    browser.theme(dark=True)
    time.sleep(0.5)
    _drawn(browser)
    dark = browser.js(page), "#2e8b57" in browser.js(mark), "#6cc792" in browser.js(mark)
    assert light == ("rgb(247, 248, 250)", True, False)
    assert dark == ("rgb(18, 22, 28)", False, True)
    _sound(browser)
