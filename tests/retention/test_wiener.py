"""The Wiener filter is the optimum it is said to be, and training behind it is A' in A = A' P."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sequences import begun, learn, source, tasks_of
from torch import Tensor, nn
from torch.nn.utils import parametrize

from retain.curvature.blocks import linalg
from retain.curvature.blocks.factor import DenseFactor, Factor, SketchFactor
from retain.data.batches import Example, batches
from retain.errors import ConfigError
from retain.models.off import adapter_off
from retain.models.sites import lora_sites
from retain.retention.filter import Filter, InputFilter
from retain.retention.loader import reader_of
from retain.retention.methods.auto import Auto, Wiener
from retain.retention.moments import Moments, input_moments, moments_of
from retain.retention.wiener import (
    MOST,
    WIDE,
    Thin,
    Whole,
    filters_of,
    matched_gain,
    wiener,
)
from tiny import KINDS, tiny


def rows_of(size: int, count: int, seed: int, decay: float = 0.1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=random, dtype=torch.float64)
    return x * torch.exp(-decay * torch.arange(size, dtype=torch.float64))


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


@pytest.mark.parametrize("weight", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("epsilon", [1e-4, 0.1])
@pytest.mark.parametrize("held", [True, False])
def test_the_filter_minimises_what_it_says(weight: float, epsilon: float, held: bool) -> None:
    """Against least squares over the rows themselves, for any row of A."""
    size = 12
    new, old = rows_of(size, 40, 0), rows_of(size, 30, 1, 0.3)
    a = torch.randn(3, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = wiener(moment(new), moment(old) if held else None, weight=weight, epsilon=epsilon)
    ridge = epsilon * moment(new).diagonal().mean()
    parts = [(new / len(new) ** 0.5, new @ a.T / len(new) ** 0.5)]
    if held:
        parts.append((old * (weight / len(old)) ** 0.5, torch.zeros(len(old), 3).double()))
    parts.append((ridge.sqrt() * torch.eye(size).double(), torch.zeros(size, 3).double()))
    want = torch.linalg.lstsq(*(torch.cat(part) for part in zip(*parts, strict=True))).solution.T
    torch.testing.assert_close(a @ p, want, rtol=1e-9, atol=1e-11)


def sketch(size: int, rank: int, seed: int, sizes: float = 1.0) -> SketchFactor:
    vectors = sizes * rows_of(size, rank, seed).T
    left = rows_of(size, 1, seed + 1)[0].square()
    return SketchFactor(vectors, left, torch.zeros(()).double())


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("ranks", [(3, 4), (9, 9)])
@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_of_sketches_it_is_that_of_their_matrices(
    held: bool, ranks: tuple[int, int], weight: float
) -> None:
    """In both directions, also where their directions are more than there are places."""
    new, old = sketch(12, ranks[0], 0), sketch(12, ranks[1], 2) if held else None
    thin = filters_of([(new, old)], weight=weight, epsilon=1e-3)[0]
    assert isinstance(thin, Thin)
    s_old = None if old is None else old.dense()
    want = wiener(new.dense(), s_old, weight=weight, epsilon=1e-3)
    a = rows_of(12, 5, 9)
    torch.testing.assert_close(thin.rows(a), a @ want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(thin.back(a), a @ want.T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(thin.dense(), want, rtol=1e-9, atol=1e-11)
    moved = thin.to(torch.device("cpu"))
    torch.testing.assert_close(moved.rows(a), a @ want, rtol=1e-9, atol=1e-11)


def test_filters_made_together_are_those_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all kinds and shapes, in their order, however many fit into the memory."""
    dense = [DenseFactor(moment(rows_of(8, 20, seed))) for seed in range(3)]
    pairs: list[tuple[Factor, Factor | None]] = [
        (sketch(12, 3, 0), sketch(12, 4, 2)),
        (dense[0], dense[1]),
        (sketch(12, 3, 4), sketch(12, 4, 6, sizes=2.0)),
        (sketch(8, 3, 8), dense[2]),
        (DenseFactor(torch.zeros(8, 8).double()), dense[2]),
        (
            SketchFactor(torch.zeros(12, 3).double(), torch.zeros(12).double(), torch.zeros(())),
            sketch(12, 4, 6),
        ),
        (sketch(12, 3, 4), None),
        (dense[1], None),
    ]
    want = [filters_of([pair], weight=3.0, epsilon=1e-3)[0] for pair in pairs]
    for most in (linalg.MOST, 1):
        monkeypatch.setattr(linalg, "MOST", most)
        got = filters_of(pairs, weight=3.0, epsilon=1e-3)
        assert [type(p) for p in got] == [type(p) for p in want]
        for one, alone in zip(got, want, strict=True):
            torch.testing.assert_close(one.dense(), alone.dense(), rtol=1e-10, atol=1e-13)
    for i in (4, 5):
        assert not want[i].dense().any()


