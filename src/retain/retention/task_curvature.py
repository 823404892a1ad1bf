"""The curvature of rows at a model's present weights, as of a task that it has learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from retain.curvature.curvature import Curvature
from retain.curvature.fit.fit import fit_curvature
from retain.curvature.info import CurvatureInfo
from retain.data.batches import Example
from retain.errors import ConfigError
from retain.models.heads import is_causal
from retain.models.view import ModelView
from retain.retention.state import choose
from retain.types import FactorRank, Structure

__all__ = ["answering", "fit_rows", "task_curvature"]

TASK_ROWS, LABELLED = 32, 128
"""Rows of a task on which its own curvature is measured: of a decoder, which predicts at many
positions of a row, and of a classifier, which predicts once (docs/log.md, "What a task costs")."""


def task_curvature(
    model: nn.Module,
    rows: Sequence[Example | Mapping[str, Any]],
    like: CurvatureInfo | None,
    *,
    columns: slice | None = None,
    seed: int = 0,
    rank: FactorRank = "auto",
    progress: bool = False,
) -> Curvature:
    """The curvature of some rows of a task, fitted as another one was.

    Args:
        model: that has learned it.
        rows: as `Recipe.consolidate` takes them.
        like: of the other one, the source's; None where there is none.
        columns: the outputs of a classifier that answer them; None for all.
        seed: of the choice of rows, and of label draws.
        rank: of `retain.fit_curvature`, where there is no other.
        progress: show a bar.
    """
    most = TASK_ROWS if is_causal(model) else LABELLED
    every: Any = rows
    if not (rows and isinstance(rows[0], Example)):
        every = ModelView.of(model).read(every, most, max_length=256, seed=seed)
    chosen = choose(every, most, seed)
    structure: Structure = "kfac"
    options: dict[str, Any] = {"rank": rank}
    if like is not None:
        structure = like.structure
        options = {
            "space": like.space, "fisher": like.fisher, "rank": like.rank,
            "samples": like.samples, "temperature": like.temperature,
        }  # fmt: skip
    options["divide"] = False  # a process that keeps the state may be alone with it
    return fit_rows(
        model, chosen, structure, columns=columns, seed=seed, progress=progress, **options
    )


def fit_rows(
    model: nn.Module,
    rows: Sequence[Example],
    structure: Structure = "kfac",
    *,
    columns: slice | None = None,
    batch_size: int = 8,
    **options: Any,
) -> Curvature:
    """The curvature of all these rows at the model's present weights, in nats.

    Args:
        model: that answers them.
        rows: tokenised.
        structure: of the curvature.
        columns: outputs of a classifier that answer them (one: a regression); None for all.
        batch_size: rows a pass at most.
        **options: of `retain.fit_curvature`.

    Raises:
        ConfigError: labels of a kind that a regression does not have.
    """
    regression = columns is not None and columns.stop - columns.start == 1
    if regression and options.get("fisher") in ("empirical", "reversed"):
        raise ConfigError(
            "a regression has no labels of this kind", got=f"fisher={options['fisher']!r}",
            allowed="mc, exact, tempered", fix="fisher: mc",
        )  # fmt: skip
    with answering(model, columns):
        found = fit_curvature(
            model, list(rows), structure, rows=len(rows), batch_size=min(batch_size, len(rows)),
            max_length=max(len(e.tokens) for e in rows) + 1, **options,
        )  # fmt: skip
    # The loss (z - y)^2 is, in nats, that of a normal distribution of variance 1/2, whose Fisher
    # is 2; the curvature of a regression is that of variance 1.
    return 2 * found if regression else found


@contextmanager
def answering(model: nn.Module, columns: slice | None) -> Iterator[None]:
    """Lets a classifier answer with a task's own columns alone, as it is trained on it."""
    if columns is None:
        yield
        return

    def narrow(_module: nn.Module, _args: Any, output: Any) -> Any:
        output.logits = output.logits[:, columns]
        return output

    handle = model.register_forward_hook(narrow)
    try:
        yield
    finally:
        handle.remove()
