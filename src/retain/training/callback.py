"""Retention for `transformers.Trainer` and `trl.SFTTrainer`: one callback."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retain.curvature.curvature import Curvature
from retain.curvature.fit.source import source_examples
from retain.data.batches import Example
from retain.data.sources import Row
from retain.errors import ConfigError, RetainWarning, unknown
from retain.models.heads import is_causal
from retain.models.names import unwrap
from retain.retention.budget import check_budget
from retain.retention.laplace import Retention, check_strength
from retain.training.handling import (
    check_alone,
    check_gradients,
    check_trainer,
    check_trains,
    go_first,
    record,
)
from retain.training.held import Held, release_left
from retain.training.keeping import keep, kept_in
from retain.training.reading import check_loader
from retain.training.running import Running
from retain.training.start import AUTO, FILTER, Start, why_no_filter
from retain.types import UPDATES, Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RetentionCallback"]

Source = str | Path | Iterable[Row]

PROBE_ROWS, PROBE_TOKENS, PROBE_SEED = 8, 128, 1
"""Of the text that a budget is measured on; another seed than the curvature's own samples."""

NOTICED = 0.9
"""The share of the predicted nats below which a model that is moved back at the end is not the one
that was measured before."""


class RetentionCallback(TrainerCallback):
    """Adds the force once an optimiser step, after accumulation and clipping.

    To each record of the trainer's log it adds ``task_loss``, ``predicted_nats`` and
    ``retention_strength``, so every ``report_to`` backend gets them; with a budget also
    ``retention_correction``. What a budget has learned, and whether there is a filter, is kept in
    ``trainer_state.json`` of each checkpoint, and read from the one that is resumed, wherever it
    lies. A budget is settled by measuring before the last
    checkpoint and when training ends; earlier checkpoints may be above it.

    A training that breaks off (Ctrl-C, an exception) leaves nothing on the model: what holds A acts
    while the training runs alone, and a plain trainer afterwards is plain.

    Args:
        curvature: fitted on the trainer's model.
        strength: how many nats of task loss one nat of predicted forgetting weighs.
        update: ``gradient`` or ``proximal``; see `retain.retention.laplace`.
        budget: in place of a strength: nats of KL divergence per source token that may be spent.
            The strength is found in training, see `retain.retention.budget`.
        past: a second curvature, of the tasks before; see `retain.Retention`.
        start: what LoRA's A may read: ``"wiener"`` puts it behind a filter that passes what the
            training rows use and the source text does not; or a `retain.Start`; None, all. By
            default ``"auto"``, the recipe: the filter, wherever a fresh LoRA and the curvature
            allow it and the strength is not 0; else the force alone, with a warning, and
            `why_no_filter` says why.
        source: with a budget, text on which the true divergence is measured now and then: rows, a
            data set or a file as for `retain.fit_curvature`, ``"self"`` (the model samples it), or
            None to believe the prediction. By default ``"self"`` for a causal model.
        tokenizer: for text; by default the trainer's or the model's own.

    Raises:
        ConfigError: a value out of range, a source without a budget, or, when training begins, what
            does not go together with the trainer's settings, such as a second of these callbacks.
        ModelError: when training begins, of what nothing would hold: DeepSpeed, sharded weights,
            `modules_to_save`, labels that do not exclude each other; or a start for an adapter that
            is not fresh.
        SourceError: when training begins, if the source is missing or empty, or a row lies outside
            of the model's tables (see `retain.training.reading.check_loader`).
        MismatchError: when training begins, if the curvature is of another model.
        TrainingError: when a gradient is not a finite number.
    """

    def __init__(
        self,
        curvature: Curvature,
        strength: float = 10.0,
        update: Update = "gradient",
        *,
        budget: float | None = None,
        past: Curvature | None = None,
        start: Start | str | None = AUTO,
        source: Source | None = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if not isinstance(curvature, Curvature):
            raise ConfigError(
                "the curvature is none",
                got=f"{type(curvature).__name__} {str(curvature)[:60]!r}",
                allowed="what retain.fit_curvature or retain.load_curvature gives",
                fix="RetentionCallback(retain.load_curvature(path))",
            )
        if update not in UPDATES:
            raise unknown("update", update, UPDATES)
        check_strength(strength)
        if budget is not None:
            check_budget(budget)
        elif source is not None and not (isinstance(source, str) and source == "auto"):
            raise ConfigError(
                "a source is there to measure what a budget spends",
                got="a source without a budget",
                allowed="both, or neither",
                fix="budget=0.05",
            )
        self.curvature, self._strength, self.budget = curvature, strength, budget
        self.past, self.source, self.tokenizer = past, source, tokenizer
        self.start = Start(start) if isinstance(start, str) and start != AUTO else start
        self.why_no_filter: str | None = None
        self.update: Update = update
        self.retention: Retention | None = None
        self._held: Held | None = None
        self._nats: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_alone(self)
        check_trainer(args, kwargs.get("optimizer"))
        model: nn.Module = unwrap(kwargs["model"])
        resuming = state.global_step > 0
        check_loader(model, kwargs["train_dataloader"], args.seed)
        release_left(model, resuming=resuming)
        self._held = self._nats = self.why_no_filter = None
        try:
            self._begin(args, state, model, kwargs)
        except BaseException:  # nothing is left half held
            release_left(model, resuming=resuming)
            raise
        go_first(self)

    def _begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, kwargs: dict[str, Any]
    ) -> None:
        """Holds the model from now on."""
        resuming = state.global_step > 0
        check_trains(model)
        needed = self.start is not None or self.budget is not None
        kept = kept_in(state, needed) if resuming else {}
        start = self._chosen(model, kwargs["train_dataloader"], kept if resuming else None)
        if start is not None:
            self._held = start.begin(
                model,
                self.curvature,
                kwargs["train_dataloader"],
                seed=args.seed,
                past=self.past,
                resuming=resuming,
                first=kept.get("first", 0),
            )
            self._held.guard(Running())
        self.retention = Retention(
            model,
            self.curvature,
            self._strength,
            budget=self.budget,
            past=self.past,
            probe=self._probe(model, kwargs.get("processing_class")),
            update=self.update,
            resuming=resuming,
        )
        if self._held is not None and self._held.block is not None:
            if self.update == "proximal":
                raise ConfigError(
                    "a proximal step moves all rows of the adapter",
                    got="an adapter of which some rows are to stay",
                    allowed="update='gradient'",
                    fix="leave update out",
                )
            self.retention.only(self._held.rows)
            with self._still():
                moved = not resuming and self.retention.make_room()
            if moved:
                self._held.renew()
        if self.retention.budget is not None and "strength" in kept:  # it had one before
            self.retention.budget.restore(kept)

    def _chosen(self, model: nn.Module, loader: Any, kept: dict[str, Any] | None) -> Start | None:
        """The start; of a run that goes on, what it was when it began."""
        if not isinstance(self.start, str):
            return self.start
        if kept is not None:
            return Start(FILTER) if kept.get("start") == FILTER else None
        if not self._strength and self.budget is None:
            self.why_no_filter = "the strength is 0"
            return None
        self.why_no_filter = why_no_filter(model, self.curvature, self.past, loader)
        if self.why_no_filter is None:
            return Start(FILTER)
        _warn(f"held by the force alone, without a filter: {self.why_no_filter}")
        return None

    def _still(self) -> AbstractContextManager[None]:
        """While the retention moves weights: what the start holds stays."""
        return nullcontext() if self._held is None else self._held.still()

    @property
    def strength(self) -> float:
        """What one predicted nat weighs now."""
        return self._strength if self.retention is None else self.retention.strength

    def _probe(self, model: nn.Module, trainers: Any) -> Sequence[Example]:
        """A few rows to measure the true divergence on."""
        if self.budget is None or self.source is None:
            return ()
        causal, source = is_causal(model), self.source
        if isinstance(source, str) and source == "auto":
            if not causal:
                _warn("the budget is of predicted nats: a classifier writes no text to measure on")
                return ()
            source = "self"
        tokenizer = self.tokenizer or getattr(model, "retain_tokenizer", None) or trainers
        return source_examples(
            model, source, tokenizer, causal,
            rows=PROBE_ROWS, max_length=PROBE_TOKENS, batch_size=1, seed=PROBE_SEED, partial=None,
            progress=False,
        )  # fmt: skip

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.retention is not None
        budget, held = self.retention.budget, self._held
        kept = {
            "start": FILTER if held is not None and held.filter is not None else None,
            "first": 0 if held is None else held.rows.start or 0,
        }
        keep(state, kept | ({} if budget is None else budget.state()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.retention is not None
        before = self.retention.predicted()
        with self._still():
            self.retention.finish()
        left = self.retention.predicted()
        if left < NOTICED * before:  # it has stopped early, or its best checkpoint was an early one
            _warn(
                f"the model was moved back to its budget, from {before:.2g} to {left:.2g} nats "
                "as predicted: evaluate and save it anew, for its checkpoints are above the budget"
            )
        if self._held is not None:
            self._held.release()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._held is not None:
            self._held.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.retention is not None
        if not args.fp16:  # a gradient scaler skips such steps by itself
            check_gradients(self.retention.parameters(), state.global_step + 1)
        if self.update == "gradient":
            with self._still():
                self._nats = self.retention.add_force()
        if self._held is not None:
            self._held.end_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.retention is not None
        skipped = getattr(kwargs["optimizer"], "step_was_skipped", False)
        if self._held is not None:
            self._held.after_step()
        with self._still():
            if self.update == "proximal" and not skipped:
                self._nats = self.retention.apply_proximal(kwargs["optimizer"])
            if state.global_step + 1 >= state.max_steps:  # before the last evaluation
                self.retention.finish()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._nats is None:
            return
        added = {
            "task_loss": logs["loss"],
            "predicted_nats": self._nats,
            "retention_strength": self.strength,
        }
        if self.retention is not None and self.retention.budget is not None:
            added["retention_correction"] = self.retention.budget.correction
        record(state, logs, added)


def _warn(text: str) -> None:
    """Says once in what lesser way the run is held."""
    warnings.warn(text, RetainWarning, stacklevel=3)
