"""The page, its finding, its tables and the figures beside it."""

from __future__ import annotations

import json
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from retain.errors import OutputError
from retain.report import write_report
from retain.report.finding import claims_line, finding
from retain.report.page import render_html
from retain.report.schema import Result
from retain.report.series import tradeoff_csv, training_csv
from retain.report.tables import summary_table, sweep_table


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def _tags(html: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Tags()
    parser.feed(html)
    return parser.found


def test_files(result_path: Path, tmp_path: Path) -> None:
    paths = write_report(result_path, tmp_path / "out" / "report.html")
    assert [path.name for path in paths] == ["report.html", "tradeoff.png", "training.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths)
    for path in paths[1:]:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert int.from_bytes(content[16:20]) >= 1200
        assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR


def test_same_result_same_files(result_path: Path, tmp_path: Path) -> None:
    first = write_report(result_path, tmp_path / "a" / "report.html")
    again = write_report(result_path, tmp_path / "b" / "report.html")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


def test_self_contained(result: dict[str, Any]) -> None:
    html = render_html(Result.model_validate(result), "0" * 64)
    tags = _tags(html)
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in tags}
    for _, attrs in tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert "@import" not in html
    assert "url(" not in html
    assert not re.search(r"https?://", html)


def test_contains_the_numbers(result: dict[str, Any]) -> None:
    html = render_html(Result.model_validate(result), "f00d" * 16)
    for said in ("30.0%", "31.5%", "2.0%", "0.0521", "0.412", "77.9%", "3.63%", "f00d", "0123abc"):
        assert said in html
    assert "fixture-135m" in html
    assert html.count("<svg") == 6
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;" in html
    assert "Nothing was generated." in html


def test_finding(result: dict[str, Any]) -> None:
    text = finding(Result.model_validate(result))
    assert "forgets 87% less than plain LoRA (0.0521 against 0.412 nats per token)" in text
    assert "scores lower on the task (30.0% exact match against 31.5%, with overlapping" in text
    assert "95% intervals; the base 2.0%)." in text
    assert "not hold" not in text


def test_finding_is_honest(result: dict[str, Any]) -> None:
    chosen = result["rows"][4]
    chosen["forgetting"]["kl"] = 0.5
    chosen["target"] = {"exact_match": 0.1, "interval": [0.05, 0.15], "loss": 1.0, "items": 200}
    result["summary"][0] |= {"value": 1.2, "holds": False}
    read = Result.model_validate(result)
    text = finding(read)
    assert "does not forget less than plain LoRA" in text
    assert "learns less of the task" in text
    assert "1 of 3 claims does not hold" in text
    assert claims_line(read) == "2 of 3 claims hold, 1 does not."
    html = render_html(read, "")
    assert html.count(">does not hold<") == 1
    chosen["target"] |= {"exact_match": 0.02, "interval": [0.0, 0.05]}
    assert "does not learn the task" in finding(Result.model_validate(result))


def test_no_strength_chosen(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        row["chosen"] = False
    read = Result.model_validate(result)
    assert finding(read).startswith("No strength was chosen")
    assert len(summary_table(read).head) == 3
    assert "LoRA + retention" in render_html(read, "")


def test_nulls(bare: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(bare), encoding="utf-8")
    html = write_report(path, tmp_path / "report.html")[0].read_text(encoding="utf-8")
    assert "None" not in html
    assert "not measured" in html
    assert "Not recorded." in html


@pytest.mark.parametrize("part", ["target", "forgetting", "probe", "train", "history"])
def test_missing_part(result: dict[str, Any], part: str) -> None:
    for row in result["rows"][1:]:
        row[part] = None
    assert "None" not in render_html(Result.model_validate(result), "")


def test_loss_where_no_exact_match(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        row["target"]["exact_match"] = None
    html = render_html(Result.model_validate(result), "")
    assert "answer loss (nats per token)" in html


def test_base_alone(result: dict[str, Any]) -> None:
    result["rows"] = result["rows"][:1]
    result["summary"] = []
    read = Result.model_validate(result)
    assert "No claims were checked." in render_html(read, "")


def test_markdown(result: dict[str, Any]) -> None:
    read = Result.model_validate(result)
    text = summary_table(read).markdown().splitlines()
    assert text[0] == "|  | base model | LoRA | LoRA + retention (strength 100) |"
    assert text[2].startswith("| Exact match (95% interval) | 2.0% [0.1, 3.9] | 31.5% [")
    assert all(line.count("|") == 5 for line in text)
    sweep = sweep_table(read).markdown()
    assert len(sweep.splitlines()) == 2 + 7
    assert "**LoRA + retention (chosen)** | 100 |" in sweep


def test_csv(result: dict[str, Any]) -> None:
    read = Result.model_validate(result)
    lines = tradeoff_csv(read).splitlines()
    assert len(lines) == 8
    assert lines[5].startswith("retain-100,100.0,True,0.3,")
    assert len(training_csv(read).splitlines()) == 1 + 6 * 64


def test_output_error(result_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OutputError) as caught:
        write_report(result_path, tmp_path / "file" / "report.html")
    assert "\n" not in str(caught.value)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError):
        write_report(result_path, tmp_path / "report.html")
    assert not list(tmp_path.glob(".*.part"))
