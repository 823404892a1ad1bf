"""Layers that are filtered and pulled together are what they are one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fits import fit
from retain.curvature.blocks.factor import DenseFactor, Factor, SketchFactor
from retain.curvature.curvature import Curvature, reanchored
from retain.data.batches import Example
from retain.models.sites import LoraSite, lora_sites
from retain.retention.budget import Budget
from retain.retention.displacement import scale_back
from retain.retention.filter import Filter, InputFilter
from retain.retention.force import Force
from retain.retention.fresh_rows import FrozenRows
from retain.retention.moments import Moments, input_moments
from retain.retention.wiener import filters_of
from tiny import base

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN: dict[str, Any] = {"target_modules": "all-linear"}
MIXED: dict[str, Any] = {
    **PLAIN, "rank_pattern": {"q_proj": 3, "1.mlp.down_proj": 4}, "alpha_pattern": {"v_proj": 7},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "mixed ranks": MIXED,
    "groups of one": {"layers_to_transform": [1], "target_modules": NAMES},
    "DoRA": {**PLAIN, "use_dora": True},
}
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}
OPTIONS = Filter(2.0, 0.01, weight=3.0)


def made(kind: str = "plain", seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=2, lora_alpha=4, **KINDS[kind])
        model = get_peft_model(base("llama"), config, autocast_adapter_dtype=False)
        for site in lora_sites(model):
            nn.init.normal_(site.b, std=0.3)
    return model.train()


def moments(model: Any, seed: int, *, thin: bool) -> Moments:
    """Random ones: of the wide inputs sketches, or of all, or of none."""
    examples = [Example((3, 7, 1), (7, 1, 2), (True, True, True))]
    readers = input_moments(model, lora_sites(model), examples).readers
    random = torch.Generator().manual_seed(seed)
    factors: dict[str, Factor] = {}
    sizes = {site.name: site.shape[1] for site in lora_sites(model)}
    for name in sorted(set(readers.values())):
        size = sizes[name]
        u = torch.randn(size, 3, generator=random, dtype=torch.float64)
        v = torch.rand(size, generator=random, dtype=torch.float64)
        sketch = SketchFactor(u, v, torch.zeros(()).double())
        factors[name] = sketch if thin else DenseFactor(sketch.dense())
    return Moments(factors, readers)


def behind(model: Any, *, thin: bool = True, active: slice = slice(None)) -> tuple[Any, list[Any]]:
    """What filters, and each site's P as a matrix of its own."""
    sites, new, old = lora_sites(model), *(moments(model, s, thin=thin) for s in (1, 2))
    want = []
    for site in sites:
        factors = new.factor(site.name), old.factor(site.name)
        want.append(filters_of([factors], weight=3.0, epsilon=0.01)[0].dense())
    return InputFilter(sites, new, old, OPTIONS, active=active, resuming=True), want


def loss_of(model: Any, number: int) -> Tensor:
    ids = torch.tensor([[1 + number, 5, 2 + number, 9, 3]])
    found: Tensor = model(input_ids=ids, labels=ids).loss
    return found


