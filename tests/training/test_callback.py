"""The callback in a plain `transformers.Trainer`, as a user's own script has it."""

from __future__ import annotations

import json
import pickle
import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from retain import OutputKL, Retention, RetentionCallback, fit_curvature, load_curvature
from retain.errors import ConfigError, MismatchError, ModelError, RetainWarning
from retain.models.lora import attach_lora, grow_lora
from retain.models.off import adapter_off
from retain.models.view import ModelView
from retain.retention.facts import facts
from retain.training.running import Running
from retain.types import UPDATES
from tiny import ROWS, base, exactly, move, save_tiny, tiny, weights

DATA = [
    {"input_ids": [1 + i, 2 + i % 3, 12 - i, 5], "labels": [-100, 2 + i % 3, 12 - i, 5]}
    for i in range(8)
]
"""The first label is never predicted; a trainer before transformers 5 would count it."""


PRECISION: dict[str, Any] = {}
"""What the arguments say of it; see the folder's conftest."""


class Backend(TrainerCallback):
    """Stands for a backend of ``report_to``: keeps what it is given, when it is given."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.records.append(dict(logs))


def fit(model: nn.Module, **options: Any):
    return fit_curvature(model, ROWS["llama"], batch_size=4, progress=False, **options)


def trainer(
    model: nn.Module, folder: Path, callbacks: list[TrainerCallback], **options: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.01,
            "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
            "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0, **PRECISION, **options,
        },
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=DATA, callbacks=callbacks)


@pytest.mark.parametrize("update", UPDATES)
def test_backends_before_and_after_see_the_added_values(update: str, tmp_path: Path) -> None:
    model, backend, after = tiny("llama"), Backend(), Backend()
    curvature = fit(model)
    run = trainer(model, tmp_path, [backend])
    run.add_callback(RetentionCallback(curvature, strength=7.0, update=update))
    run.add_callback(after)
    run.train()
    records, later = ([r for r in seen.records if "loss" in r] for seen in (backend, after))
    assert len(records) == 3 and records == later
    names = [type(c).__name__ for c in run.callback_handler.callbacks]
    assert names.count("RetentionCallback") == 1
    kept = [entry for entry in run.state.log_history if "loss" in entry]
    for number, (record, entry) in enumerate(zip(records, kept, strict=True)):
        assert record["task_loss"] == record["loss"] == entry["task_loss"]
        assert record["retention_strength"] == entry["retention_strength"] == 7.0
        assert record["predicted_nats"] == entry["predicted_nats"]
        assert (record["predicted_nats"] > 0) is (number > 0 or update == "proximal")
    if update == "proximal":
        assert records[-1]["predicted_nats"] == pytest.approx(curvature.quadratic(model), rel=1e-9)
    # The summary at the end of training is no step, and gets nothing.
    assert all("predicted_nats" not in r for r in backend.records if "loss" not in r)


@pytest.mark.parametrize("update", UPDATES)
def test_strength_zero_is_plain_training_bit_for_bit(update: str, tmp_path: Path) -> None:
    plain, held = (tiny("llama", dtype=torch.float32) for _ in range(2))
    trainer(plain, tmp_path, []).train()
    trainer(held, tmp_path, [RetentionCallback(fit(held), 0.0, update)]).train()
    exactly(weights(held), weights(plain))


@pytest.mark.parametrize(
    "options", [{}, {"budget": 1e-3, "source": DATA}, {"kl": 1.0, "source": DATA, "moved": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("attached", [False, True])
def test_a_callback_that_has_trained_can_be_pickled(
    options: dict[str, Any], attached: bool, tmp_path: Path
) -> None:
    model, given = tiny("llama"), {k: v for k, v in options.items() if k != "moved"}
    if "moved" in options:  # so that the KL is from the adapter it began with
        move(model, seed=3, size=0.05)
    call = RetentionCallback(fit(model), **given)
    run = trainer(model, tmp_path, [] if attached else [call])
    if attached:
        call.attach(run)
    run.train()
    again = pickle.loads(pickle.dumps(call))
    assert again.recipe.predicted() == call.recipe.predicted() > 0
    other = tiny("llama")
    if "moved" in options:
        move(other, seed=3, size=0.05)
    trainer(other, tmp_path, [again]).train()
    exactly(weights(other), weights(model))


class Drawn(Dataset[Any]):
    """Rows that are drawn anew whenever they are read, with each of the three generators."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> dict[str, Any]:
        draws = random.randrange(13), int(np.random.randint(13)), int(torch.randint(13, ()))
        return {"input_ids": [index, *draws], "labels": [index, *draws]}


