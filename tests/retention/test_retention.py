"""The force in a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from fits import dense_quadratic
from retain import Curvature, fit_curvature
from retain.data.batches import collate
from retain.data.sources import encode
from retain.errors import ConfigError, MismatchError, TrainingError
from retain.models.forward import forward_logits
from retain.models.sites import lora_sites
from retain.retention.force import Force
from retain.retention.recipe import Recipe
from retain.types import SPACES, UPDATES
from tiny import KINDS, ROWS, STRUCTURES, move, relative, tiny, weights

STRENGTHS = [10.0**k for k in range(-3, 10)]
SOME = pytest.mark.parametrize(
    ("kind", "space", "structure"),
    [("llama", p, s) for p in SPACES for s in STRUCTURES] + [("bert", p, "kfac") for p in SPACES],
)
EACH = pytest.mark.parametrize(
    ("kind", "space", "structure"), [(k, p, s) for k in KINDS for p in SPACES for s in STRUCTURES]
)


def fit(model: nn.Module, kind: str, structure: str = "kfac", space: str = "weight") -> Curvature:
    return fit_curvature(model, ROWS[kind], structure, space=space, batch_size=4, progress=False)


def loss_of(model: nn.Module, kind: str, rows: list[dict[str, Any]] | None = None) -> torch.Tensor:
    """A task of its own: the same rows with other labels."""
    task = rows or [{**r, "input_ids": r["input_ids"][::-1], "label": 1} for r in ROWS[kind]]
    examples = encode(task, None, max_length=16, causal=kind == "llama")
    batch = collate(examples, 0)
    return nn.functional.cross_entropy(forward_logits(model, batch), batch.targets)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_task_relies_on_is_read_from_rows_as_a_fit_reads_them(kind: str) -> None:
    found = []
    for rows in (encode(ROWS[kind], None, max_length=16, causal=kind == "llama"), ROWS[kind]):
        model = tiny(kind)
        found.append(Recipe(fit(model, kind)).consolidate(model, rows).tensors())
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor)


def run(
    model: nn.Module,
    kind: str,
    step: Callable[[torch.optim.Optimizer], object],
    *,
    steps: int = 5,
    rate: float = 0.05,
    optimizer: type = torch.optim.AdamW,
) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt = optimizer(trainable, lr=rate)
    for _ in range(steps):
        loss_of(model, kind).backward()
        step(opt)
        opt.zero_grad()


@pytest.mark.parametrize("anchored", [False, True])
@EACH
def test_force_is_the_gradient_of_strength_times_the_quadratic(
    kind: str, space: str, structure: str, anchored: bool
) -> None:
    model = tiny(kind, moved=anchored)
    curvature = fit(model, kind, structure, space)
    retention = Force(model, curvature, strength=37.0)
    move(model, seed=5)
    task = loss_of(model, kind)
    quadratic = dense_quadratic(curvature, model)
    trainable = [p for s in lora_sites(model) for p in (s.a, s.b)]
    want = torch.autograd.grad(task + 37.0 * quadratic, trainable)
    loss_of(model, kind).backward()
    nats = retention.add_force()
    for parameter, gradient in zip(trainable, want, strict=True):
        assert relative(parameter.grad, gradient) < 1e-10
    assert relative(nats, quadratic.detach()) < 1e-10
    assert retention.predicted() == pytest.approx(nats, rel=1e-12)


def test_force_makes_a_gradient_where_the_task_gave_none() -> None:
    model = tiny("llama")
    retention = Force(model, fit(model, "llama"), strength=2.0)
    move(model, seed=5)
    frozen = lora_sites(model)[0].a.requires_grad_(False)
    retention.add_force()
    assert frozen.grad is None
    assert lora_sites(model)[1].a.grad is not None


@pytest.mark.parametrize("update", UPDATES)
@SOME
def test_strength_zero_is_plain_training_bit_for_bit(
    kind: str, space: str, structure: str, update: str
) -> None:
    plain, held = (tiny(kind, dtype=torch.float32) for _ in range(2))
    run(plain, kind, lambda opt: opt.step(), steps=3)
    retention = Force(held, fit(held, kind, structure, space), strength=0.0, update=update)
    run(held, kind, retention.step, steps=3)
    for name, weight in weights(plain).items():
        assert torch.equal(weights(held)[name], weight), name
    assert retention.predicted() > 0


@pytest.mark.parametrize("update", UPDATES)
@SOME
def test_retention_holds(kind: str, space: str, structure: str, update: str) -> None:
    ends, curvature = [], fit(tiny(kind), kind, structure, space)
    for strength in (0.0, 1.0, 10.0):
        model = tiny(kind)
        retention = Force(model, curvature, strength, update=update)
        run(model, kind, retention.step, optimizer=torch.optim.SGD, rate=0.003, steps=3)
        ends.append(retention.predicted())
    assert ends[0] > ends[1] > ends[2] > 0


def ends_of(
    model: nn.Module, kind: str, curvature: Curvature, strengths: list[float] = STRENGTHS
) -> list[float]:
    """Predicted nats after a proximal run of each strength, from the model's present weights."""
    start, ends = weights(model), []
    largest = max(float(w.abs().max()) for w in start.values())
    for strength in strengths:
        with torch.no_grad():
            for site in lora_sites(model):
                site.a.copy_(start[f"{site.name}.lora_A"])
                site.b.copy_(start[f"{site.name}.lora_B"])
        retention = Force(model, curvature, strength, update="proximal")
        run(model, kind, retention.step, steps=4, rate=0.005)
        ends.append(retention.predicted())
        for name, weight in weights(model).items():
            assert weight.dtype == start[name].dtype
            assert bool(weight.isfinite().all()), strength
            assert float(weight.abs().max()) < 20 * largest, strength
    return ends


