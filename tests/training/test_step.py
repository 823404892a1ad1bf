"""What holds a model costs a step as many tensor operations whatever the model's depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_callback import fit, trainer
from transformers import TrainerCallback

from counting import Calls
from retain import RetentionCallback, grow_lora
from retain.models.sites import lora_sites
from tiny import deep, move

VIEWS = {
    "view", "t", "transpose", "slice", "select", "detach", "expand", "unsqueeze", "squeeze",
    "alias", "reshape", "as_strided", "_unsafe_view", "permute", "lift_fresh", "split", "unbind",
    "split_with_sizes",
}  # fmt: skip
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}


def kind(name: str) -> str | None:
    """Operations that are not views, and what the host waits for."""
    if name in VIEWS:
        return None
    return "reads" if name in READS else "operations"


class Steps(TrainerCallback):
    """The middle one of some steps, none of which is a power of two."""

    def __init__(self, count: Calls) -> None:
        self.count, self.steps = count, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = self.count.found.copy()

    def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step in (5, 6, 7):
            self.steps.append({n: c - self.before[n] for n, c in self.count.found.items()})

    def middle(self, name: str) -> int:
        return sorted(step.get(name, 0) for step in self.steps)[1]


def made(layers: int, how: str) -> Any:
    base = deep(layers)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    if how == "grown":
        move(model, 3)
        model = grow_lora(model, 2, seed=3)
    return model


def counted(layers: int, how: str, held: bool, folder: Path, options: dict[str, Any]) -> Steps:
    model, count, added = made(layers, how), Calls(kind), []
    if held:
        source = fit(made(layers, "fresh"), rank=3)
        past = fit(model, rank=3) if how == "grown" else None
        added.append(RetentionCallback(source, past=past, source=None, **options["held"]))
    steps = Steps(count)
    run = trainer(model, folder, [*added, steps], max_steps=8, logging_steps=100, **options["run"])
    with count:
        run.train()
    if held:
        assert added[0].recipe.filter is not None
        assert all(site.a.requires_grad for site in lora_sites(model))
    return steps


@pytest.mark.parametrize(
    ("how", "options", "most", "reads"),
    [
        ("fresh", {"held": {}, "run": {}}, 300, 1),
        (
            "fresh",
            {
                "held": {"budget": 1e-5},  # that each step crosses
                "run": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            },
            500,
            2,
        ),
        ("grown", {"held": {}, "run": {}}, 450, 1),
    ],
    ids=["plain", "budget", "grown"],
)
def test_the_number_of_operations_does_not_grow_with_the_layers(
    how: str, options: dict[str, Any], most: int, reads: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    counts: list[Calls] = []
    listed = torch.Tensor.tolist

    def looked(self: torch.Tensor) -> Any:  # no operation of its own, but the host waits
        for count in counts:
            count.found["reads"] += 1
        return listed(self)

    begin = Calls.__enter__
    monkeypatch.setattr(torch.Tensor, "tolist", looked)
    monkeypatch.setattr(Calls, "__enter__", lambda self: counts.append(self) or begin(self))
    found = []
    for layers in (2, 6):
        held, plain = (counted(layers, how, held, tmp_path, options) for held in (True, False))
        found.append(held.middle("operations") - plain.middle("operations"))
        assert held.middle("reads") - plain.middle("reads") <= reads
    assert 0 < found[0] <= found[1] <= found[0] + 5
    assert found[1] <= most
