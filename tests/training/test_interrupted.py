"""A training that is broken off leaves a plain model; what is held stays, whoever looks."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_callback import fit, trainer
from transformers import TrainerCallback

from retain import Filter, RetentionCallback, grow_lora, measure_forgetting
from retain.errors import ModelError
from retain.models.sites import lora_sites
from retain.retention.marks import release_left
from tiny import ROWS, exactly, move, tiny, weights

STARTS: dict[str, dict[str, Any]] = {
    "named": {"parts": ("rows", "filter", "force")},
    "budget": {"budget": 0.05, "source": None},
    "force": {"parts": ("force",)},
    "grown": {},
    "grown, force": {"parts": ("rows", "force")},
}

INSIDE = ("forward", "backward of A", "backward of B")
OUTSIDE = (
    "on_train_begin", "on_epoch_begin", "on_step_begin", "on_pre_optimizer_step",
    "on_optimizer_step", "on_step_end", "on_log", "on_substep_end",
)  # fmt: skip


def model_for(how: str) -> Any:
    model = tiny("llama")
    if how.startswith("grown"):
        move(model, 3)
        model = grow_lora(model, 2, seed=3)
    return model


def call_for(how: str, model: Any) -> RetentionCallback:
    past = fit(model, structure="kfac") if how.startswith("grown") else None
    curvature = fit(tiny("llama"), structure="kfac")
    return RetentionCallback(curvature, **{"strength": 1.0, "past": past, **STARTS[how]})


class Stop(TrainerCallback):
    """Breaks off at the second step, with what Ctrl-C raises."""

    def __init__(self, where: str, model: Any) -> None:
        self.handles: list[Any] = []
        self.where, self.site, self.model = where, lora_sites(model)[1], model
        if where in OUTSIDE:
            setattr(self, where, self.event)

    def event(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 1 or self.where in ("on_train_begin", "on_epoch_begin"):
            raise KeyboardInterrupt

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        if state.global_step == 1 and self.where in INSIDE:
            where = {"backward of A": self.site.a, "backward of B": self.site.b}.get(self.where)
            if where is None:
                self.handles.append(self.site.layer.register_forward_hook(stop))
            else:
                self.handles.append(where.register_hook(stop))


def hooks(model: Any) -> int:
    return sum(
        len(p._backward_hooks or {}) + len(p._post_accumulate_grad_hooks or {})
        for p in model.parameters()
    )


def broken_off(how: str, where: str, folder: Path, **options: Any) -> Any:
    model = model_for(how)
    flags = [p.requires_grad for p in model.parameters()]
    call, stop = call_for(how, model), Stop(where, model)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, folder, [call, stop], **options).train()
    for handle in stop.handles:
        handle.remove()
    assert [p.requires_grad for p in model.parameters()] == flags
    if where not in ("on_train_begin", "on_epoch_begin"):
        assert (call.recipe.filter is None) is (
            "filter" not in STARTS[how].get("parts", ("filter",))
        )
    if where in OUTSIDE and where not in ("on_step_begin", "on_substep_end"):
        assert hooks(model) == 0  # nothing is left even before anybody looks
    return model


def plain_again(model: Any, folder: Path) -> None:
    """A plain training of the model is that of a copy of its weights, bit for bit."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert hooks(twin) == 0
    for each in (model, twin):
        each.zero_grad()
        trainer(each, folder, []).train()
    assert hooks(model) == 0
    exactly(weights(model), weights(twin))


@pytest.mark.parametrize(
    ("how", "where"),
    [
        (how, where)
        for how in STARTS
        for where in (*INSIDE, *OUTSIDE)  # everywhere of what has all parts; elsewhere of each
        if how in ("grown", "budget") or where in ("backward of A", "on_step_begin", "on_step_end")
    ],
)
def test_afterwards_a_plain_training_is_plain(how: str, where: str, tmp_path: Path) -> None:
    pieces = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    model = broken_off(how, where, tmp_path, **(pieces if "substep" in where else {}))
    before = weights(model)
    plain_again(model, tmp_path)
    for site in lora_sites(model):  # A trains freely, all of it
        assert not torch.equal(site.a, before[f"{site.name}.lora_A"])


