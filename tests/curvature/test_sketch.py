"""Sketched factors: what the stream promises, what sums of them promise, and fits with them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fits import SEEDS, fit, known
from retain import Curvature, load_curvature
from retain.curvature.blocks import estimator, linalg, ranks
from retain.curvature.blocks.factor import (
    DenseFactor,
    Factor,
    ScalarFactor,
    SketchFactor,
    factor_from,
    inner,
    truncate,
)
from retain.curvature.blocks.ranks import sketch_columns, sketch_rank
from retain.curvature.blocks.sketch import sketch_sizes, sketch_update, sketches_finish
from tiny import KINDS, relative, tiny

F64 = torch.float64
FACTORS = ("dense", "scalar", "sketch")
SIZES = st.tuples(st.integers(2, 12), st.integers(1, 6)).filter(lambda s: 2 * s[1] <= s[0])
WIDE = st.tuples(st.integers(20, 60), st.integers(1, 8))
SPECTRA = ("flat", "decaying", "steep", "low")
HARD = settings(max_examples=25, deadline=None)


def stream(size: int, rank: int, count: int, spectrum: str, seed: int) -> Tensor:
    """Rows, [count, size]; those of `low` span no more than `rank` directions."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, generator=random, dtype=F64)
    turn = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=F64))[0]
    if spectrum == "low":
        return rows[:, :rank] @ turn[:rank]
    base = {"flat": 1.0, "decaying": 0.7, "steep": 0.05}[spectrum]
    return rows * base ** torch.arange(size, dtype=F64) @ turn


def pieces(count: int, seed: int) -> list[int]:
    """Random sizes that sum to `count`; some are zero."""
    cuts = torch.randint(0, count + 1, (4,), generator=torch.Generator().manual_seed(seed))
    return [b - a for a, b in pairwise([0, *sorted(cuts.tolist()), count])]


def sketch(rows: Tensor, rank: int, sizes: list[int] | None = None, scale: float = 1.0):
    state: dict[str, Tensor] = {}
    for part in rows.split(sizes or [len(rows)]):
        sketch_update(state, "s", part, rank)
    return sketches_finish(state, {"s": rank})["s"].scaled(scale)


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def sound(factor: Factor, truth: Tensor, slack: float = 1e-11) -> None:
    """Semi-definite, with the true diagonal and trace, and within its own bound of the truth."""
    got, trace = factor.dense(), float(truth.trace())
    assert float(torch.linalg.eigvalsh(got)[0]) >= -slack * trace
    assert float((got.diagonal() - truth.diagonal()).abs().max()) <= slack * trace
    assert factor.trace() == pytest.approx(trace, rel=slack)
    bound = float(factor.bound) if isinstance(factor, SketchFactor) else 0.0
    assert norm(got - truth) <= bound + slack * trace


def example(kind: str, size: int, rank: int, seed: int) -> tuple[Factor, Tensor]:
    """A factor, and the matrix that it stands for."""
    rows = stream(size, rank, 20, "decaying", seed)
    if kind == "scalar":
        scale = rows[0, 0].abs()
        return ScalarFactor(scale, size), scale * torch.eye(size, dtype=F64)
    if kind == "dense":
        return DenseFactor(rows.T @ rows), rows.T @ rows
    return sketch(rows, rank), rows.T @ rows


# --- the stream ---


@pytest.mark.parametrize("spectrum", SPECTRA)
@HARD
@given(shape=SIZES | WIDE, count=st.integers(1, 70), seed=SEEDS, scale=st.floats(1e-6, 1e6))
def test_a_sketch_keeps_its_promises(
    spectrum: str, shape: tuple[int, int], count: int, seed: int, scale: float
) -> None:
    size, rank = shape
    rows = stream(size, rank, count, spectrum, seed)
    truth = scale * rows.T @ rows
    got = sketch(rows, rank, pieces(count, seed), scale)
    sound(got, truth)
    assert bool((got.diagonal >= 0).all())
    assert float(got.bound) <= float(got.diagonal.sum()) + 1e-12 * float(truth.trace())
    if spectrum == "low" or count <= rank:
        assert norm(got.dense() - truth) <= 1e-11 * float(truth.trace())
        assert float(got.bound) <= 1e-11 * float(truth.trace())
    assert sum(t.numel() for t in got.tensors().values()) == rank * size + size + 1