def test_in_float32_a_massive_direction_leaves_no_rounding_behind() -> None:
    """One direction with a million times the rest, in the new and the old text alike."""
    new, old = sketch(12, 3, 0), sketch(12, 3, 2)
    for s in (new, old):
        s.vectors[:, 0] = 1e3 * torch.nn.functional.normalize(torch.ones(12).double(), dim=0)
    want = wiener(new.dense(), old.dense(), weight=3.0, epsilon=1e-3)

    def narrow(s: SketchFactor) -> SketchFactor:
        return SketchFactor(s.vectors.float(), s.diagonal.float(), s.bound.float())

    thin = filters_of([(narrow(new), narrow(old))], weight=3.0, epsilon=1e-3)[0]
    a = rows_of(12, 5, 9)
    assert thin.dtype == torch.float32
    torch.testing.assert_close(thin.rows(a.float()).double(), a @ want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(thin.back(a.float()).double(), a @ want.T, rtol=1e-4, atol=1e-5)


def test_of_silence_a_sketch_learns_nothing() -> None:
    none = SketchFactor(torch.zeros(6, 2), torch.zeros(6), torch.zeros(()))
    thin = filters_of([(none, none)], weight=3.0, epsilon=1e-3)[0]
    assert float(thin.dense().abs().max()) == 0


def test_sketches_add_up_as_matrices_do() -> None:
    def made() -> Moments:
        return Moments({"x": sketch(6, 6, 0), "y": DenseFactor(moment(rows_of(4, 9, 5)))}, READERS)

    other = Moments({"x": sketch(6, 6, 3), "y": DenseFactor(moment(rows_of(4, 9, 6)))}, READERS)
    total, twice, sized = made().plus(other), made().times(2.0), made().sized_as(other)
    assert made().ranks() == {"x": 6, "z": 6}
    for name in ("x", "y", "z"):
        s, o = made().of(name), other.of(name)
        # of a sum only 6 of 12 directions are kept, and the rest on the diagonal
        assert float(total.of(name).trace()) == pytest.approx(float((s + o).trace()))
        torch.testing.assert_close(total.of(name).diagonal(), (s + o).diagonal())
        torch.testing.assert_close(twice.of(name), 2.0 * s)
        ratio = (o.diagonal() / s.diagonal()).median()
        torch.testing.assert_close(sized.of(name), s * ratio)


def test_a_unit_is_found_beside_a_massive_direction() -> None:
    """What a source keeps at a first position does not make the rest of it small."""
    x = rows_of(64, 500, 0)
    sink = 1e3 * torch.nn.functional.normalize(rows_of(64, 1, 1)[0].sign(), dim=0)
    sink[8:] = 0.0  # massive activations are of a few coordinates
    whole = DenseFactor(7.0 * (moment(x) + torch.outer(sink, sink)))
    rows = Moments({"x": DenseFactor(moment(x))}, {"x": "x"})
    sized = Moments({"x": whole}, {"x": "x"}).sized_as(rows).of("x")
    torch.testing.assert_close(sized[8:, 8:], moment(x)[8:, 8:])


READERS = {"x": "x", "y": "y", "z": "x"}


def test_read_as_sketches_the_moments_are_those_of_the_rows() -> None:
    attached = begun(Wiener(), "lora", "llama", tasks=1)
    sites = lora_sites(attached.model)
    rows = list(tasks_of("llama")[0].examples)
    whole = input_moments(attached.model, sites, rows)
    ranks = dict.fromkeys([s.name for s in sites if s.shape[1] == 12], 12)
    found = input_moments(attached.model, sites, rows, ranks=ranks)
    assert set(found.ranks()) == set(ranks)
    for site in sites:
        torch.testing.assert_close(found.of(site.name), whole.of(site.name))


def test_at_its_ends_it_passes_all_or_leaves_the_old_alone() -> None:
    new, old = rows_of(8, 20, 0), rows_of(8, 3, 1)  # the old span three directions
    nothing = wiener(moment(new), moment(old), weight=0.0, epsilon=1e-12)
    torch.testing.assert_close(nothing, torch.eye(8).double(), rtol=0, atol=1e-8)
    most = wiener(moment(new), moment(old), weight=1e9, epsilon=1e-12)
    assert float((old @ most.T).norm() / old.norm()) < 1e-6
    assert torch.linalg.matrix_rank(most, atol=1e-6) == 5
    silent = wiener(torch.zeros(8, 8), moment(old).float(), weight=1.0, epsilon=0.01)
    assert float(silent.abs().max()) == 0


class Behind(nn.Module):
    """A' -> A' P."""

    def __init__(self, p: Tensor) -> None:
        super().__init__()
        self.p = p

    def forward(self, a: Tensor) -> Tensor:
        return a @ self.p


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_is_that_of_a_row_behind_the_filter(kind: str, optimizer: str) -> None:
    """Step by step equal to autograd through ``A = A' P``."""
    model, twin = tiny(kind), tiny(kind)
    sites, others = lora_sites(model), lora_sites(twin)
    rows = list(tasks_of(kind)[0].examples)
    new, old = (input_moments(model, sites, r) for r in (rows, source(kind)))
    with torch.no_grad():
        for site, other in zip(sites, others, strict=True):
            random = torch.Generator().manual_seed(len(site.name))
            site.b.copy_(0.1 * torch.randn(site.b.shape, generator=random).double())
            other.b.copy_(site.b)
            other.a.mul_(2.0)
    held = InputFilter(sites, new, old, Filter(2.0, 0.01, weight=10.0))
    begun_at = [k.clone() for k in held.kept]
    for other, p in zip(others, held.filters, strict=True):
        place: Any = next(m for m in twin.modules() if getattr(m, "weight", None) is other.a)
        parametrize.register_parametrization(place, "weight", Behind(p.dense()), unsafe=True)
    make = {
        "sgd": lambda m: torch.optim.SGD(m, lr=0.1, momentum=0.9),
        "adam": lambda m: torch.optim.AdamW(m, lr=0.05, weight_decay=0.0),
    }[optimizer]
    steps = [make([p for p in m.parameters() if p.requires_grad]) for m in (model, twin)]
    for _ in range(4):
        for batch in batches(rows, 4, 0):
            for each, step in zip((model, twin), steps, strict=True):
                each(**batch.inputs).logits.pow(2).mean().backward()
                step.step()
                step.zero_grad()
                if each is model:
                    held.after_step()
    held.hooks.detach()
    moved = 0.0
    for site, other, first in zip(sites, others, begun_at, strict=True):
        torch.testing.assert_close(site.a.detach(), other.a.detach(), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(site.b, other.b, rtol=1e-7, atol=1e-9)
        moved = max(moved, float((site.a - first).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("turned", "more"), [(0, 1.02), (100, 1.3)])
def test_a_wide_filter_is_read_in_bfloat16(
    bf16: bool, turned: float, more: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it stops stays stopped, also where the old text is a thousand times as large.

    Of a large direction that is no axis rounding lets some more through.
    """
    monkeypatch.setattr("retain.retention.wiener.has_bf16", lambda _: bf16)
    new, old = rows_of(WIDE, 600, 0, 0.01).float(), rows_of(WIDE, 600, 1, 0.01).float()
    old[:, 7] *= 1000
    turn = torch.linalg.qr(rows_of(WIDE, WIDE, 2, 0.0))[0].float()
    old = old + turned * old[:, :1] * turn[:1]
    factors = DenseFactor(moment(new)), DenseFactor(moment(old))
    whole = filters_of([factors], weight=1, epsilon=1e-3)[0]
    light = whole.rounded()
    assert isinstance(light, Whole) and isinstance(whole, Whole)
    assert light.p.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert light.dtype == torch.float32 == whole.p.dtype
    a = torch.randn(8, WIDE, generator=torch.Generator().manual_seed(3))
    for exact, found in ((whole.rows(a), light.rows(a)), (whole.back(a), light.back(a))):
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < (0.01 if bf16 else 1e-6)
    read, kept = ((x @ old.T).square().mean() for x in (light.rows(a), whole.rows(a)))
    chosen = whole.rounded(DenseFactor(moment(old)))
    assert (chosen is whole) is (turned > 0 or not bf16)  # rounded where that changes little
    assert read < more * kept < 1e-3 * (a @ old.T).square().mean()
    thinner = DenseFactor(moment(new[:, :64]))
    narrow = filters_of([(thinner, None)], weight=1, epsilon=1e-3)[0].rounded()
    assert isinstance(narrow, Whole) and narrow.p.dtype == torch.float32


def test_what_bfloat16_would_lose_adds_up() -> None:
    """A hundred steps, each far below the last bit of A."""
    model = tiny("llama").to(torch.bfloat16)
    sites = lora_sites(model)
    new = input_moments(model, sites, tasks_of("llama")[0].examples)
    old = Moments({k: s.scaled(1.0) for k, s in new.factors.items()}, new.readers)
    held = InputFilter(sites, new, old, Filter(1.0, 1e-6, weight=99.0))
    before = [k.clone() for k in held.kept]
    for _ in range(100):
        with torch.no_grad():
            for site in sites:
                site.a.add_(2.0**-6)
        held.after_step()
    for site, first, p in zip(sites, before, held.filters, strict=True):
        want = first + 100 * 2.0**-6 * torch.ones_like(first) @ p.dense()
        error = float((site.a.float() - want).abs().max())
        assert error < 0.1 * float((want - first).abs().max()) + 2.0**-8 * float(want.abs().max())


def test_the_update_reads_little_of_the_old() -> None:
    """Of what plain LoRA reads of the old text, for as much of the new."""
    shares = []
    for weight in (0.0, 1.0, 1000.0):
        method = Wiener(weight=weight, epsilon=1e-6)
        attached = begun(method, "lora", "llama", tasks=2)
        sites = lora_sites(attached.model)
        task = tasks_of("llama")[0]
        old = input_moments(attached.model, sites, source("llama"))
        new = input_moments(attached.model, sites, task.examples)
        learn(method, attached, task, max_steps=6)
        read = []
        for site in sites:
            update = (site.b @ site.a).detach()
            energy = [((update @ m.of(site.name)) * update).sum() for m in (old, new)]
            read.append(energy[0] / energy[1])
        shares.append(float(torch.stack(read).mean()))
    assert shares[2] < 0.5 * shares[1] < 0.5 * shares[0]


def test_a_task_learns_in_rows_of_its_own_behind_its_filter() -> None:
    method = Wiener(gain=2.0)
    attached = begun(method, "lora", "llama", tasks=3)
    drawn = [s.a.detach().clone() for s in lora_sites(attached.model)]
    first, *others = tasks_of("llama")
    method.before_task(first)
    found = method.recipe.filter
    assert found is not None
    for site, a, p in zip(lora_sites(attached.model), drawn, found.filters, strict=True):
        torch.testing.assert_close(site.a, 2.0 * a @ p.dense())
    learn(method, attached, first, weight_decay=0.1)
    kept = [(s.a.detach().clone(), s.b.detach().clone()) for s in lora_sites(attached.model)]
    for task in others:
        rank = lora_sites(attached.model)[0].rank
        learn(method, attached, task, weight_decay=0.1)
        sites = lora_sites(attached.model)
        for site, (a, b) in zip(sites, kept, strict=True):
            assert site.rank == rank + 2
            assert torch.equal(site.a[:rank], a)
            assert torch.equal(site.b[:, :rank], b)
            assert float(site.b[:, rank:].abs().max()) > 0
        kept = [(s.a.detach().clone(), s.b.detach().clone()) for s in sites]
        assert not any(s.a._backward_hooks for s in sites)  # nothing holds them any more


@pytest.mark.parametrize("strong", [0.5, 300.0])
def test_a_matched_gain_reads_as_much_of_the_new_as_before(strong: float) -> None:
    """Against the rows themselves; a sketch like its matrix; and at most `MOST`."""
    new, old = rows_of(12, 40, 0), strong * rows_of(12, 30, 1)
    factors = DenseFactor(moment(new)), DenseFactor(moment(old))
    p = filters_of([factors], weight=1.0, epsilon=1e-3)[0]
    a = rows_of(12, 5, 9)
    gain = matched_gain(factors[0], a, p.rows(a))
    read = [float((new @ rows.T).norm()) for rows in (a, p.rows(a))]
    assert read[0] > read[1]
    assert float(gain) == pytest.approx(min(MOST, read[0] / read[1]))
    assert (float(gain) == MOST) == (strong > 1)
    thin = sketch(12, 4, 0)
    whole = matched_gain(DenseFactor(thin.dense()), a, p.rows(a))
    torch.testing.assert_close(matched_gain(thin, a, p.rows(a)), whole)
    nothing = DenseFactor(torch.zeros(12, 12).double())
    assert float(matched_gain(nothing, a, p.rows(a))) == 1


def test_a_matched_gain_is_each_layers_own() -> None:
    method = Wiener(gain="matched")
    attached = begun(method, "lora", "llama", tasks=1)
    drawn = [s.a.detach().clone() for s in lora_sites(attached.model)]
    method.before_task(tasks_of("llama")[0])
    found = method.recipe.filter
    assert found is not None
    gains = set()
    for site, a, p in zip(lora_sites(attached.model), drawn, found.filters, strict=True):
        filtered = a @ p.dense()
        gain = float(site.a.detach().norm() / filtered.norm())
        torch.testing.assert_close(site.a, gain * filtered)
        assert 1 < gain <= MOST
        gains.add(round(gain, 4))
    assert len(gains) > 1


def test_the_old_are_the_source_and_each_task_in_the_unit_of_the_rows() -> None:
    method = Auto(rows=8)
    attached = begun(method, "lora", "llama", tasks=3)
    first, second = tasks_of("llama")[:2]
    learn(method, attached, first)
    method.before_task(second)
    recipe, sites = method.recipe, lora_sites(attached.model)
    assert recipe.filter is not None and recipe.curvature is not None and recipe.past is not None
    rows = reader_of(second.examples)(8, second.seed)
    with adapter_off(attached.model):
        new = input_moments(attached.model, sites, rows, first=False)
    old = moments_of(recipe.curvature).sized_as(new)
    old = old.plus(moments_of(recipe.past).sized_as(new))
    for site, p in zip(sites, recipe.filter.filters, strict=True):
        want = wiener(new.of(site.name), old.of(site.name), weight=1.0, epsilon=1e-3)
        torch.testing.assert_close(p.dense(), want)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": -1.0}, "weight is out of range"),
        ({"weight": float("inf")}, "weight is out of range"),
        ({"epsilon": 0.0}, "epsilon is out of range"),
        ({"gain": 0.0}, "gain is out of range"),
        ({"answers": 1.5}, "answers' share is out of range"),
        ({"rows": 0}, "too few rows to read"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Wiener(**options)


def test_without_any_old_text_it_is_lora_behind_a_ridge() -> None:
    method = Wiener(epsilon=1e-9, gain=1.0)
    attached = begun(method, "lora", "llama", tasks=1, source=[])
    sites = lora_sites(attached.model)
    drawn = [s.a.detach().clone() for s in sites]
    rows: list[Example] = list(tasks_of("llama")[0].examples)
    method.before_task(tasks_of("llama")[0])
    x = input_moments(attached.model, sites, rows, first=False)
    for site, a in zip(sites, drawn, strict=True):  # what it reads of the rows is what A read
        gap = site.a.detach() - a
        s = x.of(site.name)
        assert float(((gap @ s) * gap).sum()) < 1e-4 * float(((a @ s) * a).sum())


def test_values_that_are_silent_in_the_new_rows_do_not_size_the_old() -> None:
    """Behind a ReLU most units may be 0 on all rows of a task; the old must count all the same."""
    old = Moments(
        {"a": DenseFactor(torch.diag(torch.tensor([4.0, 4.0, 4.0, 4.0, 0.0])))}, {"a": "a"}
    )
    new = Moments(
        {"a": DenseFactor(torch.diag(torch.tensor([2.0, 0.0, 0.0, 0.0, 1.0])))}, {"a": "a"}
    )
    sized = old.sized_as(new).factor("a").dense()
    torch.testing.assert_close(sized, 0.5 * old.factor("a").dense())


def test_a_batch_of_systems_is_solved_on_several_threads() -> None:
    """A batch of LU of this size has pivots of 0 there (torch 2.13 with MKL, AVX-512)."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 256, 512, generator=random, dtype=torch.float64)
    a, b, threads = x @ x.mT, x[:, :, :256], torch.get_num_threads()
    a[1] -= 50.0 * torch.eye(256, dtype=torch.float64)  # indefinite: by itself
    try:
        torch.set_num_threads(2)
        found = linalg.solve_positive(a, b)
    finally:
        torch.set_num_threads(threads)
    assert torch.linalg.cholesky_ex(a).info.tolist()[::2] == [0, 0]
    assert int(torch.linalg.cholesky_ex(a).info[1]) > 0
    torch.testing.assert_close(a @ found, b, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(linalg.solve_positive(a[0], b[0]), found[0])