@pytest.mark.parametrize(
    ("kind", "space", "structure", "dtype"),
    [
        (k, p, s, d)
        for k, p, d in (
            ("llama", "weight", torch.float64),
            ("llama", "adapter", torch.float64),
            ("bert", "weight", torch.float64),
            ("llama", "weight", torch.float32),
        )
        for s in STRUCTURES
    ],
)
def test_proximal_is_finite_and_monotone_in_the_strength(
    kind: str, space: str, structure: str, dtype: torch.dtype
) -> None:
    # Each half step is monotone by theory (see the tests of the blocks); a whole run is so here
    # because its steps are small beside the curvature of the task, and all weights are pulled from
    # the first on (those of A while B is 0 are not).
    model = tiny(kind, dtype=dtype)
    curvature = fit(model, kind, structure, space)
    if space == "weight":
        move(model, 1)
    every = (structure, dtype) == ("kfac", torch.float64)
    ends = ends_of(model, kind, curvature, STRENGTHS if every else STRENGTHS[::2])
    slack = 1e-12 if dtype == torch.float64 else 1e-6 * ends[0]
    for before, after in pairwise(ends):
        assert after <= before + slack
    assert abs(ends[-1]) < 1e-6 * ends[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_proximal_around_a_later_anchor_is_finite_and_holds(
    structure: str, dtype: torch.dtype
) -> None:
    # Away from zero the two halves of a step (first B, then A) share the way back between them,
    # so that a strength more or less need not be monotone; it must hold, and stay in reach.
    model = tiny("llama", moved=True, dtype=dtype)
    ends = ends_of(model, "llama", fit(model, "llama", structure), STRENGTHS[::2])
    assert ends[-1] < 1e-2 * ends[0]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@SOME
def test_proximal_is_near_the_gradient_way_for_a_small_step(
    kind: str, space: str, structure: str, optimizer: type
) -> None:
    # From the same point one small step of plain gradient descent is the same to first order.
    if structure == "tridiagonal":
        pytest.skip("its proximal step is that of a bound without the links")
    # (Adam divides the gradient entry by entry, so there only the direction can be compared.)
    model = tiny(kind, moved=True)
    curvature = fit(tiny(kind), kind, structure, space)
    rate, ends = 1e-6, {}
    if space == "adapter":
        curvature.load_anchor(model)
    for update in UPDATES:
        model = tiny(kind)
        retention = Force(model, curvature, 3.0, update=update)
        move(model, seed=5)
        before = weights(model)
        run(model, kind, retention.step, steps=1, rate=rate, optimizer=optimizer)
        ends[update] = {n: w - before[n] for n, w in weights(model).items()}
    for name, step in ends["gradient"].items():
        if optimizer is torch.optim.SGD:
            assert relative(ends["proximal"][name], step) < 1e-3, name
        else:
            assert float((ends["proximal"][name] * step).sum()) > 0


def test_proximal_and_gradient_mean_the_same_strength_with_momentum() -> None:
    ends = {}
    for update, strength in (("gradient", 0.0), ("gradient", 3.0), ("proximal", 3.0)):
        model = tiny("llama")
        held = Force(model, fit(model, "llama"), strength, update=update)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=2e-4, momentum=0.9)
        for _ in range(150):
            loss_of(model, "llama").backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            held.step(optimizer)
            optimizer.zero_grad()
        ends[update, strength] = held.predicted()
    wanted = ends["gradient", 3.0]
    assert wanted < 0.5 * ends["gradient", 0.0]
    assert ends["proximal", 3.0] == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_accumulation_gives_one_trajectory(update: str, optimizer: type) -> None:
    rows = [{"input_ids": [1 + i, 2 + i % 3, 12 - i, 5]} for i in range(8)]

    def trajectory(pieces: int) -> dict[str, torch.Tensor]:
        model = tiny("llama", moved=True)
        retention = Force(model, fit(model, "llama"), 50.0, update=update)
        opt = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
        size = len(rows) // pieces
        for _ in range(4):
            for start in range(0, len(rows), size):
                (loss_of(model, "llama", rows[start : start + size]) / pieces).backward()
            retention.step(opt)
            opt.zero_grad()
        return weights(model)

    want = trajectory(1)
    for count in (2, 4, 8):
        for name, weight in trajectory(count).items():
            assert float((weight - want[name]).abs().max()) < 1e-10, (count, name)


