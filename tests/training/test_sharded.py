"""FSDP2 (`fully_shard`) in two processes holds a model as one process does (gloo on CPUs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import forked
import retain
from retain.data.batches import Example
from retain.errors import ModelError
from retain.models import processes
from retain.models.lora import attach_lora
from retain.models.shards import whole
from tiny import deep

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
}
"""What is given to `Retention`; some say how the loop goes."""


def trained(case: str, *, sharded: bool = False) -> dict[str, Any]:
    told = dict(CASES[case])
    rate, anew = told.pop("rate", 3e-3), told.pop("anew", None)
    micro, clip, grown = told.pop("micro", 1), told.pop("clip", None), told.pop("grown", False)
    model: Any = attach_lora(deep(2), rank=3)
    left = case == "left whole"
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
    most = 5e-4 if case == "budget" else 1e-4  # float32, and a strength that answers to it
    for name, value in one["weights"].items():
        apart = (first["weights"][name] - value).abs().max()
        assert apart <= most * value.abs().max(), name
        assert torch.equal(first["weights"][name], other["weights"][name]), name
    if case == "budget":  # it was reached
        assert one["strength"] != pytest.approx(0.2 / 1e-3)
