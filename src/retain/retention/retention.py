"""The recipe in a plain PyTorch loop."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retain.curvature.curvature import Curvature
from retain.data.batches import Example
from retain.data.encoding import Loss, encode
from retain.data.messages import native
from retain.errors import ConfigError, RetainWarning
from retain.models.heads import is_causal
from retain.retention.filter import Filter
from retain.retention.loader import RowReader, loader_examples, reader_of
from retain.retention.named import Budgets, Curvatures
from retain.retention.optimizers import check_steps
from retain.retention.output_kl import OutputKL
from retain.retention.recipe import Probe, Recipe
from retain.retention.stepping import scaler_of, step_each
from retain.types import STRENGTH, Update

__all__ = ["Retention"]


class Retention:
    """Holds a model near what it knew while a plain loop trains it::

        retention = retain.Retention(model, curvature, rows=loader)
        for batch in loader:
            model(**batch).loss.backward()
            retention.step(optimizer)  # in place of optimizer.step()
            optimizer.zero_grad()
        retention.finish()

    It drives the recipe (`retain.retention.recipe`), as `retain.RetentionCallback` does in a
    trainer. Until `finish`, what holds the model is on it.

    Args:
        model: a PEFT model with LoRA; or, for the force alone, one whose weights train.
        curvature: of the source text, fitted on this model; or several by name.
        strength: how many nats of task loss one nat of predicted forgetting weighs.
        rows: what is learned, which the filter reads: a `torch.utils.data.DataLoader` whose batches
            have ``input_ids``, or tokenised rows: dictionaries with ``input_ids``, a list of
            numbers, and ``labels`` where they have some. Without it there is no filter.
        parts: of the recipe; all by default.
        budget: in place of the strength, nats per source token (of a classifier per row) that may
            be spent; of several curvatures by the same names.
        confidence: with which a budget is to hold on text like the probe, such as 0.95; see
            `retain.RetentionCallback`.
        past: the curvature of the tasks before, around the model's present weights.
        probe: tokenised source text, on which a budget is measured, by name where budgets have
            names; without it the prediction is believed.
        update: ``gradient`` or ``proximal``.
        filter: options of the filter.
        kl: nats of task loss that one nat of the true divergence on `source` weighs, every fourth
            step; or its options (`retain.OutputKL`). 0 for none.
        source: tokenised source text, for `kl`.
        seed: of the choice of rows.
        progress: of a loop that goes on, what `progress` gave.
        kept: of one, what `kept` gave.

    Attributes:
        recipe: what is driven; after training, ``recipe.consolidate(model, rows)`` gives the `past`
            for the next task.

    Raises:
        ConfigError, ModelError, MismatchError, SourceError: see `Recipe` and `Recipe.begin`.
    """

    def __init__(
        self,
        model: nn.Module,
        curvature: Curvatures | None = None,
        strength: float = STRENGTH,
        *,
        rows: Any = None,
        parts: Sequence[str] | None = None,
        budget: Budgets | None = None,
        confidence: float | None = None,
        past: Curvature | None = None,
        probe: Probe = (),
        update: Update = "gradient",
        filter: Filter | None = None,
        kl: float | OutputKL = 0.0,
        source: Sequence[Example] = (),
        seed: int = 0,
        progress: dict[str, Any] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_steps(model)
        self._stepped = progress is not None
        self._weights: set[int] = set()  # ``id`` of those that the first step's optimisers train
        self.recipe = Recipe(
            curvature, strength, parts=parts, budget=budget, confidence=confidence, past=past,
            update=update, filter=filter, kl=kl,
        )  # fmt: skip
        reader = _reader(model, rows, filters="filter" in self.recipe.parts)
        self.recipe.begin(
            model, reader, seed=seed, probe=_probe(model, probe),
            source=_tokenised(model, source, "source"), progress=progress, kept=kept,
        )  # fmt: skip

    @property
    def strength(self) -> float:
        """What one predicted nat weighs now."""
        return self.recipe.weight()

    @property
    def why_no_filter(self) -> str | None:
        """Why the filter is left out; None where it acts."""
        return self.recipe.why_no_filter

    def predicted(self) -> float:
        """Predicted nats per source token at the present weights; 0 without a force."""
        return self.recipe.predicted()

    def step(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        scaler: torch.amp.GradScaler | None = None,
    ) -> float | None:
        """Steps the optimiser with the recipe applied, in place of ``optimizer.step()``.

        Args:
            optimizer: that trains the model; where several do, all in one list, for each call
                applies the recipe anew.
            scaler: of float16 gradients: it unscales them, unless it has for clipping, steps in
                place of ``scaler.step`` and is updated. An optimiser of accelerate's has its own.

        Returns:
            Predicted nats per source token (before the step for ``gradient``); None without a
            force, and where an optimiser of accelerate's waits for the last of the batches that it
            accumulates (``accelerator.accumulate``): then nothing is done.

        Raises:
            ModelError: an optimiser of DeepSpeed, or one that computes gradients inside its step.
            ConfigError: an optimiser that trains none of the weights of the first step's; with
                ``proximal``, one that is neither torch's SGD nor like Adam; a schedule-free one,
                but beside a strength without a filter; one with ``maximize=True``.
            TrainingError: the weights have left the finite numbers.
        """
        every: list[Any] = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        for each in every:
            check_steps(each)
            self.recipe.check_optimizer(each)
        self._check_together(every)
        self._stepped = True
        waits = [getattr(each, "gradient_state", None) for each in every]
        if not all(getattr(state, "sync_gradients", True) for state in waits):
            return None
        scaled = [(each, *scaler_of(each, scaler)) for each in every]
        for _, by, known in scaled:
            if by is not None:
                with suppress(RuntimeError):  # they are unscaled already
                    by.unscale_(known)
        nats = self.recipe.before_optimizer()
        stepped = step_each(scaled)
        after = self.recipe.after_step(*stepped, skipped=not stepped)
        return nats if after is None else after

    def _check_together(self, optimizers: Sequence[Any]) -> None:
        """Refuses a call for each of several optimisers, which would apply the recipe to each."""
        groups = (group for each in optimizers for group in each.param_groups)
        trained = (id(weight) for group in groups for weight in group["params"])
        if not self._weights:
            self._weights.update(trained)
        elif self._weights.isdisjoint(trained):
            raise ConfigError(
                "each call of retention.step applies the force anew",
                got="an optimiser that trains none of the weights of the first step's",
                allowed="one call a step, with all of its optimisers in a list",
                fix="retention.step([first, second])",
            )

    def progress(self) -> dict[str, Any]:
        """What a checkpoint of the loop is to keep, as plain data for JSON."""
        return self.recipe.progress()

    def kept(self) -> dict[str, Tensor]:
        """What it is to keep as tensors, for safetensors; empty but for a filtered A
        that is rounded, or that proximal steps move.
        """
        return self.recipe.kept()

    def finish(self) -> None:
        """When training has ended: takes back what is above a budget, and lets the model go.

        Where nothing was learned, A is what it was before its filter again; so a checkpoint to go
        on from is written before.

        Warns:
            RetainWarning: `step` was never called.
        """
        if not self._stepped:
            warnings.warn(
                "retention.step(optimizer) was never called, so no step of the training was held; "
                "it takes the place of optimizer.step()",
                RetainWarning,
                stacklevel=2,
            )
        self.recipe.end()


def _reader(model: nn.Module, rows: Any, *, filters: bool) -> RowReader | None:
    if rows is None:
        return None
    if hasattr(rows, "collate_fn"):
        causal = is_causal(model)
        return lambda count, seed: loader_examples(rows, count, seed, causal)
    found = _tokenised(model, rows, "rows")
    if not found and filters:
        raise ConfigError(
            "there are no rows that the filter could read", got="rows=[]",
            allowed="1 or more, or none at all for the force alone",
            fix="rows=loader, the DataLoader of the training; or leave rows out",
        )  # fmt: skip
    return reader_of(found)


def _probe(model: nn.Module, probe: Any) -> Probe:
    if isinstance(probe, Mapping):
        return {name: _tokenised(model, rows, "probe") for name, rows in probe.items()}
    return _tokenised(model, probe, "probe")


def _tokenised(model: nn.Module, rows: Any, name: str) -> list[Example]:
    """Rows that were tokenised by whoever gives them, as the package has them."""
    if rows is None:
        return []
    given: list[Any] = [rows] if isinstance(rows, str | Mapping) else list(rows)
    found = [row for row in given if isinstance(row, Example)]
    plain = [_plain(row, name) for row in given if not isinstance(row, Example)]
    if not plain:
        return found
    longest = max(len(row["input_ids"]) for row in plain)
    loss: Loss = "assistant" if name == "rows" else "source"
    causal = is_causal(model)
    return found + encode(plain, None, max_length=max(longest, 2), causal=causal, loss=loss)


def _plain(row: Any, name: str) -> dict[str, Any]:
    """One tokenised row, with lists for tensors of one dimension; anything else is refused."""
    told = type(row).__name__
    if isinstance(row, Mapping):
        found = {key: native(value) for key, value in row.items()}
        ids = found.get("input_ids")
        if isinstance(ids, Sequence) and all(isinstance(i, int) for i in ids):
            return found
        told += f" with {', '.join(map(str, row))}"
    raise ConfigError(
        f"{name} takes tokenised rows", got=told,
        allowed="a dictionary for each row, whose input_ids are a list of token numbers"
        + (", or a DataLoader" if name == "rows" else ""),
        fix="rows=loader, the DataLoader of the training" if name == "rows"
        else f"{name}=[{{'input_ids': ids}} for ids in tokenizer(texts)['input_ids']]",
    )  # fmt: skip
