"""``--rows``, ``--limit`` and ``--seed``: rows are drawn from the whole file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retain.data import sources
from retain.data.draws import HELD_OUT, draw


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of the rows that were read, for each reading of a file."""
    found: list[list[int]] = []
    read = sources.read_rows

    def spy(source: Any, *args: Any, **more: Any) -> Any:
        rows = read(source, *args, **more)
        if isinstance(source, str | Path):
            found.append([row.number - 1 for row in rows])  # type: ignore[attr-defined]
        return rows

    monkeypatch.setattr(sources, "read_rows", spy)
    return found


@pytest.mark.parametrize("seed", [0, 5])
def test_fit(
    retain: Any, model: Path, source: Path, tmp_path: Path, asked: list[Any], seed: int
) -> None:
    found = retain(
        "fit", model, source, "-o", tmp_path / "c", "--rows", 5, "--batch-size", 5,
        "--seed", seed, "--json",
    ).json  # fmt: skip
    assert asked[0] == list(draw(16, 5, seed))
    assert found["info"]["note"] == str(source)
    assert found["info"]["sequences"] == 5


def test_eval_measures_on_others(
    retain: Any, trained: Path, source: Path, asked: list[Any]
) -> None:
    adapter = trained / "adapter"
    retain("eval", "--adapter", adapter, "--source", source, "--rows", 5, "--seed", 2, "-q")
    assert asked == [list(draw(16, 5, HELD_OUT + 2))]
    assert asked[0] != list(draw(16, 5, 2))


@pytest.mark.parametrize("seed", [0, 5])
def test_train(
    retain: Any, model: Path, data: Path, tmp_path: Path, short: Any, asked: list[Any], seed: int
) -> None:
    out = tmp_path / "run"
    done = retain(
        "train", "--model", model, "--data", data, *short, "--method", "none", "--out", out,
        "--limit", 8, "--seed", seed, "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert asked == [list(draw(24, 8, seed))]
    assert json.loads((out / "train.json").read_text())["examples"] == 8


def test_train_on_a_limit_of_text(retain: Any, model: Path, tmp_path: Path, short: Any) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{i:04} words " for i in range(900)))
    out = tmp_path / "run"
    done = retain(
        "train", "--model", model, "--data", text, *short, "--method", "none", "--out", out,
        "--limit", 8, "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads((out / "train.json").read_text())["examples"] == 8
