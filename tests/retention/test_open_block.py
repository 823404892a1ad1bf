"""A task's own block in the place of the whole LoRA: the same function, and the same quadratic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sequences import begun, shaken, source, tasks_of
from torch import nn

from retain import Curvature, fit_curvature, reanchored
from retain.errors import ConfigError
from retain.models.off import adapter_off
from retain.models.sites import lora_sites
from retain.retention.beside import Beside
from retain.retention.blocks import OpenBlock
from retain.retention.laplace import Retention
from retain.retention.methods.olora import OLoRA


def fitted(model: nn.Module, structure: Any, **options: Any) -> Curvature:
    return fit_curvature(model, source("llama"), structure, batch_size=2, progress=False, **options)


def opened() -> tuple[Any, torch.Tensor]:
    """Three blocks that do something, but for the last, which is still to come."""
    attached = begun(OLoRA(), "lora", "llama", tasks=3)
    shaken(attached.model)
    with torch.no_grad():
        for site in lora_sites(attached.model):
            site.b[:, 4:] = 0
    attached.model.eval()
    ids = torch.tensor([tasks_of("llama")[0].examples[0].tokens])
    return attached, ids


def test_the_model_computes_what_it_did_and_is_put_back() -> None:
    attached, ids = opened()
    sites = lora_sites(attached.model)
    whole, state = attached.model(ids).logits, attached.state()
    with adapter_off(attached.model):
        bare = attached.model(ids).logits
    assert not torch.allclose(whole, bare)
    block = OpenBlock(sites, slice(2, 4))
    torch.testing.assert_close(attached.model(ids).logits, whole)
    with adapter_off(attached.model):
        assert torch.equal(attached.model(ids).logits, bare)
    assert {s.a.shape[0] for s in lora_sites(attached.model)} == {2}
    with torch.no_grad():
        for site in sites:
            site.b.add_(1.0)
    moved = attached.model(ids).logits
    assert not torch.allclose(moved, whole)
    block.release()
    torch.testing.assert_close(attached.model(ids).logits, moved)
    for name, tensor in attached.state().items():
        want = state[name].clone()
        if "lora_B" in name:
            want[:, 2:4] += 1.0
        assert torch.equal(tensor, want)
    assert all(p.requires_grad for s in sites for p in (s.a, s.b))


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("structure", ["kfac", "shampoo"])
def test_what_stays_and_what_moves_make_the_whole_quadratic(
    structure: Any, rank: int | None
) -> None:
    attached, _ = opened()
    model, sites = attached.model, lora_sites(attached.model)
    kept = {s.name: s.b.detach().clone() for s in sites}
    with torch.no_grad():
        for site in sites:
            site.b.zero_()
    curvature, diagonal = fitted(model, structure, rank=rank), fitted(model, "diagonal")
    with torch.no_grad():
        for site in sites:
            site.b.copy_(kept[site.name])
    nats, pulls = curvature.pulls(sites)
    want = {id(p): g for p, g in pulls}
    wholes = [(s.a, s.b) for s in sites]
    block = OpenBlock(sites, slice(2, 4))
    retention = Retention(model, curvature, 3.0, beside=block.displacements(), resuming=True)
    assert retention.predicted() == pytest.approx(nats, rel=1e-5)
    found = retention.add_force()
    assert found == pytest.approx(nats, rel=1e-5)
    for site, (a, b) in zip(sites, wholes, strict=True):
        close = {"rtol": 1e-4, "atol": 1e-7}
        torch.testing.assert_close(site.a.grad, 3.0 * want[id(a)][2:4].to(site.a), **close)
        torch.testing.assert_close(site.b.grad, 3.0 * want[id(b)][:, 2:4].to(site.b), **close)
    with pytest.raises(ConfigError, match="fixed strength alone"):
        Retention(model, curvature, budget=0.1, beside=block.displacements(), resuming=True)
    with pytest.raises(ConfigError, match="does not know a displacement that stays"):
        Retention(model, curvature, past=curvature, beside=block.displacements(), resuming=True)
    with pytest.raises(ConfigError, match="weight space, around a later anchor"):
        Beside(reanchored(curvature, model), block.displacements())
    adapter = fitted(model, "kfac", space="adapter")
    with pytest.raises(ConfigError, match="got: a curvature in adapter space"):
        Beside(adapter, block.displacements())
    with pytest.raises(ConfigError, match="got: a curvature of structure diagonal"):
        Beside(diagonal, block.displacements())
