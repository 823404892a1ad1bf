"""``retain train`` in two processes: the numbers of one, and one of them that writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_parts import SHORT

import forked


@pytest.mark.shows("retain train", "DDP")
def test_two_processes_train_as_one(retain: Any, model: Path, data: Path, tmp_path: Path) -> None:
    argv = ["train", "--model", str(model), "--data", str(data), *SHORT, "--budget", "0.05"]
    argv += ["--epochs", "2", "--save-steps", "3", "--keep-state", "--dtype", "float32"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert retain(*argv, "--out", one, "-q").code == 0
    done = forked.command(*argv, "--out", two, "--json", processes=2)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one object: the other process says nothing
    assert told["steps"] == 12
    runs = [json.loads((out / "train.json").read_text()) for out in (one, two)]
    losses = [[entry["loss"] for entry in run["history"]] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    assert sorted(p.name for p in (two / "state").iterdir()) == [
        "past.safetensors", "source.safetensors", "state.json",
    ]  # fmt: skip
