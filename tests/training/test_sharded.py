"""FSDP2 (`fully_shard`) in two processes holds a model as one process does (gloo on CPUs)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import forked
import retain
from retain.data.batches import Example
from retain.errors import ModelError, TrainingError
from retain.models import processes
from retain.models.lora import attach_lora
from retain.models.shards import check_divided, whole
from retain.training.handling import check_gradients
from tiny import deep, save_tiny

STEPS, BATCH = 8, 4


def ids(seed: int, count: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, 32, (count, 8), generator=random).tolist()


SOURCE = [{"input_ids": row} for row in ids(1, 8)]
ROWS = [Example(tuple(row), (*row[1:], 0), (*(True,) * 7, False)) for row in ids(2, STEPS * BATCH)]

CASES: dict[str, dict[str, Any]] = {
    "left whole": {"rows": ROWS, "strength": 300.0},
    "clipped micro-batches": {"rows": ROWS, "strength": 300.0, "micro": 2, "clip": 0.05},
    "budget": {"rows": ROWS, "budget": 1e-3, "probe": ROWS[:2], "rate": 0.03, "anew": 4},
    "proximal": {"update": "proximal", "parts": ["force"], "strength": 100.0},
    "fresh rows": {"rows": ROWS, "strength": 300.0, "grown": True},
    "nothing learned": {"rows": ROWS, "strength": 300.0, "rate": 0.0},
    "kl": {
        "rows": ROWS, "strength": 300.0, "kl": retain.OutputKL(1e4, every=2), "source": ROWS[:6],
        "micro": 2, "clip": 0.05, "anew": 5,
    },
    "kl, left whole": {"rows": ROWS, "kl": 2.0, "source": ROWS[:6]},
    "budget, float64": {
        "rows": ROWS, "budget": 1e-3, "probe": ROWS[:2], "rate": 0.03, "anew": 4, "double": True,
    },
}  # fmt: skip
"""What is given to `Retention`; some say how the loop goes."""


def trained(case: str, *, sharded: bool = False) -> dict[str, Any]:
    told = dict(CASES[case])
    rate, anew = told.pop("rate", 3e-3), told.pop("anew", None)
    micro, clip, grown = told.pop("micro", 1), told.pop("clip", None), told.pop("grown", False)
    base = deep(2).double() if told.pop("double", False) else deep(2)
    model: Any = attach_lora(base, rank=3)
    left = case.endswith("left whole")
    if sharded and left:  # of a base that is sharded, as the adapter is not
        shard(model, lora=False)
    curvature = retain.fit_curvature(model, SOURCE, batch_size=4, progress=False)
    if grown:  # an earlier task has learned in the first row
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p[:, 0] = 0.1
    if sharded and not left:
        shard(model, lora=True)
        with pytest.raises(ModelError, match="the trained weights are sharded"):
            retain.fit_curvature(model, SOURCE, batch_size=4, progress=False)
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=rate)
    retention = retain.Retention(model, curvature, **told)
    assert (retention.recipe.filter is not None) == ("rows" in told)
    nats = []
    for i in range(STEPS):
        if i == anew:  # as from a checkpoint
            known = retention.progress()
            retention.recipe.release()
            retention = retain.Retention(model, curvature, progress=known, **told)
        rows = ROWS[i * BATCH : (i + 1) * BATCH][processes.rank() :: processes.count()]
        size = len(rows) // micro
        for m in range(micro):
            batch = torch.tensor([r.tokens for r in rows[m * size : (m + 1) * size]])
            (model(input_ids=batch, labels=batch).loss / micro).backward()
        if sharded and left:  # nobody averages what FSDP is told to leave alone
            for p in trains:
                distributed.all_reduce(p.grad)
                p.grad /= processes.count()
        if clip is not None:
            nn.utils.clip_grad_norm_(trains, clip)
        nats.append(retention.step(optimizer))
        optimizer.zero_grad()
    strength = retention.strength
    retention.finish()
    weights = {n: whole(p.detach()).clone() for n, p in model.named_parameters() if "lora_" in n}
    return {"weights": weights, "nats": nats, "strength": strength}


def shard(model: nn.Module, *, lora: bool) -> None:
    mesh = init_device_mesh("cpu", (processes.count(),))
    left = set() if lora else {p for n, p in model.named_parameters() if "lora_" in n}
    for layer in model.get_base_model().model.layers:  # type: ignore[operator]
        fully_shard(layer, mesh=mesh, ignored_params=left)
    fully_shard(model, mesh=mesh, ignored_params=left)


def train_all(out: Path) -> None:
    for case in CASES:
        torch.save(trained(case, sharded=True), out / f"{case}-{processes.rank()}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    forked.gloo(train_all, out)
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.shows("plain loop", "FSDP2", only="budget")
def test_two_processes_hold_as_one(two: Path, case: str) -> None:
    one = trained(case)
    first, other = (torch.load(two / f"{case}-{rank}.pt") for rank in (0, 1))
    assert first["nats"] == pytest.approx(one["nats"], rel=1e-3, abs=1e-9)
    assert first["strength"] == pytest.approx(one["strength"], rel=1e-3)
    most = 1e-9 if "float64" in case else 1e-4
    for name, value in one["weights"].items():
        apart = (first["weights"][name] - value).abs().max()
        assert apart <= most * value.abs().max(), name
        assert torch.equal(first["weights"][name], other["weights"][name]), name
    if "budget" in case:  # it was reached
        assert one["strength"] != pytest.approx(0.2 / 1e-3)


def test_other_ways_of_dividing_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    check_divided(model)
    model[0].weight.full_tensor = lambda: None  # what a DTensor has
    with pytest.raises(ModelError, match=r"a tensor-parallel plan, of 0\.weight too"):
        check_divided(model)
    model.requires_grad_(False)
    check_divided(model)
    model.append(type("FullyShardedDataParallel", (nn.Identity,), {})())
    with pytest.raises(ModelError, match="got: FSDP1"):
        check_divided(model)


def by_trainer(out: Path) -> None:
    """What a trainer of accelerate's does with FSDP2, which it allows on accelerators alone."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    begin = PartialState.__init__

    def begin_as_on_devices(self: PartialState, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_on_devices  # type: ignore[method-assign]
    for case in TRAINED:
        for name, checkpoint in (("whole", None), ("resumed", "whole/checkpoint-2")):
            place = out / case / f"{name}-{processes.rank()}.pt"
            place.parent.mkdir(exist_ok=True)
            torch.save(one_trained(case, out / "tiny", out / case, name, checkpoint), place)


TRAINED: dict[str, dict[str, Any]] = {
    "transformers.Trainer": {"budget": 1e-3, "source": SOURCE},
    "SFTTrainer": {"strength": 300.0, "update": "proximal", "kl": 1.0, "source": SOURCE},
    "DPOTrainer": {"strength": 300.0},
    "GRPOTrainer": {"strength": 300.0, "parts": ["force"]},  # its filter is refused
}


def odd_gradient(out: Path) -> None:
    """One process alone has a gradient that is not finite."""
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (processes.count(),)))
    model(torch.ones(2, 4)).sum().backward()
    if processes.rank():
        model.weight.grad.to_local().fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        check_gradients(model.parameters(), 1)
    (out / str(processes.rank())).touch()


