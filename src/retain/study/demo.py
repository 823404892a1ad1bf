"""The demo: a study of one task, with plain LoRA and with the recipe, that brings its own data.

Its folder holds ``study.yaml``, the task and its rows beside it, and all that a study writes, so
an interrupted demo goes on after what is done, and ``retain study`` can do it again with changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from retain.data.problems import Split, problem_rows, word_problems
from retain.errors import TrainingError
from retain.files import check_folder, whole_file
from retain.models.load import load_model
from retain.records import RunSpec, StudyRecord
from retain.study.grid import expand
from retain.study.runner import Outcome
from retain.study.spec import read_study
from retain.study.studies import run_study
from retain.study.work import Work, read_shared

__all__ = ["MARK", "demo_study", "run_demo"]

MARK = "# Written by retain demo"
"""How the files that tell a folder of the demo begin."""

TASK = "word-problems"

FULL = {"train": 256, "test": 64, "source": 64, "heldout": 24, "length": 128, "answers": 3}
QUICK = {"train": 32, "test": 8, "source": 8, "heldout": 8, "length": 48, "answers": 1}
"""Numbers of rows; the quick ones show in a minute or two that all stages work, and no more."""

STRENGTH, KL = 1000.0, 3.0
"""Ten times the default, in a proximal step, and the KL on the beginnings of answers: for
the sake of what general questions are answered with (docs/measured.md, docs/log.md)."""

LARGEST = 30
"""In a problem: a model of 135M parameters learns those in a minute."""

_TASK = {
    "description": "grade-school word problems, made up; asked in the model's chat form",
    "local": TASK,
    "files": {"train": "train", "eval": "test"},
    "kind": "generate",
    "prompt": "{{ prompt }}",
    "gold": "completion",
    "metric": "exact_match",
    "max_new_tokens": 32,
    "pattern": r"####[ \t]*\$?[ \t]*(-?\d+(?:,\d{3})*)",
}


def demo_study(
    seed: int = 0,
    quick: bool = False,
    model: str = "smollm2-135m",
    dtype: str = "bfloat16",
    strength: float = STRENGTH,
    kl: float = KL,
) -> dict[str, Any]:
    """What ``study.yaml`` of the demo says."""
    size = QUICK if quick else FULL
    apart, loss, lost = (
        {"claim": f"{claim}, retention / plain LoRA", "metric": metric, "method": "retention",
         "bound": bound}
        for claim, metric, bound in (
            ("forgetting (KL to the base)", "kl", 0.5),
            ("target loss on new problems", "loss", 1.05),
            ("knowledge lost", "general", round(1 / 3, 4)),
        )
    )  # fmt: skip
    return {
        "name": "demo",
        "description": "A small model learns word problems with plain LoRA and with retention.",
        "model": model,
        "dtype": dtype,
        "seeds": [seed],
        "orders": {TASK: [f"{TASK}.yaml"]},
        "adapters": {"lora": {"rank": 16, "alpha": 32}},
        "methods": {"none": {}, "retention": {"kind": "auto", "strength": strength, "kl": kl,
                                              "update": "proximal"}},
        "training": {"learning_rate": 2e-3, "batch_size": 8},
        "source": {"kind": "self", "rows": size["source"], "heldout": size["heldout"],
                   "max_length": size["length"]},
        "general": {"tasks": ["knowledge"], "limit": 40 if quick else 300},
        "evaluation": {"batch_size": 64, "measure_every": 2 if quick else 16,
                       "answers": size["answers"]},
        "claims": [apart, loss, lost],
    }  # fmt: skip


def run_demo(
    out: Path,
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> StudyRecord:
    """Does the demo, as far as it is not done, and gives its record, ``study.json``.

    What is done is told in a few words to `say`; `changes` are those of `demo_study`.

    Raises:
        OutputError: `out` cannot be written.
        TrainingError: a run has failed.
    """
    out = check_folder(out)
    study = demo_study(seed, quick, **changes)
    _write(out / f"{TASK}.yaml", _as_yaml(_TASK))
    _write_problems(out / "data" / TASK, study, QUICK if quick else FULL)
    _write(out / "study.yaml", _as_yaml(study))
    spec = read_study(out / "study.yaml")
    work = Work(spec.name, out, out, out / "data", progress=progress, adapters=True)

    def tell(run: RunSpec, outcome: Outcome) -> None:
        for note in outcome.notes:
            say(f"{run.method.title}: {note}")
        if outcome.error is not None or outcome.status != "done":
            raise TrainingError(
                f"the demo's run {run.method.title} is {outcome.status}",
                got=outcome.error,
                fix=f"see {work.trace(run.key)}; what is done is kept",
            )

    run_study(spec, expand(spec, out), work, say=say, tell=tell)
    return StudyRecord.model_validate(read_shared(out / "study.json"))


def _as_yaml(value: dict[str, Any]) -> str:
    return f"{MARK}\n{yaml.safe_dump(value, sort_keys=False, allow_unicode=True)}"


def _write(path: Path, text: str) -> None:
    """Writes a file whose contents are others; an equal one keeps its time."""
    if not path.is_file() or path.read_bytes() != text.encode():
        with whole_file(path, "a file of the demo") as scratch:
            scratch.write_text(text, encoding="utf-8")


def _write_problems(folder: Path, study: dict[str, Any], size: dict[str, int]) -> None:
    tokenizer = load_model(study["model"]).tokenizer
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        problems = word_problems(split, size[split], study["seeds"][0], LARGEST)
        lines = [json.dumps(row, ensure_ascii=False) for row in problem_rows(tokenizer, problems)]
        _write(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
