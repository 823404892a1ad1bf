"""A model over several devices (``device_map``): each block lies where its layer does.

There is one device here, so tensors only say that they lie on two; see `devices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import retain
from devices import Devices, place, spread
from retain.curvature.operator import BlockOperator
from retain.data.batches import Example
from retain.models.lora import attach_lora
from retain.models.sites import lora_sites
from tiny import deep

TWO = ["cuda:0", "cuda:1"]


def ids(seed: int, count: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, 32, (count, 8), generator=random).tolist()


SOURCE = [{"input_ids": row} for row in ids(1, 8)]
ROWS = [Example(tuple(row), (*row[1:], 0), (*(True,) * 7, False)) for row in ids(2, 8)]


@pytest.fixture(autouse=True)
def one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on devices that are not there is read in the same precision as elsewhere."""
    for part in ("force", "wiener"):
        monkeypatch.setattr(f"retain.retention.{part}.has_bf16", lambda _: True)


def model_on(devices: list[str] | None) -> nn.Module:
    model = attach_lora(deep(4), rank=2)
    if devices:
        spread(model, model.get_base_model().model, devices)
    return model


def trained(devices: list[str] | None, structure: str, **options: Any) -> Mapping[str, Any]:
    """Of a few steps of a plain loop, what is left of it."""
    with Devices() if devices else nullcontext():
        model = model_on(devices)
        curvature = retain.fit_curvature(model, SOURCE, structure, batch_size=4, progress=False)
        if options.pop("two", False):
            options["past"] = 0.5 * curvature
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        retention = retain.Retention(model, curvature, **options)
        assert (retention.recipe.filter is not None) == ("rows" in options)
        sites, nats = lora_sites(model), []
        for i in range(4):
            batch = torch.tensor([r.tokens for r in ROWS[2 * i : 2 * i + 2]])
            model(input_ids=batch, labels=batch).loss.backward()
            nats.append(retention.step(optimizer))
            optimizer.zero_grad()
        retention.finish()
        parts = {s.name: curvature.blocks[s.name].tensors().values() for s in sites}
        lies = {s.name: (place(s.a), {place(t) for t in parts[s.name]}) for s in sites}
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"weights": weights, "nats": nats, "lies": lies}


@pytest.mark.parametrize(
    ("structure", "options"),
    [
        ("kfac", {"rows": ROWS}),
        ("kfac", {"budget": 1e-4, "probe": ROWS[:2]}),
        ("kfac", {"two": True}),
        ("activation", {"rows": ROWS}),
        ("tridiagonal", {"update": "proximal"}),
        ("tridiagonal", {"parts": ["force"]}),
        ("diagonal", {"parts": ["force"]}),
    ],
)
@pytest.mark.filterwarnings("ignore::retain.errors.RetainWarning")
def test_two_devices_hold_as_one(structure: str, options: dict[str, Any]) -> None:
    one, two = trained(None, structure, **options), trained(TWO, structure, **options)
    assert one["nats"][-1] > 0
    for name, value in one["weights"].items():
        assert torch.allclose(value, two["weights"][name], rtol=1e-5, atol=1e-7), name
    assert one["nats"] == pytest.approx(two["nats"], rel=1e-5)
    for name, (there, parts) in two["lies"].items():
        assert parts == {there}, name
    assert {there for there, _ in two["lies"].values()} == set(map(torch.device, TWO))


def test_blocks_on_the_first_device_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(self: BlockOperator, devices: Mapping[str, torch.device]) -> BlockOperator:
        first = next(iter(devices.values()))
        return put_all(self, dict.fromkeys(devices, first))

    put_all = BlockOperator.place
    monkeypatch.setattr(BlockOperator, "place", whole)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        trained(TWO, "kfac", parts=["force"])


def test_fresh_rows_lie_where_their_layers_do() -> None:
    def grown(devices: list[str] | None) -> Mapping[str, Any]:
        with Devices() if devices else nullcontext():
            model = model_on(devices)
            with torch.no_grad():
                for site in lora_sites(model):
                    site.b.copy_(torch.ones_like(site.b))
            model = retain.grow_lora(model, 2, seed=1)
            lies = {s.name: {place(t) for t in (s.a, s.b)} for s in lora_sites(model)}
            rows = {s.name: (s.a.detach().clone(), s.b.detach().clone()) for s in lora_sites(model)}
        return {"lies": lies, "rows": rows}

    one, two = grown(None), grown(TWO)
    assert {frozenset(places) for places in two["lies"].values()} == {
        frozenset({torch.device(there)}) for there in TWO
    }
    for name, (a, b) in one["rows"].items():
        assert torch.equal(a, two["rows"][name][0]) and torch.equal(b, two["rows"][name][1])