def test_strength_zero_leaves_what_a_data_set_draws(tmp_path: Path) -> None:
    found = []
    for held in (False, True):
        model = tiny("llama", dtype=torch.float32)
        run = trainer(model, tmp_path, [RetentionCallback(fit(model), 0.0)] if held else [])
        run.train_dataset = Drawn()
        random.seed(0)
        np.random.seed(0)
        run.train()
        found.append(weights(model))
    exactly(*found)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_the_callback_does_what_the_plain_loop_does(
    update: str, pieces: int, tmp_path: Path
) -> None:
    # One batch of all rows a step, so that the order of the rows does not matter.
    options = {
        "per_device_train_batch_size": 8 // pieces, "gradient_accumulation_steps": pieces,
        "max_grad_norm": 0.0,
    }  # fmt: skip
    held = tiny("llama", moved=True)
    run = trainer(held, tmp_path, [RetentionCallback(fit(held), 30.0, update)], **options)
    run.train()

    loop = tiny("llama", moved=True)
    retention = Retention(loop, fit(loop), 30.0, update=update)
    opt = torch.optim.AdamW(
        [p for p in loop.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0
    )
    batch = {k: torch.tensor([row[k] for row in DATA]) for k in DATA[0]}
    for _ in range(3):
        loop(**batch).loss.backward()
        retention.step(opt)
        opt.zero_grad()
    # transformers' loss is float32, so equality ends there.
    torch.testing.assert_close(weights(held), weights(loop), rtol=0, atol=1e-5)


def test_the_clipped_gradient_is_the_tasks_alone(tmp_path: Path) -> None:
    # Clipping comes before the force, so a strong force is not cut to the clip's length.
    sizes = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            sizes.append(float(torch.cat([g.reshape(-1) for g in grads]).norm()))

    model = tiny("llama")
    curvature = fit(model)
    move(model, seed=5)
    callbacks = [RetentionCallback(curvature, 1e6), Look()]
    trainer(model, tmp_path, callbacks, max_steps=1, max_grad_norm=1e-3).train()
    assert sizes[0] > 1.0


def test_a_proximal_step_beside_an_unread_optimiser_is_refused_before_the_first(
    tmp_path: Path,
) -> None:
    model = tiny("llama")
    curvature, before = fit(model), weights(model)
    for strength, update in ((1.0, "proximal"), (0.0, "proximal"), (1.0, "gradient")):
        call = RetentionCallback(curvature, strength, update, parts=("force",))
        run = trainer(model, tmp_path, [call], optim="rmsprop")
        if strength and update == "proximal":
            with pytest.raises(ConfigError, match="this optimiser's state; got: RMSprop"):
                run.train()
            exactly(weights(model), before)
            held = Retention(model, curvature, update="proximal", parts=("force",))
            with pytest.raises(ConfigError, match="this optimiser's state; got: RMSprop"):
                held.step(torch.optim.RMSprop(p for p in model.parameters() if p.requires_grad))
            exactly(weights(model), before)
        else:
            run.train()


@pytest.mark.parametrize(
    ("options", "fine"),
    [({}, False), ({"kl": 1.0, "update": "proximal"}, False), ({"update": "proximal"}, True),
     ({"strength": 0.0}, True)], ids=str,
)  # fmt: skip
def test_what_is_added_to_gradients_is_refused_beside_one_that_maximises(
    options: dict[str, Any], fine: bool, tmp_path: Path
) -> None:
    """It would push the model away; a proximal step pulls by itself."""
    model = tiny("llama")
    curvature, before = fit(model), weights(model)
    given = {"source": DATA} if "kl" in options else {}
    held = Retention(model, curvature, parts=("force",), **options, **given)
    optimizer: Any = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, maximize=True
    )
    call = RetentionCallback(curvature, parts=("force",), **options, **given)
    run = trainer(model, tmp_path, [call])
    run.optimizer = optimizer
    if fine:
        held.step(optimizer)
        run.train()
        return
    told = "turns the force round.*got: AdamW with maximize=True"
    with pytest.raises(ConfigError, match=told):
        held.step(optimizer)
    with pytest.raises(ConfigError, match=told):
        run.train()
    exactly(weights(model), before)