@pytest.mark.parametrize("where", ["backward of A", "on_step_end"])
@pytest.mark.parametrize("how", STARTS)
def test_it_is_saved_copied_and_merged(how: str, where: str, tmp_path: Path) -> None:
    model = broken_off(how, where, tmp_path)
    ids = torch.tensor([ROWS["llama"][0]["input_ids"]])
    model.eval()
    with torch.no_grad():
        want = model(input_ids=ids).logits
        assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, want)
        whole = io.BytesIO()
        torch.save(model, whole)
        whole.seek(0)
        again = torch.load(whole, weights_only=False)
        assert torch.equal(again(input_ids=ids).logits, want)
        assert hooks(again) == 0
    plain_again(again, tmp_path)
    merged = model.merge_and_unload()
    assert hooks(merged) == 0
    torch.testing.assert_close(merged(input_ids=ids).logits, want)


@pytest.mark.parametrize("how", ["named", "grown, force", "grown"])
def test_a_traceback_that_is_kept_keeps_nothing_alive(how: str, tmp_path: Path) -> None:
    """A notebook holds the last traceback, and with it the frames of the training."""
    model = model_for(how)
    call, stop, kept = call_for(how, model), Stop("backward of B", model), []
    run = trainer(model, tmp_path, [call, stop])
    try:
        run.train()
    except KeyboardInterrupt as error:
        kept.append(error)
    stop.handles[0].remove()
    assert hooks(model) > 0
    plain_again(model, tmp_path)
    run.remove_callback(call)
    run.remove_callback(stop)
    run.train()  # the same trainer, without the two lines
    assert kept and hooks(model) == 0


@pytest.mark.parametrize("attached", [True, False])
def test_before_anything_was_learned_a_is_put_back(attached: bool, tmp_path: Path) -> None:
    """At once where the callback knows when the training ends, else with the next beginning."""
    model = tiny("llama")
    drawn, call = weights(model), call_for("budget", model)
    run = trainer(model, tmp_path, [Stop("on_epoch_begin", model)])
    call.attach(run) if attached else run.add_callback(call)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    if not attached:
        assert not torch.equal(lora_sites(model)[0].a, drawn[f"{lora_sites(model)[0].name}.lora_A"])
        release_left(model)
    exactly(weights(model), drawn)
    assert hooks(model) == 0


@pytest.mark.parametrize("how", ["budget", "grown"])
@pytest.mark.parametrize("idle", [{"learning_rate": 0.0}, {"num_train_epochs": 0, "max_steps": -1}])
def test_an_end_at_which_nothing_was_learned_puts_a_back(
    how: str, idle: dict[str, Any], tmp_path: Path
) -> None:
    """So the next training filters it once, as if this one had not been."""
    model, fresh = model_for(how), model_for(how)
    drawn = weights(model)
    for _ in range(2):
        call = call_for(how, model)
        trainer(model, tmp_path, [call], **idle).train()
        assert call.recipe.filter is not None and hooks(model) == 0
        exactly(weights(model), drawn)
    for each in (model, fresh):
        trainer(each, tmp_path, [call_for(how, each)]).train()
    exactly(weights(model), weights(fresh))


