"""`retain.training.loop.train`: plain, held, accumulated, resumed."""

from __future__ import annotations

import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from retain import Curvature, fit_curvature
from retain.config import TrainConfig
from retain.data.batches import Example
from retain.data.sources import encode
from retain.errors import RetainWarning, SourceError, TrainingError
from retain.models.sites import lora_sites
from retain.retention.force import Force
from retain.retention.recipe import Recipe
from retain.training.loop import TrainResult, train
from retain.types import SPACES, UPDATES
from tiny import KINDS, ROWS, exactly, tiny, weights


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def examples(kind: str, count: int = 16) -> list[Example]:
    rows = [
        {"input_ids": [1 + (i * k) % 12 for k in range(1, 3 + i % 4)], "label": i % 3}
        for i in range(1, count + 1)
    ]
    return encode(rows, None, max_length=16, causal=kind == "llama")


def fit(model: nn.Module, kind: str, space: str = "weight", structure: str = "kfac") -> Curvature:
    return fit_curvature(model, ROWS[kind], structure, space=space, batch_size=4, progress=False)


def go(model: nn.Module, kind: str, curvature: Curvature | None = None, **options: Any):
    """(weights after training, what training gave)"""
    own = {k: options.pop(k) for k in ("out", "resume", "measure") if k in options}
    strength, update = options.pop("strength", 10.0), options.pop("update", "gradient")
    config = TrainConfig(**{"batch_size": 8, "learning_rate": 0.01, "max_steps": 4} | options)
    recipe = None
    if curvature is not None:
        recipe = Recipe(curvature, strength, parts=["force"], update=update)
    result = train(model, examples(kind), config, recipe=recipe, progress=False, **own)
    assert isinstance(result, TrainResult)
    return weights(model), result


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_plain_training_bit_for_bit(kind: str, space: str, update: str) -> None:
    options = {"dtype": torch.float32, "lora_dropout": 0.2}
    plain, _ = go(tiny(kind, **options), kind)
    model = tiny(kind, **options)
    start = weights(model)
    held, result = go(model, kind, fit(model, kind, space), strength=0.0, update=update)
    exactly(held, plain)
    assert any(not torch.equal(plain[name], start[name]) for name in plain)
    assert result.history[-1]["predicted"] > 0


@pytest.mark.parametrize(
    ("kind", "update"), [*(("llama", u) for u in (None, *UPDATES)), ("bert", "gradient")]
)
def test_accumulation_gives_one_trajectory(kind: str, update: str | None) -> None:
    def trajectory(accumulation: int):
        model = tiny(kind, moved=True)
        curvature = fit(model, kind) if update else None
        options = {"update": update, "strength": 50.0} if update else {}
        return go(model, kind, curvature, accumulation=accumulation, max_steps=3, **options)

    want, whole = trajectory(1)
    for accumulation in (2, 4, 8):
        got, pieces = trajectory(accumulation)
        assert pieces.steps == whole.steps == 3
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        for one, other in zip(pieces.history, whole.history, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            if update:
                assert one["predicted"] == pytest.approx(other["predicted"], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_force_is_applied_once_an_optimiser_step(
    accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = Force.add_force
    monkeypatch.setattr(
        Force, "add_force", lambda self, *a: calls.append(1) or original(self, *a), raising=True
    )
    model = tiny("llama")
    go(model, "llama", fit(model, "llama"), strength=1.0, accumulation=accumulation, max_steps=3)
    assert len(calls) == 3


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_retention_holds_and_the_history_says_so(kind: str, update: str) -> None:
    ends = []
    for strength in (0.0, 100.0):
        model = tiny(kind)
        curvature = fit(model, kind)
        _, result = go(model, kind, curvature, strength=strength, update=update, max_steps=6)
        assert [entry["step"] for entry in result.history] == [1, 2, 3, 4, 5, 6]
        assert {entry["strength"] for entry in result.history} == {strength}
        ends.append(curvature.quadratic(model))
        if update == "proximal":
            assert result.history[-1]["predicted"] == pytest.approx(ends[-1], rel=1e-9)
        else:  # the gradient way looks before it steps
            assert result.history[0]["predicted"] == 0.0
    assert ends[1] < 0.5 * ends[0]


def test_proximal_strengths_are_finite_and_monotone() -> None:
    model = tiny("llama")
    curvature, start, ends = fit(model, "llama"), weights(model), []
    for power in range(-3, 10):
        with torch.no_grad():
            for site in lora_sites(model):
                site.a.copy_(start[f"{site.name}.lora_A"])
                site.b.copy_(start[f"{site.name}.lora_B"])
        options = {"learning_rate": 0.005, "schedule": "constant", "update": "proximal"}
        after, result = go(model, "llama", curvature, strength=10.0**power, **options)
        assert all(bool(w.isfinite().all()) for w in after.values())
        ends.append(result.history[-1]["predicted"])
    for before, now in pairwise(ends):
        assert now <= before + 1e-12
    assert abs(ends[-1]) < 1e-6 * ends[0]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("space", SPACES)
def test_a_resumed_run_is_the_uninterrupted_one(space: str, update: str, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, dict[str, Any]]:
        model = tiny("llama", dtype=torch.float32)
        return model, {"curvature": fit(model, "llama", space), "strength": 5.0}

    options = {"update": update, "save_steps": 2, "out": tmp_path / "out"}
    model, held = start()
    want, _ = go(model, "llama", **held, **options)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    model, held = start()
    got, result = go(model, "llama", resume=True, **held, **options)
    assert result.steps == 4
    assert [entry["step"] for entry in result.history] == [3, 4]
    exactly(got, want)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "epochs": 1.5}], ids=str)
