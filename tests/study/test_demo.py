"""The demo from end to end, on a tiny model: all stages, the report, and going on from files."""

import json
from pathlib import Path

import pytest

from retain.errors import ConfigError
from retain.report.page import write_report
from retain.study import demo as module
from retain.study.claims import summary
from retain.study.demo import run_demo

TINY = {
    "dtype": "float32",
    "examples": 48,
    "problems": 4,
    "source_rows": 8,
    "source_length": 24,
    "strengths": [1e7],  # an untrained model relies on little: its curvature is tiny
    "chosen": 1e7,
}


def test_every_stage_runs_and_is_not_done_twice(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TINY | {"model": str(tiny_folder), "progress": False, "verbose": False}
    monkeypatch.setattr(module, "provenance", lambda seed: {"commit": "fixed", "seed": seed})
    result = run_demo(tmp_path, quick=True, **settings)
    base, lora, held = result["rows"]
    assert base["forgetting"]["kl"] == 0.0
    assert [r["method"] for r in (base, lora, held)] == [None, "none", "laplace"]
    assert 0 < held["forgetting"]["kl"] < lora["forgetting"]["kl"]
    assert held["history"][-1]["measured"] is not None
    assert held["chosen"]
    assert len(result["summary"]) == 3
    for name in ("lora", "retain-1e+07"):
        assert (tmp_path / "adapters" / name / "adapter_model.safetensors").is_file()
    pages = write_report(tmp_path / "result.json", tmp_path / "report.html")
    assert all(page.stat().st_size > 1000 for page in pages)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a stage that was done is done again")

    for stage in ("train", "sample_rows", "fit_curvature"):
        monkeypatch.setattr(module, stage, never)
    again = run_demo(tmp_path, quick=True, **settings)
    assert again["rows"] == json.loads(json.dumps(result["rows"]))
    assert json.loads((tmp_path / "result.json").read_text())["rows"][0]["name"] == "base"


def test_the_chosen_strength_is_one_that_is_tried(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chosen must be one of the strengths"):
        run_demo(tmp_path, chosen=5.0, verbose=False)


def test_claims_hold_by_their_numbers_alone() -> None:
    def row(method: str | None, strength: float | None, kl: float, loss: float, lost: float):
        return {
            "method": method,
            "strength": strength,
            "forgetting": {"kl": kl},
            "target": {"loss": loss},
            "probe": {"lost": lost},
        }

    good = summary([row("none", 0.0, 0.4, 0.24, 0.09), row("laplace", 10.0, 0.1, 0.25, 0.02)], 10.0)
    assert [c["holds"] for c in good] == [True, True, True]
    bad = summary([row("none", 0.0, 0.4, 0.24, 0.0), row("laplace", 10.0, 0.3, 0.26, 0.02)], 10.0)
    assert [c["holds"] for c in bad] == [False, False, None]