def test_one_that_computes_gradients_inside_its_step_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    curvature, before = fit(model), weights(model)
    optimizer: Any = torch.optim.LBFGS(p for p in model.parameters() if p.requires_grad)
    told = "computes gradients inside its step, where no force can act; got: LBFGS"
    run = trainer(model, tmp_path, [RetentionCallback(curvature, parts=("force",))])
    run.optimizer = optimizer
    with pytest.raises(ModelError, match=told):
        run.train()
    with pytest.raises(ModelError, match=told):
        Retention(model, curvature, parts=("force",)).step(optimizer)
    exactly(weights(model), before)
    assert all(p.grad is None for p in model.parameters())


class ScheduleFree(torch.optim.Optimizer):
    """SGD as schedule-free: weights y while it trains, a mix of y and z to evaluate and save."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        super().__init__(weights, {"lr": 0.01, "trains": True, "steps": 0})

    def _mix(self, trains: bool, share: float) -> None:
        for group in self.param_groups:
            for weight in group["params"] if group["trains"] is not trains else ():
                weight.data.lerp_(self.state[weight].get("z", weight.data), share)
            group["trains"] = trains

    def train(self) -> None:
        self._mix(True, 0.1)

    def eval(self) -> None:
        self._mix(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1
            share = 1 / group["steps"]
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                y.lerp_(z, share).add_(y.grad, alpha=group["lr"] * (0.9 * (1 - share) - 1))
                z.sub_(y.grad, alpha=group["lr"])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"budget": 1e-3}, "a budget"),
        ({"update": "proximal"}, "a proximal step"),
        ({"parts": ("rows", "filter", "force")}, "the filter"),
        ({}, "the filter"),
    ],
    ids=str,
)
def test_what_moves_weights_is_refused_beside_a_schedule_free_optimiser(
    options: dict[str, Any], part: str, tmp_path: Path
) -> None:
    """Its second point would stay behind, so what is evaluated and saved would not be held."""
    model = tiny("llama")
    curvature, before = fit(model), weights(model)
    optimizer = ScheduleFree(p for p in model.parameters() if p.requires_grad)
    told = f"^{part} does not act on a schedule-free .*got: ScheduleFree of test_callback;"
    if options:  # else it is left out
        run = trainer(model, tmp_path, [RetentionCallback(curvature, **options)])
        run.optimizer = optimizer
        with pytest.raises(ConfigError, match=told):
            run.train()
        exactly(weights(model), before)
    held = Retention(model, curvature, rows=DATA, **options)
    begun = weights(model)  # behind a filter A is another
    with pytest.raises(ConfigError, match=told):
        held.step(optimizer)
    exactly(weights(model), begun)


def test_beside_a_schedule_free_optimiser_a_strength_holds_what_is_evaluated(
    tmp_path: Path,
) -> None:
    ends, told = [], []
    for options in ({}, {"parts": ("rows", "force")}):
        model = tiny("llama")
        call = RetentionCallback(fit(model), 10.0, **options)
        run = trainer(model, tmp_path, [call], max_steps=20)
        run.optimizer = ScheduleFree(p for p in model.parameters() if p.requires_grad)
        run.train()
        trained = call.recipe.predicted()
        run.optimizer.eval()
        assert 0 < call.recipe.predicted() < 1.5 * trained
        ends.append(weights(model))
        told.append(call.why_no_filter)
    exactly(*ends)
    assert told == ["a schedule-free optimiser keeps a second point of A, which no filter acts on",
                    None]  # fmt: skip


def test_full_fine_tuning_says_what_is_held_by_nothing(tmp_path: Path) -> None:
    card = "- Trained, and held by nothing: 7 weights, such as model.embed_tokens.weight, "
    for frozen in (False, True):
        model = base("llama", dtype=torch.float32)
        for name, parameter in model.named_parameters():  # as the warning says
            parameter.requires_grad_(not frozen or "_proj" in name)
        call = RetentionCallback(fit(model), parts=("force",))
        run = trainer(model, tmp_path / str(frozen), [call])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run.train()
        said = [str(w.message) for w in told if "held by nothing" in str(w.message)]
        assert len(said) == (not frozen)
        assert all(s.startswith("7 weights train, and are held by nothing, such as model.embed")
                   and "lm_head.weight" in call.recipe.unheld for s in said)  # fmt: skip
        assert (card in (tmp_path / str(frozen) / "README.md").read_text()) is not frozen
        assert call.recipe.predicted() > 0
    model = base("llama", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RetainWarning)
        Retention(model, fit(model), 0.0, parts=("force",))


def test_another_model_is_refused_when_training_begins(tmp_path: Path) -> None:
    curvature = fit(tiny("llama", seed=5))
    run = trainer(tiny("llama"), tmp_path, [RetentionCallback(curvature)])
    with pytest.raises(MismatchError, match="another base model"):
        run.train()


def test_adapter_space_must_start_at_its_anchor(tmp_path: Path) -> None:
    model = tiny("llama")
    curvature = fit(model, space="adapter")
    move(model, seed=5)
    with pytest.raises(MismatchError, match="load_anchor"):
        trainer(model, tmp_path, [RetentionCallback(curvature)]).train()


def test_an_unknown_update_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gradient'") as caught:
        RetentionCallback(fit(tiny("llama")), update="gradeint")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_refused(strength: float) -> None:
    with pytest.raises(ConfigError, match="strength"):
        RetentionCallback(fit(tiny("llama")), strength)


@pytest.mark.parametrize("source", [None, ROWS["llama"]])
def test_a_budget_is_kept_in_a_trainer(source: Any, tmp_path: Path) -> None:
    model, backend = tiny("llama"), Backend()
    curvature = fit(model, structure="kfac")
    keep = RetentionCallback(curvature, budget=0.02, source=source)
    run = trainer(model, tmp_path, [keep], max_steps=20, learning_rate=0.05)
    run.add_callback(backend)
    run.train()
    records = [r for r in backend.records if "loss" in r]
    assert len({r["retention_strength"] for r in records}) > 1
    assert all(0 <= r["predicted_nats"] for r in records)
    retention = keep.force
    assert retention is not None and retention.budget is not None
    if source is None:
        assert retention.holds[0].probe is None
        assert {r["retention_correction"] for r in records} == {1.0}
        assert curvature.quadratic(model) <= 0.02 * (1 + 1e-9)
    else:
        assert records[-1]["retention_correction"] != 1.0
        assert 0.5 * 0.02 < retention.holds[0].probe.measure(model).kl <= 0.02
    plain = tiny("llama")
    trainer(plain, tmp_path, [], max_steps=20, learning_rate=0.05).train()
    assert curvature.quadratic(plain) > 0.1


def test_what_a_budget_has_learned_is_in_the_checkpoint(tmp_path: Path) -> None:
    def keep(model: nn.Module) -> RetentionCallback:
        return RetentionCallback(fit(model), budget=0.02, source=ROWS["llama"])

    options = {"max_steps": 8, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 4}
    model = tiny("llama")
    trainer(model, tmp_path / "a", [keep(model)], **options).train()
    other = tiny("llama")
    half = keep(other)
    run = trainer(other, tmp_path / "a", [half], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    torch.testing.assert_close(weights(other), weights(model))
    state = json.loads((tmp_path / "a" / "checkpoint-4" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["retain"]
    assert kept["reached"] is True and kept["strength"] != 10.0


def test_a_budget_may_come_when_a_run_goes_on(tmp_path: Path) -> None:
    """The checkpoint says how the run was held, and nothing of a budget."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    model, other = tiny("llama"), tiny("llama")
    trainer(model, tmp_path, [RetentionCallback(fit(model))], **options).train()
    call = RetentionCallback(fit(other), budget=0.02, source=None)
    run = trainer(other, tmp_path, [call], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert call.force is not None and call.force.predicted() <= 0.02


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0.0}, "budget is no budget"),
        ({"source": "text.txt"}, "a source without a budget"),
    ],
)
def test_a_bad_budget_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RetentionCallback(fit(tiny("llama")), **options)


