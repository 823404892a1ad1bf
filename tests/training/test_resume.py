"""A run that goes on from any of its checkpoints ends at the uninterrupted run's bytes."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_trl import of_trl
from torch import nn
from transformers import Trainer, TrainingArguments

import retain
from retain import Retention, RetentionCallback, fit_curvature, grow_lora
from retain.errors import RetainWarning
from retain.models.view import ModelView
from tiny import ROWS, exactly, move, save_tiny, tiny, weights, with_chat

STEPS = 6
MIDDLE = range(1, STEPS)
"""The five checkpoints: two steps make an epoch, so some are amid one and some between two."""

WAYS: dict[str, dict[str, Any]] = {
    "force": {"parts": ("force",)},
    "budget": {"parts": ("force",), "budget": 0.005, "source": ROWS["llama"]},
    "filter": {"strength": 3.0},
    "kl": {"kl": retain.OutputKL(2.0, every=2, batch=1), "source": ROWS["llama"]},
    "months": {"parts": ("rows", "force")},
    "all": {"budget": 0.005, "source": ROWS["llama"]},
    "proximal": {"strength": 300.0, "update": "proximal"},
}


def held(way: str) -> tuple[nn.Module, RetentionCallback]:
    """What a script makes anew each time that it is started."""
    model: Any = tiny("llama", dtype=torch.float32, lora_dropout=0.1)
    options: dict[str, Any] = {"rows": 4, "batch_size": 4, "progress": False}
    curvature, past = fit_curvature(model, ROWS["llama"], **options), None
    if way in ("months", "all", "proximal"):
        move(model, 3)
        past = fit_curvature(model, ROWS["llama"][::-1], **options)
        model = grow_lora(model, 2, seed=3)
    return model, RetentionCallback(curvature, past=past, **WAYS[way])


def by_transformers(model: nn.Module, call: RetentionCallback, common: dict[str, Any]) -> Trainer:
    rows = [{"input_ids": [1 + i, 2 + i % 3, 12 - i, 5]} for i in range(8)]
    data = [row | {"labels": row["input_ids"]} for row in rows]
    return Trainer(model, TrainingArguments(**common), train_dataset=data, callbacks=[call])


def by_trl(model: nn.Module, call: RetentionCallback, common: dict[str, Any]) -> Trainer:
    from transformers import AutoTokenizer

    SFTConfig, SFTTrainer = of_trl("SFTConfig", "SFTTrainer")
    place = save_tiny(Path(common["output_dir"]).parent / "tokenizer")
    data = Dataset.from_list([{"input_ids": [1 + i, 2, 12 - i, 5][: 3 + i % 2]} for i in range(8)])
    return SFTTrainer(
        model=model, processing_class=AutoTokenizer.from_pretrained(place), train_dataset=data,
        args=SFTConfig(**common), callbacks=[call],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("made", "way"),
    [*((by_transformers, way) for way in WAYS), (by_trl, "budget"), (by_trl, "all")],
)
@pytest.mark.shows("transformers.Trainer", "resume", only="by_transformers-all")
@pytest.mark.shows("SFTTrainer", "resume", only="by_trl-all")
def test_from_each_checkpoint_of_a_trainer(made: Any, way: str, tmp_path: Path) -> None:
    def trained(name: str, start: Path | None = None) -> dict[str, torch.Tensor]:
        model, call = held(way)
        trainer = made(model, call, {
            "output_dir": str(tmp_path / name), "per_device_train_batch_size": 2, "use_cpu": True,
            "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 0.05,
            "weight_decay": 0.1, "save_steps": 1, "report_to": "none", "disable_tqdm": True,
            "logging_steps": 1,
        })  # fmt: skip
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        assert trainer.state.global_step == STEPS
        assert (call.recipe.filter is not None) is (way in ("filter", "kl", "all", "proximal"))
        assert (call.recipe.frozen is not None) is (way in ("months", "all", "proximal"))
        if "budget" in WAYS[way]:  # and it has something to remember
            assert call.force.budget.reached and call.force.budget.correction != 1.0
        trainer.save_model()
        return load_file(tmp_path / name / "adapter_model.safetensors")

    want = trained("whole")
    for step in MIDDLE:
        torch.manual_seed(1000 + step)  # of another process, whose random state is another
        exactly(trained(f"from{step}", tmp_path / "whole" / f"checkpoint-{step}"), want)


@pytest.mark.shows(
    "retain train", "force", "filter", "fresh rows", "budget", "resume", "gradient accumulation"
)
def test_from_each_checkpoint_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``retain train --resume`` of a first month and of a second, each within a budget."""
    months_from_each_checkpoint(tmp_path, monkeypatch)


