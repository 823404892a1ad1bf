"""Studies for the tests: one whose runs are pretended, one of a tiny model on local files, and
records of several settings made by hand.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from retain.errors import OutputError, RetainWarning, TrainingError
from retain.records import RunSpec
from retain.study.grid import Grid, expand
from retain.study.spec import StudySpec, parse_study
from retain.study.work import Work

A, B = "glue/cola", "glue/rte"

PRETENDED: dict[str, Any] = {
    "name": "pretended",
    "model": "smollm2-135m",
    "seeds": [0, 1],
    "orders": {"ab": [A, B], "ba": [B, A]},
    "adapters": {"lora": {"rank": 4}, "prefix": {"training": {"learning_rate": 0.02}}},
    "methods": {"none": None, "held": {"kind": "l2", "strength": [1, 10]}},
    "training": {"learning_rate": 0.01, "tasks": {B: {"epochs": 3}}},
}


LACKING: dict[str, Exception] = {
    "accelerator memory": torch.OutOfMemoryError("CUDA out of memory"),
    "host memory": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "a connection": ConnectionResetError("Connection reset by peer"),
    "time": TimeoutError("timed out"),
    "open files": OSError(errno.EMFILE, "Too many open files"),
}
"""What a machine may lack, as an error."""

FULL: dict[str, Exception] = {
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "torch's disk": RuntimeError("basic_ios::clear: iostream error"),
    "safetensors' disk": SafetensorError("I/O error: No space left on device (os error 28)"),
    "our disk": OutputError("the state of a run cannot be written", got="x"),
}
"""What the disk may lack."""

LACKING |= FULL


def pretended(tmp_path: Path, **changes: Any) -> tuple[StudySpec, Grid, Work]:
    """A study whose runs `pretend` does."""
    spec = parse_study(PRETENDED | changes)
    grid = expand(spec, tmp_path)
    return spec, grid, Work(spec.name, tmp_path / "out", tmp_path, function=pretend)


def pretend(run: RunSpec, *, state: Any, work: Work, say: Any) -> dict[str, Any]:
    """A record whose numbers depend on the run alone; notes that it was called.

    The adapter's label may be a kind of trouble: it makes the run fail, wait, die or be stopped.
    """
    calls = work.out / "calls"
    calls.mkdir(parents=True, exist_ok=True)
    with (calls / f"{os.getpid()}.txt").open("a") as file:
        file.write(f"{run.method.title} {run.order.name} {run.seed}\n")
    trouble = run.adapter.name
    if trouble == "error":
        raise TrainingError("the loss is not finite", got="NaN\nat step 3", fix="lower it")
    if trouble in LACKING and not (work.out.parent / "mended").exists():
        raise LACKING[trouble]
    if trouble == "note":
        warnings.warn("held in a lesser way", RetainWarning, stacklevel=1)
        warnings.warn("held in a lesser way", RetainWarning, stacklevel=1)
    if trouble == "stop":
        raise KeyboardInterrupt
    if trouble == "wait":
        time.sleep(60)
    if trouble in ("die", "die late"):
        time.sleep(0.5 * (len(trouble) > 3))
        os._exit(3)
    tasks = run.order.tasks

    def number(*what: object) -> float:
        text = json.dumps([run.method.plain(), run.adapter.name, run.seed, *what])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32

    matrix = [[number(i, task) for task in tasks] for i in range(len(tasks))]
    return {
        "tasks": tasks,
        "metrics": ["accuracy"] * len(tasks),
        "before": [0.1] * len(tasks),
        "matrix": matrix,
        "sizes": {"train": [4] * len(tasks), "test": [4] * len(tasks)},
        "retention": [
            {"after": i, "kl": number("kl", i), "kl_interval": [0, 1], "ppl_base": 8.0,
             "ppl": float("inf"), "flips": 0.1, "tokens": 9}
            for i in range(len(tasks))
        ],
        "general": {"before": {"arc": 0.5}, "after": {"arc": 0.25}},
        "metrics_summary": {"average": sum(matrix[-1]) / len(tasks), "learning": number("l"),
                            "forgetting": None, "backward_transfer": None,
                            "forward_transfer": None, "intransigence": None},
        "parameters": {"trainable": 5, "base": 100, "share": 0.05},
        "seconds": {"train": 1.0, "method": 0.0, "evaluate": 0.0, "total": 1.0},
        "peak_memory_gib": 0.5,
        "losses": [number("loss", task) for task in tasks],
        "predicted": [None] * len(tasks),
    }  # fmt: skip


def calls(work: Work) -> list[str]:
    """What `pretend` was called for."""
    found = sorted((work.out / "calls").glob("*.txt"))
    return [line for path in found for line in path.read_text().splitlines()]


TEXT = "the cat sat on a mat and dog ran to big red house"

TASK = """
description: which of two letters comes
local: {name}
kind: choice
prompt: "{{{{ text }}}}:"
options: ["{first}", "{second}"]
gold: label
"""


def tiny_study(folder: Path, model: Path, **changes: Any) -> Path:
    """Writes a study of a tiny model and three tasks of its own; returns its path."""
    (folder / "tasks").mkdir(parents=True)
    data = folder / "data"
    for place, (name, pair) in enumerate({"one": "ab", "two": "cd", "three": "ef"}.items()):
        text = TASK.format(name=name, first=pair[0], second=pair[1])
        (folder / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")
        (data / name).mkdir(parents=True)
        for split, count in (("train", 12), ("validation", 8)):
            rows = [{"text": f"{'xyz'[(i + place) % 3]}{i % 4}", "label": (i + place) % 2}
                    for i in range(count)]  # fmt: skip
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (data / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    words = TEXT.split()
    text = [{"text": " ".join(words[(i * k) % 13] for k in range(1, 9))} for i in range(1, 25)]
    lines = "".join(json.dumps(row) + "\n" for row in text)
    (folder / "source.jsonl").write_text(lines, encoding="utf-8")
    study = {
        "name": "tiny",
        "model": str(model),
        "seeds": [0, 1],
        "orders": {"three": [f"tasks/{n}.yaml" for n in ("one", "two", "three")]},
        "adapters": {"lora": {"rank": 2}},
        "methods": {"none": {}, "kfac": {"strength": 100.0, "rows": 8}, "replay": {"per_task": 2}},
        "training": {"learning_rate": 0.02, "batch_size": 4, "pad_multiple": 1},
        "source": {"kind": "file", "path": "source.jsonl", "rows": 8, "heldout": 4,
                   "max_length": 24},
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | changes), encoding="utf-8")
    return path


def setting_run(
    method: str, rate: str, seed: int, values: str, *, kind: str = "auto", **more: Any
) -> dict[str, Any]:
    """A record; `values` are average, learning, forgetting, update_size and, if measured, KL."""
    average, learning, forgetting, size, *kl = map(float, values.split())
    adapter = {"name": f"lora-{rate}", "kind": "lora", "rank": 8} | more.pop("adapter", {})
    return {
        "schema": "retain.run/1",
        "config": {
            "model": "m", "adapter": adapter, "seed": seed,
            "method": {"name": method, "kind": kind, "strength": more.pop("strength", 30)},
            "order": {"name": "o", "tasks": ["a", "b"]}, "training": {"learning_rate": float(rate)},
            "evaluation": {"split": more.pop("split", "validation")},
        },
        "tasks": ["a", "b"],
        "retention": [{"after": 1, "kl": kl[0]}] if kl else [],
        "metrics_summary": {"average": average, "learning": learning, "forgetting": forgetting,
                            "update_size": size},
    } | more  # fmt: skip


SETTINGS = [
    setting_run("none", "3e-4", 0, ".50 .60 .10 -2", kind="none"),
    setting_run("none", "1e-3", 0, ".55 .70 .20 -1", kind="none"),
    setting_run("none", "3e-4", 1, ".50 .64 .12 -2", kind="none"),
    setting_run("none", "1e-3", 1, ".55 .90 .30 -1", kind="none"),
    # seed 0: .02 at .60 and .06 at .80, so .04 at .70; seed 1: .03 at .60 and .07 at .80
    setting_run("auto", "3e-4", 0, ".57 .60 .02 -1.5 .1"),
    setting_run("auto", "1e-3", 0, ".60 .80 .06 -0.5 .3"),
    setting_run("auto", "3e-4", 1, ".59 .60 .03 -1.5 .1"),
    setting_run("auto", "1e-3", 1, ".62 .80 .07 -0.5 .3"),
    setting_run("auto-100", "1e-3", 0, ".61 .65 .01 -5", strength=100),
    setting_run("auto-100", "1e-3", 1, ".63 .77 .01 -5", strength=100),
]
"""Finished runs of LoRA and of the recipe at two rates and seeds, and of one more strength."""