def test_all_processes_notice_a_gradient_of_one(tmp_path: Path) -> None:
    forked.gloo(odd_gradient, tmp_path)
    assert (tmp_path / "0").is_file() and (tmp_path / "1").is_file()


def by_place(completions: list[str], **_: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def one_trained(
    case: str, base: Path, out: Path, name: str, checkpoint: str | None = None
) -> dict[str, Any]:
    import trl
    from datasets import Dataset

    loaded = retain.load_model(base, dtype="float32")
    torch.manual_seed(0)
    model: Any = attach_lora(loaded.model, rank=3)
    many = processes.count()
    fsdp: dict[str, Any] = {"fsdp": True, "fsdp_config": {
        "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT",
    }}  # fmt: skip
    said: dict[str, Any] = {
        "output_dir": str(out / name), "max_steps": 4, "save_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 4 // many, "learning_rate": 1e-2, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "accelerator_config": {"split_batches": False},
        **(fsdp if many > 1 else {"save_strategy": "no"}),
    }  # fmt: skip
    rows: Any = [{"input_ids": row, "labels": row} for row in ids(2, 16)]
    kind, more = case.removesuffix("Trainer"), {}
    if kind in ("DPO", "GRPO"):
        rows = [{"prompt": f"say {i}", "chosen": " ok", "rejected": " no"} for i in range(16)]
    if kind == "GRPO":
        said |= {"num_generations": 2, "max_completion_length": 4}
        more["reward_funcs"] = by_place
    if case == "transformers.Trainer":
        trainer = Trainer(model=model, train_dataset=rows, args=TrainingArguments(**said))
    else:
        trainer = getattr(trl, case)(
            model=model, train_dataset=Dataset.from_list(rows),
            args=getattr(trl, f"{kind}Config")(**said, bf16=False),
            processing_class=loaded.tokenizer, **more,
        )  # fmt: skip
    curvature = retain.fit_curvature(model, SOURCE, batch_size=4, progress=False)
    call = retain.RetentionCallback(curvature, **TRAINED[case])
    trainer.add_callback(call)
    trainer.train(resume_from_checkpoint=checkpoint and str(out / checkpoint))
    assert (call.recipe.filter is None) is ("parts" in TRAINED[case])
    assert (trainer.accelerator.distributed_type == DistributedType.FSDP) is (many > 1)
    weights = {n: whole(p.detach()).clone() for n, p in model.named_parameters() if "lora_" in n}
    nats = [e["predicted_nats"] for e in trainer.state.log_history if "predicted_nats" in e]
    return {"weights": weights, "nats": nats}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trainers")
    save_tiny(out / "tiny")
    forked.gloo(by_trainer, out)
    return out


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.shows(case, "FSDP2")) for case in TRAINED]
)
def test_two_processes_of_a_trainer_hold_as_one(trainers: Path, case: str, tmp_path: Path) -> None:
    """And go on from a checkpoint where they were. GRPO's draw answers of their own: alike."""
    first, other = (torch.load(trainers / case / f"whole-{rank}.pt") for rank in (0, 1))
    resumed = torch.load(trainers / case / "resumed-0.pt")
    assert first["nats"][-1] > 0 and resumed["nats"] == first["nats"]
    for name, value in first["weights"].items():
        for others in (other, resumed):
            assert torch.equal(value, others["weights"][name]), name
    if case == "GRPOTrainer":
        return
    one = one_trained(case, trainers / "tiny", tmp_path, "one")
    assert first["nats"] == pytest.approx(one["nats"], rel=1e-3, abs=1e-9)
    for name, value in one["weights"].items():
        apart = (first["weights"][name] - value).abs().max()
        assert apart <= 1e-4 * value.abs().max(), name
