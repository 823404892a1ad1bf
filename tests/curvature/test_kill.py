"""A fit that is killed goes on: SIGKILL at random moments, 20 times, and the same bytes at the end.

A process of its own imports the library once and forks the command line from then on. It never
runs a model itself, so its children start clean.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = '''
import json, os, random, signal, sys, time
from pathlib import Path

import torch
from safetensors import safe_open

import retain.curvature.fit.fit, retain.models.load, retain.models.generating
from retain.cli import main

def start(argv, output):
    child = os.fork()
    if child == 0:
        os._exit(main(["fit", *argv, "-o", str(output), "--quiet", "--save-every", "0"]))
    return child

def ended(child, options=0):
    """Whether a child has come to its end by itself."""
    found, status = os.waitpid(child, options)
    if not found or os.WIFSIGNALED(status):
        return False
    assert status == 0, os.waitstatus_to_exitcode(status)
    return True

def written(partial):
    try:
        return partial.stat().st_mtime_ns
    except FileNotFoundError:
        return 0

def progress(partial):
    """(passes, batches of the next one) that the file says are done; it is always whole."""
    if not partial.exists():
        return [0, 0]
    with safe_open(partial, framework="pt") as file:
        return [int(file.get_tensor(key)) for key in ("passes", "done")]

def fit(argv, output, draw, span, quota):
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

folder, model, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
draw, report = random.Random(seed), []
for number, (argv, quota) in enumerate(json.loads(sys.argv[4])):
    argv, alone = [model, *argv], folder / f"{number}-alone"
    begin, child = time.monotonic(), start(argv, alone)
    first = alone.with_name(alone.name + ".partial")
    while not written(first):
        time.sleep(0.0005)
    load = time.monotonic() - begin
    assert ended(child)
    span, tries = (load, 2 * (time.monotonic() - begin - load) / quota), []
    while sum(len(steps) - 1 for steps in tries) < quota:
        output = folder / f"{number}-killed-{len(tries)}"
        left = quota - sum(len(steps) - 1 for steps in tries)
        tries.append(fit(argv, output, draw, span, left))
        assert output.read_bytes() == alone.read_bytes(), (argv, tries)
    report.append({"tries": tries, "seconds": [load, time.monotonic() - begin]})
print(json.dumps(report))
'''

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
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(out), str(tiny_folder), "0", json.dumps(jobs)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    tries = [steps for job in report for steps in job["tries"]]
    assert sum(len(steps) - 1 for steps in tries) >= 20
    for steps in tries:  # no kill has cost what was kept before it
        assert steps == sorted(steps)
    assert sum(steps[-1] > [0, 1] for steps in tries) >= len(jobs)  # and they went on from there
    left = [p.name for p in out.iterdir() if ".partial" in p.name or ".tmp" in p.name]
    assert left == []  # not even what a kill in the midst of writing has left
