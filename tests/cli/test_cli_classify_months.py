"""Months of a classifier: the head goes on, the classes stay, other classes are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_cli_classify import KINDS, SHORT, answers, encoder, write

from retain.cli import main
from retain.curvature.curvature import load_curvature

__all__ = ["encoder"]


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def months(
    request: pytest.FixtureRequest, encoder: Path, model: Path, source: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[Path]]:  # fmt: skip
    """The base, and three runs, the second of which sees two of the three classes."""
    folder = tmp_path_factory.mktemp("months")
    base, runs = encoder if request.param == "encoder" else model, []
    for month, labels in enumerate(([*KINDS] * 8, ["red", "green"] * 12, [*KINDS] * 8)):
        rows, out = write(folder / f"{month}.jsonl", labels), folder / f"run{month}"
        argv = ["train", "--data", rows, "--out", out, "--epochs", 3, "-q", *SHORT]
        if runs:
            argv = [a for a in argv if a not in SHORT] + ["--continue-from", runs[-1]]
            argv += SHORT[:4]
        else:
            argv += ["--model", base, "--source", source, "--keep-state", "--num-labels", "auto"]
        assert main([str(a) for a in argv]) == 0
        runs.append(out)
    return base, runs


def test_the_head_goes_on(months: tuple[Path, list[Path]]) -> None:
    base, runs = months
    heads, records = [], []
    for run in runs:
        weights = load_file(run / "adapter" / "adapter_model.safetensors")
        (name,) = [n for n in weights if n.endswith(("classifier.weight", "score.weight"))]
        heads.append(weights[name])
        records.append(json.loads((run / "train.json").read_text()))
    assert [r["labels"]["names"] for r in records] == [sorted(KINDS)] * 3
    assert records[0]["labels"]["head"]["rows"] == 24
    assert records[1]["labels"]["head"] is records[2]["labels"]["head"] is None
    assert any("1 of 3 classes" in note for note in records[1]["notes"])
    assert len({r["model"]["fingerprint"] for r in records}) == 1
    first = load_file(runs[0] / "state" / "head.safetensors")
    last = load_file(runs[2] / "state" / "head.safetensors")
    assert first.keys() == last.keys() and all(torch.equal(first[n], last[n]) for n in first)
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    assert load_curvature(runs[2] / "state" / "past.safetensors").info.merged == 3
    if "classifier" in name:  # the tiny decoder's features foretell little
        said = answers(runs[2], base, runs[2].parent / "2.jsonl")
        wanted = torch.tensor([sorted(KINDS).index(KINDS[i % 3]) for i in range(24)])
        assert float((said.argmax(1) == wanted).float().mean()) > 0.6


def test_it_begins_where_the_run_before_ended(
    months: tuple[Path, list[Path]], retain: Any, tmp_path: Path
) -> None:
    rows, out = write(tmp_path / "r.jsonl", [*KINDS] * 8), tmp_path / "out"
    argv = ["--continue-from", months[1][0], "--data", rows, "--out", out, "-q"]
    more = ["--max-steps", 1, "--learning-rate", 1e-12, "--batch-size", 4]
    assert retain("train", *argv, *more).code == 0
    then, now = (answers(run, months[0], rows) for run in (months[1][0], out))
    torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "more", "said"),
    [
        ([*KINDS, "black"] * 6, [], ["other labels", "'black'", "blue, green, red"]),
        ([0, 1, 2] * 8, [], ["other labels", "got: labels such as 0"]),
        ([*KINDS] * 8, ["--num-labels", 4], ["other labels", "--num-labels 4"]),
    ],
    ids=["new name", "numbers", "count"],
)
def test_other_labels_are_refused(
    months: Any, retain: Any, tmp_path: Path, labels: list[Any], more: list[Any], said: list[str]
) -> None:
    rows, out = write(tmp_path / "r.jsonl", labels), tmp_path / "out"
    argv = ["--continue-from", months[1][0], "--data", rows, "--out", out, *SHORT[:4], *more]
    retain("train", *argv).refused(*said)
    assert not out.exists()


def test_a_language_model_does_not_go_on_as_a_classifier(
    retain: Any, model: Path, data: Path, curvature: Path, tmp_path: Path
) -> None:
    out, rows = tmp_path / "may", write(tmp_path / "r.jsonl", [0, 1, 2] * 8)
    argv = ["--model", model, "--data", data, "--curvature", curvature, "--rank", 4, "-o", out]
    assert retain("train", *argv, "--keep-state", "--max-steps", 1, "-q").code == 0
    more = ["--continue-from", out, "--data", rows, "--num-labels", 3, "-o", tmp_path / "june"]
    retain("train", *more).refused("other labels", "no classifier")


def test_resuming_a_later_month_ends_at_the_same_bytes(
    months: Any, retain: Any, tmp_path: Path
) -> None:
    rows = write(tmp_path / "r.jsonl", [*KINDS] * 8)
    argv = ["--continue-from", months[1][0], "--data", rows, "--save-steps", 2, "-q", *SHORT[:4]]
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        assert retain("train", *argv, "--out", out).code == 0
    shutil.rmtree(two / "checkpoints" / "checkpoint-6")
    assert retain("train", "--resume", "--out", two, "-q").code == 0
    for name in ("adapter/adapter_model.safetensors", "state/past.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
