"""A fit that is killed goes on: SIGKILL at random moments, 20 times, and the same bytes at the end.

A process of its own forks the command line and never runs a model itself, so that its children
start clean.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors import safe_open

import forked
from retain.cli import main


def start(argv: list[str], output: Path) -> int:
    child = os.fork()
    if child == 0:
        os._exit(main(["fit", *argv, "-o", str(output), "--quiet", "--save-every", "0"]))
    return child


def ended(child: int, options: int = 0) -> bool:
    """Whether a child has come to its end by itself."""
    found, status = os.waitpid(child, options)
    if not found or os.WIFSIGNALED(status):
        return False
    assert status == 0, os.waitstatus_to_exitcode(status)
    return True


def written(partial: Path) -> int:
    try:
        return partial.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def progress(partial: Path) -> list[int]:
    """(passes, batches of the next one) that the file says are done; it is always whole."""
    if not partial.exists():
        return [0, 0]
    with safe_open(partial, framework="pt") as file:
        return [int(file.get_tensor(key)) for key in ("passes", "done")]


def fit(
    argv: list[str], output: Path, draw: random.Random, span: tuple[float, float], quota: int
) -> list[list[int]]:
    """Kills a fit up to `quota` times, and restarts it until it is done."""
    partial, steps = output.with_name(output.name + ".partial"), [[0, 0]]
    while len(steps) <= quota:
        before, early, done = written(partial), draw.random() < 0.15, False
        child = start(argv, output)
        while not early and not done and written(partial) == before:
            time.sleep(0.0005)
            done = ended(child, os.WNOHANG)
        if not done:
            time.sleep(draw.random() * span[0 if early else 1])
            os.kill(child, signal.SIGKILL)
            done = ended(child)
        if done:
            return steps
        if output.exists():  # it came too late: the work was done, if not yet tidied up
            break
        steps.append(progress(partial))
    assert ended(start(argv, output))
    return steps


def fits(folder: Path, model: str, jobs: list[tuple[list[str], int]]) -> None:
    draw, report = random.Random(0), []
    for number, (options, quota) in enumerate(jobs):
        argv, alone = [model, *options], folder / f"{number}-alone"
        begin, child = time.monotonic(), start(argv, alone)
        first = alone.with_name(alone.name + ".partial")
        while not written(first):
            time.sleep(0.0005)
        load = time.monotonic() - begin
        assert ended(child)
        span = (load, 2 * (time.monotonic() - begin - load) / quota)
        tries: list[list[list[int]]] = []
        while sum(len(steps) - 1 for steps in tries) < quota:
            output = folder / f"{number}-killed-{len(tries)}"
            left = quota - sum(len(steps) - 1 for steps in tries)
            tries.append(fit(argv, output, draw, span, left))
            assert output.read_bytes() == alone.read_bytes(), (argv, tries)
        report.append(tries)
    print(json.dumps(report))


JOBS = [
    (["--structure", "ekfac"], 7),
    (["--structure", "shampoo", "--factor-rank", "2", "--share", "0.5"], 6),
    (["--structure", "tridiagonal", "--samples", "2", "--space", "adapter"], 5),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork")
def test_killed_fits_end_in_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    text = "the cat sat on a mat and dog ran to big red house while small bird sang"
    words = text.split()
    source, out = tmp_path / "source.jsonl", tmp_path / "out"
    out.mkdir()
    rows = [" ".join(words[(i * k) % 17] for k in range(1, 2 + i % 5)) for i in range(1, 101)]
    source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    common = [str(source), "--rows", "100", "--batch-size", "2", "--max-length", "24"]
    jobs = [([*common, *options], kills) for options, kills in JOBS]
    jobs.append((["self", "--rows", "24", "--batch-size", "1", "--max-length", "12"], 2))
    done = forked.run(fits, out, str(tiny_folder), jobs, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    tries = [steps for job in json.loads(done.stdout) for steps in job]
    assert sum(len(steps) - 1 for steps in tries) >= 20
    for steps in tries:  # no kill has cost what was kept before it
        assert steps == sorted(steps)
    assert sum(steps[-1] > [0, 1] for steps in tries) >= len(jobs)  # and they went on from there
    left = [p.name for p in out.iterdir() if ".partial" in p.name or ".tmp" in p.name]
    assert left == []  # not even what a kill in the midst of writing has left
