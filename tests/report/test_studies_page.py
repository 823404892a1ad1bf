"""The page of a study as text, the command, and the page of committed results."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from synthetic import fail, make_adapters, make_long, make_study

from retain.cli import main
from retain.report.studies.page import write_study_report
from retain.report.studies.results_page import (
    find_studies,
    stale_pictures,
    write_results_page,
)

ROOT = Path(__file__).resolve().parents[2]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def write(data: dict[str, Any], name: str = "study") -> Path:
        path = tmp_path / name / "study.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    return write


def _page(path: Path) -> str:
    return write_study_report([path], path.with_name("r.html"))[0].read_text(encoding="utf-8")


def test_is_self_contained(put: Put) -> None:
    html = _page(put(make_study()))
    parser = _Tags()
    parser.feed(html)
    for tag, attrs in parser.found:
        assert tag not in {"iframe", "object", "embed", "base", "img"}
        for name in ("src", "href", "srcset", "action"):
            assert (attrs.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attrs)
    assert "@import" not in html
    assert set(re.findall(r"url\(.", html)) == {"url(#"}
    assert set(re.findall(r"https?://[^\s\"']*", html)) == {"http://www.w3.org/2000/svg"}
    script = html.rpartition("<script>")[2].partition("</script>")[0]
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


@pytest.mark.parametrize(("planned", "said"), [(28, False), (31, True), (None, False)])
def test_says_how_much_is_still_to_be_run(put: Put, planned: int | None, said: bool) -> None:
    html = _page(put(make_study() | {"planned": planned}))
    assert ("27 done, 1 failed, 3 not yet run" in html) is said
    assert ("not yet run" in html) is said


def test_says_what_was_studied(put: Put) -> None:
    html = _page(put(make_study()))
    for said in (
        "<h1>made-up</h1>", "Test CPU, 2 cores, 23 GiB memory, no GPU", "0123abcd4567",
        "torch 2.13.0", "27 done, 1 failed", "<dd>0, 1, 2</dd>", "plain LoRA forgets 17.2",
        "O-LoRA, seed 2: the loss is not finite", "O-LoRA on prefix: it wants A and B",
        '<span class="note">stores data</span>',
    ):  # fmt: skip
        assert said in html, said
    assert "None" not in html.partition("<script")[0]


def test_names_are_escaped(put: Put) -> None:
    data = make_study("</script><b>bold</b>")
    for run in data["runs"]:
        run["config"]["method"]["label"] += "<i>&"
        run["tasks"] = ["</script><i>", *run["tasks"][1:]] if run["tasks"] else []
    html = _page(put(data))
    assert html.count("</script>") == 2
    assert "<b>bold" not in html and "<i>" not in html


def test_same_files_same_page(put: Put) -> None:
    path = put(make_study())
    assert _page(path) == _page(path)


def test_tables_download_their_numbers(put: Put) -> None:
    html = _page(put(make_study()))
    links = re.findall(
        r'download="([^"]+)" href="data:text/csv;charset=utf-8;base64,([^"]+)"', html
    )
    assert [name.partition("-")[0] for name, _ in links] == ["results", "difference", "scores"]
    first = b64decode(links[0][1]).decode().splitlines()
    assert first[0].startswith("Method,note,Seeds,Average score (points),Average score low")
    assert len(first) == 11


class TestCommand:
    def test_a_study_with_tables(self, put: Put, tmp_path: Path, capsys: Any) -> None:
        folder = put(make_study()).parent
        argv = ["--markdown", str(tmp_path / "t.md"), "--latex", str(tmp_path / "t.tex")]
        assert main(["report", str(folder), *argv]) == 0
        assert capsys.readouterr().out.split() == [
            str(folder / "report.html"), str(tmp_path / "t.md"), str(tmp_path / "t.tex")
        ]  # fmt: skip
        text = (tmp_path / "t.md").read_text(encoding="utf-8")
        assert text.startswith("## made-up: fixture-135m, 4 tasks (order A)\n")
        assert "### Failed runs\n\n- O-LoRA, seed 2: the loss is not finite" in text
        tex = (tmp_path / "t.tex").read_text(encoding="utf-8")
        assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 3

    def test_several(self, put: Put, tmp_path: Path) -> None:
        paths = [put(make_study(), "a"), put(make_adapters(), "b"), put(make_long(), "c").parent]
        out = tmp_path / "all.html"
        assert main(["report", *map(str, paths), "--out", str(out), "-q"]) == 0
        html = out.read_text(encoding="utf-8")
        assert "made-up, glue, long" in html
        assert html.count('<option value="') == 1 + 7 + 2 + 4  # comparisons and strengths

    def test_tables_of_a_demo_are_refused(self, result_path: Path, capsys: Any) -> None:
        assert main(["report", str(result_path), "--markdown", "t.md"]) == 2
        assert "tables are written for studies" in capsys.readouterr().err

    def test_a_demo_among_studies_is_refused(
        self, put: Put, result_path: Path, capsys: Any
    ) -> None:
        assert main(["report", str(put(make_study())), str(result_path)]) == 2
        assert "retain.result/1" in capsys.readouterr().err


class TestResultsPage:
    def test_is_made_from_the_files_alone(self, put: Put, tmp_path: Path) -> None:
        studies = [put(make_study(), "a"), put(make_adapters(), "b")]
        assert find_studies(tmp_path) == studies
        page, images = tmp_path / "docs" / "results.md", tmp_path / "docs" / "images"
        first = [path.read_bytes() for path in write_results_page(studies, page, images)]
        again = [path.read_bytes() for path in write_results_page(studies, page, images)]
        assert first == again
        text = page.read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert "[study.json](../a/study.json)" in text
        linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
        assert [(page.parent / name).is_file() for name in linked] == [True, True]
        assert "| replay (stores data) | 3 |" in text
        assert stale_pictures(studies, page, images) == []

    def test_studies_with_holes_are_drawn(self, put: Put, tmp_path: Path) -> None:
        data = make_study()
        for run in data["runs"]:
            held = run["config"]["method"]["kind"] != "none"
            if run["metrics_summary"] and held:
                run["metrics_summary"] |= dict.fromkeys(run["metrics_summary"])
            elif not held:
                run["retention"] = []
        one = [fail(run, "no memory") for run in make_study("none-done")["runs"]]
        studies = [put(data, "a"), put(make_study("none-done") | {"runs": one}, "b")]
        page = tmp_path / "results.md"
        written = write_results_page(studies, page, tmp_path / "images")
        assert [path.name for path in written] == [
            "results.md",
            "results-made-up-fixture-135m-a.png",
        ]
        text = page.read_text(encoding="utf-8")
        assert "None" not in text
        assert text.count("no memory") == len(one)
        assert stale_pictures(studies, page, tmp_path / "images") == []

    def test_stale_pictures_are_told(self, put: Put, tmp_path: Path) -> None:
        data = make_study()
        studies = [put(data)]
        page, images = tmp_path / "results.md", tmp_path / "images"
        write_results_page(studies, page, images)
        data["runs"][0]["metrics_summary"]["learning"] += 0.01
        put(data)
        assert stale_pictures(studies, page, images) == ["results-made-up-fixture-135m-a.png"]


def _script() -> ModuleType:
    path = ROOT / "benchmarks" / "results_page.py"
    spec = importlib.util.spec_from_file_location("results_page_script", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_page_is_what_the_studies_give() -> None:
    script = _script()
    if not find_studies(script.STUDIES):
        pytest.skip("benchmarks/results holds no study yet")
    assert script.check() == [], "run python benchmarks/results_page.py"
