"""A study killed at random moments and started again gives the tables of one left alone.

``RETAIN_KILLS=10`` kills more often than the 3 times of the ordinary run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import forked
from retain.cli import main
from study_parts import tiny_study

KILLS = int(os.environ.get("RETAIN_KILLS", "3"))
TIMES = {"created", "seconds", "peak_memory_gib", "commit"}


def files(out: Path) -> set[tuple[str, int]]:
    found = set()
    for path in out.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # a file that is being written is renamed
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "study.json").read_text())
    found["runs"] = [{k: v for k, v in run.items() if k not in TIMES} for run in found["runs"]]
    return found


def tables(out: Path) -> bytes:
    return json.dumps(json.loads((out / "study.json").read_text())["tables"]).encode()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_killed_at_random_moments(tiny_folder: Path, tmp_path: Path) -> None:
    path = tiny_study(tmp_path / "study", tiny_folder)

    def process(out: Path) -> Any:
        argv = ["study", str(path), "--out", str(out), "--quiet"]
        argv += ["--data-dir", str(path.parent / "data"), "--threads", "1"]
        return forked.begin(main, argv, told=tmp_path / "told")

    alone = process(tmp_path / "whole")
    alone.join()
    assert alone.exitcode == 0
    moments = random.Random()
    seed = moments.randrange(2**32)
    moments.seed(seed)
    print(f"seed of the moments: {seed}")
    out, kills, at = tmp_path / "killed", 0, []
    while kills < KILLS:
        before = files(out)
        victim = process(out)
        limit = time.monotonic() + 60
        while files(out) == before and victim.is_alive():  # it has begun to work
            assert time.monotonic() < limit
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 5.0 / KILLS))
        if not victim.is_alive():
            break
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        kills += victim.exitcode == -signal.SIGKILL
        at.append(len(list((out / "runs").glob("*.json"))))
    assert kills
    print(f"{kills} kills, with so many runs done: {at}")
    last = process(out)
    last.join()
    assert last.exitcode == 0
    assert tables(out) == tables(tmp_path / "whole")
    assert results(out) == results(tmp_path / "whole")
    assert not list((out / "state").iterdir())
    assert not [p for p in out.rglob(".*") if p.is_file()]
