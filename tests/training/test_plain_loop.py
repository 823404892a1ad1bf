"""`retain.Retention`: what a loop of one's own may give it, and what it is told."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader

import retain
from retain.data.sources import encode
from retain.errors import ConfigError, ModelError, RetainWarning
from retain.models.sites import lora_sites
from retain.retention.optimizers import step_lengths
from retain.types import UPDATES, Update
from tiny import ROWS, exactly, move, tiny, weights

TASK = [{"input_ids": [1 + (i * k) % 12 for k in range(1, 6)]} for i in range(1, 9)]


def learned(step: bool = True, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after a few steps."""
    model = tiny("llama")
    curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    retention = retain.Retention(model, curvature, **options)
    for row in TASK[:3]:
        batch = torch.tensor([row["input_ids"]])
        model(input_ids=batch, labels=batch).loss.backward()
        retention.step(optimizer) if step else optimizer.step()
        optimizer.zero_grad()
    retention.finish()
    return weights(model)


def test_rows_may_be_dictionaries() -> None:
    examples = encode(TASK, None, max_length=5, causal=True)
    source = encode(ROWS["llama"], None, max_length=64, causal=True, loss="source")
    plain = learned(rows=TASK, budget=1e-3, probe=ROWS["llama"], kl=1, source=ROWS["llama"])
    exactly(plain, learned(rows=examples, budget=1e-3, probe=source, kl=1, source=source))
    with pytest.raises(AssertionError):
        exactly(plain, learned(rows=TASK[:2], budget=1e-3, probe=source, kl=1, source=source))


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"rows": ["a text"]}, "rows takes tokenised rows, not str"),
        ({"rows": "a text"}, "rows takes tokenised rows, not str"),
        (
            {"rows": [{"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 5)}]},
            "rows takes tokenised rows, not dict with input_ids, attention_mask",
        ),
        ({"rows": [{"text": "a"}]}, "rows takes tokenised rows, not dict with text"),
        ({"probe": ["a text"], "budget": 0.1}, "probe takes tokenised rows, not str"),
        ({"source": ["a text"], "kl": 1}, "source takes tokenised rows, not str"),
        ({"rows": []}, "there are no rows that the filter could read, not rows=[]"),
    ],
)
def test_other_rows_are_refused_with_what_to_give(options: dict[str, Any], got: str) -> None:
    with pytest.raises(ConfigError) as caught:
        learned(**options)
    assert f"{caught.value.what}, not {caught.value.got}" == got
    name = "rows" if "rows" in options else next(iter(options))
    assert f"{name}=" in caught.value.fix


def test_rows_may_be_tensors_mixed_with_examples_or_nothing() -> None:
    plain = learned(rows=TASK, probe=None, source=None)
    tensors = [{"input_ids": torch.tensor(row["input_ids"])} for row in TASK]
    exactly(plain, learned(rows=tensors, probe=None, source=None))
    examples = encode(TASK, None, max_length=5, causal=True)
    learned(rows=[*TASK[:4], *examples[4:]], budget=1e-3, probe=[*TASK[:1], *examples[1:2]])
    exactly(learned(rows=[], parts=["force"]), learned(parts=["force"]))


def test_the_fix_for_rows_works() -> None:
    loader = DataLoader([torch.tensor(row["input_ids"]) for row in TASK], batch_size=2,
                        collate_fn=lambda b: {"input_ids": torch.stack(b)})  # fmt: skip
    model = tiny("llama")
    curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    held = retain.Retention(model, curvature, rows=loader)
    assert held.recipe.filter is not None and held.why_no_filter is None


@pytest.fixture
def accelerated() -> Iterator[None]:
    """What accelerate keeps for a process is as it was, and made anew."""
    kinds = (AcceleratorState, GradientState, PartialState)
    before = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()
    Accelerator(cpu=True)
    yield
    for kind, kept in zip(kinds, before, strict=True):
        kind._shared_state.clear()
        kind._shared_state.update(kept)


def batches_of(size: int) -> DataLoader[Any]:
    rows = [torch.tensor(row["input_ids"]) for row in TASK]
    return DataLoader(rows, size, collate_fn=lambda b: {"input_ids": torch.stack(b)})


@pytest.mark.parametrize(
    "options", [{}, {"update": "proximal"}, {"budget": 1e-3, "probe": ROWS["llama"]},
                {"kl": 1.0, "source": ROWS["llama"]}], ids=str,
)  # fmt: skip
def test_accelerate_accumulates_as_one_batch(accelerated: None, options: dict[str, Any]) -> None:
    ends, told = [], []
    for pieces in (1, 4):
        model = tiny("llama")
        curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
        weighed = [p for p in model.parameters() if p.requires_grad]
        held = retain.Retention(model, curvature, rows=batches_of(8), **options)
        GradientState._shared_state.clear()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=pieces)
        run, optimizer, loader = accelerator.prepare(
            model, torch.optim.SGD(weighed, lr=0.1), batches_of(8 // pieces)
        )
        for _ in range(3):
            for batch in loader:
                with accelerator.accumulate(run):
                    loss = run(**batch, labels=batch["input_ids"]).loss
                    accelerator.backward(loss)
                    told.append(held.step(optimizer))
                    optimizer.zero_grad()
        held.finish()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    assert [nats is None for nats in told] == [False] * 3 + [True, True, True, False] * 3


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("given", [False, True])
def test_the_scaler_of_accelerates_optimiser_is_used(
    accelerated: None, update: Update, given: bool
) -> None:
    """Clipped before or not, and with a first scale that is too large; also where it is given."""
    ends = []
    for wrapped in (False, True):
        model = tiny("llama", dtype=torch.float32)
        curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
        move(model, seed=3, size=0.05)
        weighed = [p for p in model.parameters() if p.requires_grad]
        inner = torch.optim.SGD(weighed, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-111)
        optimizer: Any = inner
        if wrapped:
            optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
        held = retain.Retention(model, curvature, 30.0, parts=["force"], update=update)
        for step, batch in enumerate(batches_of(2)):
            scaler.scale(model(**batch, labels=batch["input_ids"]).loss).backward()
            if step % 2:  # as accelerator.clip_grad_norm_ does
                scaler.unscale_(inner)
                torch.nn.utils.clip_grad_norm_(weighed, 1.0)
            held.step(optimizer, None if wrapped and not given else scaler)
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**16  # so one step was left out
        held.finish()
        ends.append(weights(model))
    exactly(*ends)


def halves(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """A and B, as two optimisers may have them."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [[p for n, p in named if f"lora_{which}" in n] for which in "AB"]


@pytest.mark.parametrize(
    "options",
    [{}, {"update": "proximal"}, {"budget": 1e-4, "probe": ROWS["llama"]},
     {"kl": 1.0, "source": ROWS["llama"]}], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_several_optimisers_step_as_one_in_one_call(options: dict[str, Any], kind: Any) -> None:
    ends, states = [], []
    for several in (False, True):
        model = tiny("llama")
        curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
        parts = halves(model)
        optimizers = [kind(p, lr=0.05) for p in (parts if several else [[*parts[0], *parts[1]]])]
        held = retain.Retention(model, curvature, rows=TASK, **options)
        for batch in batches_of(2):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            nats = held.step(optimizers if several else optimizers[0])
            for each in optimizers:
                each.zero_grad()
        states.append((nats, held.strength, held.progress()))
        held.finish()
        ends.append(weights(model))
    exactly(*ends)
    assert states[0] == states[1]


def test_a_call_for_each_of_several_optimisers_is_refused() -> None:
    model = tiny("llama")
    curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    first, second = (torch.optim.SGD(part, lr=0.05) for part in halves(model))
    held = retain.Retention(model, curvature)
    batch = torch.tensor([TASK[0]["input_ids"]])
    model(input_ids=batch, labels=batch).loss.backward()
    held.step(first)
    gradients = [p.grad.clone() for part in halves(model) for p in part if p.grad is not None]
    before = weights(model)
    with pytest.raises(ConfigError, match=r"applies the force anew.*retention.step\(\[first, sec"):
        held.step(second)
    exactly(weights(model), before)
    left = [p.grad for part in halves(model) for p in part if p.grad is not None]
    assert all(map(torch.equal, left, gradients)) and len(left) == len(gradients)
    held.step(torch.optim.SGD(halves(model)[0], lr=0.1))  # a new one of the same weights
    held.step([first, second])


def test_deepspeeds_optimiser_is_refused_among_several() -> None:
    model = tiny("llama")
    curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    kind = type("DeepSpeedZeroOptimizer", (torch.optim.SGD,), {})
    first, second = halves(model)
    with pytest.raises(ModelError, match="DeepSpeed steps its optimiser behind"):
        retain.Retention(model, curvature).step([torch.optim.SGD(first), kind(second)])


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("update", UPDATES)
def test_a_scaler_that_optimisers_share_unscales_once(
    accelerated: None, update: Update, wrapped: bool
) -> None:
    """And is updated once, as for one optimiser; the first step is left out."""
    ends, scales = [], []
    for several in (False, True):
        model = tiny("llama", dtype=torch.float32)
        curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
        move(model, seed=3, size=0.05)
        parts = halves(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-111)
        groups = parts if several else [[*parts[0], *parts[1]]]
        every: list[Any] = [torch.optim.SGD(part, lr=0.1) for part in groups]
        if wrapped:
            every = [AcceleratedOptimizer(o, device_placement=False, scaler=scaler) for o in every]
        held = retain.Retention(model, curvature, 30.0, parts=["force"], update=update)
        for batch in batches_of(2):
            scaler.scale(model(**batch, labels=batch["input_ids"]).loss).backward()
            held.step(every, None if wrapped else scaler)
            for each in every:
                each.zero_grad()
        scales.append((scaler.get_scale(), scaler._get_growth_tracker()))
        assert not wrapped or all(each.scaler is scaler for each in every)
        held.finish()
        ends.append(weights(model))
    exactly(*ends)
    assert scales == [(2.0**16, 3)] * 2


def test_a_loop_with_a_filter_goes_on_with_its_rows() -> None:
    model = tiny("llama")
    curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    held = retain.Retention(model, curvature, rows=TASK)
    known: dict[str, Any] = {"progress": held.progress(), "kept": held.kept()}
    held.recipe.release()
    with pytest.raises(ConfigError, match=r"had a filter.*got: no rows.*fix: rows=loader"):
        retain.Retention(model, curvature, **known)
    assert retain.Retention(model, curvature, rows=TASK, **known).recipe.filter is not None
    alone = retain.Retention(model, curvature, parts=["force"], **known)
    assert alone.recipe.filter is None and alone.recipe.force is not None


def test_a_step_that_was_never_held_is_told() -> None:
    with pytest.warns(RetainWarning, match=r"retention.step\(optimizer\) was never called"):
        learned(step=False, rows=TASK)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RetainWarning)
        learned(rows=TASK)


def test_a_first_proximal_step_leaves_a_as_adam_does() -> None:
    """Its gradient is 0 while B is, and Adam's formula gives it the rate over eps for a length."""
    model = tiny("llama")
    before = weights(model)
    curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    held = retain.Retention(model, curvature, 1000.0, parts=["force"], update="proximal")
    batch = torch.tensor([TASK[0]["input_ids"]])
    model(input_ids=batch, labels=batch).loss.backward()
    held.step(optimizer)
    moved = {n: float((w - before[n]).abs().max()) for n, w in weights(model).items()}
    assert {far for n, far in moved.items() if "lora_A" in n} == {0.0}
    assert min(far for n, far in moved.items() if "lora_B" in n) > 0
    held.finish()


def test_a_proximal_strength_weighs_as_much_in_fresh_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mean denominator is that of the rows that train; those that stay have none."""
    model = tiny("llama")
    curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    move(model, 1)
    model = retain.grow_lora(model, 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    told: list[dict[int, float]] = []
    monkeypatch.setattr(
        "retain.retention.force.step_lengths", lambda *a: told.append(step_lengths(*a)) or told[-1]
    )
    held = retain.Retention(model, curvature, parts=["rows", "force"], update="proximal")
    batch = torch.tensor([TASK[0]["input_ids"]])
    for _ in range(2):
        model(input_ids=batch, labels=batch).loss.backward()
        held.step(optimizer)
        optimizer.zero_grad()
    columns = held.recipe.active
    for site in lora_sites(model):
        second = optimizer.state[site.b]["exp_avg_sq"][:, columns] / (1 - 0.999**2)
        assert second.shape[1] == 2 < site.rank
        assert told[-1][id(site.b)] == pytest.approx(0.01 / (float(second.sqrt().mean()) + 1e-8))
    held.finish()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("deleted", [False, True])
def test_another_adapter_that_is_made_active_meanwhile_is_refused(
    deleted: bool, update: Update
) -> None:
    model = tiny("llama")
    curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    model.add_adapter("other", model.peft_config["default"])
    both = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(both, lr=0.01)
    held = retain.Retention(model, curvature, parts=["force"], update=update)
    batch = torch.tensor([TASK[0]["input_ids"]])
    for other in (False, True):
        if other:
            model.set_adapter("other")
        if other and deleted:
            model.delete_adapter("default")
        model(input_ids=batch, labels=batch).loss.backward()
        if other:
            with pytest.raises(ModelError, match=r"another adapter.*got: other; allowed: default"):
                held.step(optimizer)
        else:
            held.step(optimizer)


def test_an_adapter_that_was_deleted_or_is_one_of_two_is_let_go_and_no_budget_measured() -> None:
    for deleted in (False, True):
        model = tiny("llama")
        curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
        held = retain.Retention(model, curvature, rows=TASK, budget=1e-3)
        assert held.why_no_filter is None
        model.add_adapter("other", model.peft_config["default"])
        if deleted:
            model.set_adapter("other")
            model.delete_adapter("default")
        else:
            model.base_model.set_adapter(["default", "other"])
        with pytest.raises(ModelError, match="default alone" + deleted * ", which was deleted"):
            held.finish()
        held.recipe.release()