def test_the_last_checkpoint_is_inside_the_budget(tmp_path: Path) -> None:
    model = tiny("llama")
    call = RetentionCallback(fit(model), budget=0.05, source=ROWS["llama"])
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10, "learning_rate": 0.03}
    trainer(model, tmp_path, [call], **options).train()
    end = weights(model)
    saved = load_file(tmp_path / "checkpoint-20" / "adapter_model.safetensors")
    assert call.force is not None
    measured = call.force.holds[0].probe.measure(model).kl
    assert 0.03 < measured <= 0.05
    for name, tensor in end.items():
        assert torch.equal(saved[f"base_model.model.{name}.weight"], tensor)


def test_a_path_is_no_curvature() -> None:
    with pytest.raises(ConfigError, match=r"got: str 'c.safetensors'.*load_curvature"):
        RetentionCallback("c.safetensors")  # type: ignore[arg-type]


def test_a_second_callback_on_one_trainer_is_refused(tmp_path: Path) -> None:
    """As of a cell of a notebook that is run again."""
    model = tiny("llama")
    curvature = fit(model)
    run = trainer(model, tmp_path, [RetentionCallback(curvature), RetentionCallback(curvature)])
    before = weights(model)
    with pytest.raises(ConfigError, match=r"held twice; got: 2 of RetentionCallback"):
        run.train()
    exactly(weights(model), before)
    run.remove_callback(RetentionCallback)  # what the error says
    run.train()


