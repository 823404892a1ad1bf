"""Train an adapter: `transformers.Trainer`, with the head run where labels are."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from retain.compat import checkpointing, warmup
from retain.config import TrainConfig
from retain.data.batches import Example, check_fills, collate
from retain.errors import ConfigError, SourceError, warn
from retain.models.heads import check_single
from retain.models.sizes import pad_multiple
from retain.models.view import ModelView
from retain.retention.method import Method
from retain.retention.recipe import Recipe
from retain.training.callback import RetentionCallback
from retain.training.checkpoints import Seal, last_whole
from retain.training.loss import head_of
from retain.training.method import MethodCallback
from retain.training.probes import Sources
from retain.training.trainer import Rows, RowTrainer

__all__ = ["TrainResult", "history_entry", "train"]

Measure = Callable[[nn.Module], float]


@dataclass
class TrainResult:
    """What training gave.

    Attributes:
        seconds: wall time.
        steps: optimiser steps.
        history: one entry a logged step: ``step``, ``loss`` (nats per predicted token),
            ``predicted`` and ``measured`` (nats per source token, or None) and ``strength``; with a
            method ``extra`` too, what the method added to the loss (it is not in ``loss``).
    """

    seconds: float
    steps: int
    history: list[dict[str, float | None]] = field(default_factory=list)


def history_entry(
    step: int, logs: Mapping[str, Any], measured: float | None = None
) -> dict[str, Any]:
    """One entry of a `TrainResult.history`, of what the trainer has logged at a step."""
    return {
        "step": step,
        "loss": float(logs["loss"]),
        "predicted": logs.get("predicted_nats"),
        "measured": measured,
        "strength": logs.get("retention_strength"),
    }


class _Watch(TrainerCallback):
    """Keeps the history, and measures the true KL now and then."""

    def __init__(self, measure: Measure | None, every: int) -> None:
        self.measure, self.every = measure, every
        self.history: list[dict[str, float | None]] = []
        self.extra: Callable[[], float] | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        last = step >= state.max_steps
        due = self.measure is not None and (last or step % self.every == 0)
        measured = self.measure(kwargs["model"]) if due and self.measure else None
        entry = history_entry(step, logs, measured)
        if self.extra is not None:
            entry["extra"] = self.extra()
            entry["loss"] -= entry["extra"]
        self.history.append(entry)


def train(
    model: nn.Module,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    recipe: Recipe | None = None,
    source: Sources = "auto",
    method: Method | None = None,
    columns: slice | None = None,
    regression: bool = False,
    out: Path | None = None,
    measure: Measure | None = None,
    measure_every: int = 20,
    progress: bool = True,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains a PEFT model's adapter in place.

    Args:
        model: with a trainable adapter.
        examples: tokenised rows.
        config: batch size, epochs, learning rate and so on.
        recipe: turns retention on.
        source: of the recipe's KL or budget; see `RetentionCallback`.
        method: in place of a recipe, a method whose `before_task` gave the examples; its hooks
            are called as `retain.retention.method` says.
        columns: the outputs of a classifier that are trained on, with targets local to them; None
            for all. The other columns get no gradient, so without weight decay they stay.
        regression: the mean squared error on a single column, in place of cross-entropy; of a model
            whose head is one, always.
        out: folder for checkpoints; none are written without it.
        measure: gives the true KL in nats; called every `measure_every` steps and at the end.
        measure_every: steps.
        progress: show a bar.
        resume: go on from the last whole checkpoint in `out`, if there is one.
        identity: what tells the run from another, kept in its checkpoints' seals.

    Raises:
        TrainingError: the loss is not finite.
        SourceError: fewer examples than one batch, one without its class, or one that the model's
            tables have no place for.
        ConfigError: both a recipe and a method, or a regression on several columns.
        ModelError: a regression of several outputs.
    """
    whole = columns is None and method is None
    view = ModelView.of(model)
    values = view.regression
    regression = regression or (whole and values)
    _check_choice(recipe, method, columns, regression)
    if whole and values:
        check_single(model)
    check_fills(len(examples), config.batch_size)
    if regression and any(e.targets[0] != e.targets[0] for e in examples):
        raise SourceError(
            "a row to learn from has no label",
            got="no number",
            allowed="the value of each row",
            fix="leave out rows without a label",
        )
    own = whole and regression == values
    view.check(examples, labels=own)
    if not regression and any(not e.predict and e.targets[0] < 0 for e in examples):
        raise SourceError(
            "a row to learn from has no label",
            got="no label, or one below 0",
            allowed="the class of each row, from 0",
            fix="leave out rows without a label",
        )
    pad, multiple = view.pad, pad_multiple(model, examples, config.pad_multiple)
    watch = _Watch(measure, measure_every)
    callbacks: list[TrainerCallback] = [watch]
    if method is not None:
        callbacks.append(MethodCallback(method))
    if out is not None:
        callbacks.append(Seal(identity or {}))  # last, when the others have written

    def gathered(rows: list[tuple[int, Example]]) -> dict[str, Any]:
        found = [example for _, example in rows]
        numbers = [number for number, _ in rows]
        return {
            "batch": collate(found, pad, numbers, multiple),
            "heads": [head_of(example, columns, regression) for example in found],
        }

    scratch = None if out else tempfile.TemporaryDirectory()  # the trainer wants a folder
    folder = scratch.name if scratch else str(out)
    try:
        trainer = RowTrainer(
            model=model,
            args=_arguments(config, folder, out is not None, progress),
            train_dataset=Rows(examples),
            data_collator=gathered,
            callbacks=callbacks,
            method=method,
        )
        if recipe is not None:
            RetentionCallback.driving(recipe, source).attach(trainer)
        watch.extra = None if method is None else trainer.taken_extra
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(_Bar())
        began = time.perf_counter()
        last = last_whole(out) if resume and out else None
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = time.perf_counter() - began
        _check_learned(model, trainer.state.global_step)
    finally:
        if scratch:
            scratch.cleanup()
    return TrainResult(seconds, trainer.state.global_step, watch.history)


