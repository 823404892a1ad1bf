"""Sampled labels: towards the exact Fisher, at the stated error."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from oracles import Oracle
from retain import fit_curvature
from retain.curvature.curvature import Curvature
from retain.curvature.fit import labels
from retain.curvature.fit.labels import EXACT_LIMIT
from retain.errors import CurvatureError
from tiny import KINDS, ROWS, STRUCTURES, tiny

ONE = {kind: ROWS[kind][:1] for kind in KINDS}
SAMPLES = (8, 32, 128, 256)


def fit(kind: str, samples: int, seed: int = 0, fisher: str = "mc", structure: str = "diagonal"):
    return fit_curvature(
        tiny(kind), ONE[kind], structure,
        fisher=fisher, samples=samples, seed=seed, batch_size=1, progress=False,
    )  # fmt: skip


def trace(curvature: Curvature) -> float:
    return sum(block.trace() for block in curvature.blocks.values())


@cache
def exact_trace(kind: str) -> float:
    return trace(fit(kind, 1, fisher="exact"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", SAMPLES)
def test_sampled_trace_is_within_four_stated_errors(kind: str, samples: int) -> None:
    found = fit(kind, samples)
    assert abs(trace(found) - exact_trace(kind)) < 4 * found.info.error * trace(found)


@pytest.mark.parametrize("kind", KINDS)
def test_stated_error_shrinks_as_one_over_the_root_of_samples(kind: str) -> None:
    scaled = [fit(kind, n).info.error * math.sqrt(n) for n in SAMPLES]
    assert all(e > 0 for e in scaled)
    for e in scaled[1:]:  # the first, of 8 draws, is itself noisy
        assert 0.7 < e / scaled[-1] < 1.4
    assert 0.4 < scaled[0] / scaled[-1] < 2.5


@pytest.mark.parametrize("kind", KINDS)
def test_stated_error_is_the_spread_over_seeds(kind: str) -> None:
    fits = [fit(kind, 8, seed) for seed in range(30)]
    traces = torch.tensor([trace(f) for f in fits])
    stated = sum(f.info.error for f in fits) / len(fits)
    assert 0.7 < float(traces.std()) / exact_trace(kind) / stated < 1.4
    assert abs(float(traces.mean()) / exact_trace(kind) - 1) < 4 * stated / math.sqrt(len(fits))


@pytest.mark.parametrize("kind", KINDS)
def test_stated_error_counts_the_texts_spread_however_many_draws(kind: str) -> None:
    found = fit_curvature(
        tiny(kind), ROWS[kind], "diagonal", samples=128, batch_size=1, progress=False
    )
    rows = Oracle(tiny(kind), ROWS[kind], causal=kind == "llama").traces("weight")
    t = torch.tensor([r[0] for r in rows], dtype=torch.float64)
    n = torch.tensor([r[1] for r in rows], dtype=torch.float64)
    residual = t - t.sum() / n.sum() * n
    between = float((residual.square().sum() * len(t) / (len(t) - 1)).sqrt() / t.sum())
    assert found.info.error > 0.8 * between


@pytest.mark.parametrize("kind", KINDS)
def test_stated_error_of_all_labels_is_the_texts_spread(kind: str) -> None:
    rows = Oracle(tiny(kind), ROWS[kind], causal=kind == "llama").traces("weight")
    t = torch.tensor([r[0] for r in rows], dtype=torch.float64)
    n = torch.tensor([r[1] for r in rows], dtype=torch.float64)
    residual = t - t.sum() / n.sum() * n
    between = float((residual.square().sum() * len(t) / (len(t) - 1)).sqrt() / t.sum())
    for size in (1, 2):
        found = fit_curvature(
            tiny(kind), ROWS[kind], "diagonal", fisher="exact", batch_size=size, progress=False
        )
        assert found.info.error == pytest.approx(between, rel=1e-6)


def test_the_error_of_a_fit_without_gradients_is_not_known() -> None:
    found = fit_curvature(tiny("llama"), ROWS["llama"], "activation", progress=False)
    assert math.isnan(found.info.error) and math.isnan((found + found).info.error)
    assert found.info.to_dict()["error"] is None


@pytest.mark.parametrize("fisher", ["mc", "empirical", "tempered", "reversed"])
def test_stated_error_of_one_draw_of_one_row_is_unknown(fisher: str) -> None:
    assert math.isnan(fit("llama", 1, fisher=fisher).info.error)


def test_exact_fisher_of_one_row_has_no_label_noise() -> None:
    assert fit("bert", 1, fisher="exact").info.error == 0.0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_seed_alone_fixes_the_draws(structure: str) -> None:
    a, b, c = (fit("llama", 2, seed, structure=structure) for seed in (3, 3, 4))
    for name, block in a.blocks.items():
        assert torch.equal(block.to_dense(), b.blocks[name].to_dense())
    assert any(not torch.equal(x.to_dense(), c.blocks[n].to_dense()) for n, x in a.blocks.items())


@pytest.mark.parametrize("fisher", ["mc", "tempered"])
def test_how_many_predictions_are_worked_on_at_a_time_changes_nothing(
    fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = fit("llama", 2, fisher=fisher)
    monkeypatch.setattr(labels, "_ROWS", 1)
    got = fit("llama", 2, fisher=fisher)
    for name, block in want.blocks.items():
        assert torch.equal(block.to_dense(), got.blocks[name].to_dense())


def test_exact_fisher_refuses_too_many_passes() -> None:
    rows = [{"input_ids": [1] * (EXACT_LIMIT // 13 + 3)}]
    with pytest.raises(CurvatureError, match="fix: fisher='mc'"):
        fit_curvature(
            tiny("llama"), rows, fisher="exact", batch_size=1, max_length=1000, progress=False
        )
