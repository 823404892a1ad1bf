"""The demo from end to end, on a tiny model: all stages, its claims, and going on from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retain.errors import TrainingError
from retain.records import StudyRecord
from retain.study.demo import MARK, demo_study, run_demo
from retain.study.spec import ClaimSpec, parse_study
from retain.study.tables import judged

# An untrained model relies on little: its curvature is tiny.
TINY = {"quick": True, "dtype": "float32", "strength": 1e7, "progress": False}


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyRecord]:
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(out, model=str(tiny_folder), **TINY)


def test_every_stage_runs(done: tuple[Path, StudyRecord]) -> None:
    out, study = done
    lora, held = study.runs
    assert [run.config.method.name for run in study.runs] == ["none", "retention"]
    assert (lora.before == held.before and lora.general == held.general) or held.general
    kl = [run.retention[-1].kl or 0.0 for run in study.runs]
    assert -1e-6 < kl[1] < kl[0]  # held so, a model of a few steps has hardly moved
    for run in study.runs:
        assert run.sizes is not None and (run.sizes.train, run.sizes.test) == ([32], [8])
        assert run.general is not None and "knowledge" in run.general.before
        assert [step.step for step in run.history] == [1, 2, 3, 4]
        assert run.history[-1].measured is not None
        (told,) = run.generations
        assert told.before is not None and told.prompt == "What is the capital of France?"
    adapters = sorted(path.name for path in (out / "adapters").iterdir())
    assert len(adapters) == 2
    assert (out / "adapters" / adapters[0] / "adapter_model.safetensors").is_file()
    assert (out / "study.yaml").read_text().startswith(f"{MARK}\n")


def test_its_claims_are_told(done: tuple[Path, StudyRecord]) -> None:
    study = done[1]
    assert [claim.bound for claim in study.claims] == [0.5, 1.05, 0.3333]
    lora, held = ((run.retention[-1].kl or 0.0) for run in study.runs)
    assert study.claims[0].value == pytest.approx(held / lora)
    assert study.claims[0].holds is (held / lora <= 0.5)
    assert study.chosen == "retention"


def test_what_is_done_is_not_done_twice(
    done: tuple[Path, StudyRecord], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a run that was done is done again")

    out, study = done
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    monkeypatch.setattr("retain.study.sequence.run_sequence", never)
    assert run_demo(out, model=str(tiny_folder), **TINY) == study
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")} == times


def test_a_run_that_fails_is_said(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr("retain.study.sequence.train", fails)
    with pytest.raises(TrainingError, match="run none is failed; got: the loss is not finite"):
        run_demo(tmp_path, model=str(tiny_folder), **TINY)


def test_it_is_a_study_like_any_other() -> None:
    full, quick = (parse_study(demo_study(3, quick)) for quick in (False, True))
    assert full.seeds == [3] and full.source.rows > quick.source.rows


def cell(method: str, **metrics: float) -> dict[str, Any]:
    place = {"model": "m", "adapter": "lora", "method": method, "order": "o"}
    numbers = {name: {"mean": value, "values": [value]} for name, value in metrics.items()}
    return place | {"seeds": [0], "metrics": numbers}


@pytest.mark.parametrize(
    ("metric", "ours", "plain", "value", "holds"),
    [
        ("kl", 0.1, 0.4, 0.25, True),
        ("kl", 0.3, 0.4, 0.75, False),
        ("kl", 0.3, 0.0, None, None),
        ("general", -0.02, -0.08, 0.25, True),
        ("general", -0.02, 0.0, None, None),
        ("general", 0.02, -0.08, -0.25, True),
    ],
)
def test_claims_hold_by_their_numbers_alone(
    metric: str, ours: float, plain: float, value: float | None, holds: bool | None
) -> None:
    claim = ClaimSpec(claim="less", metric=metric, method="held", bound=0.5)
    cells = [cell("none", **{metric: plain}), cell("held", **{metric: ours})]
    (found,) = judged([claim], cells)
    assert (found["value"], found["holds"]) == (pytest.approx(value), holds)
    (found,) = judged([claim], cells[:1])
    assert (found["value"], found["holds"]) == (None, None)
    other = claim.model_copy(update={"relation": ">="})
    (found,) = judged([other], cells)
    assert found["holds"] is (None if value is None else value >= 0.5)


@pytest.mark.parametrize(
    ("relation", "a", "b", "value", "holds"),
    [
        ("<=", 0.1, 0.2, 0.5, True),
        ("<=", 0.1, 1.2, 3.0, False),
        (">=", 0.1, 1.2, 0.25, False),
        (">=", 0.2, 1.2, 0.5, True),
    ],
)
def test_a_claim_is_of_all_its_cells(
    relation: Any, a: float, b: float, value: float, holds: bool
) -> None:
    """The first alone was judged."""
    claim = ClaimSpec(claim="x", metric="kl", method="held", relation=relation, bound=0.5)
    first = [cell("none", kl=0.4), cell("held", kl=a)]
    second = [one | {"order": "p"} for one in (cell("none", kl=0.4), cell("held", kl=b))]
    alone = cell("held", kl=9.0) | {"order": "without a reference"}
    for cells in ([*first, *second, alone], [alone, *second, *first]):
        (found,) = judged([claim], cells)
        assert (found["value"], found["holds"]) == (pytest.approx(value), holds)
    nothing = [one | {"order": "q"} for one in (cell("none", kl=0.0), cell("held", kl=1.0))]
    (found,) = judged([claim], [*first, *second, *nothing])
    assert found["holds"] is (None if holds else False)
    assert found["value"] == (None if holds else pytest.approx(value))