def test_from_each_checkpoint_of_a_run_with_named_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is on a text, the other on answers of the model."""
    months_from_each_checkpoint(tmp_path, monkeypatch, names=True)


def months_from_each_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, names: bool = False
) -> None:
    """The model and the adapter are in bfloat16, and what the filter leaves of a step is less than
    A's last bit: it is kept beside A.
    """
    monkeypatch.setattr("retain.training.checkpoints.KEPT", STEPS)  # else two are left
    model, data = save_tiny(tmp_path / "model"), tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {i % 5}", "completion": f" {i % 3}"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [{"text": f"the cat sat on mat {i}"} for i in range(8)]
    base, tokenizer, _ = retain.load_model(model)
    curvature = fit_curvature(
        retain.attach_lora(base, rank=2), source, tokenizer=tokenizer, progress=False
    ).save(tmp_path / "source.safetensors")
    common: dict[str, Any] = {
        "data": data, "batch_size": 4, "max_steps": STEPS, "max_length": 16, "save_steps": 1,
        "learning_rate": 0.05, "training": {"accumulation": 2}, "quiet": True,
    }  # fmt: skip
    first = {"model": model, "curvature": curvature, "rank": 2, "budget": 1e-4, "keep_state": True}
    if names:
        text = tmp_path / "source.jsonl"
        text.write_text("".join(json.dumps(row) + "\n" for row in source))
        with_chat(model)
        first |= {
            "curvature": None, "budget": {"mine": 1e-4, "facts": 2e-4},
            "source": {"mine": str(text)}, "factor_rank": 4,
        }  # fmt: skip
    may = retain.train_run(**common, **first, out=tmp_path / "may")
    june = retain.continue_run(may.out, **common, out=tmp_path / "june")
    for done in (may, june):
        for step in MIDDLE:
            out = Path(shutil.copytree(done.out, tmp_path / f"{done.out.name}{step}"))
            shutil.rmtree(out / "adapter")
            for later in range(step + 1, STEPS + 1):
                shutil.rmtree(out / "checkpoints" / f"checkpoint-{later}")
            torch.manual_seed(1000 + step)
            found = retain.train_run(resume=True, out=out, quiet=True)
            assert found.record.resumed_from == f"checkpoint-{step}"
            assert found.record.why_no_filter is None
            assert (out / "checkpoints" / "checkpoint-6" / "filtered.safetensors").is_file()
            if names:
                assert list(found.record.held_to) == ["mine", "facts"]
                again = [h.curvature.seconds for h in found.record.held_to.values()]
                assert again == [None, None]  # none is measured anew
                left = {n: h.measured_nats for n, h in done.record.held_to.items()}
                assert {n: h.measured_nats for n, h in found.record.held_to.items()} == left
            for name in ("adapter/adapter_model.safetensors", "state/past.safetensors"):
                assert (out / name).read_bytes() == (done.out / name).read_bytes(), (step, name)


@pytest.mark.shows("plain loop", "resume")
def test_from_each_step_of_a_plain_loop() -> None:
    """With an adapter in bfloat16, and with what `progress` and `kept` give."""

    def begun(**kept: Any) -> tuple[Any, Retention, torch.optim.Optimizer]:
        model = tiny("llama", dtype=torch.bfloat16)
        curvature = fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
        if "model" in kept:
            model.load_state_dict(kept.pop("model"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
        if "optimizer" in kept:
            optimizer.load_state_dict(kept.pop("optimizer"))
        rows = ModelView(model).read(ROWS["llama"][::-1], 4, max_length=8)
        held = Retention(model, curvature, rows=rows, budget=1e-3, **kept)
        return model, held, optimizer

    def trained(model: Any, held: Retention, optimizer: Any, steps: range) -> list[dict[str, Any]]:
        seen = []
        for step in steps:
            ids = torch.tensor([ROWS["llama"][step % 4]["input_ids"]])
            model(input_ids=ids, labels=ids).loss.backward()
            held.step(optimizer)
            optimizer.zero_grad()
            seen.append(copy.deepcopy({
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "progress": json.loads(json.dumps(held.progress())), "kept": held.kept(),
            }))  # fmt: skip
        held.finish()
        return seen

    model, *rest = begun()
    seen, want = trained(model, *rest, range(STEPS)), weights(model)
    for step in MIDDLE:
        other, *rest = begun(**seen[step - 1])
        trained(other, *rest, range(step, STEPS))
        exactly(weights(other), want)
    for less in ({}, {name: rows[:1] for name, rows in seen[2]["kept"].items()}):
        with pytest.warns(RetainWarning, match="beside a filtered A is not there for 14 of 14"):
            begun(**seen[2] | {"kept": less})
