"""The page as text, the command, and the page of committed results."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import stat
from base64 import b64decode, b64encode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from synthetic import (
    fail,
    make_adapters,
    make_eval,
    make_long,
    make_softening,
    make_study,
    nulled,
)

from retain.cli import main
from retain.errors import OutputError, SourceError
from retain.report import write_report

ROOT = Path(__file__).resolve().parents[2]
Put = Callable[..., Path]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def _page(*paths: Path) -> str:
    page = write_report(paths, paths[0].with_name("r.html"))[0].read_text(encoding="utf-8")
    assert "None" not in page.partition("<script>")[0].replace('"None"', "")
    return page


def test_says_where_a_study_was_scored_on_validation_rows(put: Put) -> None:
    study = make_study()
    assert "validation rows" not in _page(put(study))
    for run in study["runs"]:
        run["config"]["evaluation"] = {"split": "validation"}
    assert "validation rows, held out of the training rows" in _page(put(study))


@pytest.mark.parametrize("of", ["study", "result", "softening", "eval"])
def test_is_self_contained(put: Put, result: dict[str, Any], of: str) -> None:
    made = {"study": make_study(), "result": result, "softening": make_softening()}
    html = _page(put((made | {"eval": make_eval()})[of]))
    parser = _Tags()
    parser.feed(html)
    for tag, attrs in parser.found:
        assert tag not in {"iframe", "object", "embed", "base", "img"}
        for name in ("src", "href", "srcset", "action"):
            assert (attrs.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attrs)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 2, "one bundle for all figures, and ours"
    digests = [b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in scripts]
    policy = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src {policy}; img-src" in html
    rest = html.replace(scripts[0], "")
    assert "@import" not in rest and "url(" not in rest
    assert set(re.findall(r"https?://[^\s\"']*", rest)) <= {
        "https://vega.github.io/schema/vega/v6.json"
    }


@pytest.mark.parametrize(("planned", "said"), [(28, False), (31, True), (None, False)])
def test_says_how_much_is_still_to_be_run(put: Put, planned: int | None, said: bool) -> None:
    html = _page(put(make_study() | {"planned": planned}))
    assert ("27 done, 1 failed, 3 not yet run" in html) is said
    assert (", 3 not yet run" in html) is said


def test_says_what_was_studied(put: Put) -> None:
    html = _page(put(make_study()))
    for said in (
        "<h1>made-up</h1>", "Test CPU, 2 cores, 23 GiB memory, no GPU", "0123abcd4567",
        "torch 2.13.0", "27 done, 1 failed", "<dd>0, 1, 2</dd>", "plain LoRA forgets 17.2",
        "O-LoRA, seed 2: the loss is not finite", "O-LoRA on prefix: it wants A and B",
        '<span class="note">stores data</span>',
    ):  # fmt: skip
        assert said in html, said


def test_says_what_a_result_holds(put: Put, result: dict[str, Any]) -> None:
    html = _page(put(result))
    for said in (
        "retention 100 forgets 87 % less than plain LoRA (0.0521 against 0.412 nats per token)",
        "scores lower on the task (30.0 points against 31.5, with overlapping 95 % intervals; "
        "the base 2.0).",
        "All 3 claims hold.", "fixture-135m", "0123abc", "512 rows to train on", "kfac",
        "Nothing was generated.", "&lt;b&gt;&amp;", "one seed ± half the 95 % interval within",
    ):  # fmt: skip
        assert said in html, said
    assert "<b>&" not in html
    assert html.count('class="card"') == 3 * 4


def test_says_what_an_eval_found(put: Put) -> None:
    one = make_eval(1)
    one["scores"]["data.loss"]["changes"][0] = {"value": -0.1, "interval": [-0.3, 0.1], "n": 40}
    html = _page(put(one), put(make_study(), "b"))
    for said in (
        "With the adapter on: loss of the rows 0.400 nats per token against 0.200 "
        "(−0.100 [−0.300, +0.100], which may be chance)",
        "hellaswag higher", "rows.jsonl: 12 rows, 12 asked, 2 left out", "a note",
        "&lt;i&gt;Prompt&lt;/i&gt; 3", "4 more prompts", "base wrong, adapter right",
        "2 more rows", "made-up: fixture", "27 done, 1 failed", 
    ):  # fmt: skip
        assert said in html, said
    assert "<i>Prompt" not in html and html.count('<span class="mark right">right</span>') > 20


@pytest.mark.parametrize("interval", [None, [-0.1, -0.1]])
def test_a_change_without_an_interval_may_be_chance(put: Put, interval: Any) -> None:
    one = make_eval(1)
    one["scores"]["data.loss"]["changes"][0] = {"value": -0.1, "interval": interval, "n": 1}
    assert "against 0.200 (−0.100, which may be chance)" in _page(put(one))


def test_a_result_is_told_honestly(put: Put, result: dict[str, Any]) -> None:
    chosen = result["rows"][3]
    chosen["forgetting"]["kl"] = 0.5
    chosen["target"] = {"exact_match": 0.1, "interval": [0.05, 0.15], "loss": 1.0, "items": 200}
    result["summary"][0] |= {"value": 1.2, "holds": False}
    html = _page(put(result))
    assert "does not forget less than plain LoRA" in html
    assert "learns less of the task" in html
    assert "2 of 3 claims hold, 1 does not." in html
    assert html.count(">does not hold<") == 1
    chosen["target"] |= {"exact_match": 0.02, "interval": [0.0, 0.05]}
    assert "does not learn the task" in _page(put(result))
    chosen["chosen"] = False
    assert "picked after the fact" in _page(put(result))


def test_an_eval_has_no_plain_lora(put: Put, result: dict[str, Any]) -> None:
    base, lora, held = result["rows"][:3]
    html = _page(put(result | {"rows": [base, held]}))
    assert "retention 10 moves 0.236 ± 0.024 nats per token from the base, and it" in html
    assert "it scores 31.0 ± 6.4 points; the base 2.0" in html
    lora["target"] = base["target"] = None
    html = _page(put(result | {"rows": [base, lora]}))
    assert "plain LoRA moves 0.412 ± 0.041 nats per token from the base." in html


def test_results_with_holes(put: Put, result: dict[str, Any]) -> None:
    keep = frozenset({"schema", "kind", "name", "label", "method", "prompt", "step", "claim"})
    assert "Not recorded." in _page(put(nulled(result, keep)))
    assert "not measured" in _page(put(nulled(result, keep)))
    for part in ("target", "forgetting", "probe", "train", "history"):
        for row in result["rows"][1:]:
            row[part] = None
        _page(put(result))
    for row in result["rows"]:
        row["target"] = {"exact_match": None, "loss": 0.5}
        row["forgetting"] = {"kl": 0.1 if row["method"] else 0.0}
    assert "KL to the base against test loss" in _page(put(result))
    with pytest.raises(SourceError, match="no runs yet"):
        _page(put(result | {"rows": result["rows"][:1]}))


def test_names_are_escaped(put: Put, result: dict[str, Any]) -> None:
    data = make_study("</script><b>bold</b>")
    for run in data["runs"]:
        run["config"]["method"]["label"] += "<i>&"
        run["tasks"] = ["</script><i>", *run["tasks"][1:]] if run["tasks"] else []
    html = _page(put(data))
    assert html.count("</script>") == html.count("<script")
    assert "<b>bold" not in html and "<i>" not in html
    result["task"]["name"] = result["rows"][3]["label"] = "</script><b>bold</b>"
    html = _page(put(result))
    assert html.count("</script>") == html.count("<script") and "<b>bold" not in html


def test_same_files_same_page(put: Put) -> None:
    path = put(make_study())
    assert _page(path) == _page(path)


def test_numbers_can_be_saved(put: Put) -> None:
    html = _page(put(make_study()))
    found = re.findall(
        r'download="([^"]+)" href="data:text/csv;charset=utf-8;base64,([^"]+)"', html
    )
    links = {name.partition("-made")[0]: b64decode(text).decode() for name, text in found}
    assert list(links) == [
        "forgetting-learning", "kl-learning", "course-seen", "course-kl", "matrix-a", "matrix-b",
        "results", "difference", "scores",
    ]  # fmt: skip
    table = links["results"].splitlines()
    assert table[0].startswith("Method,note,Seeds,Average score (points),Average score low")
    assert len(table) == 11
    figure = links["forgetting-learning"].splitlines()
    assert figure[0].startswith("name,series,strength,stores,plain,seeds,x,x_low,x_high,y,")
    assert len(figure) == 11


def test_files_are_whole_or_not_there(put: Put, tmp_path: Path) -> None:
    study = put(make_study())
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    (tmp_path / "page.html").mkdir()
    for page in (tmp_path / "file" / "report.html", tmp_path / "page.html"):
        with pytest.raises(OutputError) as caught:
            write_report([study], page)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*.part"))
    (page,) = write_report([study], tmp_path / "new" / "report.html")
    assert stat.S_IMODE(page.stat().st_mode) & stat.S_IRUSR


class TestCommand:
    @pytest.mark.parametrize("option", ["--markdown", "--latex"])
    @pytest.mark.parametrize("text", ["Mine.\n", "A mark: drawn by retain report.\n\nMine.", ""])
    def test_tables_replace_tables_alone(
        self, put: Put, tmp_path: Path, capsys: Any, option: str, text: str
    ) -> None:
        folder, mine = put(make_study()).parent, tmp_path / "mine"
        argv = ["report", str(folder), "-q", option]
        mine.write_text(text, encoding="utf-8")
        assert main([*argv, str(mine)]) == 2
        said = capsys.readouterr().err
        assert "the tables of a report would take the place" in said
        assert f"choose another {option} than {mine}" in said
        assert mine.read_text(encoding="utf-8") == text
        assert not (folder / "report.html").exists()
        for _ in range(2):
            assert main([*argv, str(tmp_path / "tables")]) == 0

    def test_a_study_with_tables_and_pictures(self, put: Put, tmp_path: Path, capsys: Any) -> None:
        folder = put(make_study()).parent
        argv = ["--markdown", str(tmp_path / "t.md"), "--latex", str(tmp_path / "t.tex")]
        assert main(["report", str(folder), *argv, "--pictures", str(tmp_path / "p")]) == 0
        name = "made-up-fixture-135m-a"
        assert capsys.readouterr().out.split() == [
            str(folder / "report.html"), str(tmp_path / "t.md"), str(tmp_path / "t.tex"),
            str(tmp_path / "p" / f"{name}.png"), str(tmp_path / "p" / f"{name}.svg"),
        ]  # fmt: skip
        text = (tmp_path / "t.md").read_text(encoding="utf-8")
        assert text.startswith("## made-up: fixture-135m, 4 tasks (order A)\n")
        assert "### Failed runs\n\n- O-LoRA, seed 2: the loss is not finite" in text
        tex = (tmp_path / "t.tex").read_text(encoding="utf-8")
        assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 3
        again = ["report", str(folder), "--pictures", str(tmp_path / "p")]
        assert main([*again, "-q"]) == 0
        (tmp_path / "p" / f"{name}.png").write_bytes(b"mine")
        assert main(again) == 2 and "did not write" in capsys.readouterr().err

    def test_all_kinds_on_one_page(self, put: Put, result: dict[str, Any], tmp_path: Path) -> None:
        paths = [put(make_study(), "a"), put(make_adapters(), "b"), put(make_long(), "c").parent]
        paths += [put(result, "d"), put(make_softening(), "e")]
        out = tmp_path / "all.html"
        assert main(["report", *map(str, paths), "--out", str(out), "-q"]) == 0
        html = out.read_text(encoding="utf-8")
        assert "made-up, glue, long, fixture-135m on word-problems" in html
        assert html.count('<details class="part"') == 1 + 7 + 2 + 1 + 1
        assert "Softening of an adapter of fixture-135m" in html

    def test_the_tables_of_a_softening(self, put: Put, tmp_path: Path) -> None:
        made = make_softening()
        page, md, tex = (tmp_path / f"t.{kind}" for kind in ("html", "md", "tex"))
        write_report([put(made)], page, markdown_file=md, latex_file=tex)
        text = md.read_text(encoding="utf-8")
        assert text.startswith("## Softening of an adapter of fixture-135m\n\n| Point |")
        assert "| written | 0.100 | 70 | " in text
        assert "| 1 | 0.400 | 100 | 0.350 [0.300, 0.400] | 100 | 0.350 [0.300, 0.400] |\n" in text
        code = tex.read_text(encoding="utf-8")
        assert code.count(r"\toprule") == 1 and r"\label{tab:curve-soften-1}" in code
        html = page.read_text(encoding="utf-8")
        assert "curve-soften-1.csv" in html and '<th scope="row">written</th>' in html
        assert "Learning is measured as nats per token." in html
        for point in made["curve"]:
            point |= {"measured": None, "scaled_measured": None}
        write_report([put(made)], page, markdown_file=md)
        assert "KL (" not in md.read_text(encoding="utf-8")

    @pytest.mark.parametrize("more", [False, True])
    def test_a_folder_of_a_softening(self, put: Put, tmp_path: Path, more: bool) -> None:
        place = tmp_path / "soft"
        (place / "adapter").mkdir(parents=True)
        (place / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
        (place / "soften.json").write_text(json.dumps(make_softening()), encoding="utf-8")
        if more:
            (place / "study.json").write_text(json.dumps(make_study()), encoding="utf-8")
        out = tmp_path / "soft.html"
        both = [str(place), str(place / "soften.json")]
        assert main(["report", *both, "--out", str(out), "-q"]) == 0
        html = out.read_text(encoding="utf-8")
        assert "Softening of an adapter of fixture-135m" in html and "soften-2" not in html
        assert ("made-up" in html) is more


def _script() -> ModuleType:
    path = ROOT / "benchmarks" / "results_page.py"
    spec = importlib.util.spec_from_file_location("results_page_script", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestResultsPage:
    def test_is_made_from_the_files_alone(self, put: Put, tmp_path: Path) -> None:
        script = _script()
        studies = [put(make_study(), "a"), put(make_adapters(), "b")]
        assert script.find_studies(tmp_path) == studies
        page, images = tmp_path / "docs" / "results.md", tmp_path / "docs" / "images"
        first = [path.read_bytes() for path in script.write_results_page(studies, page, images)]
        again = [path.read_bytes() for path in script.write_results_page(studies, page, images)]
        assert first == again
        text = page.read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert "[study.json](../a/study.json)" in text
        linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
        assert [(page.parent / name).is_file() for name in linked] == [True, True]
        assert "| replay (stores data) | 3 |" in text
        assert script.stale(studies, page, images) == []

    def test_studies_with_holes_are_drawn(self, put: Put, tmp_path: Path) -> None:
        script, data = _script(), make_study()
        for run in data["runs"]:
            held = run["config"]["method"]["kind"] != "none"
            if run["metrics_summary"] and held:
                run["metrics_summary"] |= dict.fromkeys(run["metrics_summary"])
            elif not held:
                run["retention"] = []
        one = [fail(run, "no memory") for run in make_study("none-done")["runs"]]
        studies = [put(data, "a"), put(make_study("none-done") | {"runs": one}, "b")]
        page = tmp_path / "results.md"
        written = script.write_results_page(studies, page, tmp_path / "images")
        assert [path.name for path in written] == [
            "results.md",
            "results-made-up-fixture-135m-a.png",
        ]
        text = page.read_text(encoding="utf-8")
        assert "None" not in text
        assert text.count("no memory") == len(one)
        assert script.stale(studies, page, tmp_path / "images") == []

    def test_stale_pictures_are_told(self, put: Put, tmp_path: Path) -> None:
        script, data = _script(), make_study()
        studies = [put(data)]
        page, images = tmp_path / "results.md", tmp_path / "images"
        script.write_results_page(studies, page, images)
        data["runs"][0]["metrics_summary"]["learning"] += 0.01
        put(data)
        wrong = script.stale(studies, page, images)
        assert wrong == ["results.md", "results-made-up-fixture-135m-a.png"]


def test_committed_page_is_what_the_studies_give() -> None:
    script = _script()
    studies = script.find_studies(script.STUDIES)
    assert len(studies) > 15
    wrong = script.stale(studies, script.PAGE, script.IMAGES)
    assert wrong == [], "run python benchmarks/results_page.py"
