"""Named budgets of ``retain train``: what each name's text is, and the rows that come of it.

A name's text is what ``--source NAME=FILE`` says (``self`` is text that the model writes by
itself); without one the name is a skill of the general prompts (`retain.data.general_prompts`):
the base model answers those of their half ``source``. The curvature reads answers of one seed, the
budget is measured on answers of another. The half that is held out is never asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from retain.config import RunConfig, names_of
from retain.errors import ConfigError, SourceError, shown

__all__ = [
    "OWN", "budget_names", "check_chat", "check_named", "check_same_names", "note_of", "probes",
    "read_texts", "text_of",
]  # fmt: skip

OWN = "self"
"""A source's text that the model writes by itself."""

ROWS, LENGTH = 128, 128
"""Answers of a skill that its curvature reads, and tokens of each with its question, at most: as
many as `retain.fit_curvature` reads of any text."""


def budget_names(config: RunConfig) -> tuple[str, ...]:
    """The names of the budgets; ``""`` alone of one source without names."""
    return names_of(config.budget) or ("",)


def check_named(config: RunConfig) -> None:
    """Refuses, before anything is read, what named budgets do not go with.

    Raises:
        ConfigError: a name without a text, a text without a name, or another setting that knows one
            source alone.
    """
    names, sources = names_of(config.budget), names_of(config.source)
    if sources and not names:
        raise ConfigError(
            "sources by name are held within budgets by name",
            got=f"sources of {', '.join(sources)}; budget {config.budget}",
            allowed="a budget for each name, or one source without a name",
            fix=f"--budget {sources[0]}=0.02",
        )
    if not names:
        return
    if config.source is not None and not sources:
        raise ConfigError(
            "named budgets have each its own source", got=f"source {shown(config.source)}",
            allowed=f"a text for each of {', '.join(names)}, or none for a built-in skill",
            fix=f"--source {names[0]}=FILE",
        )  # fmt: skip
    _check_names(names, sources)
    if config.curvature is not None:
        raise ConfigError(
            "a curvature in a file is of one source, and named budgets have each its own",
            got=f"curvature {shown(config.curvature)}; budgets of {', '.join(names)}",
            allowed="curvatures that the run measures, or RetentionCallback with several",
            fix=f"leave --curvature out; --source {names[0]}=FILE gives a text",
        )
    if len(names) > 1 and config.training.update == "proximal":
        raise ConfigError(
            "a proximal step knows one source", got=f"{len(names)} named budgets",
            allowed="update gradient", fix="leave --update out",
        )  # fmt: skip


def _check_names(names: tuple[str, ...], sources: tuple[str, ...]) -> None:
    from retain.data.general_prompts import SKILLS

    odd = [name for name in sources if name not in names]
    if odd:
        raise ConfigError(
            "a source has no budget", got=", ".join(odd), allowed=", ".join(names),
            fix=f"--budget {odd[0]}=0.02, or leave that source out",
        )  # fmt: skip
    unknown = [name for name in names if name not in sources and name not in SKILLS]
    if unknown:
        raise ConfigError(
            "a named budget has no source", got=", ".join(unknown),
            allowed=f"{', '.join(SKILLS)}; or any name with a text of its own",
            fix=f"--source {unknown[0]}=FILE",
        )  # fmt: skip


def check_same_names(before: RunConfig, now: RunConfig) -> None:
    """Refuses to continue a run with other names, or with a number in place of names.

    Raises:
        ConfigError: they are others.
    """
    old, new = names_of(before.budget), names_of(now.budget)
    if set(old) == set(new):
        return
    what = "budgets of " + ", ".join(new) if new else f"budget {now.budget}"
    if now.budget is None:
        what = f"strength {now.strength:g}"
    raise ConfigError(
        "the run to continue from was held to other sources", got=what,
        allowed="budgets of " + ", ".join(old) if old else "one budget, or a strength",
        fix="leave --budget and --strength out; or begin a run with --model",
    )  # fmt: skip


def read_texts(config: RunConfig, names: Iterable[str]) -> dict[str, Any]:
    """By name the rows of its own text for its curvature, of those that have one.

    Raises:
        SourceError: it cannot be read, or is empty.
    """
    from retain.data.sources import read_rows

    given = {name: _given(config, name) for name in names}
    return {
        name: read_rows(text, ROWS, seed=config.training.seed, max_length=LENGTH)
        for name, text in given.items()
        if text not in (None, OWN)
    }


def check_chat(config: RunConfig, tokenizer: Any) -> None:
    """Refuses built-in skills for a model without a chat form, which answers no prompts.

    Raises:
        SourceError: it has none.
    """
    from retain.models.generating import chat_form

    asked = [name for name in names_of(config.budget) if name not in names_of(config.source)]
    if asked and config.method != "none" and chat_form(tokenizer) is None:
        raise SourceError(
            f"the prompts of {', '.join(asked)} are asked in a chat",
            got="no chat template", allowed="a chat model, or a text of your own",
            fix=f"--source {asked[0]}=FILE",
        )  # fmt: skip


def note_of(config: RunConfig, name: str) -> str:
    """What a curvature of a name's text says that it was measured on."""
    return _given(config, name) or f"{OWN}:{name}"


def text_of(config: RunConfig, name: str, model: Any, tokenizer: Any, messages: Any) -> Any:
    """A name's text for its curvature: its file, ``"self"``, or rows of the base's answers."""
    given = _given(config, name)
    return given or _answers(name, model, tokenizer, ROWS, config.training.seed, messages)


def probes(config: RunConfig, model: Any, tokenizer: Any, messages: Any) -> dict[str, Any]:
    """By name the text on which a budget is measured, as `retain.RetentionCallback` takes it.

    Answers are of another seed than those that the curvature has read.
    """
    from retain.training.probes import KL_ROWS, PROBE_ROWS, PROBE_SEED

    rows, seed = (KL_ROWS if config.kl else PROBE_ROWS), config.training.seed + PROBE_SEED
    return {
        name: _given(config, name) or _answers(name, model, tokenizer, rows, seed, messages)
        for name in names_of(config.budget)
    }


def _given(config: RunConfig, name: str) -> str | None:
    """The text that a name has of its own; None of a built-in skill."""
    if isinstance(config.source, Mapping):
        return config.source.get(name)
    return None if name else config.source or OWN


def _answers(
    skill: str, model: Any, tokenizer: Any, count: int, seed: int, messages: Any
) -> list[dict[str, Any]]:
    """Rows of tokens: prompts of a skill's source half, each with the base model's answer."""
    from retain.data.general_prompts import general_prompts
    from retain.models.generating import sample_rows

    return sample_rows(
        model, tokenizer, count=count, max_length=LENGTH, seed=seed, documents=False,
        prompts=[prompt.prompt for prompt in general_prompts(skill, "source")],
        progress=messages.progress,
    )  # fmt: skip
