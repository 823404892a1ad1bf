"""Records: the committed ones are read and written unchanged, and keep their keys."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from retain.records import RunRecord, RunSpec, StudyRecord, bits_of, flags_of

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*/study.json"))

SPEC: dict[str, Any] = {
    "model": "m",
    "adapter": {"name": "lora", "rank": 4},
    "method": {"name": "held", "label": "held 10", "kind": "kfac", "strength": 10.0, "rows": 8},
    "order": {"name": "ab", "tasks": ["a", "b"]},
    "seed": 3,
    "training": {"learning_rate": 0.01, "epochs": 2, "tasks": {"b": {"epochs": 3}}},
}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_what_is_committed_is_read_and_written_unchanged(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    study = StudyRecord.model_validate(found)
    assert json.dumps(study.plain(), sort_keys=True) == json.dumps(found, sort_keys=True)
    for run in study.runs:
        assert run.config.key == run.key
        assert run.done and run.config.settings(0).learning_rate > 0


def test_there_are_committed_studies() -> None:
    assert len(RESULTS) > 10


def test_a_key_depends_on_all_that_is_set_and_on_nothing_else() -> None:
    spec = RunSpec.model_validate(SPEC)
    assert spec.plain() == SPEC
    assert spec.key == RunSpec.model_validate(dict(reversed(SPEC.items()))).key
    other = [SPEC | {"seed": 4}, SPEC | {"new": 1}, SPEC | {"head": None}]
    assert len({spec.key, *(RunSpec.model_validate(o).key for o in other)}) == 4


def test_a_run_in_words_and_its_settings() -> None:
    spec = RunSpec.model_validate(SPEC)
    assert spec.title == "m lora held 10 ab seed 3"
    assert [spec.settings(i, 5).epochs for i in range(2)] == [2, 3]
    assert spec.settings(0, 5).seed == 5 and spec.settings(1).learning_rate == 0.01
    assert (spec.adapter.options, spec.method.options) == ({"rank": 4}, {"rows": 8})


def test_what_a_newer_version_adds_survives_and_what_is_null_is_nothing() -> None:
    found = {"schema": "retain.run/1", "config": SPEC, "status": "failed", "matrix": None,
             "metrics_summary": None, "later": {"x": [1]}}  # fmt: skip
    record = RunRecord.model_validate(found)
    assert record.matrix == [] and record.metrics_summary == {} and not record.done
    assert record.plain() == found | {"matrix": [], "metrics_summary": {}}


@pytest.mark.parametrize(
    "change", [{"schema": "retain.run/2"}, {"status": "odd"}, {"config": {}},
               {"peak_memory_gib": float("nan")}],
)  # fmt: skip
def test_what_is_no_record_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RunRecord.model_validate({"config": SPEC} | change)


@pytest.mark.parametrize("count", [0, 1, 4, 7, 400])
def test_flags_as_text(count: int) -> None:
    flags = [i * i % 7 < 3 for i in range(count)]
    text = bits_of(flags)
    assert flags_of(text) == flags and len(text) <= count / 4 + 5
    assert bits_of([True, False, False, False, True]) == "5:88"
    with pytest.raises(ValueError, match="flags"):
        flags_of(f"{count + 4}:{text.split(':')[1]}")


def test_they_need_no_torch() -> None:
    code = "import sys, retain.records; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