def test_the_log_says_no_divergence_before_one_is_measured(tmp_path: Path) -> None:
    """As where a training goes on between two steps that measure it."""
    options = {"save_strategy": "steps", "save_steps": 2}
    for steps in (2, 6):
        model = tiny("llama")
        call = RetentionCallback(fit(model), kl=1.0, source=ROWS["llama"])
        run = trainer(model, tmp_path, [call], max_steps=steps, **options)
        run.train(resume_from_checkpoint=steps > 2)
    steps = [e["step"] for e in run.state.log_history if "source_kl" in e]
    assert steps == [1, 2, 5, 6]  # of which the resumed ones are those from 3 on
    assert "NaN" not in (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()


def test_one_that_was_attached_acts_in_another_trainer_too(tmp_path: Path) -> None:
    call = RetentionCallback(fit(tiny("llama")))
    first = trainer(tiny("llama"), tmp_path, [])
    call.attach(first)
    first.train()
    model, backend = tiny("llama"), Backend()
    second = trainer(model, tmp_path, [backend, call])
    second.train()
    assert second.callback_handler.callbacks[0] is call
    assert all("predicted_nats" in r for r in backend.records if "loss" in r)
    assert call.recipe.filter is not None
    live = call.recipe.filter.hooks.live
    assert isinstance(live, Running) and not live()
    second.add_callback(RetentionCallback(fit(model)))
    with pytest.raises(ConfigError, match=r"held twice; got: 2 of RetentionCallback"):
        second.train()


@pytest.mark.parametrize("best", [False, True])
def test_moved_back_to_the_budget_after_the_last_evaluation_is_said(
    best: bool, tmp_path: Path
) -> None:
    """As where training has stopped early."""

    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = best

    model = tiny("llama")
    call = RetentionCallback(
        fit(model), budget=1e-4, parts=("force",), source=ROWS["llama"] if best else None
    )
    run = trainer(model, tmp_path, [call, Stops()], learning_rate=0.3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.train()
    found = [str(w.message) for w in said if "moved back to its budget" in str(w.message)]
    assert len(found) == best


def test_weights_that_are_put_in_after_the_last_step_are_within_the_budget(tmp_path: Path) -> None:
    """As those of an average are, of a callback that comes later."""

    class Puts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                move(kwargs["model"], 3)

    model = tiny("llama")
    call = RetentionCallback(fit(model), budget=1e-3, parts=("force",), source=ROWS["llama"])
    with pytest.warns(RetainWarning, match="moved back to its budget"):
        trainer(model, tmp_path, [call, Puts()]).train()
    assert call.force is not None
    (hold,) = call.force.holds
    assert hold.probe is not None and hold.measured is not None and 5e-4 < hold.measured <= 1e-3
    assert hold.probe.measure(model).kl == pytest.approx(hold.measured, rel=1e-4)


@pytest.mark.parametrize("around", ["adapter", "base"])
def test_it_is_said_what_an_adapter_that_had_learned_is_held_to(
    around: str, tmp_path: Path
) -> None:
    model = tiny("llama")
    move(model, 3)
    curvature = fit(model if around == "adapter" else base("llama"))
    before = weights(model)
    call = RetentionCallback(curvature, budget=0.5, kl=OutputKL(every=1), source=ROWS["llama"])
    run = trainer(model, tmp_path, [call], max_steps=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.train()
    said = [w for w in told if "the adapter had learned before" in str(w.message)]
    assert len(said) == (around == "adapter")
    told_of = facts(call.recipe)
    to = {"adapter": "the adapter that training began from", "base": "the base"}[around]
    assert told_of["Budget"] == f"0.5 nats per token of KL divergence to {to}"
    assert ("Held to" in told_of) == (around == "adapter")
    assert call.recipe.outputs is not None  # it is where it counts from, at the first step
    assert (float(call.recipe.outputs.last) < 1e-9) == (around == "adapter")
    assert not all(torch.equal(before[n], w) for n, w in weights(model).items())


@pytest.mark.parametrize("init", ["orthogonal", "mica"])
@pytest.mark.parametrize("rounded", [False, True])
def test_an_adapter_that_begins_with_a_b_and_no_update_is_the_base(
    init: Any, rounded: bool, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    model = get_peft_model(base("llama", dtype=torch.float32), config)
    if rounded:  # as of a base in bfloat16, whose adapter PEFT has in float32
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data.copy_(weight.data.bfloat16())
    call = RetentionCallback(fit(model), budget=0.5, kl=1.0, source=ROWS["llama"])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(model, tmp_path, [call], max_steps=1).train()
    assert not any("had learned" in str(w.message) for w in told)
    assert "Held to" not in facts(call.recipe)
    assert facts(call.recipe)["Budget"].endswith("KL divergence to the base")


@pytest.mark.parametrize("init", ["orthogonal", "mica"])
def test_such_an_adapter_has_its_filter_once_it_has_grown(init: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    model = get_peft_model(base("llama", dtype=torch.float32), config)
    curvature = fit(model)
    assert not curvature.around_adapter and curvature.quadratic(model) < 1e-8
    move(model, 3)
    grown = grow_lora(model, 2)
    held = Retention(grown, curvature, rows=DATA)
    assert held.why_no_filter is None and held.recipe.active == slice(2, None)
    held.step(torch.optim.SGD([p for p in grown.parameters() if p.requires_grad], lr=0.0))
    held.finish()


@pytest.mark.parametrize("space", ["weight", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_in_the_bases_weights_is_that_of_a_curvature_from_a_file(
    init: Any, dtype: torch.dtype, space: str, tmp_path: Path
) -> None:
    """A training that is resumed in a new process has not seen the adapter as it was made."""

    def made() -> Any:
        config = LoraConfig(
            r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], init_lora_weights=init
        )
        return get_peft_model(base("llama", dtype=dtype), config)

    first = made()
    fit(first, space=space).save(tmp_path / "curvature.safetensors")
    move(first, 3)
    model, curvature = made(), load_curvature(tmp_path / "curvature.safetensors")
    fresh = weights(model)
    move(model, 3)
    rows = ModelView(model).read(ROWS["llama"], 4, max_length=16, seed=0, labels=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        held = Retention(model, curvature, kl=1.0, source=rows, parts=["force"], progress={})
    assert not any("had learned" in str(w.message) for w in told)
    for trained in (first, model):
        with adapter_off(trained):
            torch.testing.assert_close(weights(trained), fresh, atol=0.0, rtol=1e-6)
    held.step(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0))
    assert held.recipe.outputs is not None and float(held.recipe.outputs.last) > 1e-4


def test_a_start_in_half_precision_is_not_said_to_have_learned() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(
        base("llama", dtype=torch.bfloat16), config, autocast_adapter_dtype=False
    )
    with pytest.warns(RetainWarning, match="or, kept in half precision, cannot be told"):
        Retention(model, fit(model), parts=["force"])


def test_the_kl_of_an_adapter_that_has_grown_counts_from_what_it_was() -> None:
    model = tiny("llama", moved=True)
    curvature = fit(model)
    rows = ModelView(model).read(ROWS["llama"], 4, max_length=16, seed=0, labels=False)
    other = attach_lora(base("llama"), rank=1)
    with pytest.raises(MismatchError, match="belongs to one rank"), pytest.warns(RetainWarning):
        Retention(other, curvature, kl=1.0, source=rows, parts=["force"])
    grown = grow_lora(model, 3)
    with pytest.warns(RetainWarning, match="the adapter had learned before"):
        held = Retention(grown, curvature, kl=1.0, source=rows, parts=["force"])
    before = weights(grown)
    held.step(torch.optim.SGD([p for p in grown.parameters() if p.requires_grad], lr=0.0))
    assert held.recipe.outputs is not None
    assert float(held.recipe.outputs.last) < 1e-9
    exactly(weights(grown), before)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 leaves no marks")
@pytest.mark.parametrize("trains", [True, False])
def test_what_no_checkpoint_has_is_said_where_it_does_not_train(
    trains: bool, tmp_path: Path
) -> None:
    """Of a model that `retain.load_model` has not loaded, by the marks of transformers 5."""
    plain = BertModel.from_pretrained(save_tiny(tmp_path, kind="bert"), add_pooling_layer=False)
    plain.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    saved = ["bert.pooler.dense"] if trains else None
    config = LoraConfig(
        r=2, task_type="SEQ_CLS", target_modules=["query", "value"], modules_to_save=saved
    )
    model = get_peft_model(loaded, config)
    curvature = fit_curvature(model, ROWS["bert"], progress=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Retention(model, curvature, parts=["force"])
    said = [str(w.message) for w in told if "no checkpoint has" in str(w.message)]
    assert len(said) == (not trains)
    assert all("LoraConfig(modules_to_save=['bert.pooler.dense'], ...)" in s for s in said)


def test_trained_tokens_are_said_to_be_held_by_nothing(tmp_path: Path) -> None:
    for trains in (True, False):
        config = LoraConfig(r=2, trainable_token_indices={"embed_tokens": [1, 2]})
        model = get_peft_model(base("llama"), config)
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.requires_grad_(trains)
        if trains:
            call = RetentionCallback(fit(model), budget=0.1, source=ROWS["llama"])
            fix = r"without trainable_token_indices; or, where .* are new, .* \(source=None\)"
            with pytest.raises(ConfigError, match=f"while other weights train; .*{fix}"):
                trainer(model, tmp_path, [call]).train()
        call = RetentionCallback(fit(model), budget=0.1, source=None, parts=("force",))
        run = trainer(model, tmp_path / str(trains), [call])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run.train()
        said = [w for w in told if "trainable_token_indices are held by nothing" in str(w.message)]
        assert len(said) == trains
        assert ("Trained, and held by nothing" in facts(call.recipe)) == trains
