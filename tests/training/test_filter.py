"""The filter in a trainer: it reads the rows, and leaves the order of the data as it was."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from peft import LoraConfig, get_peft_model
from test_callback import DATA, fit, trainer
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from retain import Filter, RetentionCallback
from retain.data.batches import Example, collate
from retain.errors import (
    ConfigError,
    MismatchError,
    ModelError,
    RetainWarning,
    SourceError,
    TrainingError,
)
from retain.models.lora import grow_lora
from retain.models.off import adapter_off
from retain.models.sites import lora_sites
from retain.retention import filter_rows
from retain.retention.filter import InputFilter
from retain.retention.filter_checks import why_no_filter
from retain.retention.force import Force
from retain.retention.fresh_rows import fresh_rows
from retain.retention.loader import loader_examples
from retain.retention.moments import input_moments, moments_of
from retain.retention.recipe import Recipe
from retain.retention.wiener import Thin, Whole, wiener
from tiny import ROWS, base, exactly, move, tiny, weights


def keep(model: Any, **options: Any) -> RetentionCallback:
    curvature = fit(model, structure="kfac")
    return RetentionCallback(curvature, 1.0, **options)


def examples(predict: tuple[bool, ...] = (True,) * 3) -> list[Example]:
    """The trainer's rows, tokenised."""
    ids = [tuple(row["input_ids"]) for row in DATA]
    return [Example(i[:-1], i[1:], predict) for i in ids]