def raw(model: Any, number: int) -> dict[int, Tensor]:
    """The gradients as they come, by `torch.autograd.grad`, which nothing filters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss_of(model, number), trained, allow_unused=True)
    return {id(p): g for p, g in zip(trained, grads, strict=True) if g is not None}


def filtered(g: Tensor, p: Tensor, active: slice) -> Tensor:
    found = g.clone()
    found[active] = g[active] @ p.T
    return found


@pytest.mark.parametrize("active", [slice(None), slice(1, None)], ids=str)
@pytest.mark.parametrize("thin", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_steps_are_filtered_one_by_one(kind: str, thin: bool, active: slice) -> None:
    """With accumulation and clipping, and a step that decays the weights."""
    for accumulation, to_none in ((1, True), (3, True), (3, False)):
        model = made(kind)
        sites = lora_sites(model)
        sites[2].a.requires_grad_(False)
        held, ps = behind(model, thin=thin, active=active)
        kept = [site.a.detach().clone() for site in sites]
        trained = [p for p in model.parameters() if p.requires_grad]
        rate, decay = 0.3, 0.1
        optimizer = torch.optim.SGD(trained, lr=rate, weight_decay=decay)
        for step in range(3):
            total = {id(p): torch.zeros_like(p) for p in trained}
            for number in range(accumulation):
                for key, g in raw(model, step + number).items():
                    total[key] += g
                loss_of(model, step + number).backward()
                for site, p in zip(sites, ps, strict=True):
                    if site.a.requires_grad:
                        want = filtered(total[id(site.a)], p, active)
                        torch.testing.assert_close(site.a.grad, want, **TIGHT)
            for site, p in zip(sites, ps, strict=True):
                if site.a.requires_grad:
                    total[id(site.a)] = filtered(total[id(site.a)], p, active)
            norm = torch.stack([g.norm() for g in total.values()]).norm()
            clipped = nn.utils.clip_grad_norm_(trained, 0.5)
            torch.testing.assert_close(clipped, norm, **TIGHT)
            scale = min(1.0, 0.5 / (float(norm) + 1e-6))
            wanted = []
            for site, p, k in zip(sites, ps, kept, strict=True):
                a = site.a.detach().clone()
                if site.a.requires_grad:
                    a -= rate * (scale * total[id(site.a)] + decay * a)
                a[active] = k[active] + (a[active] - k[active]) @ p
                wanted.append(a)
            optimizer.step()
            held.after_step()
            optimizer.zero_grad(set_to_none=to_none)
            for i, (site, want) in enumerate(zip(sites, wanted, strict=True)):
                torch.testing.assert_close(site.a.detach(), want, **TIGHT)
                torch.testing.assert_close(held.kept[i], want[active], **TIGHT)
                kept[i] = site.a.detach().clone()
        held.hooks.detach()
        assert not any(site.a._backward_hooks for site in sites)


def test_a_filter_is_stored_once() -> None:
    model = made("mixed ranks")
    held, _ = behind(model)
    stores = {p.basis.untyped_storage().data_ptr() for p in held.filters}
    assert stores == {g.whole.p.basis.untyped_storage().data_ptr() for g in held.groups}
    assert len(held.groups) < len({id(p) for p in held.filters}) < len(held.filters)


def first_layer(model: Any, number: int) -> Tensor:
    ids = torch.tensor([[1 + number, 5, 2]])
    found: Tensor = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    return found.square().sum()


def test_layers_that_a_pass_leaves_out_stay_as_they_are() -> None:
    model = made()
    sites = lora_sites(model)
    held, ps = behind(model)
    total = [torch.zeros_like(site.a) for site in sites]
    for number, run in enumerate((first_layer, loss_of, first_layer, loss_of)):
        grads = torch.autograd.grad(run(model, number), [s.a for s in sites], allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
        run(model, number).backward()
        for site, t, p in zip(sites, total, ps, strict=True):
            grad = torch.zeros_like(t) if site.a.grad is None else site.a.grad
            torch.testing.assert_close(grad, t @ p.T, **TIGHT)
    held.hooks.detach()


@pytest.mark.parametrize("reentrant", [True, False])
def test_passes_inside_a_pass(reentrant: bool) -> None:
    """Gradient checkpointing of the older kind runs a pass for each layer."""
    model, twin = made(), made()
    held, ps = behind(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        for number in range(3):
            loss_of(model, number).backward()
            loss_of(twin, number).backward()
            for site, other, p in zip(lora_sites(model), lora_sites(twin), ps, strict=True):
                torch.testing.assert_close(site.a.grad, other.a.grad @ p.T, **TIGHT)
        model.zero_grad()
        twin.zero_grad()
    held.hooks.detach()


def test_what_a_user_writes_into_a_gradient_stays() -> None:
    model = made()
    sites = lora_sites(model)
    held, ps = behind(model)
    first, second = raw(model, 0), raw(model, 1)
    loss_of(model, 0).backward()
    for site in sites[1:]:
        site.a.grad.mul_(0.5)
        site.a.grad[1] += 1.0
    loss_of(model, 1).backward()
    for i, (site, p) in enumerate(zip(sites, ps, strict=True)):
        want = first[id(site.a)] @ p.T
        if i:
            want = 0.5 * want
            want[1] += 1.0
        torch.testing.assert_close(site.a.grad, want + second[id(site.a)] @ p.T, **TIGHT)
    held.hooks.detach()


def test_what_is_not_finite_stays_so() -> None:
    """A gradient scaler has to see it, also when more comes on top."""
    model = made()
    held, _ = behind(model)
    (1e200 * loss_of(model, 0) * 1e200).backward()
    assert not any(bool(site.a.grad.isfinite().any(1).all()) for site in lora_sites(model))
    loss_of(model, 1).backward()
    assert not any(bool(site.a.grad.isfinite().all()) for site in lora_sites(model))
    model.zero_grad()
    loss_of(model, 1).backward()
    assert all(bool(site.a.grad.isfinite().all()) for site in lora_sites(model))
    held.hooks.detach()


def test_a_pass_that_breaks_off_is_made_good() -> None:
    model = made()
    sites = lora_sites(model)
    held, ps = behind(model)
    want = raw(model, 0)

    def stop(_: Tensor) -> None:
        raise KeyboardInterrupt

    handle = sites[0].a.register_hook(stop)  # the last that a pass reaches
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, 0).backward()
    handle.remove()
    held.hooks.settle()
    reached = [s for s in sites if s.a.grad is not None]
    assert len(reached) > 3
    for site, p in zip(sites, ps, strict=True):
        if site.a.grad is not None:
            torch.testing.assert_close(site.a.grad, want[id(site.a)] @ p.T, **TIGHT)
    model.zero_grad()
    loss_of(model, 0).backward()
    for site, p in zip(sites, ps, strict=True):
        torch.testing.assert_close(site.a.grad, want[id(site.a)] @ p.T, **TIGHT)
    held.hooks.detach()


def test_it_acts_after_what_averages_over_processes() -> None:
    """As DDP does at the end of a pass; each process has added up micro-batches of its own."""
    models = [made(), made()]
    held, ps = zip(*(behind(model) for model in models), strict=True)
    numbers = ((0, 1), (2, 3))
    total = [torch.zeros_like(site.a) for site in lora_sites(models[0])]
    for model, mine in zip(models, numbers, strict=True):
        for number in mine:
            found = raw(model, number)
            for t, site in zip(total, lora_sites(model), strict=True):
                t += found[id(site.a)] / 2
        loss_of(model, mine[0]).backward()
    came: list[list[Tensor]] = []

    def average(model: Any) -> None:  # the second process meets what the first has
        grads = [site.a.grad for site in lora_sites(model)]
        came.append([g.clone() for g in grads])
        if len(came) == 2:
            for g, first, second in zip(grads, *came, strict=True):
                g.copy_((first + second) / 2)

    engine = torch.autograd.Variable._execution_engine
    for model, mine in zip(models, numbers, strict=True):
        last = lora_sites(model)[0].a  # DDP asks when its last bucket is full
        handle = last.register_hook(
            lambda _, m=model: engine.queue_callback(lambda: average(m)) or None
        )
        loss_of(model, mine[1]).backward()
        handle.remove()
    for site, t, p in zip(lora_sites(models[1]), total, ps[1], strict=True):
        torch.testing.assert_close(site.a.grad, t @ p.T, **TIGHT)
    for each in held:
        each.hooks.detach()


@pytest.mark.parametrize("active", [slice(1, None), slice(0, 1), slice(1, 2)], ids=str)
def test_rows_that_stay_get_no_gradient_and_no_step(active: slice) -> None:
    model = made()
    sites = lora_sites(model)
    held = FrozenRows(sites, active)
    before = [(s.a.detach().clone(), s.b.detach().clone()) for s in sites]
    want = raw(model, 0)
    loss_of(model, 0).backward()
    mask = torch.zeros(2, 1).double()
    mask[active] = 1
    for site in sites:
        assert torch.equal(site.a.grad, want[id(site.a)] * mask)
        assert torch.equal(site.b.grad, want[id(site.b)] * mask.T)
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5).step()
    held.after_step()
    moves = mask.bool().expand(2, 1)
    for site, (a, b) in zip(sites, before, strict=True):
        assert torch.equal((site.a == a).all(1, keepdim=True), ~moves)
        assert torch.equal((site.b == b).all(0, keepdim=True).T, ~moves)
    held.release()


def one_by_one(curvature: Curvature, site: LoraSite) -> tuple[float, Tensor, Tensor]:
    """0.5 <D, F D>, and its gradients in B and A."""
    a, b, s = site.a.detach(), site.b.detach(), site.scaling
    d = s * b @ a
    if site.name in curvature.anchor:
        b0, a0 = curvature.anchor[site.name]
        d = d - b0 @ a0
    fd = curvature.blocks[site.name].matvec(d)
    return 0.5 * float((d * fd).sum()), s * fd @ a.T, s * b.T @ fd


def fitted(kind: str, options: dict[str, Any], around: bool) -> tuple[Any, Curvature]:
    model = made(kind)
    with torch.no_grad():
        for site in lora_sites(model):
            site.b.zero_()
    curvature = fit(model, "llama", **options)
    assert not curvature.anchor
    if around:  # one layer's update is 0 at the anchor, which then has none of it
        moved = made(kind)
        with torch.no_grad():
            lora_sites(moved)[3].b.zero_()
        curvature = reanchored(curvature, moved)
        assert len(curvature.anchor) == len(lora_sites(model)) - 1
    with torch.no_grad():
        for site in lora_sites(model):
            random = torch.Generator().manual_seed(len(site.name))
            site.b.add_(0.1 * torch.randn(site.b.shape, generator=random).double())
    return model, curvature


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"structure": "kfac"}, {"structure": "kfac", "rank": 3}, {"structure": "activation"}],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_pulls_are_those_of_each_layer(kind: str, options: dict[str, Any], around: bool) -> None:
    model, curvature = fitted(kind, options, around)
    nats, pulls = curvature.pulls(curvature.bind(model))
    found = {id(p): g for p, g in pulls}
    total = 0.0
    for site in lora_sites(model):
        value, of_b, of_a = one_by_one(curvature, site)
        total += value
        torch.testing.assert_close(found[id(site.b)], of_b, **TIGHT)
        torch.testing.assert_close(found[id(site.a)], of_a, **TIGHT)
    assert nats == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("around", ["base", "elsewhere", "its other rows"])
@pytest.mark.parametrize("rows", [slice(None), slice(1, None)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"structure": "kfac"}, {"structure": "kfac", "rank": 3}, {"structure": "tridiagonal"}],
    ids=str,
)
def test_what_stays_is_read_once(options: dict[str, Any], rows: slice, around: str) -> None:
    """The pulls of the rows that train, after steps of theirs, are those of the whole update."""
    model, curvature = fitted("plain", options, around == "elsewhere")
    sites = lora_sites(model)
    if around == "its other rows":
        kept = [site.b.detach().clone() for site in sites]
        with torch.no_grad():
            for site in sites:
                site.b[:, rows] = 0
        curvature = reanchored(curvature, model)
        with torch.no_grad():
            for site, b in zip(sites, kept, strict=True):
                site.b.copy_(b)
    still = curvature.still(curvature.bind(model), rows)
    assert (still is None) == (
        options["structure"] == "tridiagonal" or (rows == slice(None) and not curvature.anchor)
    )
    with torch.no_grad():
        for site in sites:
            site.a[rows] *= 1.3
            site.b[:, rows] *= 0.7
    force = Force(model, curvature, resuming=True)
    force.only(rows)
    force.pulls._still[id(curvature)] = still
    value, pulls = force.pulls.of(curvature)
    nats, whole = curvature.pulls(sites)
    assert float(value) == pytest.approx(nats, rel=1e-12)
    for (p, got), (q, want) in zip(pulls, whole, strict=True):
        assert p is q
        torch.testing.assert_close(got, want[force.pulls.active.get(id(p), ...)], **TIGHT)


def gradients(model: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    random = torch.Generator().manual_seed(5)
    for site in lora_sites(model):
        for parameter in (site.b, site.a):
            yield parameter, torch.randn(parameter.shape, generator=random).double()


@pytest.mark.parametrize("rows", [slice(None), slice(1, None)], ids=str)
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("budget", [None, 100.0])
def test_the_force_is_that_of_each_layer(budget: float | None, past: bool, rows: slice) -> None:
    model, curvature = fitted("plain", {"structure": "kfac"}, False)
    second = reanchored(fit(model, "llama", rank=2), made(seed=3)) if past else None
    sites = lora_sites(model)
    held = Force(model, curvature, 3.0, past=second, budget=budget, resuming=True)
    held.only(rows)
    sites[1].a.requires_grad_(False)
    before = dict(gradients(model))
    for parameter, g in before.items():
        parameter.grad = g.clone() if parameter.requires_grad else None
    sites[4].b.grad = None  # it has none, and gets one
    task = force = 0.0
    nats, strength, wanted = 0.0, held.strength, []
    for site in sites:
        value, of_b, of_a = one_by_one(curvature, site)
        nats += value
        if second is not None:
            _, more_b, more_a = one_by_one(second, site)
            of_b, of_a = of_b + more_b, of_a + more_a
        for parameter, dq, place in ((site.b, of_b, (slice(None), rows)), (site.a, of_a, rows)):
            moves = torch.zeros_like(dq)
            moves[place] = 1
            had = parameter.grad
            if parameter.requires_grad:
                g = torch.zeros_like(dq) if had is None else had
                wanted.append((parameter, g + strength * dq * moves))
            if had is not None:
                task += float((had * moves).square().sum())
                force += float((dq * moves).square().sum())
    assert held.add_force() == pytest.approx(nats, rel=1e-12)
    for parameter, want in wanted:
        torch.testing.assert_close(parameter.grad, want, **TIGHT)
    assert sites[1].a.grad is None
    if budget is not None:
        assert held.budget is not None
        assert held.budget.pull == pytest.approx((0.1 * task, 0.1 * force), rel=1e-12)


@pytest.mark.parametrize("around", [False, True])
def test_what_is_moved_back_keeps_its_direction(around: bool) -> None:
    model, curvature = fitted("mixed ranks", {"structure": "kfac"}, False)
    curvature = reanchored(curvature, made("mixed ranks")) if around else curvature
    sites = curvature.bind(model)
    before = [(s.a.detach().clone(), s.b.detach().clone()) for s in lora_sites(model)]
    nats, _ = curvature.pulls(sites)
    share = scale_back(curvature, sites, nats / 4, now=nats)
    assert 0 < share < 1 and Budget(nats / 4).allowed() == nats / 4
    assert curvature.pulls(sites)[0] == pytest.approx(nats / 4, rel=0.02)
    for site, (a, b) in zip(lora_sites(model), before, strict=True):
        if not around:
            torch.testing.assert_close(site.b.detach(), share * b, **TIGHT)
            assert torch.equal(site.a.detach(), a)
            continue
        b0, a0 = curvature.anchor[site.name]
        b0 = b0 / site.scaling
        torch.testing.assert_close(site.b.detach(), b0 + share * (b - b0), **TIGHT)
        torch.testing.assert_close(site.a.detach(), a0 + share * (a - a0), **TIGHT)