@HARD
@given(shape=SIZES | WIDE, count=st.integers(1, 70), seed=SEEDS)
def test_how_the_stream_is_cut_does_not_matter(
    shape: tuple[int, int], count: int, seed: int
) -> None:
    size, rank = shape
    rows = stream(size, rank, count, "decaying", seed)
    whole, cut = sketch(rows, rank), sketch(rows, rank, pieces(count, seed))
    padded = torch.cat([rows, torch.zeros_like(rows)], 1).reshape(-1, size)
    for other in (cut, sketch(padded, rank), sketch(rows.flip(0), rank)):
        assert norm(whole.dense() - other.dense()) <= 1e-10 * whole.trace()
        assert float(abs(whole.bound - other.bound)) <= 1e-10 * whole.trace()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_long_stream_in_single_precision(spectrum: str) -> None:
    rows = stream(12, 3, 3000, spectrum, 0).float()
    state: dict[str, Tensor] = {}
    for part in rows.split(37):
        sketch_update(state, "s", part, 3)
        # Nothing of the stream is held beyond the columns and the diagonal.
        assert sum(t.numel() for t in state.values()) == (sketch_columns(12, 3) + 1) * 12
    got = sketches_finish(state, {"s": 3})["s"].scaled(1 / 3000)
    assert not state
    assert {t.dtype for t in got.tensors().values()} == {torch.float32}
    sound(got, (rows.T.double() @ rows.double() / 3000).float(), slack=1e-5)


def frequent_directions(rows: Tensor, rank: int) -> Tensor:
    """What Frequent Directions (arXiv 1206.0594), with its diagonal put back, makes of the rows."""
    buffer = rows.new_zeros(0, rows.shape[1])
    for part in rows.split(rank):
        _, s, v = torch.linalg.svd(torch.cat([buffer, part]), full_matrices=False)
        if len(s) > rank:
            s = (s.square() - s[rank].square()).clamp(min=0).sqrt()
        buffer = s[:rank, None] * v[:rank]
    lost = rows.square().sum(0) - buffer.square().sum(0)
    return buffer.T @ buffer + torch.diag(lost)