def test_adapter_space_must_start_at_its_anchor() -> None:
    model = tiny("llama")
    curvature = fit(model, "llama", space="adapter")
    move(model, seed=5)
    with pytest.raises(MismatchError, match="load_anchor") as caught:
        Force(model, curvature)
    assert "\n" not in str(caught.value)
    Force(model, curvature, resuming=True)
    curvature.load_anchor(model)
    Force(model, curvature)


def test_weight_space_may_start_anywhere() -> None:
    model = tiny("llama")
    curvature = fit(model, "llama")
    move(model, seed=5)
    assert Force(model, curvature).predicted() > 0


def test_another_model_is_refused() -> None:
    with pytest.raises(MismatchError, match="another base model"):
        Force(tiny("llama", seed=3), fit(tiny("llama"), "llama"))


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), None, "100"])
def test_a_strength_that_is_none_is_refused(strength: Any) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match="strength"):
        Force(model, fit(model, "llama"), strength)


def test_an_unknown_update_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match="did you mean 'proximal'") as caught:
        Force(model, fit(model, "llama"), update="proximale")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("update", UPDATES)
def test_an_adapter_that_is_not_finite_is_an_error(update: str) -> None:
    model = tiny("llama")
    retention = Force(model, fit(model, "llama"), update=update)
    with torch.no_grad():
        lora_sites(model)[2].b[0, 0] = float("nan")
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(TrainingError, match="no longer finite"):
        retention.step(opt)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_adapters_keep_their_type(kind: str, update: str) -> None:
    model = tiny(kind, dtype=torch.bfloat16)
    curvature = fit(model, kind)
    retention = Force(model, curvature, 10.0, update=update)
    run(model, kind, retention.step, steps=2)
    for weight in weights(model).values():
        assert weight.dtype == torch.bfloat16
        assert bool(weight.isfinite().all())
    assert {t.dtype for b in curvature.blocks.values() for t in b.tensors().values()} == {
        torch.float32
    }


def _weak(model: Any, curvature: Any) -> None:
    """Moves each layer where its curvature sees next to nothing, as behind a filter."""
    for site in lora_sites(model):
        inputs = curvature.blocks[site.name].inputs.dense()
        a = torch.linalg.eigh(inputs).eigenvectors[:, : site.rank].T
        with torch.no_grad():
            site.a.copy_(10 * a)
            site.b.normal_(generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weak", [False, True])
def test_factors_in_bfloat16_are_given_up_where_their_rounding_is_what_is_left(
    weak: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retain.retention.force.has_bf16", lambda _: True)
    model = tiny("llama").float()
    curvature = fit(model, "llama")
    factors = {id(block.inputs): block.inputs for block in curvature.blocks.values()}
    for factor in factors.values():  # one direction outweighs all others, as in real models
        heavy = torch.linspace(1, 2, len(factor.matrix))
        factor.matrix += 1e4 * factor.matrix.trace() * torch.outer(heavy, heavy)
    move(model, seed=9)
    if weak:
        _weak(model, curvature)
    sites = curvature.bind(model)
    rounded, exact = curvature.pulls(sites, rounded=True), curvature.pulls(sites)
    retention = Force(model, curvature, 3.0)
    nats = retention.add_force()
    chosen = exact if weak else rounded
    assert (rounded[0] == exact[0]) is False
    assert nats == chosen[0]
    for parameter, gradient in chosen[1]:
        torch.testing.assert_close(parameter.grad, 3.0 * gradient)
    assert nats > 0
    if weak:
        off = sum(
            float((g - w).square().sum())
            for (_, g), (_, w) in zip(rounded[1], exact[1], strict=True)
        )
        assert off > 0.05**2 * sum(float(w.square().sum()) for _, w in exact[1])
        assert curvature.memory() == fit_size(curvature)


def fit_size(curvature: Any) -> int:
    """Without copies in bfloat16."""
    curvature.drop_rounded()
    return int(curvature.memory())


@pytest.mark.parametrize("steps", [1, 3, 70])
def test_the_error_of_rounding_is_looked_at_now_and_then(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retain.retention.force.has_bf16", lambda _: True)
    model = tiny("llama").float()
    curvature = fit(model, "llama")
    retention, looks = Force(model, curvature, 3.0), []
    felt = curvature.felt

    def look(sites: Any, *, rounded: bool = False, **others: Any) -> Any:
        if not rounded:
            looks.append(retention.holds[0].looks)
        return felt(sites, rounded=rounded, **others)

    monkeypatch.setattr(curvature, "felt", look)
    retention.add_force()  # nothing has moved: nothing to look at
    assert not looks
    move(model, seed=9)
    for _ in range(steps):
        retention.add_force()
    assert looks == [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= steps]