def test_what_goes_on_from_a_checkpoint_without_a_step_is_filtered_once(tmp_path: Path) -> None:
    """The checkpoint has A behind its filter, which the end of an idle training does not change."""
    options = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "save_steps": 1}
    whole, part = tiny("llama"), tiny("llama")
    trainer(whole, tmp_path / "whole", [call_for("budget", whole)], **options).train()
    options |= {"save_strategy": "steps"}
    call = call_for("budget", part)
    trainer(part, tmp_path / "part", [call], max_steps=1, **options).train()
    run = trainer(part, tmp_path / "part", [call], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-1"))
    torch.testing.assert_close(weights(part), weights(whole))


def test_a_model_goes_when_its_last_name_does(tmp_path: Path) -> None:
    """While the function that trained it still runs, as a loop over budgets does."""
    model = tiny("llama")
    run = trainer(model, tmp_path, [RetentionCallback(fit(model, structure="kfac"), 1.0)])
    run.train()
    base = weakref.ref(lora_sites(model)[0].layer.base_layer.weight)
    del run, model
    gc.collect()
    assert base() is None


def test_a_training_in_a_thread_is_held(tmp_path: Path) -> None:
    found = []
    for threaded in (False, True):
        model = tiny("llama")
        run = trainer(model, tmp_path, [RetentionCallback(fit(model, structure="kfac"), 1.0)])
        if threaded:
            thread = threading.Thread(target=run.train)
            thread.start()
            thread.join()
        else:
            run.train()
        found.append(weights(model))
    exactly(*found)


def peft_off(model: Any) -> None:
    with model.disable_adapter():  # PEFT's own: all is trainable afterwards
        model(input_ids=torch.tensor([[1, 2, 3]]))


def ref_adapter(model: Any) -> None:
    model.set_adapter("default")  # as TRL's trainers do


LOOKS: dict[str, Callable[[Any], Any]] = {
    "PEFT's disable_adapter": peft_off,
    "PEFT's set_adapter": ref_adapter,
    "measure_forgetting": lambda model: measure_forgetting(model, ROWS["llama"]),
    "requires_grad_": lambda model: [p.requires_grad_() for s in lora_sites(model) for p in [s.a]],
}


class Look(TrainerCallback):
    def __init__(self, event: str, look: Callable[[Any], Any]) -> None:
        self.look = look
        setattr(self, event, self.event)

    def event(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        modes = [m.training for m in model.modules()]
        self.look(model)
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    ("options", "event"),
    [
        ({"filter": Filter(gain=2.0)}, "on_step_begin"),
        ({"filter": Filter(gain=2.0)}, "on_step_end"),
        ({"parts": ("force",)}, "on_step_end"),
        ({"parts": ("force",), "update": "proximal"}, "on_step_begin"),
        ({"budget": 0.01, "source": [{"input_ids": [3, 7, 1, 12]}]}, "on_step_begin"),
        ({"budget": 0.01, "source": [{"input_ids": [3, 7, 1, 12]}]}, "on_step_end"),
    ],
    ids=str,
)
def test_what_is_held_stays_whoever_looks(
    options: dict[str, Any], event: str, look: str, tmp_path: Path
) -> None:
    """And what trains is moved as if nobody had looked, bit for bit."""
    found = []
    for each in ([], [Look(event, LOOKS[look])]):
        model = tiny("llama")
        options = {"strength": 1.0, **options}
        call = RetentionCallback(fit(model, structure="kfac"), **options)
        seen: list[dict[str, torch.Tensor]] = []
        after = Look("on_step_end", lambda m, seen=seen: seen.append(weights(m)))
        trainer(model, tmp_path, [call, *each, after], weight_decay=0.1, max_steps=4).train()
        assert all(site.a.requires_grad for site in lora_sites(model))
        found.append(weights(model))
    exactly(*found)


@pytest.mark.parametrize("parts", [None, ("force",)])
def test_an_a_that_its_user_has_frozen_stays_so(parts: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    for site in lora_sites(model):
        site.a.requires_grad_(False)
    drawn = weights(model)
    call = RetentionCallback(fit(model, structure="kfac"), 1.0, parts=parts)
    trainer(model, tmp_path, [call, Look("on_step_end", LOOKS["measure_forgetting"])]).train()
    assert call.why_no_filter == ("A does not train" if parts is None else None)
    for site in lora_sites(model):
        assert not site.a.requires_grad
        assert float(site.b.abs().max()) > 0
        assert torch.equal(site.a, drawn[f"{site.name}.lora_A"])
    fresh = tiny("llama")
    lora_sites(fresh)[0].a.requires_grad_(False)
    run = trainer(
        fresh, tmp_path, [RetentionCallback(fit(fresh, structure="kfac"), parts=("filter",))]
    )
    with pytest.raises(ModelError, match="a filter is for an A that trains"):
        run.train()


def test_a_model_of_which_nothing_trains_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    for p in model.parameters():
        p.requires_grad_(False)
    call = RetentionCallback(fit(model, structure="kfac"), 1.0)
    with pytest.raises(ModelError, match=r"no weight of the model trains.*is_trainable=True"):
        trainer(model, tmp_path, [call]).train()


def test_a_beginning_that_fails_leaves_a_as_it_was(tmp_path: Path) -> None:
    model = tiny("llama")
    drawn = weights(model)
    call = RetentionCallback(fit(model, structure="kfac"), budget=0.1, source=[{"text": "a"}])
    with pytest.raises(Exception, match="tokenizer"):
        trainer(model, tmp_path, [call]).train()
    assert hooks(model) == 0
    exactly(weights(model), drawn)


@pytest.mark.parametrize("part", ["grouped", "Behind"])
def test_a_filter_that_cannot_be_laid_out_leaves_a_as_it_was(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    drawn = weights(model)

    def full(*_: Any) -> Any:
        raise MemoryError("no room for the filters")

    monkeypatch.setattr(f"retain.retention.filter.{part}", full)
    with pytest.raises(MemoryError, match="no room"):
        trainer(model, tmp_path, [RetentionCallback(fit(model, structure="kfac"), 1.0)]).train()
    exactly(weights(model), drawn)
