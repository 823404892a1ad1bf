"""A linear probe against the objective that it says it minimises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from retain.retention.probe import RIDGES, fit_probe


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    """Features far from 0, of very unlike sizes."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, -1, width, dtype=torch.float64)
    return 5 + sizes * torch.randn(rows, width, generator=random, dtype=torch.float64)


def objective(weight: Tensor, bias: Tensor, x: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """That of the docstring, in the features' own unit."""
    size = (x - x.mean(dim=0)).square().mean().sqrt()
    outputs = x @ weight.T + bias
    if len(weight) == 1:
        loss = (outputs[:, 0] - targets).square().mean() / 2
    else:
        loss = nn.functional.cross_entropy(outputs, targets)
    return loss + ridge / 2 * (weight * size).square().sum()


@pytest.mark.parametrize(("rows", "width"), [(60, 5), (12, 30)], ids=["tall", "wide"])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_it_is_the_minimum_of_its_objective(rows: int, width: int, classes: int) -> None:
    """The objective is convex: where all slopes are 0 is its minimum, and every step away is up."""
    x = drawn(rows, width)
    targets = x[:, 0] * 7 if classes == 1 else torch.arange(rows) * 7 % 5 % classes
    probe = fit_probe(x, targets, classes)
    weight, bias = probe.weight.requires_grad_(), probe.bias.requires_grad_()
    least = objective(weight, bias, x, targets, probe.ridge)
    slopes = torch.autograd.grad(least, [weight, bias])
    size = float((x - x.mean(dim=0)).square().mean().sqrt())
    centred = slopes[0] - slopes[1][:, None] * x.mean(dim=0)  # the bias follows the mean
    assert float(centred.abs().max()) / size < 1e-3
    assert float(slopes[1].abs().max()) < 1e-4
    random = torch.Generator().manual_seed(1)
    weight, bias = weight.detach(), bias.detach()
    for _ in range(5):
        off = 1e-2 / size * torch.randn(weight.shape, generator=random, dtype=torch.float64)
        moved = objective(weight + off, bias - off @ x.mean(dim=0), x, targets, probe.ridge)
        assert float(moved) > float(least)


def test_features_that_tell_nothing_are_left_out() -> None:
    targets = torch.randint(3, (90,), generator=torch.Generator().manual_seed(3))
    probe = fit_probe(drawn(90, 60), targets, 3)
    assert probe.ridge >= 1
    assert probe.loss == pytest.approx(math.log(3), abs=0.15)
    assert not probe.tells
    assert probe.known == pytest.approx(math.log(3), abs=0.02)
    shares = torch.bincount(targets) / 90
    outputs = (probe.weight @ probe.mean + probe.bias).softmax(dim=0)
    assert torch.allclose(outputs.float(), shares, atol=0.05)


def test_features_that_tell_all_are_used() -> None:
    x = drawn(90, 20)
    probe = fit_probe(x, (x[:, -1] > 5).long(), 2)
    assert probe.ridge < 0.1
    assert probe.loss < 0.35
    values = fit_probe(x, 3 * x[:, -1], 1)
    assert probe.tells and values.tells
    assert values.ridge == min(RIDGES)
    assert values.known == pytest.approx(float((3 * x[:, -1]).var(correction=0)))
    assert values.loss < 1e-3 * float((3 * x[:, -1]).var())


def test_the_loss_is_that_of_rows_it_has_not_seen() -> None:
    """Every row has a value of its own: all can be learned by heart, and none foretold."""
    x = torch.eye(40, dtype=torch.float64)
    targets = torch.arange(40) % 2
    assert fit_probe(x, targets, 2).loss > 0.69


@pytest.mark.parametrize("classes", [1, 3])
def test_few_rows_and_classes_without_any(classes: int) -> None:
    probe = fit_probe(drawn(2, 4), torch.tensor([0, 1]), classes)
    assert torch.isfinite(probe.weight).all()
    assert torch.isfinite(probe.bias).all()
    assert math.isfinite(probe.loss)


def test_features_that_are_all_alike() -> None:
    probe = fit_probe(torch.ones(8, 3), torch.tensor([0, 1, 1, 1, 0, 1, 1, 1]), 2)
    outputs = (probe.weight @ torch.ones(3, dtype=torch.float64) + probe.bias).softmax(dim=0)
    assert float(outputs[1]) == pytest.approx(0.75, abs=1e-3)


def test_the_same_seed_gives_the_same_fit() -> None:
    x, targets = drawn(30, 8), torch.arange(30) % 3
    first, second = (fit_probe(x, targets, 3, seed=4) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.loss == second.loss