def test_a_run_that_goes_on_from_its_last_step_does_no_other(
    length: dict[str, float], update: str, tmp_path: Path
) -> None:
    """Though that is amid an epoch, of two steps."""

    def start() -> tuple[nn.Module, dict[str, Any]]:
        model = tiny("llama", dtype=torch.float32)
        return model, {"curvature": fit(model, "llama"), "update": update, **length}

    options = {"schedule": "constant", "save_steps": 1, "out": tmp_path / "out"}
    model, held = start()
    want, _ = go(model, "llama", **held, **options)
    for _ in range(2):
        model, held = start()
        got, result = go(model, "llama", resume=True, **held, **options)
        assert (result.steps, result.history) == (3, [])
        exactly(got, want)
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]


def test_a_run_without_out_writes_nothing() -> None:
    go(tiny("llama"), "llama", max_steps=1)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("warmup", [0.05, 10.0])
def test_a_single_step_learns(warmup: float) -> None:
    model = tiny("llama")
    go(model, "llama", max_steps=1, warmup=warmup)
    assert all(bool(site.b.any()) for site in lora_sites(model))


def test_an_adapter_that_learned_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learned nothing")
        go(tiny("llama"), "llama", max_steps=2)
    with pytest.warns(RetainWarning, match="learned nothing in 2 steps: every B is still 0"):
        go(tiny("llama", dtype=torch.float32), "llama", max_steps=2, learning_rate=1e-60)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_is_an_error(kind: str, held: bool) -> None:
    model = tiny(kind)
    curvature = fit(model, kind) if held else None
    with torch.no_grad():
        lora_sites(model)[0].b.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss is not finite.*step 1") as caught:
        go(model, kind, curvature, strength=1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("update", UPDATES)
def test_a_gradient_that_is_not_finite_is_an_error(update: str) -> None:
    model = tiny("llama")
    curvature = fit(model, "llama")
    before = weights(model)
    lora_sites(model)[0].b.register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainingError, match="gradient is not finite") as caught:
        go(model, "llama", curvature, strength=1.0, update=update)
    assert "\n" not in str(caught.value)
    exactly(weights(model), before)


def test_fewer_examples_than_a_batch_are_refused() -> None:
    with pytest.raises(SourceError, match="smaller than one batch"):
        go(tiny("llama"), "llama", batch_size=17)


@pytest.mark.parametrize("held", [False, True])
def test_the_measured_kl_is_that_of_the_model_at_that_step(held: bool) -> None:
    model = tiny("llama")
    curvature = fit(model, "llama") if held else None
    norms = []

    def measure(now: nn.Module) -> float:
        norms.append(sum(float(w.square().sum()) for w in weights(now).values()))
        return norms[-1]

    after, result = go(model, "llama", curvature, strength=1.0, measure=measure)
    assert len(norms) == 1
    assert result.history[-1]["measured"] == norms[0]
    assert norms[0] == pytest.approx(sum(float(w.square().sum()) for w in after.values()))
    assert [entry["measured"] for entry in result.history[:-1]] == [None] * 3


@pytest.mark.shows("retain train", "gradient checkpointing")
def test_gradient_checkpointing_gives_the_same_adapter() -> None:
    ends = []
    for checkpointing in (False, True):
        model = tiny("llama")
        curvature = fit(model, "llama")
        ends.append(
            go(model, "llama", curvature, strength=1.0, gradient_checkpointing=checkpointing)[0]
        )
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)
