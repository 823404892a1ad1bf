"""The recipe: the filter, and the force of the source text's curvature."""

from __future__ import annotations

import pytest
import torch
from sequences import begun, learn, same, tasks_of

from retain.data.batches import batches
from retain.errors import ConfigError
from retain.models.sites import lora_sites
from retain.retention.auto import Auto
from retain.retention.wiener import Wiener


def test_without_strength_it_is_the_filter_bit_for_bit() -> None:
    ends = []
    for method in (Auto(0.0, rows=8), Wiener(rows=8)):
        attached = begun(method, "lora", "llama", tasks=2)
        for task in tasks_of("llama"):
            learn(method, attached, task)
        ends.append(attached.state())
    same(*ends)


def test_the_force_is_the_gradient_of_predicted_nats() -> None:
    """Against differences of the quadratic, on every kind of entry, in the second task too."""
    method = Auto(7.0, rows=8)
    attached = begun(method, "lora", "llama", tasks=2)
    first, second = tasks_of("llama")
    learn(method, attached, first)
    learn(method, attached, second, max_steps=2)
    rows = method.before_task(second)
    curvature = method.curvature
    assert curvature is not None
    sites = lora_sites(attached.model)
    batch = next(iter(batches(rows, 4, 0)))
    attached.model(**batch.inputs).logits.pow(2).mean().backward()
    before = [(s.a.grad.clone(), s.b.grad.clone()) for s in sites]
    nats = method.before_step(attached.model)

    def whole() -> float:
        """Of all blocks, by the definition: what is open, and what was there before."""
        assert method.block is not None
        total = 0.0
        for site, (a0, b0) in zip(sites, method.block.earlier, strict=True):
            d = (site.scaling * (b0 @ a0 + site.b @ site.a)).detach().double()
            total += 0.5 * float((d * curvature.blocks[site.name].matvec(d)).sum())
        return total

    assert nats == pytest.approx(whole(), rel=1e-9)
    assert nats > 0
    for site, (a, b) in zip(sites, before, strict=True):
        for weight, was in ((site.a, a), (site.b, b)):
            place = (1, 2) if weight is site.a else (2, 1)
            ends = []
            for step in (1e-4, -1e-4):
                with torch.no_grad():
                    weight[place] += step
                    ends.append(whole())
                    weight[place] -= step
            slope = (ends[0] - ends[1]) / 2e-4
            added = float((weight.grad - was)[place])
            assert added == pytest.approx(7.0 * slope, rel=1e-4, abs=1e-9)
    last = whole()
    method.after_task(second)
    assert curvature.quadratic(attached.model) == pytest.approx(last, rel=1e-9)


def test_a_stronger_force_predicts_less_forgetting() -> None:
    nats = []
    for strength in (1e-6, 1e2):
        method = Auto(strength, rows=8)
        attached = begun(method, "lora", "llama", tasks=1)
        learn(method, attached, tasks_of("llama")[0])
        assert method.curvature is not None
        nats.append(method.curvature.quadratic(attached.model))
    assert nats[1] < 0.7 * nats[0]


def test_without_source_text_there_is_no_force() -> None:
    method = Auto(5.0, rows=8)
    attached = begun(method, "lora", "bert", tasks=2, source=[])
    learn(method, attached, tasks_of("bert")[0])
    assert method.curvature is None
    assert method.retention is None


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="strength is no strength"):
        Auto(-1.0)
    with pytest.raises(ConfigError, match="gain is out of range"):
        Auto(gain=0.0)
