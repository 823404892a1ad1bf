"""What is named on a command line: base models, adapters, word problems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from retain.errors import ConfigError, ModelError

__all__ = ["Base", "base_of", "load_base", "problem_count"]

Base = Annotated[
    str | None, Field(description="The base model; the one that the adapter names by default")
]


def base_of(adapter: Path, model: str | None) -> str:
    """The base model of an adapter's folder, which is checked: `model`, or what the folder names.

    Raises:
        RetainError: the folder holds no adapter, or nothing names a base.
    """
    from retain.models.saved import check_adapter

    found = check_adapter(adapter)
    if found.get("task_type") == "SEQ_CLS":
        raise ConfigError(
            "a classifier's adapter brings its own head, and its base has none to compare it with",
            got=f"{adapter} with task_type SEQ_CLS",
            allowed="the adapter of a language model",
            fix="score it in Python: see docs/classifiers.md",
        )
    name = found.get("base_model_name_or_path")
    if not (model or name):
        raise ConfigError(
            "nothing says which base model the adapter is for",
            got="no --model",
            allowed="a name, a folder or a .gguf file",
            fix="--model smollm2-135m",
        )
    return model or str(name)


def load_base(name: str, of: str | None, **options: Any) -> Any:
    """`retain.models.load.load_model`, with the fix for a base that was not named by hand.

    `of` is what names it; None for ``--model``.

    Raises:
        ModelError: it cannot be loaded.
    """
    from retain.models.load import load_model

    try:
        return load_model(name, **options)
    except ModelError as error:
        if of is None:
            raise
        raise ModelError(
            f"the base model of {of} cannot be loaded",
            got=error.got,
            allowed="the same model, wherever it lies now",
            fix="if it has moved, say with --model where it lies now",
        ) from error


def problem_count(task: str, split: Literal["train", "test"]) -> int | None:
    """N of ``word-problems[:N]``; None for anything else.

    Raises:
        ConfigError: N is no number above 0.
    """
    name, _, count = task.partition(":")
    if name != "word-problems":
        return None
    if not count and ":" not in task:
        return {"train": 1000, "test": 100}[split]
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError(
            "the number of word problems is not accepted",
            got=repr(count),
            allowed="a whole number above 0",
            fix="word-problems:100",
        )
    return int(count)