def _check_learned(model: nn.Module, steps: int) -> None:
    """Warns where an adapter is LoRA that has begun at 0 and is there still."""
    every = [p for name, p in model.named_parameters() if ".lora_B." in name]
    if every and not any(bool(p.detach().any()) for p in every):
        warn(
            f"the adapter has learned nothing in {steps} steps: every B is still 0; more steps, or "
            "a larger learning rate"
        )


def _check_choice(
    recipe: Recipe | None, method: Method | None, columns: slice | None, regression: bool
) -> None:
    if recipe is not None and method is not None:
        raise ConfigError(
            "a recipe and a method are two ways to say the same",
            got="both",
            allowed="one of them",
            fix="leave the recipe out",
        )
    if regression and columns is not None and columns.stop - columns.start != 1:
        raise ConfigError(
            "a regression has one output",
            got=f"{columns.stop - columns.start} columns",
            allowed="1",
            fix="give the task a single column",
        )


def _arguments(config: TrainConfig, folder: str, keep: bool, progress: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        **warmup(config.warmup),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=1,
        logging_first_step=True,
        save_strategy="steps" if keep and config.save_steps else "no",
        save_steps=config.save_steps or 500,
        seed=config.seed,
        data_seed=config.seed,
        report_to=config.report_to,
        remove_unused_columns=False,
        disable_tqdm=not progress,
        **checkpointing(config.gradient_checkpointing),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # the head's hook does not split over devices
    share, rest = divmod(config.micro_batch, arguments.world_size)
    if rest:
        raise ConfigError(
            "the rows of a forward pass do not divide among the processes",
            got=f"{config.micro_batch} rows, {arguments.world_size} processes",
            allowed=f"multiples of {arguments.world_size}",
            fix="change batch_size, accumulation or the number of processes",
        )
    arguments.per_device_train_batch_size = share
    return arguments


class _Bar(ProgressCallback):
    """The trainer's bar without a printed line for each log record."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            if "predicted_nats" in logs:
                shown["nats"] = f"{logs['predicted_nats']:.4f}"
            self.training_bar.set_postfix(shown)
