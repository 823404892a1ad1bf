"""The page of a study in a real browser."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_chromium
from synthetic import fail, make_adapters, make_long, make_study, make_wide, scoreless

from retain.report.studies.page import write_study_report

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
    studies = {"study": make_study(), "adapters": make_adapters(), "long": make_long()}
    studies["wide"], studies["scoreless"] = make_wide(), scoreless()
    studies["failed"] = make_study("failed")
    studies["failed"]["runs"] = [fail(run, "no memory") for run in make_study()["runs"]]
    studies["holes"] = make_study("holes")
    for run in studies["holes"]["runs"]:
        run["retention"] = []
        run["before"] = [None for _ in run["before"]]
    for name, data in studies.items():
        (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    out = {name: folder / f"{name}.html" for name in studies}
    for name, page in out.items():
        write_study_report([folder / f"{name}.json"], page)
    out["all"] = folder / "all.html"
    write_study_report([folder / f"{name}.json" for name in studies], out["all"])
    return out


def _sound(browser: Browser) -> None:
    assert browser.complaints() == []
    assert browser.requests() == []
    wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = browser.js(wide)
    assert scroll <= client


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["study", "adapters", "long", "wide", "all", "holes", "scoreless"])
def test_opens_without_complaint_or_sideways_scroll(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width)
    _sound(browser)
    groups = browser.js("[...document.querySelectorAll('#group option')].map((o) => o.value)")
    for group in groups[:4] + groups[-1:]:
        browser.choose("#group", group)
        _sound(browser)
        narrow = browser.js(
            "[...document.querySelectorAll('figure')].filter((f) => !f.hidden)"
            ".map((f) => [f.id, f.querySelector('.plot svg').getBoundingClientRect().width])"
        )
        assert narrow
        assert all(wide > 150 for _, wide in narrow), narrow


@pytest.mark.parametrize(("name", "across"), [("scoreless", "loss"), ("study", "learning")])
def test_the_picture_shows_what_was_learned(
    browser: Browser, pages: dict[str, Path], name: str, across: str
) -> None:
    browser.open(pages[name], 1440)
    assert browser.js("document.querySelector('#tradeoff-x').value") == across


def test_only_failures_leave_the_tables(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["failed"], 390)
    _sound(browser)
    assert browser.js("[...document.querySelectorAll('.figures')].every((s) => s.hidden)")
    assert browser.js("document.querySelectorAll('.failed li').length") > 20


_OVERLAPS = """
[...document.querySelectorAll('#tradeoff .label, #share .label')].flatMap((a, i, all) =>
  all.slice(i + 1).filter((b) => {
    const [r, s] = [a.getBoundingClientRect(), b.getBoundingClientRect()];
    return a.closest('svg') === b.closest('svg') && r.left < s.right - 1 && s.left < r.right - 1
      && r.top < s.bottom - 3 && s.top < r.bottom - 3;
  }).map((b) => [a.textContent, b.textContent]))
"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["study", "adapters", "wide"])
def test_names_in_the_picture_do_not_overlap(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width)
    assert "plain LoRA" in browser.js(
        "[...document.querySelectorAll('#tradeoff .label')].map((n) => n.textContent)"
    )
    for measure in browser.js(
        "[...document.querySelector('#tradeoff-y').options].map((o)=>o.value)"
    ):
        browser.choose("#tradeoff-y", measure)
        assert browser.js(_OVERLAPS) == []


def _column(browser: Browser, at: int) -> list[str]:
    rows: list[str] = browser.js(
        "[...document.querySelector('table.sortable').tBodies[0].rows]"
        f".map((r) => r.cells[{at}].dataset.value ?? r.cells[{at}].textContent)"
    )
    return rows


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_sort(browser: Browser, pages: dict[str, Path], width: int) -> None:
    browser.open(pages["adapters"], width)
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
        browser.js(f"document.querySelector({json.dumps(button)}).scrollIntoView()")
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


_TIP = "document.querySelector('#tip').hidden ? null : document.querySelector('#tip').innerText"


def test_tool_tips_by_mouse_and_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["study"], 1440)
    assert browser.js(_TIP) is None
    browser.hover("#tradeoff .spot")
    tip = browser.js(_TIP)
    assert tip.startswith("plain LoRA\n")
    assert "Forgetting: 17.2 ± 1.9 points" in tip
    assert "3 seeds" in tip
    browser.js("document.querySelector('#tradeoff-y').focus()")
    browser.key("Escape")
    assert browser.js(_TIP) is None
    browser.js("document.querySelector('#tradeoff .spot').focus()")
    assert "plain LoRA" in browser.js(_TIP)
    browser.key("ArrowRight")
    assert browser.js(_TIP).startswith("l2\n")
    stops = "document.querySelectorAll('#tradeoff .spot[tabindex=\"0\"]').length"
    assert browser.js(stops) == 1
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    browser.js("document.querySelector('#matrix-a .spot').focus()")
    browser.key("ArrowDown")
    assert "after sst2 (task 1)" in browser.js(_TIP)


