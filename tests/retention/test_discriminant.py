"""The discriminant start: the eigenvectors are true ones, A is theirs, and B alone learns."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from sequences import begun, learn, tasks_of
from torch import Tensor

from retain.errors import ConfigError
from retain.models.adapter import lora_sites
from retain.retention.discriminant import Discriminant
from retain.retention.start import discriminants


def moment(size: int, seed: int, decay: float = 0.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * size, size, generator=random, dtype=torch.float64)
    rows = rows * torch.exp(-decay * torch.arange(size, dtype=torch.float64))
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
@pytest.mark.parametrize("held", [True, False])
def test_the_eigenvectors_are_those_of_scipy(held: bool, epsilon: float) -> None:
    size, count = 40, 5
    new, old = moment(size, 0, 0.1), moment(size, 1, 0.05)
    right = old + epsilon * old.diagonal().mean() * torch.eye(size).double()
    right = right if held else torch.eye(size).double()
    values, vectors = scipy.linalg.eigh(new.numpy(), right.numpy())
    found = discriminants(new, old if held else None, count, epsilon=epsilon)
    torch.testing.assert_close(found @ right @ found.T, torch.eye(count).double())
    ratios = (found @ new @ found.T).diagonal()
    best = torch.from_numpy(values[::-1][:count].copy())
    assert bool((ratios <= best * (1 + 1e-9)).all())
    torch.testing.assert_close(ratios, best, rtol=0.02, atol=0)
    top = torch.from_numpy(vectors[:, -1].copy())
    assert abs(float(top @ right @ found[0])) > 0.99
    again = discriminants(new, old if held else None, count, epsilon=epsilon, seed=7)
    assert float((again[0] - found[0]).norm() / found[0].norm()) < 0.1  # with its sign


def test_fewer_directions_than_asked_for_are_all_there_are() -> None:
    found = discriminants(moment(6, 0), moment(6, 1), 6)
    assert found.shape == (6, 6)
    assert torch.linalg.matrix_rank(found) == 6


@pytest.mark.parametrize("start", ["discriminant", "principal", "null", "random"])
@pytest.mark.parametrize("signal", ["inputs", "gradients"])
def test_a_is_set_once_and_b_alone_learns(start: str, signal: str) -> None:
    method = Discriminant(start=start, signal=signal, rows=8)
    attached = begun(method, "lora", "llama", tasks=2)
    sites = lora_sites(attached.model)
    drawn = [s.a.detach().clone() for s in sites]
    task = tasks_of("llama")[0]
    rows = method.before_task(task)
    assert rows is task.examples
    first = [s.a.detach().clone() for s in sites]
    for site, before, now in zip(sites, drawn, first, strict=True):
        assert torch.equal(now[2:], before[2:])  # the next task's block
        assert torch.equal(now[:2], before[:2]) is (start == "random")
        assert not site.a.requires_grad
    learn(method, attached, task)
    for site, now in zip(sites, first, strict=True):
        assert torch.equal(site.a, now)
        assert site.a.requires_grad
        assert float(site.b[:, :2].abs().max()) > 0
        assert float(site.b[:, 2:].abs().max()) == 0


def test_what_the_update_reads_is_new_and_not_old() -> None:
    """Of its first direction the share of new energy over old is the largest there is."""
    ratios: dict[str, Tensor] = {}
    for start in ("discriminant", "principal", "random"):
        method = Discriminant(start=start, rows=16)
        attached = begun(method, "lora", "llama", tasks=2)
        task: Any = tasks_of("llama")[0]
        new = method.fit(task.examples, None, 0)
        old = method.curvature
        assert old is not None
        method.before_task(task)
        shares = []
        for site in lora_sites(attached.model):
            s, t = (c.blocks[site.name].inputs.dense() for c in (new, old))
            t = t + 0.01 * t.diagonal().mean() * torch.eye(len(t)).to(t)
            a = site.a[:2].detach()
            energy = ((a @ s) * a).sum(1)
            shares.append((energy / ((a @ t) * a).sum(1)).mean())
            if start != "random":  # the energy of PEFT's draw
                want = s.diagonal().mean() / 3
                torch.testing.assert_close(energy, want.expand(2), rtol=1e-4, atol=0)
        ratios[start] = torch.stack(shares)
    assert bool((ratios["discriminant"] >= ratios["principal"] * (1 - 1e-6)).all())
    assert float(ratios["discriminant"].mean()) > 1.5 * float(ratios["random"].mean())


def test_a_penalty_holds_the_block_back() -> None:
    norms = []
    for strength in (0.0, 1e4):
        method = Discriminant(strength, structure="kfac", rows=8)
        attached = begun(method, "lora", "llama", tasks=2)
        learn(method, attached, tasks_of("llama")[0])
        norms.append(sum(float(s.b.norm()) for s in lora_sites(attached.model)))
    assert norms[1] < 0.7 * norms[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": "fisher"}, "unknown start"),
        ({"signal": "labels"}, "unknown signal"),
        ({"structure": "diagonal"}, "unknown structure"),
        ({"epsilon": 0.0}, "epsilon is out of range"),
        ({"epsilon": float("nan")}, "epsilon is out of range"),
        ({"gain": -1.0}, "gain is out of range"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Discriminant(**options)