def sized(s: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    ratios = (like.diagonal() / s.diagonal()).sort().values
    return s * ratios[(len(ratios) - 1) // 2]


NAMED = ("rows", "filter", "force")


@pytest.fixture
def goes_on(tmp_path: Path) -> None:
    """Skips where the trainer by itself, without the callback, does not go on as it began.

    Trainers before transformers 5 read other rows when they resume inside an epoch.
    """
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    model, other = tiny("llama"), tiny("llama")
    folder = tmp_path / "plain"
    trainer(model, folder, [], **options).train()
    run = trainer(other, folder, [], **options)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    want = weights(model)
    if not all(torch.allclose(w, want[n]) for n, w in weights(other).items()):
        pytest.skip("this trainer does not resume exactly inside an epoch, whoever watches it")


def test_the_order_of_the_data_is_as_without_it(tmp_path: Path) -> None:
    orders = []
    for parts in (("force",), NAMED):
        model, seen = tiny("llama"), []
        run = trainer(model, tmp_path, [keep(model, parts=parts)], per_device_train_batch_size=1)
        inner = run.data_collator

        def look(items: Any, inner: Any = inner, seen: list[Any] = seen) -> Any:
            seen.append([tuple(item["input_ids"]) for item in items])
            return inner(items)

        run.train_dataset = DATA
        run.data_collator = look
        run.train()
        orders.append(seen[-3:])
    assert all(order == orders[0] for order in orders)


@pytest.mark.usefixtures("goes_on")
@pytest.mark.parametrize("parts", [None, NAMED])
def test_a_run_that_goes_on_keeps_its_a(parts: Any, tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    model, other = tiny("llama"), tiny("llama")
    trainer(model, tmp_path, [keep(model, parts=parts)], **options).train()
    run = trainer(other, tmp_path, [keep(other, parts=parts)], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(weights(other), weights(model))


def test_behind_the_filter_each_step_is_filtered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A starts filtered, once each step is filtered too, and the hooks are gone after."""
    model, twin = tiny("llama"), tiny("llama")
    new = input_moments(twin, lora_sites(twin), examples(), first=False)
    old = moments_of(fit(twin, structure="kfac")).sized_as(new)
    options = Filter(gain=2.0, weight=7.0)
    held = InputFilter(lora_sites(twin), new, old, options)
    call, calls = keep(model, filter=options), 0
    step = InputFilter.after_step

    def counted(self: InputFilter) -> None:
        nonlocal calls
        before = [s.a.detach().clone() for s in self.sites]
        kept = [k.clone() for k in self.kept]
        step(self)
        calls += 1
        for site, raw, k, p in zip(self.sites, before, kept, self.filters, strict=True):
            torch.testing.assert_close(site.a.detach(), k + (raw - k) @ p.dense())

    monkeypatch.setattr(InputFilter, "after_step", counted)
    trainer(model, tmp_path, [call], max_steps=5).train()
    assert calls == 5
    assert call.recipe.filter is not None
    moved = []
    for i, (site, other) in enumerate(zip(lora_sites(model), lora_sites(twin), strict=True)):
        got, want = call.recipe.filter.filters[i].dense(), held.filters[i].dense()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(site.a.detach(), call.recipe.filter.kept[i])
        moved.append((site.a - other.a).detach().abs().max())
        assert site.a.requires_grad
        assert not site.a._backward_hooks
    assert max(moved) > 1e-4


@pytest.mark.parametrize("structure", ["activation", "shampoo"])
def test_the_source_counts_the_same_in_any_unit(structure: str, tmp_path: Path) -> None:
    """Input sides that are weighted by gradients are far smaller than the inputs' own."""
    model = tiny("llama")
    sites, curvature = lora_sites(model), fit(model, structure=structure)
    new = input_moments(model, sites, examples(), first=False)
    old = moments_of(curvature)
    call = RetentionCallback(curvature, 0.0, parts=NAMED, filter=Filter(weight=10.0, epsilon=0.01))
    trainer(model, tmp_path, [call], max_steps=1).train()
    assert call.recipe.filter is not None
    for site, p in zip(sites, call.recipe.filter.filters, strict=True):
        s_new, s_old = new.of(site.name), old.of(site.name)
        s_old = sized(s_old, s_new)
        torch.testing.assert_close(p.dense(), wiener(s_new, s_old, weight=10.0, epsilon=0.01))


def test_a_curvature_of_sketches_has_a_thin_filter(tmp_path: Path) -> None:
    """Of the rank of the curvature, and half of it for the rows; narrow layers keep a whole one."""
    model = tiny("llama")
    curvature = fit(model, structure="kfac", rank=2)
    call = RetentionCallback(curvature, 1.0)
    trainer(model, tmp_path, [call], max_steps=3).train()
    assert call.why_no_filter is None
    assert call.recipe.filter is not None
    kinds = {type(f) for f in call.recipe.filter.filters}
    thin = [f for f in call.recipe.filter.filters if isinstance(f, Thin)]
    assert kinds == {Thin, Whole} or (kinds == {Thin} and thin)
    for found in thin:
        assert found.basis.shape[1] == 3
    for site, kept in zip(lora_sites(model), call.recipe.filter.kept, strict=True):
        torch.testing.assert_close(site.a.detach(), kept)
        assert float(site.b.detach().abs().max()) > 0


def test_a_used_adapter_has_no_fresh_rows(tmp_path: Path) -> None:
    model = tiny("llama", moved=True)
    with pytest.raises(ModelError, match="needs fresh rows"):
        trainer(model, tmp_path, [keep(model, parts=NAMED)]).train()


def test_without_fresh_rows_each_step_of_a_used_adapter_is_filtered(tmp_path: Path) -> None:
    model = tiny("llama", moved=True)
    before = [s.a.detach().clone() for s in lora_sites(model)]
    source = fit(tiny("llama"), structure="kfac")
    call = RetentionCallback(source, 1.0, parts=["filter", "force"])
    trainer(model, tmp_path, [call], max_steps=3).train()
    assert call.recipe.filter is not None
    for site, a, p in zip(lora_sites(model), before, call.recipe.filter.filters, strict=True):
        step = site.a.detach() - a
        assert float(step.abs().max()) > 0
        solved = torch.linalg.lstsq(p.dense().T, step.T).solution.T @ p.dense()
        torch.testing.assert_close(solved, step, rtol=1e-5, atol=1e-8)


def test_a_curvature_without_inputs_has_no_filter(tmp_path: Path) -> None:
    model = tiny("llama")
    call = RetentionCallback(fit(model, structure="diagonal"), parts=NAMED)
    with pytest.raises(MismatchError, match="does not tell what a layer reads"):
        trainer(model, tmp_path, [call]).train()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gain": 0.0}, "gain is out of range"),
        ({"epsilon": float("inf")}, "epsilon is out of range"),
        ({"rows": 0}, "too few rows"),
        ({"tokens": 0}, "too few tokens"),
        ({"answers": -0.1}, "answers' share is out of range"),
        ({"weight": -1.0}, "weight is out of range"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Filter(**options)


@pytest.mark.parametrize(
    ("tokens", "lengths"), [(100, [5, 2, 3, 4]), (10, [5, 2, 3]), (9, [5, 2]), (5, [5]), (3, [3])]
)
def test_rows_are_read_while_their_tokens_fit(
    tokens: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first row that is longer alone is cut."""
    model = tiny("llama")
    rows = [
        Example(ids, (*ids[1:], 0), (True,) * len(ids))
        for ids in (tuple(row["input_ids"]) for row in ROWS["llama"])
    ]
    seen: list[Example] = []

    def read(model: Any, sites: Any, examples: Any, **options: Any) -> Any:
        seen.extend(examples)
        return input_moments(model, sites, examples, **options)

    monkeypatch.setattr(filter_rows, "input_moments", read)
    held = Recipe(fit(model, structure="kfac"), filter=Filter(tokens=tokens))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        held.begin(model, lambda count, seed: rows[:count])
    held.release()
    told = [str(w.message) for w in said if issubclass(w.category, RetainWarning)]
    whole = sum(lengths) == sum(len(row.tokens) for row in rows)
    text = f"the filter reads {len(lengths)} of the 4 training rows that it was to read"
    assert [text in line for line in told] == ([] if whole else [True])
    assert [len(e.tokens) for e in seen] == lengths
    assert seen == [e.cut(n) for e, n in zip(rows, lengths, strict=False)]


def test_a_cut_row_keeps_its_label() -> None:
    assert Example((3, 4, 5), (2,), (), (0, 0, 1)).cut(2) == Example((3, 4), (2,), (), (0, 0))


def test_answers_are_those_that_the_labels_name(tmp_path: Path) -> None:
    """Of prompt and completion rows the completion's places count as predictions."""
    masked = [
        {"input_ids": row["input_ids"], "labels": [-100, -100, -100, row["labels"][3]]}
        for row in DATA
    ]
    found = []
    for answers in (0.0, 1.0):
        model, options = tiny("llama"), Filter(answers=answers)
        call = keep(model, filter=options)
        run = trainer(model, tmp_path, [call], max_steps=1)
        run.train_dataset = masked
        run.train()
        twin = tiny("llama")
        rows = examples((False, False, True))
        new = input_moments(twin, lora_sites(twin), rows, answers=answers, first=False)
        old = moments_of(fit(twin, structure="kfac")).sized_as(new)
        want = InputFilter(lora_sites(twin), new, old, options)
        assert call.recipe.filter is not None
        for p, q in zip(call.recipe.filter.filters, want.filters, strict=True):
            torch.testing.assert_close(p.dense(), q.dense())
        found.append(want.filters[0].dense())
    assert not torch.allclose(*found)


@pytest.mark.parametrize("structure", ["kfac", "shampoo", "activation"])
def test_the_recipe_filters_where_it_can(structure: str, tmp_path: Path) -> None:
    """Without a word it is the one that is named, bit for bit; also in the words of 0.1."""
    ends = []
    for options in ({}, {"parts": NAMED}, {"start": "wiener"}):
        model = tiny("llama")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            call = RetentionCallback(fit(model, structure=structure), 1.0, **options)  # type: ignore[arg-type]
        trainer(model, tmp_path, [call]).train()
        assert call.why_no_filter is None
        assert call.recipe.filter is not None
        ends.append(weights(model))
    for end in ends[1:]:
        exactly(end, ends[0])


def test_a_curvature_of_the_plain_model_makes_the_same_filter(tmp_path: Path) -> None:
    """One is often fitted before there is an adapter: it is around the base all the same."""
    ends = []
    for fitted in (fit(tiny("llama")), fit(base("llama"))):
        model = tiny("llama")
        call = RetentionCallback(fitted, 1.0)
        trainer(model, tmp_path, [call]).train()
        assert call.why_no_filter is None
        ends.append(weights(model))
    assert ends[0].keys() == ends[1].keys()
    for name, end in ends[0].items():
        torch.testing.assert_close(ends[1][name], end, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("structure", "space", "moved", "strength", "said"),
    [
        ("diagonal", "weight", False, 1.0, "does not tell what a layer reads"),
        ("kfac", "adapter", False, 1.0, "not of the base model's weights"),
        ("kfac", "weight", True, 1.0, "not fresh"),
        ("kfac", "weight", False, 0.0, "the strength is 0"),
    ],
)
def test_the_recipe_holds_alone_where_it_cannot(
    structure: str, space: str, moved: bool, strength: float, said: str, tmp_path: Path
) -> None:
    ends = []
    for options in ({}, {"parts": ("force",)}):
        model = tiny("llama", moved=moved)
        curvature = fit(model, structure=structure, space=space)
        call = RetentionCallback(curvature, strength, **options)
        trainer(model, tmp_path, [call]).train()
        ends.append(weights(model))
        assert call.recipe.filter is None
        assert ("parts" in options) is (call.why_no_filter is None)
        assert call.why_no_filter is None or said in call.why_no_filter
    exactly(*ends)


def test_the_recipe_holds_alone_where_a_filter_would_be_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retain.retention.filter_checks.WIDEST", 7)
    model = tiny("llama")
    call = RetentionCallback(fit(model, structure="kfac"), 1.0)
    trainer(model, tmp_path, [call]).train()
    assert call.recipe.filter is None
    assert "a filter has as many rows" in str(call.why_no_filter)


@pytest.mark.usefixtures("goes_on")
def test_a_run_of_the_recipe_goes_on_as_it_began(tmp_path: Path) -> None:
    """Its B is not 0 any more, so the checkpoint says that there was a filter."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    model, other = tiny("llama"), tiny("llama")
    curvature = fit(model, structure="kfac")
    trainer(model, tmp_path, [RetentionCallback(curvature, 1.0)], **options).train()
    call = RetentionCallback(curvature, 1.0)
    run = trainer(other, tmp_path, [call], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert call.recipe.filter is not None
    torch.testing.assert_close(weights(other), weights(model))


@pytest.mark.usefixtures("goes_on")
def test_a_grown_adapter_trains_its_fresh_rows_alone(tmp_path: Path) -> None:
    """Behind a filter that knows the source and the tasks before; also when it goes on."""
    model, other = (grow_lora(tiny("llama", moved=True), 2, seed=3) for _ in range(2))
    sites, old = lora_sites(model), weights(model)
    source = fit(tiny("llama"), structure="kfac")
    past = fit(model, structure="kfac")
    past = past + past + past
    with adapter_off(model):
        new = input_moments(model, sites, examples(), first=False)

    def call() -> RetentionCallback:
        return RetentionCallback(source, 1.0, past=past)

    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    options["weight_decay"] = 0.1
    first = call()
    trainer(model, tmp_path, [first], **options).train()
    assert first.recipe.filter is not None
    for site, p in zip(sites, first.recipe.filter.filters, strict=True):
        s_new = new.of(site.name)
        s_old = torch.zeros_like(s_new)
        for curvature, count in ((source, 1), (past, 3)):
            s_old += count * sized(moments_of(curvature).of(site.name), s_new)
        torch.testing.assert_close(p.dense(), wiener(s_new, s_old, weight=1.0, epsilon=1e-3))
    for site in sites:
        assert torch.equal(site.a[:2], old[f"{site.name}.lora_A"][:2])
        assert torch.equal(site.b[:, :2], old[f"{site.name}.lora_B"][:, :2])
        assert float(site.b[:, 2:].detach().abs().max()) > 0
        assert site.a.requires_grad
        assert not site.b._backward_hooks
    run = trainer(other, tmp_path, [call()], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(weights(other), weights(model))


def test_fresh_rows_are_those_at_the_end_that_do_nothing_yet() -> None:
    assert fresh_rows(lora_sites(tiny("llama"))) == slice(None)
    assert fresh_rows(lora_sites(tiny("llama", moved=True))) is None
    sites = lora_sites(grow_lora(tiny("llama", moved=True), 3))
    assert fresh_rows(sites) == slice(2, None)
    with torch.no_grad():
        sites[-1].b[0, 2] = 1.0  # one layer uses it
    assert fresh_rows(sites) == slice(3, None)


@pytest.mark.parametrize("share", [0.5, 1.0, 100.0])
def test_a_budget_that_is_spent_already_makes_room_once(share: float, tmp_path: Path) -> None:
    """The old rows are scaled back before the first step, if at all, and then they stay."""
    model = grow_lora(tiny("llama", moved=True), 2, seed=3)
    old = weights(model)
    source = fit(tiny("llama"), structure="kfac")
    budget = share * source.quadratic(model)
    past = fit(model, structure="kfac")
    call = RetentionCallback(source, past=past, budget=budget, source=None)
    trainer(model, tmp_path, [call], max_steps=12, learning_rate=1e-3).train()
    assert source.quadratic(model) <= budget * 1.001
    kept = min(1.0, 0.8 * share) ** 0.5
    for site in lora_sites(model):
        b = old[f"{site.name}.lora_B"][:, :2]
        torch.testing.assert_close(site.b[:, :2].detach(), kept * b, rtol=0.02, atol=1e-6)
        assert torch.equal(site.a[:2], old[f"{site.name}.lora_A"][:2])
        assert float(site.b[:, 2:].detach().abs().max()) > 0


def test_old_rows_feel_no_force(tmp_path: Path) -> None:
    model = grow_lora(tiny("llama", moved=True), 2, seed=3)
    source = fit(tiny("llama"), structure="kfac")
    held = Force(model, source, 10.0, past=fit(model, structure="kfac"))
    held.only(slice(2, None))
    for parameter in held.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held.add_force()
    felt = 0.0
    for site in lora_sites(model):
        assert site.a.grad is not None and site.b.grad is not None
        assert float(site.a.grad[:2].abs().max()) == 0
        assert float(site.b.grad[:, :2].abs().max()) == 0
        felt += float(site.b.grad[:, 2:].abs().max())
    assert felt > 0


def test_a_proximal_step_moves_the_fresh_rows_alone(tmp_path: Path) -> None:
    model = grow_lora(tiny("llama", moved=True), 2, seed=3)
    before = weights(model)
    call = RetentionCallback(fit(tiny("llama"), structure="kfac"), 1.0, "proximal")
    trainer(model, tmp_path, [call]).train()
    for name, now in weights(model).items():
        rows = now if "lora_A" in name else now.T
        then = before[name] if "lora_A" in name else before[name].T
        assert torch.equal(rows[:2], then[:2]) and not torch.equal(rows[2:], then[2:])


class Broken(TrainerCallback):
    """Breaks a training off at its first step, once."""

    def __init__(self) -> None:
        self.due = True

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        due, self.due = self.due, False
        if due:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("again", ["the same callback", "a new one"])
def test_a_training_that_broke_off_leaves_no_filter(again: str, tmp_path: Path) -> None:
    model, want = tiny("llama"), tiny("llama")
    trainer(want, tmp_path, [keep(want)]).train()
    call = keep(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(model, tmp_path, [call, Broken()]).train()
    assert not any(site.a._backward_hooks for site in lora_sites(model))
    trainer(model, tmp_path, [call if again[0] == "t" else keep(model)]).train()
    exactly(weights(model), weights(want))
    assert not any(site.a._backward_hooks for site in lora_sites(model))


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    ("parts", "space"), [(None, "weight"), (NAMED, "weight"), (("force",), "adapter")], ids=str
)
def test_smaller_batches_go_on_as_they_were_held(
    parts: Any, space: Any, attached: bool, tmp_path: Path
) -> None:
    """Where a trainer runs out of memory after its first step, and begins once more by itself."""
    model = tiny("llama")
    call = RetentionCallback(fit(model, space=space), budget=1e-3, parts=parts, source=None)
    run = trainer(
        model, tmp_path, [] if attached else [call], auto_find_batch_size=True, max_steps=4
    )
    if attached:
        call.attach(run)
    sizes, step = [], run.training_step

    def full(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] == 4 and run.state.global_step:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *args, **kwargs)

    run.training_step = full  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RetainWarning)
        run.train()
    assert sizes[:2] == [4, 4] and len(sizes) == 6 and max(sizes[2:]) < 4
    assert call.why_no_filter is None and (call.recipe.filter is None) == (parts == ("force",))
    assert call.force is not None and call.force.budget is not None
    assert call.force.budget.steps == 5  # one before, four after
    assert not any(site.a._backward_hooks for site in lora_sites(model))


def test_what_is_read_before_training_is_not_read_again_for_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr("retain.retention.recipe.new_moments", full)
    model = tiny("llama")
    run = trainer(model, tmp_path, [keep(model)], auto_find_batch_size=True)
    with pytest.raises(TrainingError, match=r"full before the first step.*Filter\(tokens="):
        run.train()
    assert len(calls) == 1


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("broken", ["memory", "by hand"])
def test_smaller_batches_of_a_resumed_training_go_on_too(
    broken: str, attached: bool, tmp_path: Path
) -> None:
    """Out of memory it goes on from the weights as they are; a new call reads the checkpoint's."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    options |= {"auto_find_batch_size": True}

    def held(model: Any) -> RetentionCallback:
        return RetentionCallback(
            fit(model), budget=1e-5, update="proximal", source=ROWS["llama"], parts=NAMED
        )

    want, model = tiny("llama"), tiny("llama")
    trainer(want, tmp_path, [held(want)], **options).train()
    call, place = held(model), str(tmp_path / "checkpoint-2")
    run = trainer(model, tmp_path / "o", [] if attached else [call], **options)
    if attached:
        call.attach(run)
    step, seen = run.training_step, []

    def full(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if run.state.global_step == 4 and not seen:
            seen.append(([k.clone() for k in call.recipe.filter.kept], call.recipe.progress()))
            raise RuntimeError("CUDA out of memory.") if broken == "memory" else KeyboardInterrupt
        if run.state.global_step == 2 and len(seen) == 1:
            seen.append((call.recipe.filter.kept, call.recipe.progress()))
        return step(model, inputs, *args, **kwargs)

    run.training_step = full  # type: ignore[method-assign]
    with nullcontext() if broken == "memory" else pytest.raises(KeyboardInterrupt):
        run.train(resume_from_checkpoint=place)
    if broken == "memory":
        (before, then), (after, now) = seen
        exactly(dict(enumerate(after)), dict(enumerate(before)))
        assert now == then and now["steps"] == 4
    else:
        run.train(resume_from_checkpoint=place)
        exactly(weights(model), weights(want))


def test_a_callback_may_train_twice(tmp_path: Path) -> None:
    """The second time the adapter is not fresh: held by the force alone, as by a new callback."""
    found = []
    for same in (True, False):
        model = tiny("llama")
        call = keep(model)
        first = call.recipe.curvature
        assert first is not None
        trainer(model, tmp_path, [call]).train()
        call = call if same else RetentionCallback(first, 1.0)
        trainer(model, tmp_path, [call]).train()
        assert call.recipe.filter is None and call.why_no_filter == "the adapter is not fresh"
        found.append(weights(model))
    exactly(*found)


def test_rows_of_one_token_are_named(tmp_path: Path) -> None:
    for parts in (None, NAMED):
        model = tiny("llama")
        call = keep(model, parts=parts)
        run = trainer(model, tmp_path, [call])
        run.train_dataset = [{"input_ids": [3], "labels": [3]}] * 4
        if parts is None:
            run.train()
            assert str(call.why_no_filter).endswith("no input_ids of two tokens or more")
        else:
            with pytest.raises(SourceError, match="without input_ids, or of one token"):
                run.train()


def test_a_run_that_goes_on_says_again_why_it_has_no_filter(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    curvature, calls = fit(tiny("llama"), structure="kfac"), []
    for steps in (2, 4):
        call = RetentionCallback(curvature, 1.0)
        run = trainer(tiny("llama", moved=True), tmp_path, [call], max_steps=steps, **options)
        with pytest.warns(RetainWarning, match="without a filter: the adapter is not fresh"):
            run.train(resume_from_checkpoint=steps > 2)
        calls.append(call)
    assert [call.why_no_filter for call in calls] == ["the adapter is not fresh"] * 2


def test_a_run_that_goes_on_with_a_strength_says_that_it_began_without_a_filter(
    tmp_path: Path,
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    curvature, said = fit(tiny("llama"), structure="kfac"), []
    for steps, strength in ((2, 0.0), (4, 0.0), (6, 1.0)):
        call = RetentionCallback(curvature, strength)
        run = trainer(tiny("llama"), tmp_path, [call], max_steps=steps, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RetainWarning)
            run.train(resume_from_checkpoint=steps > 2)
        said.append([text for w in caught if "without a filter" in (text := str(w.message))])
    why = "the training began without one, for its strength was 0"
    assert said == [[], [], [f"held by the force alone, without a filter: {why}"]]
    assert call.why_no_filter == why


def test_room_is_made_of_what_is_measured(tmp_path: Path) -> None:
    """Months later too: the old rows are scaled once, before the first step, and then stay."""
    model, probe = tiny("llama"), [{"input_ids": row["input_ids"]} for row in ROWS["llama"]]
    source = fit(model, structure="kfac")
    move(model, 3, 0.6)
    first = RetentionCallback(source, budget=0.3, source=probe, parts=("force",))
    trainer(model, tmp_path, [first], learning_rate=1e-3).train()
    assert first.force is not None
    spent = first.force.holds[0].probe.measure(model).kl
    assert 0.25 < spent <= 0.3
    model = grow_lora(model, 2, seed=3)
    old, past = weights(model), fit(model, structure="kfac")
    call = RetentionCallback(source, past=past, budget=0.3, source=probe)
    shares = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            shares.append(
                [
                    float(s.b[:, :2].detach().norm() / old[f"{s.name}.lora_B"][:, :2].norm())
                    for s in lora_sites(model)
                ]
            )

    trainer(model, tmp_path, [call, Look()], max_steps=40, learning_rate=0.02).train()
    assert call.force is not None and call.force.budget is not None
    assert shares[0][0] < 0.97
    assert all(share == pytest.approx(shares[0][0], rel=1e-6) for step in shares for share in step)
    for site in lora_sites(model):
        kept = shares[0][0] * old[f"{site.name}.lora_B"][:, :2]
        torch.testing.assert_close(site.b[:, :2].detach(), kept, rtol=1e-6, atol=1e-9)
        assert float(site.b[:, 2:].detach().abs().max()) > 0
    left, predicted = call.force.budget.spent
    assert left <= 0.8 * 0.3 and predicted > 0
    end = call.force.holds[0].probe.measure(model).kl
    assert left < end <= 0.3


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(DATA)


class Sized(Stream):
    def __len__(self) -> int:
        return len(DATA)


@pytest.mark.parametrize("data", [Stream(), Sized()])
def test_streams_have_a_filter_too(data: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    call = keep(model)
    run = trainer(model, tmp_path, [call])
    run.train_dataset = data
    run.train()
    assert call.recipe.filter is not None
    share = IterableDatasetShard(data, batch_size=2, num_processes=2, process_index=1)
    loaders = [DataLoader(d, batch_size=2, collate_fn=run.data_collator) for d in (data, share)]
    one, other = (loader_examples(loader, 3, 0, True) for loader in loaders)
    assert len(one) == 3 and one == other


class Once(Stream):
    """Goes on where it was left."""

    def __init__(self, around: bool) -> None:
        self.around, self.rows = around, iter(DATA * 40)

    def __iter__(self) -> Any:
        return (row for row in self.rows) if self.around else self

    def __next__(self) -> Any:
        return next(self.rows)


class Shuffled(Stream):
    def __iter__(self) -> Any:
        return (DATA[i] for i in torch.randperm(len(DATA)).tolist())


@pytest.mark.parametrize(
    ("data", "lost"),
    [(Stream(), False), (Shuffled(), False), (Once(True), True), (Once(False), True)],
)
def test_rows_that_are_lost_to_the_training_are_said(data: Any, lost: bool, tmp_path: Path) -> None:
    model = tiny("llama")
    run = trainer(model, tmp_path, [keep(model)])
    run.train_dataset = data
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.train()
    assert sum("begun again" in str(w.message) for w in said) == lost


@pytest.mark.parametrize("own", [False, True])
def test_a_pair_is_read_with_its_token_types(own: bool) -> None:
    """Of a trainer's batch, padded on the left as some tokenizers do, and of this package's own."""
    pair = Example((3, 7, 1, 15), (2,), (), (0, 0, 1, 1))

    def collated(items: list[Example]) -> dict[str, Any]:
        batch = collate([*items, Example((2,) * 6, (0,))], pad=0)
        if own:
            return {"batch": collate(items, pad=0, multiple=8)}
        return {k: v[:1].roll(2, dims=1) for k, v in batch.inputs.items()}

    loader = SimpleNamespace(dataset=[pair], collate_fn=collated)
    (found,) = loader_examples(loader, 1, 0, causal=False)
    assert (found.tokens, found.segments) == (pair.tokens, pair.segments)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", False])
def test_an_initialisation_that_is_never_at_zero_is_named(init: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
    model = get_peft_model(base("llama", dtype=torch.float32), config)
    why = why_no_filter(model, fit(model))
    assert why == f"init_lora_weights={init!r} begins with a B that is not 0"