def powers(size: int, count: int, exponent: float, seed: int) -> Tensor:
    """Rows whose second moments fall by a power, as those of real layers do."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, generator=random, dtype=F64)
    turn = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=F64))[0]
    return rows / torch.arange(1, size + 1, dtype=F64) ** exponent @ turn


@pytest.mark.parametrize(("size", "rank"), [(40, 3), (60, 8), (200, 20), (200, 50)])
@pytest.mark.parametrize("spectrum", [*SPECTRA, 0.5, 1.0])
def test_it_errs_as_frequent_directions_at_most(
    spectrum: str | float, size: int, rank: int
) -> None:
    """Less in the Frobenius norm but for flat spectra, which neither can tell; at most twice, and
    within half their guarantee, tr(S) / (k + 1), in the spectral norm."""
    for seed in range(3):
        made = stream if isinstance(spectrum, str) else powers
        args = (size, rank, 600, spectrum) if made is stream else (size, 600, spectrum)
        rows = made(*args, seed)  # type: ignore[operator]
        truth = rows.T @ rows
        trace = float(truth.trace())
        got = sketch(rows, rank)
        off, twin = got.dense() - truth, frequent_directions(rows, rank) - truth
        assert norm(off) <= 2 * norm(twin) + 1e-13 * trace
        assert norm(off) <= 0.6 * trace / (rank + 1)
        flat = 1.4 if spectrum == "flat" else 1.0
        assert float(off.norm()) <= flat * float(twin.norm()) + 1e-13 * trace
        sound(got, truth)


def test_the_bound_is_no_worse_than_what_it_is_made_of() -> None:
    """Between the true error and what the trace allows; near the error where it falls fast."""
    for exponent, most in ((0.0, 120.0), (0.5, 40.0), (1.0, 25.0), (4.0, 3.0)):
        for seed in range(5):
            rows = powers(300, 900, exponent, seed)
            got = sketch(rows, 30)
            error = norm(got.dense() - rows.T @ rows)
            assert error <= float(got.bound) <= most * error
            assert float(got.bound) <= float(got.diagonal.sum())


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_probes_cover_what_the_trace_cannot_tell(spectrum: str) -> None:
    """A wide side of little structure, where the probes' bound is less than the trace's."""
    rows = stream(400, 4, 1200, spectrum, 0)
    got = sketch(rows, 4)
    assert norm(got.dense() - rows.T @ rows) <= float(got.bound) + 1e-13 * got.trace()
    if spectrum == "flat":
        assert float(got.bound) < 0.6 * float(got.diagonal.sum())


def test_silence_is_a_sketch_of_nothing() -> None:
    got = sketch(torch.zeros(5, 40, dtype=F64), 3)
    assert all(not t.any() for t in got.tensors().values())


@pytest.mark.parametrize("rank", [3, 17])
def test_coordinates_that_are_silent_stay_so(rank: int) -> None:
    rows = stream(40, rank, 90, "decaying", 0)
    rows[:, ::2] = 0.0
    got = sketch(rows, rank)
    sound(got, rows.T @ rows)
    assert not got.dense()[::2].any()


@pytest.mark.parametrize("low", [1e-12, 1e-3])
def test_units_of_coordinates_may_differ(low: float) -> None:
    rows = stream(40, 4, 90, "decaying", 0)
    units = torch.logspace(0, torch.tensor(low).log10().item(), 40, dtype=F64)
    got = sketch(rows * units, 4)
    sound(got, units[:, None] * (rows.T @ rows) * units)


def test_massive_activations_in_single_precision() -> None:
    """One coordinate with a million times the rest, at one row in a hundred, hides none of it."""
    rows = powers(300, 2000, 1.0, 0)
    rows[::100, 7] += 1e3
    truth = rows.T @ rows
    got, narrow = sketch(rows, 30), sketch(rows.float(), 30)
    assert float((narrow.dense().diagonal() / truth.diagonal() - 1).abs().max()) < 1e-6
    assert relative(narrow.dense().double(), got.dense()) < 1e-6
    rest = torch.arange(300) != 7
    off, least = (float((s.dense().double() - truth)[rest][:, rest].norm()) for s in (narrow, got))
    assert off <= 1.05 * least


# --- many at once ---


def streamed(shapes: dict[str, tuple[int, int]], seed: int = 0) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for i, (key, (size, rank)) in enumerate(shapes.items()):
        sketch_update(state, key, stream(size, rank, 90, "decaying", seed + i), rank)
    return state


def test_many_are_finished_as_each_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a": (40, 3), "b": (40, 3), "c": (30, 3), "d": (40, 5), "e": (40, 3)}
    ranks = {key: rank for key, (_, rank) in shapes.items()}
    want = {key: sketches_finish(streamed(shapes), {key: rank})[key] for key, rank in ranks.items()}
    for most in (linalg.MOST, 1):
        monkeypatch.setattr(linalg, "MOST", most)
        state = streamed(shapes)
        state["other"] = torch.ones(1)
        assert dict(sketch_sizes(state)) == {key: size for key, (size, _) in shapes.items()}
        got = sketches_finish(state, ranks)
        assert list(got) == list(shapes)
        assert list(state) == ["other"]
        for key, factor in got.items():
            for name, tensor in factor.tensors().items():
                torch.testing.assert_close(tensor, want[key].tensors()[name], rtol=1e-9, atol=1e-12)


def test_like_items_come_together_within_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "MOST", 8 * 20)
    found = list(linalg.chunks([3, 5, 3, 5, 3, 50, 3], lambda n: n, lambda n: 2 * n))
    assert found == [[3, 3, 3], [3], [5, 5], [50]]


def test_a_sketch_is_summed_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the factors' own products may use bfloat16 or TF32."""
    monkeypatch.setattr(estimator, "_HAS_BF16", True)
    matmul: Any = torch.backends.mkldnn.matmul
    seen: list[str] = []
    inner = Tensor.addmm_

    def addmm_(self: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(matmul.fp32_precision)
        return inner(self, *args, **options)

    monkeypatch.setattr(Tensor, "addmm_", addmm_)
    rows = powers(256, 512, 1.0, 0).float()
    before = matmul.fp32_precision
    with estimator.products("auto"):
        fast = sketch(rows, 16)
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == before
    assert seen == ["ieee"]
    assert torch.equal(fast.vectors, sketch(rows, 16).vectors)


@HARD
@given(size=st.integers(1, 9), columns=st.integers(0, 9), keep=st.integers(1, 9), seed=SEEDS)
def test_truncation_is_the_best_of_its_rank(size: int, columns: int, keep: int, seed: int) -> None:
    u = torch.randn(size, columns, generator=torch.Generator().manual_seed(seed), dtype=F64)
    kept, dropped, largest = truncate(u, keep)
    rest = u @ u.T - kept @ kept.T
    assert kept.shape == (size, min(columns, keep))
    values = torch.cat([torch.linalg.svdvals(u).square(), torch.zeros(columns + 10, dtype=F64)])
    scale = 1e-11 * max(1.0, float(u.square().sum()))
    assert norm(rest) == pytest.approx(float(values[keep]), abs=scale)
    assert float(largest) == pytest.approx(float(values[keep]), abs=scale)
    assert float((dropped - rest.diagonal()).abs().max()) <= scale
    assert float(torch.linalg.eigvalsh(rest)[0]) >= -scale


# --- factors of all kinds ---


@pytest.mark.parametrize("first", FACTORS)
@pytest.mark.parametrize("second", FACTORS)
@HARD
@given(shape=SIZES, other=st.integers(1, 6), seed=SEEDS)
def test_sums_obey_their_own_bounds(
    first: str, second: str, shape: tuple[int, int], other: int, seed: int
) -> None:
    size, rank = shape
    (a, x), (b, y) = example(first, size, rank, seed), example(second, size, other, seed + 1)
    total = a.plus(b)
    sound(total, x + y)
    sound(b.plus(a), x + y)
    sound(total.scaled(3.0).plus(a), 3 * (x + y) + x)
    ranks = [f.vectors.shape[1] for f in (a, b) if isinstance(f, SketchFactor)]
    if ranks:
        assert isinstance(total, SketchFactor)
        assert total.vectors.shape == (size, max(ranks))


@pytest.mark.parametrize("first", FACTORS)
@pytest.mark.parametrize("second", FACTORS)
@HARD
@given(shape=SIZES, seed=SEEDS)
def test_inner_products_are_those_of_the_dense_matrices(
    first: str, second: str, shape: tuple[int, int], seed: int
) -> None:
    a, b = example(first, *shape, seed)[0], example(second, *shape, seed + 1)[0]
    assert inner(a, b) == pytest.approx(float((a.dense() * b.dense()).sum()), rel=1e-10)
    assert inner(a, b) == pytest.approx(inner(b, a), rel=1e-12)


@pytest.mark.parametrize("kind", FACTORS)
@HARD
@given(shape=SIZES, columns=st.integers(0, 4), seed=SEEDS, power=st.floats(-3, 3))
def test_a_factor_is_its_dense_matrix(
    kind: str, shape: tuple[int, int], columns: int, seed: int, power: float
) -> None:
    factor = example(kind, *shape, seed)[0]
    full, random = factor.dense(), torch.Generator().manual_seed(seed + 2)
    y, pull = torch.randn(2, shape[0], columns, generator=random, dtype=F64)
    t = 10**power * torch.rand(columns, generator=random, dtype=F64)
    assert float((factor.matmul(y) - full @ y).abs().sum()) <= 1e-10 * float(full.trace())
    x = factor.solve(y, t, pull)
    off = x + t * (full @ x) - y - full @ pull
    assert float(off.abs().sum()) <= 1e-9 * float(1 + full.trace()) * (1 + 10**power)
    for c in (0.0, 0.3, 7.0):
        scaled = factor.scaled(c)
        assert float((scaled.dense() - c * full).abs().max()) <= 1e-12 * float(full.trace())
        if kind == "sketch":
            assert float(scaled.bound) == pytest.approx(c * float(factor.bound), rel=1e-12)
    values, vectors = factor.eigen()
    assert relative(vectors * values @ vectors.T, full) < 1e-10
    again = factor_from(factor.tensors(), shape[0])
    assert type(again) is type(factor)
    assert torch.equal(again.dense(), full)
    assert torch.equal(again.solve(y, t, pull), x)


# --- fits ---


def near(got: Curvature, want: Curvature, rank: int) -> set[int]:
    """Checks each sketch against the whole factor; returns the sizes that were sketched."""
    seen = set()
    for name, block in got.blocks.items():
        for side, factor in block.factors().items():
            if not isinstance(factor, SketchFactor):
                continue
            whole = want.blocks[name].factors()[side]
            assert sketch_rank(factor.size, rank) == rank
            assert factor.vectors.shape == (factor.size, rank)
            sound(factor, whole.dense())
            assert float(factor.bound) <= float(factor.diagonal.sum()) + 1e-12 * whole.trace()
            seen.add(factor.size)
    return seen


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("space", ["weight", "adapter"])
@pytest.mark.parametrize("structure", ["kfac", "shampoo", "activation"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sketched_fit_stays_within_its_bounds(
    kind: str, structure: str, space: str, rank: int
) -> None:
    whole = known(kind, space, structure, rank=None)
    for batch_size in (2, 4):
        got = known(kind, space, structure, rank=rank, batch_size=batch_size)
        wide = {size for size in (2, 4, 8, 12) if 2 * rank <= size}
        seen = near(got, whole, rank)
        assert wide & {8, 12} <= seen <= wide
        for name, block in got.blocks.items():
            if structure == "activation" and space == "adapter":
                continue  # A S A^T of a sketched S has another trace
            assert block.trace() == pytest.approx(whole.blocks[name].trace(), rel=1e-10), name
            for side, factor in block.factors().items():
                if not isinstance(factor, SketchFactor):
                    want = whole.blocks[name].factors()[side].dense()
                    assert relative(factor.dense(), want) < 1e-10


def test_by_default_only_wide_sides_are_sketched(monkeypatch: Any) -> None:
    found = [sketch_rank(d, "auto") for d in (512, 2048, 2049, 14336)]
    assert found == [None, None, 256, 256]
    usual, whole = known("llama"), known("llama", rank=None)
    assert usual.info.rank is None
    assert usual.memory() == whole.memory()
    monkeypatch.setattr(ranks, "WHOLE", 8)
    monkeypatch.setattr(ranks, "USUAL_RANK", 3)
    got = fit(tiny("llama", moved=True), "llama")
    assert got.info.rank == 3
    assert near(got, whole, 3) == {12}
    assert got.memory() < usual.memory()
    plain = fit(tiny("llama", moved=True), "llama", "tridiagonal")
    assert plain.memory() == known("llama", "weight", "tridiagonal", rank=None).memory()


def test_sketches_are_smaller_and_survive_a_file(tmp_path) -> None:
    got = known("llama", rank=1)
    assert got.info.rank == 1
    assert got.memory() < known("llama", rank=None).memory() / 2
    again = load_curvature(got.save(tmp_path / "c.safetensors"))
    assert again.memory() == got.memory()
    for name, block in again.blocks.items():
        assert torch.equal(block.to_dense(), got.blocks[name].to_dense())
        assert torch.equal(block.inputs.bound, got.blocks[name].inputs.bound)
