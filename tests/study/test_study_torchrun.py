"""A study under ``torchrun``: two processes share each step, and the numbers are those of one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import main as torchrun

import forked
from retain.cli import main
from study_parts import tiny_study

METHODS: dict[str, Any] = {
    "none": {},
    "auto": {"rows": 8},
    "kl": {"strength": 300.0, "on": "source"},
    "replay": {"per_task": 2},
}


def runs(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in out.glob("runs/*.json")]
    assert [run["error"] for run in found] == [None] * len(METHODS)
    return {run["config"]["method"]["label"]: run for run in found}


@pytest.mark.shows("studies", "DDP")
def test_two_processes_give_the_numbers_of_one(tiny_folder: Path, tmp_path: Path) -> None:
    path = tiny_study(
        tmp_path / "study", tiny_folder, methods=METHODS, seeds=[0],
        orders={"two": ["tasks/one.yaml", "tasks/two.yaml"]},
        training={"learning_rate": 0.02, "batch_size": 4, "accumulation": 2, "pad_multiple": 1},
    )  # fmt: skip
    common = ["--data-dir", str(path.parent / "data"), "--quiet", "--threads", "1"]
    assert main(["study", str(path), "--out", str(tmp_path / "one"), *common]) == 0
    done = forked.command("study", path, "--out", tmp_path / "two", *common, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = runs(tmp_path / "one"), runs(tmp_path / "two")
    for name in METHODS:
        assert two[name]["key"] == one[name]["key"]
        assert two[name]["losses"] == pytest.approx(one[name]["losses"], rel=1e-4), name
        last = one[name]["retention"][-1]["kl"]
        assert two[name]["retention"][-1]["kl"] == pytest.approx(last, rel=0.01), name
    assert not list((tmp_path / "two" / "state").iterdir())
    kept = sorted(run["retention"][-1]["kl"] for run in one.values())
    assert all(b > 1.03 * a for a, b in pairwise(kept)), kept  # more than is allowed above


def test_rows_that_do_not_divide_among_the_processes(tiny_folder: Path, tmp_path: Path) -> None:
    """Under ``torchrun`` itself."""
    path = tiny_study(
        tmp_path / "study", tiny_folder, methods={"none": {}}, seeds=[0],
        training={"learning_rate": 0.02, "batch_size": 3, "pad_multiple": 1},
    )  # fmt: skip
    out, data = tmp_path / "out", str(path.parent / "data")
    argv = ["--standalone", "--nproc-per-node=2", "-m", "retain", "study", str(path)]
    forked.run(torchrun, [*argv, "--out", str(out), "--data-dir", data, "--quiet"])
    (record,) = (json.loads(path.read_text()) for path in out.glob("runs/*.json"))
    assert record["status"] == "failed"
    assert "3 rows, 2 processes" in record["error"]
