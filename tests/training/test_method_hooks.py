"""The training loop's hooks for a method, and its losses for a classifier's columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retain import fit_curvature
from retain.config import TrainConfig
from retain.data.batches import Batch, Example, collate
from retain.errors import ConfigError, TrainingError
from retain.models.forward import forward_logits
from retain.models.sites import lora_sites
from retain.retention.method import Method
from retain.retention.recipe import Recipe
from retain.retention.state import StoredRow
from retain.training.loop import train
from tiny import ROWS, exactly, tiny, weights

ROWS_OF_8 = [
    Example(ids[:-1], ids[1:], tuple(k >= i % 3 for k in range(len(ids) - 1)))
    for i in range(8)
    for ids in [tuple(1 + (i * k + k) % 12 for k in range(4 + i % 3))]
]
CLASSES = [Example((1 + i, 2, 3 + i % 4), (i % 2,)) for i in range(8)]


def go(model: nn.Module, rows: Any, **options: Any):
    own = {k: options.pop(k) for k in ("method", "columns", "regression") if k in options}
    options = {"batch_size": 8, "learning_rate": 0.01, "max_steps": 2, "warmup": 0} | options
    return train(model, rows, TrainConfig(**options), progress=False, **own)


class Spy(Method):
    """Writes down its calls, and adds a term that is easy to foretell."""

    name = "spy"

    def __init__(self, size: float = 0.0) -> None:
        super().__init__(7.0)
        self.calls: list[str] = []
        self.rows: list[int] = []
        self.size = size

    def loss(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor | None:
        self.calls.append("loss")
        self.rows += batch.rows
        assert logits.requires_grad and len(logits) == len(batch.targets)
        if not self.size:
            return None
        return self.size * logits.square().sum() / len(batch.targets)  # a mean over predictions

    def before_step(self, model: nn.Module) -> float | None:
        self.calls.append("before")
        assert any(p.grad is not None for p in model.parameters())
        norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
        assert sum(n * n for n in norms) ** 0.5 <= 1 + 1e-6  # it is clipped already
        return 0.25

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        self.calls.append("after")
        assert optimizer.param_groups[0]["lr"] > 0
        return None


@pytest.mark.parametrize("accumulation", [1, 4])
def test_hooks_are_called_in_order_once_a_step(accumulation: int) -> None:
    spy = Spy()
    result = go(tiny("llama"), ROWS_OF_8, method=spy, accumulation=accumulation)
    assert spy.calls == ([*["loss"] * accumulation, "before", "after"]) * 2
    assert sorted(spy.rows[:8]) == sorted(spy.rows[8:]) == list(range(8))
    assert {entry["predicted"] for entry in result.history} == {0.25}
    assert {entry["strength"] for entry in result.history} == {7.0}
    assert {entry["extra"] for entry in result.history} == {0.0}


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_a_methods_term_is_a_mean_over_the_steps_predictions(accumulation: int) -> None:
    model = tiny("llama")
    batch = collate(ROWS_OF_8, 0)
    logits = forward_logits(model, batch)
    task = float(nn.functional.cross_entropy(logits, batch.targets).detach())
    extra = float((0.5 * logits.square().sum(1)).mean().detach())
    result = go(model, ROWS_OF_8, method=Spy(0.5), accumulation=accumulation, max_steps=1)
    assert result.history[0]["extra"] == pytest.approx(extra, rel=1e-9)
    assert result.history[0]["loss"] == pytest.approx(task, rel=1e-5)


def test_without_a_method_nothing_changes_and_the_history_has_no_extra() -> None:
    ends = []
    for method in (None, Method(0.0)):
        model = tiny("llama", dtype=torch.float32, lora_dropout=0.2)
        result = go(model, ROWS_OF_8, method=method, max_steps=3)
        ends.append(weights(model))
        assert ("extra" in result.history[0]) is (method is not None)
    exactly(*ends)


def head(model: nn.Module) -> Tensor:
    found = [p for n, p in model.named_parameters() if "classifier" in n and p.requires_grad]
    return next(p for p in found if p.dim() == 2).detach().clone()


def test_only_a_tasks_own_columns_are_trained() -> None:
    model = tiny("bert")
    start = head(model)
    batch = collate(CLASSES, 0)
    logits = forward_logits(model, batch)
    want = float(nn.functional.cross_entropy(logits[:, 1:3], batch.targets).detach())
    result = go(model, CLASSES, columns=slice(1, 3), method=Method(0.0))
    assert result.history[0]["loss"] == pytest.approx(want, rel=1e-6)
    moved = (head(model) != start).any(1).tolist()
    assert moved == [False, True, True]


@pytest.mark.parametrize("columns", [None, slice(2, 3)])
def test_a_regression_is_the_mean_squared_error(columns: slice | None) -> None:
    rows = [Example(e.tokens, (i / 3,)) for i, e in enumerate(CLASSES)]
    model = tiny("bert")
    column = 0 if columns is None else 2
    with torch.no_grad():
        z = forward_logits(model, collate(rows, 0))[:, column]
    want = sum((float(a) - e.targets[0]) ** 2 for a, e in zip(z, rows, strict=True)) / 8
    result = go(model, rows, columns=columns, regression=True, accumulation=2)
    assert result.history[0]["loss"] == pytest.approx(want, rel=1e-5)
    assert result.history[1]["loss"] < result.history[0]["loss"]


def test_rows_of_several_heads_share_a_step() -> None:
    rows: list[Example] = list(CLASSES[:4])
    rows += [StoredRow((2, 3 + i), (i % 2,), columns=(1, 3)) for i in range(2)]
    rows += [StoredRow((4, 3 + i), (i / 4,), columns=(2, 3)) for i in range(2)]
    model = tiny("bert")
    want = 0.0
    for row in rows:
        with torch.no_grad():
            z = forward_logits(model, collate([row], 0))[0]
        if getattr(row, "columns", None) == (2, 3):
            want += (float(z[2]) - row.targets[0]) ** 2
        else:
            start, stop = getattr(row, "columns", (0, 2))
            want -= float(z[start:stop].log_softmax(-1)[row.targets[0]])
    result = go(model, rows, columns=slice(0, 2), accumulation=2)
    assert result.history[0]["loss"] == pytest.approx(want / 8, rel=1e-5)


def test_choices_that_exclude_each_other_are_refused() -> None:
    model = tiny("llama")
    curvature = fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    with pytest.raises(ConfigError, match="a recipe and a method"):
        train(model, ROWS_OF_8, TrainConfig(), recipe=Recipe(curvature), method=Spy())
    with pytest.raises(ConfigError, match="a regression has one output"):
        go(tiny("bert"), CLASSES, columns=slice(0, 2), regression=True)


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    model = tiny("llama")
    before = weights(model)
    lora_sites(model)[0].b.register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainingError, match="gradient is not finite") as caught:
        go(model, ROWS_OF_8, method=Method(0.0))
    assert "\n" not in str(caught.value)
    exactly(weights(model), before)
