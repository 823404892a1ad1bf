"""The size of an update, against the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from sequences import shaken, tasks_of

from retain.evaluation.size import update_size
from retain.models.adapters.registry import attach_adapter
from retain.models.sites import lora_sites
from tiny import base


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_it_is_the_mean_logarithm(model: str) -> None:
    adapter = attach_adapter(base(model, dtype=torch.float64), "lora", rank=2)
    rows = tasks_of(model)[0].examples[:5]
    assert update_size(adapter.model, rows) is None  # B = 0
    shaken(adapter.model)
    read: dict[str, list[torch.Tensor]] = {}
    sites = lora_sites(adapter.model)
    hooks = [
        site.layer.register_forward_pre_hook(
            lambda _m, args, name=site.name: read.setdefault(name, []).append(args[0])
        )
        for site in sites
    ]
    adapter.model.eval()
    for row in rows:  # one by one, so that nothing is padded
        kinds = {"token_type_ids": torch.tensor([row.segments])} if row.segments else {}
        adapter.model(input_ids=torch.tensor([row.tokens]), **kinds)
    for hook in hooks:
        hook.remove()
    logs = [
        math.log((site.scaling * site.b @ site.a @ x).norm().item())
        for site in sites for part in read[site.name] for x in part.reshape(-1, part.shape[-1])
    ]  # fmt: skip
    for size in (2, 5):
        found = update_size(adapter.model, rows, batch_size=size)
        assert found == pytest.approx(sum(logs) / len(logs), rel=1e-4)


def test_a_model_without_lora_has_none() -> None:
    adapter = attach_adapter(base("llama"), "full")
    assert update_size(adapter.model, tasks_of("llama")[0].examples) is None
