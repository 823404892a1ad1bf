"""A callback for trainers that take callbacks before there is a model to fit a curvature on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from retain.curvature.artifact import curvature_file
from retain.curvature.curvature import Curvature, load_curvature
from retain.curvature.fit.fit import fit_curvature
from retain.curvature.fit.settings import FitSettings
from retain.data.sources import Row
from retain.errors import ConfigError, unknown
from retain.models.heads import is_causal
from retain.models.names import unwrap
from retain.retention.filter import Filter
from retain.retention.output_kl import OutputKL
from retain.retention.recipe import Recipe
from retain.training.callback import RetentionCallback
from retain.training.handling import no_smaller_batches
from retain.types import STRENGTH, Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FILE", "FittingCallback"]

FILE = "retention.safetensors"
"""The curvature's file in the trainer's output folder, which a training that is resumed reads."""


class FittingCallback(RetentionCallback):
    """A `retain.RetentionCallback` that fits its curvature itself when training begins.

    For trainers that are given their callbacks before they load a model, such as LLaMA-Factory. The
    curvature is of the model that the trainer has, with its fresh adapter. Where checkpoints are
    written it is kept beside them (`FILE`), and a training that is resumed reads it from there.

    Args:
        source: text of what is to be kept; see `retain.fit_curvature`. With a budget or `kl`, the
            true divergence is measured on it too, so it is no iterator then; of a classifier, whose
            new head has nothing to be measured from, the prediction is believed, and a warning says
            so.
        curvature: in place of `source`, a curvature of this base model, or its file. A `source`
            beside it that is not ``"self"`` is what a budget or `kl` is measured on; without one
            see `retain.RetentionCallback`.
        fit: options of `retain.fit_curvature`, such as ``{"structure": "kfac", "rows": 64}``.
        strength: see `retain.RetentionCallback`; so are `update`, `budget`, `parts` and `filter`.
        update: how the force acts.
        budget: nats per source token (of a classifier per row) that may be spent.
        confidence: with which it is to hold on text like that which is measured.
        parts: of the recipe.
        filter: options of the filter.
        kl: nats of task loss that one nat of the true divergence on the source weighs.
        tokenizer: for text; by default the trainer's own.

    Raises:
        ConfigError: an option that there is not, of `fit` too, a value out of range, or an iterator
            that would be read twice; or, when a training is resumed, a curvature that is not where
            its first part has left it.
        ArtifactError: no such file of a curvature. What `retain.RetentionCallback` and
            `retain.fit_curvature` raise, when training begins.
    """

    def __init__(
        self,
        source: str | Path | Iterable[Row] = "self",
        *,
        curvature: Curvature | str | Path | None = None,
        fit: Mapping[str, Any] | None = None,
        strength: float = STRENGTH,
        update: Update = "gradient",
        budget: float | None = None,
        confidence: float | None = None,
        parts: Sequence[str] | None = None,
        filter: Filter | None = None,
        kl: float | OutputKL = 0.0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if isinstance(source, str) and not source.strip():  # a shell's unset variable
            raise ConfigError(
                "the source is an empty text",
                got=repr(source),
                allowed="a file, a folder, a data set, rows, or self",
                fix="name the text that is to be kept; 'self' for text that the model writes",
            )
        recipe = Recipe(
            None, strength, budget=budget, confidence=confidence, parts=parts, update=update,
            filter=filter, kl=kl,
        )  # fmt: skip
        readings = [curvature is None, budget is not None, recipe.kl.weight > 0]
        if isinstance(source, Iterator) and sum(readings) > 1:
            raise ConfigError(
                "the source is to be read more than once",
                got=f"a {type(source).__name__}, which gives its rows once",
                allowed="a file, a folder, a data set, a list of rows, or self",
                fix="list(rows), to fit and to measure on the same",
            )
        if curvature is not None and isinstance(source, str) and source == "self":
            source = "auto"
        self._drive(recipe, source, tokenizer)
        self.given, self.fit = curvature, _options(fit or {})
        if isinstance(curvature, str | Path):
            curvature_file(curvature)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = unwrap(kwargs["model"])
        if self.recipe.curvature is None:
            tokenizer = self.tokenizer or kwargs.get("processing_class")
            with no_smaller_batches(args):
                self.recipe.curvature = self._curvature(args, state, model, tokenizer)
        if not is_causal(model):
            self.source = "auto"  # a budget is of predicted nats, and a warning says so
        super().on_train_begin(args, state, control, **kwargs)

    def _curvature(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Curvature:
        if isinstance(self.given, Curvature):
            return self.given
        if self.given is not None:
            return load_curvature(self.given)
        kept = Path(args.output_dir or ".") / FILE
        if state.global_step:
            if not kept.is_file():
                raise ConfigError(
                    "the curvature of the training that goes on is missing",
                    got=f"no file {kept}",
                    allowed="the one that its first part wrote, for a tuned model has another",
                    fix=f"curvature=PATH of a copy, or put it back as {kept}",
                )
            return load_curvature(kept)
        source: Any = "self" if self.source is None else self.source
        found = fit_curvature(model, source, tokenizer=tokenizer, **self.fit)
        if args.should_save and args.save_strategy != "no":
            found.save(kept)
        return found


def _options(fit: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `fit_curvature`, checked before there is a model.

    Raises:
        ConfigError: one that there is not, or that is given elsewhere; or a value out of range.
    """
    found = dict(fit)
    names = inspect.signature(fit_curvature).parameters.keys() - {"model", "source", "tokenizer"}
    for name in found.keys() - names:
        raise unknown("option of fit", name, names)
    known = inspect.signature(FitSettings).parameters
    FitSettings(**{name: value for name, value in found.items() if name in known})
    return found
