"""``retain explain``: the table, the record, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_parts import SHORT, Run, told, write_lines

from retain import explain, load_curvature
from retain.models.load import load_model
from retain.models.saved import load_adapter


def test_a_finished_run_is_explained(
    retain: Run, trained: Path, model: Path, data: Path, curvature: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dearest.json"
    said = retain("explain", trained, "--top", 3, "--out", out).done()
    assert "the dearest of 24 rows" in said.out
    record = told(out)
    assert record["schema"] == "retain.explain/1" and record["examples"] == 24
    assert record["predicted"] == pytest.approx(told(trained / "train.json")["predicted_nats"])
    assert sum(row["share"] for row in record["rows"]) == pytest.approx(1)
    assert record == retain("explain", trained, "--json").json | {"created": record["created"]}

    base = load_model(str(model))
    tuned = load_adapter(base.model, trained / "adapter")
    found = explain(tuned, load_curvature(curvature), str(data), tokenizer=base.tokenizer)
    assert [r.row for r in found.rows] == [r["row"] for r in record["rows"]]
    assert found.rows[0].text == record["rows"][0]["text"]

    some = retain("explain", trained, "--rows", 5, "--seed", 2, "--json").json
    assert len(some["rows"]) == 5 and len({row["row"] for row in some["rows"]}) == 5
    assert max(row["row"] for row in some["rows"]) > 4  # numbers among all rows


def test_its_file_may_lie_at_home(
    retain: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for _ in range(2):  # and is replaced there
        retain("explain", trained, "--rows", 2, "--out=~/dearest.json").done()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert len(told(tmp_path / "home" / "dearest.json")["rows"]) == 2


@pytest.mark.parametrize("limit", [None, 4])
def test_rows_are_named_by_their_place_in_the_file(
    retain: Run, curvature: Path, model: Path, tmp_path: Path, limit: int | None
) -> None:
    """Whatever rows before them were left out, or not drawn."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog"]
    given = [{"prompt": " the cat" * 200, "completion": " long"}]
    given += [{"prompt": "cat", "completion": f" {word}"} for word in words]
    rows, out = write_lines(tmp_path / "rows.jsonl", given), tmp_path / "run"
    argv = ["train", *SHORT, "--model", model, "--data", rows, "--curvature", curvature, "--out",
            out, "--max-steps", 3, "--batch-size", 2, "--learning-rate", 0.01]  # fmt: skip
    retain(*argv, *([] if limit is None else ["--limit", limit])).done()
    found = retain("explain", out, "--json").json["rows"]
    assert len(found) in ({8} if limit is None else {3, 4})
    for row in found:
        line, word = row["place"], row["text"].removesuffix("</s>")
        assert line == f"line {words.index(word) + 2} of rows.jsonl"
        assert limit is not None or row["row"] == words.index(word) + 1
    said = retain("explain", out, "--top", 2).done().out
    assert str(found[0]["place"]) in " ".join(said.split())


def test_what_it_needs_and_misses_is_said(
    retain: Run, train: Run, trained: Path, curvature: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    retain("explain", tmp_path).refused("no finished run to explain")
    (tmp_path / "mine.json").write_text("{}")
    retain("explain", trained, "--out", tmp_path / "mine.json").refused("mine.json")
    assert (tmp_path / "mine.json").read_text() == "{}"
    train(tmp_path / "plain", "--method", "none", "--max-steps", 1).done()
    retain("explain", tmp_path / "plain").refused("cannot be explained", "plain LoRA")
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}] * 8)
    given = tmp_path / "given.safetensors"
    shutil.copyfile(curvature, given)
    held = ["train", *SHORT, "--model", model, "--data", rows, "--curvature", given]
    retain(*held, "--out", tmp_path / "held", "--method", "laplace", "--max-steps", 2).done()
    write_lines(rows, [{"prompt": "a", "completion": " c"}] * 8)
    retain("explain", tmp_path / "held").refused("rows are not those that the run has learned")
    given.unlink()
    retain("explain", tmp_path / "held").refused("curvature that held the run is not there")
