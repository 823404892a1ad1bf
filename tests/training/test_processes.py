"""Two processes hold a model as one does: DistributedDataParallel on CPUs (gloo)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import forked
import retain
from retain.data.batches import Example
from retain.models.processes import count, rank
from tiny import exactly, save_tiny

SIZE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def model_and_rows() -> tuple[Any, list[list[int]]]:
    torch.manual_seed(0)
    model = retain.attach_lora(LlamaForCausalLM(LlamaConfig(**SIZE)), rank=4)
    random = torch.Generator().manual_seed(1)
    return model, torch.randint(1, 40, (48, 12), generator=random).tolist()


def by_place(completions: list[str], **_: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def training(out: Path, told: dict[str, Any]) -> None:
    """A trainer of a user's own, in each of the processes."""
    model, ids = model_and_rows()
    rows = [{"input_ids": r, "labels": r} for r in ids[:32]]
    source = [{"input_ids": r} for r in ids[32:]]
    said: dict[str, Any] = {
        "output_dir": f"{out}/run", "max_steps": 6, "report_to": "none", "use_cpu": True,
        "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1)),
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3, "disable_tqdm": True,
        "seed": 0, "accelerator_config": {"split_batches": False},
    }  # fmt: skip
    off, resume = told.pop("off", None), told.pop("resume", None)
    if kind := told.pop("trl", ""):
        import trl
        from datasets import Dataset

        # they do not know of each other yet: `rank` would be 0 in both, and one folder
        place = save_tiny(out / f"tiny-{os.environ.get('RANK', '0')}")
        plain, tokenizer, _ = retain.load_model(place, dtype="float32")
        more: dict[str, Any] = {}
        if kind != "SFT":
            model = retain.attach_lora(plain, rank=4)
            rows = [{"prompt": f"say {i}", "chosen": " ok", "rejected": " no"} for i in range(32)]
        if kind == "GRPO":
            said |= {"num_generations": 2, "max_completion_length": 4}
            more["reward_funcs"] = by_place
        trainer: Trainer = getattr(trl, f"{kind}Trainer")(
            model=model, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            args=getattr(trl, f"{kind}Config")(**{**said, "max_steps": 3, "bf16": False}), **more,
        )  # fmt: skip
    else:
        trainer = Trainer(model=model, train_dataset=rows, args=TrainingArguments(**said))
    curvature = retain.fit_curvature(model, source, progress=False)
    if off and rank():
        curvature = off * curvature
    told["source"] = source if {"budget", "kl"} & set(told) else None
    trainer.add_callback(retain.RetentionCallback(curvature, **told))
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    nats = [entry["predicted_nats"] for entry in history if "predicted_nats" in entry]
    strength = trainer.callback_handler.callbacks[0].strength
    keep(out, model, {"nats": nats, "strength": strength})


def looping(out: Path) -> None:
    """And a loop."""
    model, ids = model_and_rows()
    curvature = retain.fit_curvature(model, [{"input_ids": r} for r in ids[32:]], progress=False)
    rows = [Example(tuple(r[:-1]), tuple(r[1:]), (True,) * 11) for r in ids]
    wrapped = DistributedDataParallel(model) if distributed.is_initialized() else model
    held = retain.Retention(
        wrapped, curvature, rows=rows[:32], budget=0.001, probe=rows[32:40],
        kl=retain.OutputKL(2.0, every=2), source=rows[32:],
    )  # fmt: skip
    assert held.recipe.filter is not None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(4):
        batch = torch.tensor(ids[8 * step : 8 * step + 8][rank() :: count()])
        wrapped(input_ids=batch, labels=batch).loss.backward()
        held.step(optimizer)
        optimizer.zero_grad()
    held.finish()
    keep(out, model, {"nats": [held.predicted()], "strength": held.strength})


def keep(out: Path, model: Any, told: dict[str, Any]) -> None:
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    save_file(kept, f"{out}/weights-{rank()}.safetensors")
    (out / f"told-{rank()}.json").write_text(json.dumps(told))


def run(out: Path, processes: int, **told: Any) -> CompletedProcess[str]:
    out.mkdir(parents=True, exist_ok=True)
    return forked.run(training, out, told, processes=processes, CUDA_VISIBLE_DEVICES="")


def weights(out: Path, process: int = 0) -> dict[str, torch.Tensor]:
    return load_file(out / f"weights-{process}.safetensors")


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max()) for n in a)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training with a budget in one process and in two."""
    out = tmp_path_factory.mktemp("processes")
    for name, processes in (("one", 1), ("two", 2)):
        done = run(out / name, processes, budget=0.001)
        assert done.returncode == 0, done.stderr[-3000:]
    return out


def hold_as_one(ended: Path) -> None:
    one, two, other = weights(ended / "one"), weights(ended / "two"), weights(ended / "two", 1)
    assert apart(one, two) < 1e-4
    exactly(two, other)
    told = [json.loads((ended / n / "told-0.json").read_text()) for n in ("one", "two")]
    assert told[0]["nats"] == pytest.approx(told[1]["nats"], rel=1e-3, abs=1e-9)
    assert told[0]["strength"] == pytest.approx(told[1]["strength"], rel=1e-3)
    assert told[0]["nats"][-1] > 0


@pytest.mark.shows("transformers.Trainer", "DDP")
def test_two_processes_hold_as_one(ended: Path) -> None:
    hold_as_one(ended)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.shows(f"{k}Trainer", "DDP")) for k in ("SFT", "DPO")],
)
def test_two_processes_of_trl_hold_as_one(kind: str, tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        done = run(tmp_path / name, processes, budget=0.001, trl=kind)
        assert done.returncode == 0, done.stderr[-3000:]
    hold_as_one(tmp_path)


@pytest.mark.shows("GRPOTrainer", "DDP")
def test_two_processes_that_draw_answers_hold_alike(tmp_path: Path) -> None:
    """Each draws its own, so what one process would have learned is another thing."""
    done = run(tmp_path, 2, strength=10.0, trl="GRPO")
    assert done.returncode == 0, done.stderr[-3000:]
    two, other = weights(tmp_path), weights(tmp_path, 1)
    assert all(torch.equal(two[n], other[n]) for n in two)
    told = [json.loads((tmp_path / f"told-{i}.json").read_text()) for i in (0, 1)]
    assert told[0]["nats"][-1] == told[1]["nats"][-1] > 0


@pytest.mark.shows("plain loop", "DDP")
def test_two_processes_of_a_loop_hold_as_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    looping(tmp_path / "one")
    forked.gloo(looping, tmp_path / "two")
    hold_as_one(tmp_path)


def test_two_processes_read_the_same_rows_for_the_divergence(tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        done = run(tmp_path / name, processes, kl=2.0)
        assert done.returncode == 0, done.stderr[-3000:]
    two = weights(tmp_path / "two")
    assert apart(weights(tmp_path / "one"), two) < 1e-4
    exactly(weights(tmp_path / "two", 1), two)


def test_two_processes_go_on_where_they_were(ended: Path, tmp_path: Path) -> None:
    checkpoint = ended / "two" / "run" / "checkpoint-3"
    again = run(tmp_path, 2, budget=0.001, resume=str(checkpoint))
    assert again.returncode == 0, again.stderr[-3000:]
    assert apart(weights(ended / "two"), weights(tmp_path)) < 1e-6


def test_another_curvature_on_another_process_is_noticed(tmp_path: Path) -> None:
    ended = run(tmp_path, 2, strength=10.0, off=2.0)
    assert ended.returncode != 0
    assert "the processes hold different curvatures" in ended.stderr