def test_tool_tips_by_touch(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["study"], 390)
    browser.tap("#tradeoff .spot")
    assert "plain LoRA" in (browser.js(_TIP) or "")
    box = browser.js(
        "(() => { const b = document.querySelector('#tip').getBoundingClientRect();"
        "return [b.left, b.right]; })()"
    )
    assert box[0] >= 0 and box[1] <= 390
    browser.tap("h1")
    assert browser.js(_TIP) is None


def test_legend_hides_a_method_everywhere(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["study"], 1440)
    marks = "document.querySelectorAll('#tradeoff .spot').length"
    lines = "document.querySelectorAll('#seen .line').length"
    before = browser.js(marks), browser.js(lines)
    kfac = "#tradeoff .legend button:nth-child(4)"
    assert "K-FAC" in browser.js(f"document.querySelector('{kfac}').textContent")
    browser.click(kfac)
    assert browser.js(f"document.querySelector('{kfac}').getAttribute('aria-pressed')") == "false"
    assert (browser.js(marks), browser.js(lines)) == (before[0] - 3, before[1] - 1)
    browser.click(kfac)
    assert (browser.js(marks), browser.js(lines)) == before
    browser.choose("#strength", "all")
    assert browser.js(lines) == before[1] + 2


def test_choices_draw_other_numbers(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["study"], 1440)
    browser.choose("#tradeoff-y", "kl")
    assert "KL to the base" in browser.js("document.querySelector('#tradeoff .plot').textContent")
    browser.choose("#matrix-b-cell", "replay")
    assert browser.js("document.querySelector('#matrix-b-cell').value") == "replay"
    scores = browser.js(
        "[...document.querySelectorAll('#matrix-b .score')].map((n) => n.textContent)"
    )
    assert len(scores) == 5 * 4
    table = browser.js(
        "[...document.querySelectorAll('table.sortable')[2].tBodies[0].rows]"
        ".find((r) => r.cells[0].textContent.startsWith('replay')).innerText"
    )
    assert [text.partition(" ±")[0] for text in table.split("\t")[1:]] == scores[-4:]


def _saved(folder: Path, name: str) -> str:
    for _ in range(100):
        found = [p for p in folder.iterdir() if p.name == name and p.stat().st_size]
        if found:
            return found[0].read_text(encoding="utf-8")
        time.sleep(0.05)
    raise AssertionError(f"{name} was not saved; there is {list(folder.iterdir())}")


def test_numbers_and_pictures_can_be_saved(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    browser.open(pages["study"], 1440)
    browser.call(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path.resolve())
    )
    data = make_study()
    browser.click("#tradeoff .get button:nth-child(1)")
    rows = _saved(tmp_path, "tradeoff-made-up-fixture-135m-a.csv").splitlines()
    assert rows[0].startswith("name,adapter,method,strength,stores_data,seeds,learning,")
    assert len(rows) == 1 + 10
    plain = [r["metrics_summary"] for r in data["runs"] if r["config"]["method"]["name"] == "none"]
    cells = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert float(cells["learning"]) == pytest.approx(sum(s["learning"] for s in plain) / 3, 1e-5)
    browser.click("#tasks .get button:nth-child(2)")
    picture = _saved(tmp_path, "tasks-made-up-fixture-135m-a.svg")
    assert picture.startswith("<svg")
    assert "class=" not in picture and "var(" not in picture
    assert "4. word-problems" in picture
    browser.click("[data-group] .get a")
    table = _saved(tmp_path, "results-made-up-fixture-135m-a.csv").splitlines()
    assert table[0].startswith("Method,note,Seeds,Average score (points),Average score low")
    assert len(table) == 1 + 10
    _sound(browser)


def test_themes(browser: Browser, pages: dict[str, Path]) -> None:
    page = "getComputedStyle(document.body).backgroundColor"
    mark = "document.querySelector('#tradeoff polygon').getAttribute('fill')"
    browser.open(pages["study"], 1440)
    light: Any = browser.js(page), browser.js(mark)
    browser.theme(dark=True)
    browser.settle()
    dark = browser.js(page), browser.js(mark)
    assert light == ("rgb(247, 248, 250)", "#2e8b57")
    assert dark == ("rgb(18, 22, 28)", "#6cc792")
    _sound(browser)
