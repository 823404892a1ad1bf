"""The rows that a curvature is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from retain.curvature.fit.checkpoint import kept_rows
from retain.data.batches import Batch, Example, collate
from retain.data.general_prompts import Prompts, prompt_texts
from retain.data.sources import Row
from retain.errors import ConfigError, SourceError, shown, warn
from retain.models.generating import sample_rows, sampled_form
from retain.models.view import ModelView

__all__ = ["glance", "source_examples"]


def source_examples(
    view: ModelView,
    source: str | Path | Iterable[Row] | Sequence[Example],
    rows: int,
    max_length: int,
    seed: int,
    *,
    prompts: Prompts = None,
    partial: str | Path | None = None,
    progress: bool = False,
    values: bool | None = None,
) -> Sequence[Example]:
    """Tokenised rows of a source, at most `rows` of them, drawn by `seed`; see `fit_curvature`.

    A classifier's labels are `values`, or by default what its head answers. Rows that ask for no
    prediction are left out.

    Raises:
        ConfigError: prompts for text that is given.
        SourceError: text that is missing or empty; or ``"self"`` for a
            model that cannot write; or rows that its tables have no place for, or none of which
            asks for a prediction.

    Warns:
        RetainWarning: rows were left out.
    """
    own = isinstance(source, str) and source == "self"
    if prompts is not None and not own:
        raise ConfigError(
            "prompts are what users say in the model's own text",
            got=f"prompts for source={shown(source, 60)}",
            allowed="source='self'",
            fix="leave prompts out, or the source",
        )
    if own:
        if not view.causal:
            raise SourceError(
                "only a causal model can sample its own text",
                got="source='self'",
                allowed="a data set or a file",
                fix="give source text with the classifier's fields",
            )
        length: dict[str, Any] = {"max_length": max_length, "seed": seed, "progress": progress}
        what: list[Any] = [view.fingerprint, rows, max_length, seed, sampled_form()]
        if prompts is not None:
            length["prompts"] = prompt_texts(prompts)
            what.append(length["prompts"])
        source = kept_rows(
            partial, what, lambda: sample_rows(view.model, view.tokenizer, count=rows, **length)
        )
    found = view.read(
        source, rows, max_length=max_length, seed=seed, values=values, labels=False
    )  # a text that is one row gives many
    some = [example for example in found if example.predictions]
    if not some:
        raise SourceError(
            "the source asks for no prediction",
            got=f"{len(found)} rows, none with a target that counts",
            allowed="at least one prediction",
            fix="mark the targets that count in Example.predict",
        )
    if len(some) < len(found):
        warn(f"{len(found) - len(some)} rows that ask for no prediction are left out")
    return some


def glance(example: Example, pad: int) -> Batch:
    """A few tokens, enough to see which layers read what."""
    some = example.cut(8)
    return collate([replace(some, predict=(True,) * len(some.predict))], pad, [0])
