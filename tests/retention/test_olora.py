"""O-LoRA: one block at a time, and orthogonal ones."""

from __future__ import annotations

import pytest
import torch
from sequences import attach, batch_of, begun, context, learn, run, shaken, tasks_of
from torch import nn

from retain.errors import ConfigError
from retain.models.forward import forward_logits
from retain.models.sites import lora_sites
from retain.retention.methods.olora import OLoRA
from retain.retention.registry import make_method


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_olora_trains_one_block_at_a_time(decay: float) -> None:
    method = OLoRA(strength=0.3)
    attached = begun(method, "lora", "llama", tasks=3)
    sites = lora_sites(attached.model)
    assert sites[0].rank == 6 and sites[0].scaling == 2.0
    task = tasks_of("llama")[0]
    for index in range(3):
        before = [(s.a.detach().clone(), s.b.detach().clone()) for s in sites]
        task.index = index
        learn(method, attached, task, weight_decay=decay, max_grad_norm=0.01)
        for site, (a, b) in zip(sites, before, strict=True):
            for block in range(3):
                rows = slice(2 * block, 2 * block + 2)
                stays = torch.equal(site.a[rows], a[rows]), torch.equal(site.b[:, rows], b[:, rows])
                assert stays == ((block != index,) * 2), (index, block, site.name)
    for site in sites:  # nothing is left behind
        site.b.grad = None
        (site.a.sum() + site.b.sum()).backward()
        assert bool((site.b.grad == 1).all())


def test_oloras_parameters_are_counted_as_those_of_the_others_are() -> None:
    counts = []
    for method in (OLoRA(), make_method("none")):
        attached = begun(method, "lora", "llama", tasks=3)
        counts.append(method.trained(attached.count()[0], 3))
    assert counts[0] == counts[1] == sum(s.a.numel() + s.b.numel() for s in attached.view.lora)


def test_olora_gives_other_blocks_no_gradient() -> None:
    """So that clipping sees the block alone."""
    method = OLoRA(strength=0.3)
    attached = begun(method, "lora", "llama", tasks=3)
    shaken(attached.model)
    task = tasks_of("llama")[0]
    task.index = 1
    method.before_task(task)
    batch = batch_of(task, [0, 1, 2])
    logits = forward_logits(attached.model, batch)
    term = method.loss(attached.model, batch, logits)
    (nn.functional.cross_entropy(logits, batch.targets) + term).backward()
    for site in lora_sites(attached.model):
        for trains in (site.a.grad.any(1), site.b.grad.any(0)):
            assert trains.tolist() == [False, False, True, True, False, False]


def test_oloras_term_is_the_sum_of_all_products() -> None:
    method = OLoRA(strength=0.3)
    attached = begun(method, "lora", "llama", tasks=3)
    task = tasks_of("llama")[0]
    batch = batch_of(task, [0, 1])
    drawn = [site.a.tolist() for site in lora_sites(attached.model)]
    for index in range(3):
        task.index = index
        method.before_task(task)
        term = method.loss(attached.model, batch, forward_logits(attached.model, batch))
        total = 0.0
        for a in drawn:
            for new in range(2 * index, 2 * index + 2):
                for old in range(2 * index):
                    total += abs(sum(x * y for x, y in zip(a[new], a[old], strict=True)))
        assert (term is None) is (index == 0)
        if term is not None:
            assert float(term.detach()) == pytest.approx(0.3 * total, rel=1e-9)
            grads = torch.autograd.grad(term, [s.a for s in lora_sites(attached.model)])
            own = slice(2 * index, 2 * index + 2)
            assert all(bool(g[own].any(1).all()) for g in grads)


def test_olora_becomes_orthogonal_and_says_what_it_needs() -> None:
    ends = []
    for strength in (0.0, 3.0):
        method = OLoRA(strength)
        attached = run(method, "lora", "llama", max_steps=20)
        sites = lora_sites(attached.model)
        ends.append(sum(float((s.a[2:] @ s.a[:2].T).detach().abs().sum()) for s in sites))
    assert ends[1] < 0.5 * ends[0]
    assert method.adapter_options({"rank": 4, "alpha": 6.0, "dropout": 0.1}, 3) == {
        "rank": 12, "alpha": 18.0, "dropout": 0.1,
    }  # fmt: skip
    bare = attach("lora", "llama", make_method("none"))
    other = OLoRA(0.5)
    other.begin(context(bare, "llama", tasks=3))
    with pytest.raises(ConfigError, match="no block for this task"):
        other.before_task(tasks_of("llama")[0])
