"""Retention for `transformers.Trainer` and `trl.SFTTrainer`: one callback."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from retain.curvature.curvature import Curvature
from retain.data.batches import Example
from retain.errors import ConfigError, warn
from retain.models.names import unwrap
from retain.models.processes import several
from retain.models.view import ModelView
from retain.retention.facts import changed, settings_of
from retain.retention.filter import Filter
from retain.retention.force import Force
from retain.retention.given import no_curvature
from retain.retention.hooks import always
from retain.retention.loader import is_readable, loader_examples
from retain.retention.marks import release_left
from retain.retention.named import Budgets, Curvatures, check_names
from retain.retention.output_kl import OutputKL
from retain.retention.recipe import Recipe
from retain.retention.telling import tell_head
from retain.retention.watch import Watched
from retain.training.card import Card
from retain.training.handling import (
    check_alone,
    check_trainer,
    check_trains,
    go_first,
    no_smaller_batches,
    not_finite,
    record,
    watched_gradients,
)
from retain.training.keeping import keep, keep_tensors, kept_in, kept_tensors
from retain.training.logged import last_line, step_line
from retain.training.probes import Sources, is_auto, is_elsewhere, kl_rows, probe_of
from retain.training.reading import check_loader
from retain.training.renamed import parts_of
from retain.training.running import (
    Running,
    begun_anew,
    calling_handler,
    resumed_from,
    saved_in,
    train_call,
)
from retain.training.zero import ZeroStep, zero_of
from retain.types import STRENGTH, Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RetentionCallback"]

NOTICED = 0.9
"""The share of the predicted nats below which a model that is moved back at the end is not the one
that was measured before."""


class RetentionCallback(TrainerCallback):
    """Keeps a model near what it knew while a trainer fine-tunes it: two lines in a working script.

    It drives the recipe (`retain.retention.recipe`): a filter on what LoRA's A may read, and a
    force that pulls the weights back, once an optimiser step, after accumulation and clipping.

    To each record of the trainer's log it adds ``task_loss``, ``predicted_nats`` and
    ``retention_strength``, so every ``report_to`` backend gets them; with a budget also
    ``retention_correction``, and with named ones ``predicted_nats``, ``strength`` and
    ``correction`` of each, such as ``strength/facts``, and in its last line ``budget``,
    ``predicted_nats`` and ``measured_nats`` of each (and ``bound_nats``); with `kl` also
    ``source_kl``, once it has been measured. What a budget has learned, and whether there is a
    filter, is kept in ``trainer_state.json`` of each checkpoint, and read from the one that is
    resumed, wherever it lies; of a filtered A in bfloat16, or that proximal steps move,
    ``filtered.safetensors`` beside it has the rest. A budget is settled by measuring before the
    last checkpoint and when training ends; earlier checkpoints may be above it, and so may weights
    that another callback puts in when training ends (docs/faq.md).

    Checkpoints and the output folder have a section in their ``README.md``, the model card, which
    says what held the model; see `write_card` for other folders.

    A training that breaks off (Ctrl-C, an exception) leaves nothing that acts on the model: what
    holds A acts while the training runs alone, and a plain trainer afterwards is plain. Before the
    first step A has been filtered, which may make it longer or shorter. Where nothing was learned,
    it is put back as it was: when the training ends; of one that broke off, when the next training
    with a callback begins, and, if the callback is attached (`attach`) and the process alone, at
    once.

    Args:
        curvature: fitted on the trainer's model; or several by name, each on its own source, with
            a budget each.
        strength: how many nats of task loss one nat of predicted forgetting weighs.
        update: ``gradient`` or ``proximal``; see `retain.retention.force`.
        budget: in place of a strength: nats of KL divergence per source token (of a classifier per
            row) that may be spent. The strength is found in training, see
            `retain.retention.budget`. With ``{"facts": 0.02, "code": 0.01}`` each source has its
            own bound and strength.
        confidence: how sure it is to be, such as 0.95, that a budget also holds on other text like
            the rows that it is measured on. What counts is then the one-sided upper bound of the
            measured nats, from their spread over these rows (Student's t), and less is spent. By
            default their mean counts, so about every second such text is above the budget.
        past: the curvature of the tasks before; see `retain.retention.recipe.Recipe`.
        parts: of the recipe (`retain.retention.recipe`), those that act: ``rows``, ``filter``,
            ``force``. By default all, the filter wherever a fresh LoRA and the curvature allow it
            and the strength is not 0; else the force alone, with a warning, and `why_no_filter`
            says why. (A new head is fitted by `retain.fit_head`, before the curvature.)
        filter: options of the filter.
        kl: nats of task loss that one nat of the true divergence on rows of the source weighs,
            every fourth step, or its options (`retain.OutputKL`); of chats the beginnings of
            answers. 0 for none.
        start: before 0.2, in place of `parts`: ``"wiener"`` or None.
        source: with a budget or `kl`, text on which the true divergence is measured: rows, a data
            set or a file as for `retain.fit_curvature`, ``"self"`` (the model samples it), or
            None to believe the prediction. By default ``"self"`` for a causal model; where the
            curvature was fitted on other text a warning says so. Of named budgets by name; by
            default ``"self"`` for those whose curvature was fitted on it.
        tokenizer: for text; by default the trainer's or the model's own.

    Raises:
        ConfigError: a value out of range, a source without a budget, names that differ, or, when
            training begins, what does not go together with the trainer's settings, such as a second
            of these callbacks.
        ModelError: when training begins, of what nothing would hold: ZeRO-3, FSDP1,
            `modules_to_save`, labels that do not exclude each other; or a start for an adapter that
            is not fresh.
        SourceError: when training begins, if the source is missing or empty, or a row lies outside
            of the model's tables (see `retain.training.reading.check_loader`).
        MismatchError: when training begins, if the curvature is of another model.
        TrainingError: when a gradient is not a finite number.
    """

    def __init__(
        self,
        curvature: Curvatures,
        strength: float = STRENGTH,
        update: Update = "gradient",
        *,
        budget: Budgets | None = None,
        confidence: float | None = None,
        past: Curvature | None = None,
        parts: Sequence[str] | None = None,
        filter: Filter | None = None,
        kl: float | OutputKL = 0.0,
        start: Any = "auto",
        source: Sources = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if curvature is None:
            raise no_curvature(curvature)
        if start is None or start != "auto":
            parts, filter = parts_of(start, filter)
        recipe = Recipe(
            curvature, strength, parts=parts, budget=budget, confidence=confidence, past=past,
            update=update, filter=filter, kl=kl,
        )  # fmt: skip
        auto = is_auto(source)
        if budget is None and not recipe.kl.weight and source is not None and not auto:
            raise ConfigError(
                "a source is there to measure what a budget spends, or a KL",
                got="a source without a budget",
                allowed="both, or neither",
                fix="budget=0.05, or kl=1",
            )
        if isinstance(budget, Mapping) and source is not None and not auto:
            check_names(curvature, budget, sources=source)
        self._drive(recipe, source, tokenizer)

    def _drive(
        self, recipe: Recipe, source: Sources, tokenizer: PreTrainedTokenizerBase | None,
        *, driven: bool = False,
    ) -> None:  # fmt: skip
        self.recipe, self.source, self.tokenizer = recipe, source, tokenizer
        self._handler: CallbackHandler | None = None  # while a trainer it is attached to trains
        self._call: weakref.ref[Any] | None = None  # of the trainer's `train` that goes on
        self._zero: ZeroStep | None = None
        self._settings: dict[str, Any] = {}
        self._nats: float | None = None
        self._card = Card(recipe, alone=driven)

    @classmethod
    def driving(cls, recipe: Recipe, source: Sources = "auto") -> RetentionCallback:
        """A callback that drives a recipe which is there already."""
        found = cls.__new__(cls)
        found._drive(recipe, source, None, driven=True)
        return found

    @property
    def force(self) -> Force | None:
        """What pulls, once training has begun."""
        return self.recipe.force

    @property
    def retention(self) -> Force | None:
        """Before 0.2, what is now `force`."""
        warnings.warn("retention is now force", DeprecationWarning, stacklevel=2)
        return self.force

    @property
    def start(self) -> Filter | None:
        """Before 0.2, what A may read: the filter's options, or None without a filter."""
        return self.recipe.options if "filter" in self.recipe.parts else None

    @property
    def curvature(self) -> Curvatures | None:
        """Of the source text, or several by name."""
        return self.recipe.curvature

    @property
    def why_no_filter(self) -> str | None:
        """Why the filter was left out, once training has begun; None where it acts."""
        return self.recipe.why_no_filter

    @property
    def strength(self) -> float:
        """What one predicted nat weighs now, or one on all of several sources."""
        return self.recipe.weight()

    def attach(self, trainer: Trainer) -> RetentionCallback:
        """Puts the callback in front of a trainer's others, in place of ``add_callback``.

        Args:
            trainer: any `transformers.Trainer`.

        Raises:
            ConfigError: the trainer has another one.
        """
        handler = trainer.callback_handler
        check_alone(self, handler, more=1)
        handler.callbacks.insert(0, self)
        train = trainer.train

        @functools.wraps(train)
        def released(*args: Any, **kwargs: Any) -> Any:
            self._handler = trainer.callback_handler
            try:
                return train(*args, **kwargs)
            except BaseException:
                if trainer.model is not None and not several():  # which may not all break off
                    release_left(unwrap(trainer.model))
                raise
            finally:  # whatever broke it off
                self._handler = None
                self.recipe.release()
                self._let_go()

        trainer.train = released  # type: ignore[method-assign]
        return self

    def write_card(self, folder: str | Path) -> None:
        """Says in a folder's model card what held the model, once training has begun.

        It is for folders that are written later than the training ends; what a trainer's
        ``create_model_card`` or ``push_to_hub`` writes takes the place of an earlier card.

        Args:
            folder: of a model or adapter; what its ``README.md`` says already stays.

        Raises:
            ConfigError: training has not begun.
            OutputError: the card is damaged, or the folder cannot be written.
        """
        self._card.write(folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        handler = self._handler or calling_handler()
        check_alone(self, handler)
        check_trainer(args, kwargs.get("optimizer"), zero=True)
        model: nn.Module = unwrap(kwargs["model"])
        resuming = state.global_step > 0
        loader = kwargs["train_dataloader"]
        check_loader(model, loader, args.seed)
        check_trains(model)
        self._nats = None
        self._card.begin(model)
        recipe = self.recipe
        needed = recipe.budget is not None or "filter" in recipe.parts
        view = ModelView(model, self.tokenizer)
        view.tokenizer = view.tokenizer or kwargs.get("processing_class")

        def read(count: int, seed: int) -> list[Example]:
            return loader_examples(loader, count, seed, view.causal)

        zero = zero_of(kwargs.get("optimizer"))
        kept: dict[str, Any] | None = None
        tensors: dict[str, Tensor] | None = None
        call = train_call()
        same = self._call is not None and self._call() is call is not None
        if args.auto_find_batch_size and (same or not resuming) and recipe.is_on(model):
            # It begins once more, with smaller batches and what the model has learned.
            kept, tensors = recipe.progress(), recipe.kept()
        elif resuming:
            kept, tensors = kept_in(state, needed), kept_tensors(resumed_from())
        elif begun_anew():
            tell_head(model, recipe.curvature)
        self._call = None if call is None else weakref.ref(call)
        self._settings = settings_of(recipe)
        then = (kept or {}).get("held")
        if isinstance(then, dict) and (other := changed(then, self._settings)):
            warn(f"the checkpoint was held in another way, and goes on in this: {other}")
        self._let_go()
        optimizer = kwargs.get("optimizer") if zero is None else zero.optimizer
        if optimizer is not None:
            recipe.check_optimizer(optimizer)
        if zero is not None:
            self._zero = ZeroStep(zero, recipe, model, lambda: self._watched(args, state, model))
        with no_smaller_batches(args), self._whole():
            recipe.begin(
                model,
                read if is_readable(loader) else None,
                seed=args.seed,
                probe=probe_of(recipe, view, self.source),
                source=kl_rows(recipe, view, self.source),
                elsewhere=is_elsewhere(recipe, self.source),
                tokenizer=view.tokenizer,
                progress=kept,
                kept=tensors,
            )
        if self._zero is not None:
            recipe.by_hand()
        recipe.guard(Running() if self._handler is None else always)
        go_first(self, handler)

    def _let_go(self) -> None:
        """DeepSpeed steps as it did before."""
        if self._zero is not None:
            self._zero.release()
        self._zero = None

    def _whole(self) -> AbstractContextManager[None]:
        """Inside it the weights are as the optimiser has them, and may be changed."""
        return nullcontext() if self._zero is None else self._zero.whole()

    def _watched(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module
    ) -> Watched | None:
        if args.fp16:  # a gradient scaler skips such steps by itself
            return None
        return watched_gradients(model.parameters(), state.global_step + 1)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recipe.before_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._zero is None:
            watched = self._watched(args, state, unwrap(kwargs["model"]))
            self._nats = self.recipe.before_optimizer(watched)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        if self._zero is not None:
            if self._zero.left_out() and not args.fp16:
                raise not_finite(state.global_step + 1)
            self._nats = None if self._zero.left_out() else self._zero.nats
        else:
            skipped = bool(getattr(optimizer, "step_was_skipped", False))
            nats = self.recipe.after_step(optimizer, skipped=skipped)
            self._nats = self._nats if nats is None else nats
        if state.global_step + 1 >= state.max_steps:  # before the last evaluation
            with self._whole():
                self.recipe.finish()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        keep(state, self.recipe.progress() | {"held": self._settings})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with self._whole():  # with all processes
            kept = self.recipe.kept()
        if not args.should_save:
            return
        folder = saved_in(args) / f"checkpoint-{state.global_step}"
        if kept:
            keep_tensors(folder, kept)
        self._card.written(folder, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        before = self.recipe.predicted()
        with self._whole():
            self.recipe.end()
        self._let_go()
        self._call = None
        left = self.recipe.predicted()
        last = state.log_history[-1] if state.log_history else {}
        if "train_loss" in last:  # it was written before the end
            last.update(last_line(self.recipe))
        if left < NOTICED * before:  # it has stopped early, or its best checkpoint was an early one
            warn(
                f"the model was moved back to its budget, from {before:.2g} to {left:.2g} nats "
                "as predicted: evaluate and save it anew, for its checkpoints are above the budget"
            )
        if args.should_save:
            self._card.written(saved_in(args), args, state, ended=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "train_loss" in logs:
            record(state, logs, last_line(self.recipe))
        elif logs is not None and "loss" in logs and self._nats is not None:
            record(state, logs, step_line(self.recipe, logs["loss"], self._nats))
