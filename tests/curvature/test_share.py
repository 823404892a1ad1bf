"""Fits whose products read a share of the sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fits import definite, same, text
from retain import Curvature, fit_curvature
from retain.curvature.blocks.observation import Observation
from retain.curvature.fit.accumulator import Accumulator
from tiny import STRUCTURES, tiny

ROWS = 24
CASES = [("llama", p, s, 1 / 4) for p in ("weight", "adapter") for s in STRUCTURES]
CASES += [("bert", "weight", s, 1 / 2) for s in STRUCTURES]


def fit(kind: str, structure: str, share: float, batch_size: int = 8, **options: Any) -> Curvature:
    return fit_curvature(
        tiny(kind, moved=True), text(1, ROWS), structure, share=share, batch_size=batch_size,
        **{"seed": 2, "progress": False} | options,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "space", "structure", "share"), CASES)
def test_a_share_is_deterministic_and_keeps_the_trace(
    kind: str, space: str, structure: str, share: float
) -> None:
    options = {"space": space, "structure": structure}
    whole, got = (fit(kind, share=s, **options) for s in (1.0, share))
    assert (whole.info.share, whole.info.share_error) == (1.0, 0.0)
    assert got.info.share == share
    for batch_size, tolerance in ((8, 1e-15), (ROWS, 1e-9)):
        other = fit(kind, share=share, batch_size=batch_size, **options)
        same(other, got, tolerance)
        assert other.info.share_error == pytest.approx(got.info.share_error, rel=1e-9)
    for key in ("predictions", "sequences", "tokens"):
        assert getattr(got.info, key) == getattr(whole.info, key)
    unknown = structure == "activation"
    assert got.info.error == pytest.approx(whole.info.error, rel=1e-12, nan_ok=unknown)
    if structure == "activation":  # it has no true trace to be scaled to
        assert got.info.share_error == 0
        return
    for name, block in got.blocks.items():
        assert block.trace() == pytest.approx(whole.blocks[name].trace(), rel=1e-10), name
    if structure != "identity":
        assert not torch.allclose(got.to_dense(), whole.to_dense(), rtol=1e-2)
    definite(got.to_dense())


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tridiagonal"])
def test_layers_take_turns(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Together they read everything, but for a chain, whose layers must all see the same.
    seen: dict[str, list[int]] = {}
    real = Accumulator._chosen

    def chosen(self: Accumulator, name: str, rows: list[int]) -> tuple[int, ...]:
        found = real(self, name, rows)
        seen.setdefault(name, []).extend(rows[i] for i in found)
        return found

    monkeypatch.setattr(Accumulator, "_chosen", chosen)
    fit("llama", structure, 1 / 4)
    passes = 2 if structure == "ekfac" else 1
    assert {len(set(rows)) for rows in seen.values()} == {ROWS // 4}
    assert all(len(rows) == passes * ROWS // 4 for rows in seen.values())
    assert len({tuple(sorted(rows)) for rows in seen.values()}) == (
        1 if structure == "tridiagonal" else 4
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_share_of_less_than_a_sequence_is_one_sequence(structure: str) -> None:
    one = fit("llama", structure, 1 / ROWS)
    assert one.info.share == 1 / ROWS
    for share in (1 / 50, 5e-324):
        least = fit("llama", structure, share)
        same(least, one, 1e-15)
        assert least.info.share == 1 / ROWS
    assert fit("llama", structure, 0.7).info.share == 1  # more than half is rounded


@pytest.mark.parametrize("share", [1 / 2, 1 / 4])
@pytest.mark.parametrize("structure", ["kfac", "shampoo"])
def test_sketches_of_a_share(structure: str, share: float) -> None:
    whole, got = (fit("llama", structure, share, rank=rank) for rank in (None, 2))
    for name, block in got.blocks.items():
        assert block.trace() == pytest.approx(whole.blocks[name].trace(), rel=1e-10)
        for side, factor in block.factors().items():
            want = whole.blocks[name].factors()[side].dense()
            off = float(torch.linalg.matrix_norm(factor.dense() - want, 2))
            bound = factor.tensors().get(".bound", torch.zeros(()))
            assert off <= float(bound) + 1e-10 * float(want.trace())


@pytest.mark.parametrize(
    ("kind", "structure", "options", "share"),
    [
        ("llama", "kfac", {}, 1 / 4),
        ("llama", "kfac", {"samples": 4}, 1 / 4),
        ("bert", "kfac", {}, 1 / 2),
        ("bert", "shampoo", {"fisher": "exact"}, 1 / 4),
        ("llama", "tridiagonal", {"samples": 4}, 1 / 2),
    ],
)
def test_the_stated_error_covers_what_the_share_really_misses(
    kind: str, structure: str, options: dict, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums, real = [0.0, 0.0], Accumulator._trace

    def trace(self: Accumulator, record: Observation) -> None:
        real(self, record)
        t = record.traces.double() * record.weight
        sums[0] += self.every * float(t[list(self._chosen(record.name, self._batch.rows))].sum())
        sums[1] += float(t.sum())

    monkeypatch.setattr(Accumulator, "_trace", trace)
    model, away, stated = tiny(kind, moved=True), [], []
    for seed in range(24):
        sums[:] = [0.0, 0.0]
        info = fit_curvature(
            model, text(seed, 16), structure, share=share, seed=seed, batch_size=16,
            progress=False, **options,
        ).info  # fmt: skip
        away.append(sums[0] / sums[1] - 1)
        stated.append(info.share_error)
        assert info.share_error > 0
    away, stated = torch.tensor(away), torch.tensor(stated)
    assert 0.5 < float((away / stated).square().mean().sqrt()) < 2
    assert 0.5 < float(away.square().mean().sqrt() / stated.square().mean().sqrt()) < 2
    assert abs(float(away.mean())) < 3 * float(away.std()) / 24**0.5  # and it is unbiased
