"""What `faults.py` works on: a tiny random model, its data, and the commands that read them.

All paths are relative to the folder of a trial, so that records of any two trials are comparable.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

FORMATS = ("jsonl", "csv", "parquet", "txt")

TRAIN: dict[str, Any] = {
    "model": "model",
    "dtype": "float32",
    "data": "rows.jsonl",
    "out": "run",
    "curvature": "curvature.safetensors",
    "strength": 10.0,
    "keep_state": True,
    "adapter": {"rank": 2},
    "training": {
        "batch_size": 4, "learning_rate": 0.02, "epochs": 2, "max_length": 24, "save_steps": 2,
    },
}  # fmt: skip

STUDY: dict[str, Any] = {
    "seeds": [0],
    "orders": {"two": ["tasks/one.yaml", "tasks/two.yaml"]},
    "methods": {"none": {}, "kfac": {"strength": 100.0, "rows": 8}},
}
"""What is other than in the tests' study."""


@dataclass(frozen=True)
class Job:
    """A command on some inputs.

    Attributes:
        name: of the job.
        base: the folder of inputs that it starts from, a name in `BASES`.
        command: its arguments, a space between them.
        outputs: what it leaves, by name in the folder.
        targets: (family, path) of the files that may be damaged before it.
        killed: whether it is also killed.
    """

    name: str
    base: str
    command: str
    outputs: tuple[str, ...]
    targets: tuple[tuple[str, str], ...] = ()
    killed: bool = False

    def argv(self, folder: Path) -> list[str]:
        """The arguments in a folder: with ``--resume`` where a run has begun there."""
        argv = [*self.command.split(), "--quiet"]
        begun = argv[0] == "train" and (folder / self.outputs[0] / "run.json").exists()
        return [*argv, "--resume"] if begun else argv


def _files(**families: str) -> tuple[tuple[str, str], ...]:
    """(family, path) of files that are given with a space between them."""
    return tuple((family, path) for family, text in families.items() for path in text.split())


_FIT = "fit model source.jsonl -o curvature.safetensors --rows 24 --batch-size 2 --max-length 24"
_TRAIN = "train --config train.yaml --out run"
_STUDY = "study study.yaml --out out --data-dir data --threads 1"
_ADAPTER = "run/adapter/adapter_model.safetensors run/adapter/adapter_config.json"
_STATE = "run/state/state.json run/state/past.safetensors run/state/source.safetensors"
_CHECKPOINT = " ".join(
    f"run/checkpoints/*/{name}"
    for name in (
        "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt",
        "rng_state.pth", "trainer_state.json", "retention.json", "training_args.bin", "*.json",
    )
)  # fmt: skip

_JOBS = (
    Job(
        "fit", "begun", f"{_FIT} --save-every 0", ("curvature.safetensors",),
        _files(rows="source.jsonl"), True,
    ),
    Job(
        "train", "fitted", _TRAIN, ("run",),
        _files(config="train.yaml", rows="rows.jsonl", curvature="curvature.safetensors"), True,
    ),
    Job(
        "resume", "stopped", _TRAIN, ("run",),
        _files(checkpoint=_CHECKPOINT, record="run/run.json", config="train.yaml"),
    ),
    Job(
        "study", "begun", _STUDY, ("out",),
        _files(
            config="study.yaml tasks/one.yaml",
            rows="data/one/train.jsonl data/two/validation.jsonl source.jsonl",
        ), True,
    ),
    Job(
        "study again", "studied", _STUDY, ("out",),
        _files(record="out/runs/*.json out/study.json out/untrained/*.json"),
    ),
    Job(
        "study on", "half", _STUDY, ("out",),
        _files(
            state="out/state/*/state.json out/state/*/*.safetensors", record="out/untrained/*.json"
        ),
    ),
    Job(
        "soften", "trained",
        "soften run/adapter --curvature curvature.safetensors --budget 0.01 --out soft", ("soft",),
        _files(adapter=_ADAPTER, curvature="curvature.safetensors"), True,
    ),
    Job(
        "continue", "trained",
        "train --continue-from run --data more.jsonl --batch-size 4 --save-steps 2 --epochs 2 "
        "--out next", ("next",),
        _files(adapter=_ADAPTER, state=_STATE, record="run/run.json", rows="more.jsonl"), True,
    ),
    *(
        Job(
            f"rows {kind}", "begun",
            f"train --model model --data rows.{kind} --method none --dtype float32 --rank 2 "
            "--max-steps 2 --batch-size 4 --max-length 24 --out plain", ("plain",),
            _files(rows=f"rows.{kind}"),
        )
        for kind in FORMATS
    ),
)  # fmt: skip

JOBS = {job.name: job for job in _JOBS}

BASES: dict[str, tuple[str, str | None]] = {
    "begun": ("", None),
    "fitted": ("begun", "fit"),
    "trained": ("fitted", "train"),
    "stopped": ("trained", None),
    "studied": ("begun", "study"),
    "half": ("begun", None),
}
"""Folder of inputs -> the one that it is a copy of, and the job that was done in it."""


def write_inputs(folder: Path, seed: int) -> None:
    """The model and all data."""
    import pyarrow
    import pyarrow.parquet
    import yaml

    from study_parts import TEXT, tiny_study  # type: ignore[import-not-found]
    from tiny import save_tiny  # type: ignore[import-not-found]

    folder.mkdir(parents=True)
    save_tiny(folder / "model", seed)
    tiny_study(folder, Path("model"), **STUDY)
    (folder / "train.yaml").write_text(yaml.safe_dump(TRAIN, sort_keys=False))
    draw, words = random.Random(seed), TEXT.split()
    rows = [
        {"prompt": f"{draw.choice(words)} {i}:", "completion": f" {draw.choice(words)}"}
        for i in range(24)
    ]
    more = [{**row, "completion": " no"} for row in rows[:16]]
    for name, some in (("rows.jsonl", rows), ("more.jsonl", more)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    cells = [f'"{row["prompt"]}","{row["completion"]}"' for row in rows]
    (folder / "rows.csv").write_text("\n".join(["prompt,completion", *cells]) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    texts = [" ".join(draw.choices(words, k=8)) for _ in range(32)]
    (folder / "rows.txt").write_text("\n\n".join(texts) + "\n")


def stop(folder: Path) -> None:
    """Makes of a finished run one that was stopped after its last checkpoint but one."""
    checkpoints = (folder / "run" / "checkpoints").glob("checkpoint-*")
    last = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))
    for path in (last, folder / "run" / "adapter", folder / "run" / "state"):
        shutil.rmtree(path)
    (folder / "run" / "train.json").unlink()
