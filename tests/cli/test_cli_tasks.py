"""``retain tasks``: the list, one task with its prompts, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROWS = [{"sentence": f"film {i} ", "label": i % 2} for i in range(8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "glue" / "sst2"
    place.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (place / "validation.jsonl").write_text(text)
    (place / "train.jsonl").write_text(text)
    return tmp_path


def test_the_list_fits_80_columns(retain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = retain("tasks")
    assert (outcome.code, outcome.err) == (0, "")
    table = [line for line in outcome.out.splitlines() if line.startswith(("│", "┃"))]
    assert max(map(len, table)) <= 80
    rows = {line.split()[1]: line.split() for line in table}
    assert rows["glue/cola"][3:8:2] == ["choice", "2", "matthews"]
    assert rows["gsm8k"][5] == "-"
    assert "order6-14" in outcome.out and "retain tasks --template" in outcome.out


def test_no_name_is_broken_where_there_is_room(
    retain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "│ super_glue/multirc │" in retain("tasks").out
    monkeypatch.setenv("COLUMNS", "60")
    assert "│ gsm8k      │" in retain("tasks").out


def test_lines_for_programs_are_whole(retain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = [line for line in retain("tasks").out.splitlines() if line.startswith("│")]
    assert len(lines) == 37
    assert any("SetFit/amazon_reviews_multi_en" in line for line in lines)


def test_the_list_as_json(retain: Any) -> None:
    found = retain("tasks", "--json").json
    tasks = {task["name"]: task for task in found["tasks"]}
    assert len(tasks) == 37
    assert tasks["cl15/dbpedia"]["classes"] == 14
    assert tasks["glue/stsb"]["metric"] == "pearson_spearman"
    assert found["orders"]["order1"] == ["cl15/dbpedia", "cl15/amazon", "cl15/yahoo", "cl15/agnews"]


def test_one_task(retain: Any, folder: Path) -> None:
    outcome = retain("tasks", "glue/sst2")
    assert "negative, positive" in outcome.out and "--data-dir" in outcome.out
    outcome = retain("tasks", "glue/sst2", "--data-dir", folder, "--limit", 2)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("  | Question: Is this sentence positive or negative?\n") == 2
    assert outcome.out.count("  >  ") == 2  # the right option of each


def test_rows_as_json(retain: Any, folder: Path, model: Path) -> None:
    found = retain(
        "tasks", "glue/sst2", "--data-dir", folder, "--model", model, "--split", "train", "--json"
    ).json
    assert len(found["rows"]) == 3
    for row in found["rows"]:
        number = row["row"]
        assert row["prompt"].startswith(f"film {number}\n")
        assert row["completion"] == (" positive" if number % 2 else " negative")
        assert row["prompt_tokens"] == len(row["prompt"])  # one a byte
        assert row["option_tokens"] == [9, 9]


def test_rows_without_a_label_are_said(retain: Any, folder: Path) -> None:
    path = folder / "glue" / "sst2" / "train.jsonl"
    path.write_text(path.read_text() + '{"sentence": "film 8", "label": -1}\n')
    asked = ("tasks", "glue/sst2", "--data-dir", folder, "--split", "train")
    said = "1 of 9 train rows have no gold label in 'label'; they are left out"
    assert said in retain(*asked).out
    assert said in retain(*asked, "--json").json["notes"][0]


def test_a_file_of_ones_own(retain: Any, tmp_path: Path) -> None:
    printed = retain("tasks", "--template")
    path = tmp_path / "moods.yaml"
    path.write_text(printed.out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "validation.jsonl").write_text('{"text": "Hooray!", "label": "glad"}\n')
    outcome = retain("tasks", path, "--data-dir", tmp_path)
    assert "  | Hooray!\n" in outcome.out and "  >  glad\n     sad\n     neither" in outcome.out


def test_quiet(retain: Any) -> None:
    assert retain("tasks", "--quiet").out == retain("tasks", "gsm8k", "-q").out == ""


def test_refusals(retain: Any, folder: Path, tmp_path: Path) -> None:
    retain("tasks", "glue/sst3").refused("did you mean 'glue/sst2'?")
    retain("tasks", "no.yaml").refused("no.yaml", "--template")
    retain("tasks", "glue/cola", "--data-dir", folder).refused("glue/cola/validation.jsonl.gz")
    retain("tasks", "glue/cola", "--limit", 1).refused("cannot be read from the hub", "--data-dir")
    retain("tasks", "--limit", 3).refused("retain tasks NAME")
    retain("tasks", "glue/sst2", "--limit", 0).refused("--limit")
    retain("tasks", "glue/sst2", "--split", "tset").refused("'tset'", "train")
    retain("tasks", "glue/sst2", "--model", tmp_path / "none").refused("unknown model")
