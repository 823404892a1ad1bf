"""The discriminant start: the eigenvectors are true ones, A is theirs, and B alone learns."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from sequences import begun, learn, source, tasks_of
from torch import Tensor

from retain import fit_curvature
from retain.data.batches import Example, batches
from retain.errors import ConfigError, MismatchError, SourceError
from retain.models.forward import forward_body
from retain.models.sites import lora_sites
from retain.retention.discriminant import Discriminant
from retain.retention.moments import Moments, input_moments, moments_of
from retain.retention.start import discriminants, set_start
from tiny import KINDS, ROWS, tiny


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


def test_old_moments_that_rounding_made_indefinite_still_give_directions() -> None:
    old = moment(12, 1).float()
    values, vectors = torch.linalg.eigh(old)
    values[0] = -0.05 * float(values.mean())
    found = discriminants(moment(12, 0).float(), vectors @ values.diag() @ vectors.T, 4)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answers", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("first", [True, False])
def test_moments_are_the_sums_over_positions(
    kind: str, answers: float, size: int, first: bool
) -> None:
    model = tiny(kind)
    examples: list[Any] = list(tasks_of(kind)[0].examples)
    found = input_moments(
        model, lora_sites(model), examples, answers=answers, first=first, batch_size=size
    )
    skip = kind == "llama" and not first  # a classifier's first position is one like all others
    tokens = sum(len(e.tokens) - skip for e in examples)
    predictions = sum(sum(e.predict[skip:]) for e in examples)
    for site in lora_sites(model):
        seen: list[Tensor] = []
        handle = site.layer.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
        want = torch.zeros_like(found.of(site.name))
        for e in examples:
            (batch,) = batches([e], 1, 0)
            with torch.no_grad():
                forward_body(model, batch)
            x = seen.pop().reshape(-1, want.shape[0])
            w = torch.full((len(x),), 1 / tokens, dtype=torch.float64)
            if len(x) < len(e.tokens):  # behind the pooling
                w = torch.full((len(x),), 1 / len(examples), dtype=torch.float64)
            elif predictions:
                w = (1 - answers) * w + answers * torch.tensor(e.predict) / predictions
            if skip:
                w[0] = 0.0
            want += x.T @ (w[:, None] * x)
        handle.remove()
        torch.testing.assert_close(found.of(site.name), want, rtol=1e-9, atol=1e-12)


def test_rows_of_one_position_count_with_it() -> None:
    model = tiny("llama")
    short = [Example((3,), (4,), (True,)), Example((5,), (6,), (True,))]
    long = [Example((3, 7, 2), (7, 2, 1), (True, False, True))]
    found = [input_moments(model, lora_sites(model), short, first=f) for f in (True, False)]
    both = input_moments(model, lora_sites(model), short + long, first=False, answers=0.0)
    alone = input_moments(model, lora_sites(model), long, first=False, answers=0.0)
    for name in found[0].factors:
        s = found[0].of(name)
        assert float(s.abs().max()) > 0
        assert torch.equal(s, found[1].of(name))
        # a row of one does not bring the first positions of the others back
        torch.testing.assert_close(both.of(name), 0.5 * s + 0.5 * alone.of(name))


def test_of_a_text_they_are_those_of_the_activation_curvature() -> None:
    model = tiny("llama")
    examples = source("llama")
    options: dict[str, Any] = {"batch_size": 3, "progress": False}
    for structure in ("activation", "kfac"):
        curvature = moments_of(fit_curvature(model, examples, structure, **options))
        found = input_moments(model, lora_sites(model), examples)
        assert found.readers == curvature.readers
        for site in lora_sites(model):
            torch.testing.assert_close(found.of(site.name), curvature.of(site.name))


def test_moments_add_up_and_come_back_from_a_file() -> None:
    model = tiny("llama")
    one, two = (input_moments(model, lora_sites(model), t.examples) for t in tasks_of("llama"))
    want = {n: 2 * one.of(n) + two.of(n) for n in one.factors}
    total = one.times(2.0).plus(two)
    again = Moments.of_tensors(total.tensors())
    assert again.readers == one.readers
    for name, s in want.items():
        torch.testing.assert_close(again.of(name), s)


@pytest.mark.parametrize("start", ["discriminant", "principal", "null", "random"])
@pytest.mark.parametrize("gain", [1.0, 5.0])
def test_a_is_set_once_and_b_alone_learns(start: str, gain: float) -> None:
    method = Discriminant(start=start, gain=gain, rows=8)
    attached = begun(method, "lora", "llama", tasks=2)
    sites = lora_sites(attached.model)
    drawn = [s.a.detach().clone() for s in sites]
    task = tasks_of("llama")[0]
    rows = method.before_task(task)
    assert rows is task.examples
    first = [s.a.detach().clone() for s in sites]
    for site, before, now in zip(sites, drawn, first, strict=True):
        assert len(now) == 2  # the task's block alone
        if start == "random":
            torch.testing.assert_close(now, gain * before[:2])
        else:
            s = method.new.of(site.name)
            energy = ((now @ s) * now).sum(1)
            want = gain**2 * s.diagonal().mean() / 3
            torch.testing.assert_close(energy, want.expand(2), rtol=1e-4, atol=0)
        assert not site.a.requires_grad
    learn(method, attached, task)
    for site, before, now in zip(sites, drawn, first, strict=True):
        if start == "random":  # begun twice
            now *= gain
        assert torch.equal(site.a[:2], now)
        assert torch.equal(site.a[2:], before[2:])  # the next task's block
        assert site.a.requires_grad
        assert float(site.b[:, :2].abs().max()) > 0
        assert float(site.b[:, 2:].abs().max()) == 0


def test_what_the_update_reads_is_new_and_not_old() -> None:
    """The share of new energy over old is the largest there is."""
    model = tiny("llama")
    sites = lora_sites(model)
    new = input_moments(model, sites, tasks_of("llama")[0].examples)
    old = input_moments(model, sites, source("llama"))
    ratios: dict[str, Tensor] = {}
    for kind in ("random", "principal", "discriminant"):
        set_start(sites, new, old, kind=kind)
        shares = []
        for site in sites:
            s, t = new.of(site.name), old.of(site.name)
            t = t + 0.01 * t.diagonal().mean() * torch.eye(len(t)).to(t)
            a = site.a.detach()
            shares.append((((a @ s) * a).sum(1) / ((a @ t) * a).sum(1)).mean())
        ratios[kind] = torch.stack(shares)
    assert bool((ratios["discriminant"] >= ratios["principal"] * (1 - 1e-6)).all())
    assert float(ratios["discriminant"].mean()) > 1.5 * float(ratios["random"].mean())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": "fisher"}, "unknown start"),
        ({"epsilon": 0.0}, "epsilon is out of range"),
        ({"epsilon": float("nan")}, "epsilon is out of range"),
        ({"gain": -1.0}, "gain is out of range"),
        ({"answers": 1.5}, "answers' share is out of range"),
        ({"rows": 0}, "too few rows to read"),
        ({"source_weight": -1.0}, "source_weight is out of range"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Discriminant(**options)


def test_what_tells_no_inputs_is_refused() -> None:
    model = tiny("llama")
    curvature = fit_curvature(model, ROWS["llama"], "diagonal", batch_size=4, progress=False)
    with pytest.raises(MismatchError, match="does not tell what a layer reads"):
        moments_of(curvature)
    with pytest.raises(SourceError, match="no rows"):
        input_moments(model, lora_sites(model), [])


def test_a_row_of_one_token_counts() -> None:
    model = tiny("llama")
    found = input_moments(model, lora_sites(model), [Example((3,), (4,), (True,))])
    assert all(s.trace() > 0 for s in found.factors.values())
