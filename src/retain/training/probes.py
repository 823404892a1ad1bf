"""The text on which a training measures what a budget spends, and what a KL weighs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retain.curvature.curvature import Curvature
from retain.curvature.fit.source import source_examples
from retain.data.batches import Example
from retain.data.sources import Row
from retain.errors import warn
from retain.models.view import ModelView
from retain.retention.budget import PROBE_ROWS
from retain.retention.facts import texts_of
from retain.retention.named import by_name
from retain.retention.recipe import Probe, Recipe

__all__ = [
    "KL_ROWS", "PROBE_ROWS", "PROBE_SEED", "Sources", "is_auto", "is_elsewhere", "kl_rows",
    "probe_of",
]  # fmt: skip

Source = str | Path | Iterable[Row]
Sources = Source | Mapping[str, Source | None] | None

PROBE_TOKENS, PROBE_SEED = 128, 1
"""Of the text that a budget is measured on; another seed than the curvature's own samples."""

KL_ROWS, KL_SEED = 64, 0
"""Of the text that a KL is measured on: drawn as the curvature's own samples are, though another
count may give other draws."""


def probe_of(recipe: Recipe, view: ModelView, source: Any) -> Probe:
    """A few rows to measure the true divergence on; of named budgets by name.

    Args:
        recipe: whose budget, if it has one.
        view: of the model that trains.
        source: as `retain.RetentionCallback` takes it.
    """
    if recipe.budget is None:
        return ()
    if not isinstance(recipe.budget, Mapping) or not isinstance(recipe.curvature, Mapping):
        if is_auto(source) and is_elsewhere(recipe, source):
            _tell_elsewhere(recipe, view, "the budget is measured")
        return _rows(view, source)
    given: dict[str, Any] = dict(source) if isinstance(source, Mapping) else {}
    if isinstance(source, str):  # auto
        given = {n: "auto" for n, each in recipe.curvature.items() if _is_own(each)}
    missing = [name for name in recipe.curvature if name not in given]
    if missing and source is not None:
        warn(
            f"the budget of {', '.join(missing)} is of predicted nats: no text is given to "
            f"measure it on (source={{{missing[0]!r}: rows}})"
        )
    return {name: _rows(view, each) for name, each in given.items() if each is not None}


def kl_rows(recipe: Recipe, view: ModelView, source: Any) -> Sequence[Example]:
    """Rows of the source, of named ones of all, for `kl`; none of an encoder.

    Without a source the model writes them; where the curvature was fitted on other text, a warning
    says so.
    """
    if not recipe.kl.weight or not view.causal:
        return ()
    if (source is None or is_auto(source)) and is_elsewhere(recipe, source):
        _tell_elsewhere(recipe, view, "the KL is taken")
    found: list[Example] = []
    for each in source.values() if isinstance(source, Mapping) else [source]:
        own = each is None or is_auto(each)
        if not own or view.tokenizer is not None:
            text: Any = "self" if own else each
            found += source_examples(view, text, KL_ROWS, PROBE_TOKENS, KL_SEED)
    return found


def is_elsewhere(recipe: Recipe, source: Any) -> bool:
    """Whether divergences are measured on text that the model writes, though a curvature was fitted
    on other text.
    """
    own = source is None or (isinstance(source, str) and source in ("auto", "self"))
    return own and bool(_others(recipe))


def _tell_elsewhere(recipe: Recipe, view: ModelView, what: str) -> None:
    if view.causal and view.tokenizer is not None:  # else nothing is measured, which is said too
        warn(
            f"{what} on text that the model writes, but the curvature was fitted on other text "
            f"({_others(recipe)}); to measure on that, give it: --source FILE, or source=..."
        )


def _others(recipe: Recipe) -> str:
    """The texts of the curvatures that are not of what the model wrote by itself."""
    each = by_name(recipe.curvature).values()
    return ", ".join(dict.fromkeys(texts_of(one.info) for one in each if not _is_own(one)))


def _is_own(curvature: Curvature) -> bool:
    return curvature.info.note == "self"


def is_auto(source: Any) -> bool:
    """Whether what is measured on is left to the recipe."""
    return isinstance(source, str) and source == "auto"


def _rows(view: ModelView, source: Any) -> Sequence[Example]:
    """A few rows of a source."""
    if source is None:
        return ()
    if is_auto(source):
        if not view.causal:
            warn(
                "the budget is of predicted nats: a classifier writes no text to measure on, and "
                "a new head has nothing to be measured from"
            )
            return ()
        if view.tokenizer is None:
            warn(
                "the budget is of predicted nats: without a tokenizer the model writes no text "
                "to measure on (tokenizer=..., or source=...)"
            )
            return ()
        source = "self"
    return source_examples(view, source, PROBE_ROWS, PROBE_TOKENS, PROBE_SEED)
