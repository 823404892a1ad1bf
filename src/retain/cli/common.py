"""What the commands share: options, output as text or JSON, and checks that come first."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from retain.errors import ConfigError, ModelError, OutputError, unknown
from retain.files import check_folder, first_rank

__all__ = [
    "DTYPES",
    "AsJson",
    "Interrupted",
    "Quiet",
    "Screen",
    "Trust",
    "base_of",
    "check_choices",
    "check_file",
    "finite",
    "load_base",
    "name_list",
    "problem_count",
    "quieten",
    "size_text",
]

DTYPES = ("float32", "bfloat16", "float64")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that comes with the model. For models you trust."
    ),
]


class Interrupted(Exception):
    """Ctrl-C; carries what stays usable."""

    def __str__(self) -> str:
        return f"stopped; {self.args[0]}"


class Screen:
    """Where a command prints: text for people, or one JSON object, on stdout.

    Under ``torchrun`` the first process alone prints. What this package warns of becomes a note.

    Attributes:
        notes: in what a lesser way than was asked for something was done, each once; they belong
            into the record of what the command made.
    """

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json and first_rank()
        self.quiet = quiet or as_json or not first_rank()
        self.progress = not self.quiet and sys.stderr.isatty()
        self.notes: list[str] = []
        # `retain.cli.app.main` lets our own warnings alone through, and puts this back at its end.
        warnings.showwarning = lambda message, *args, **kwargs: self.note(str(message))

    def note(self, text: str) -> None:
        """A line for people that is kept for the record too, once."""
        text = " ".join(text.split())
        if text not in self.notes:
            self.notes.append(text)
            self.say(text)

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.quiet:
            print(text, flush=True)

    def table(self, title: str, head: list[str], rows: Iterable[list[str]]) -> None:
        """A table for people; the first column names the rest."""
        if self.quiet:
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", show_header=any(head))
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)

    def emit(self, value: Mapping[str, Any]) -> None:
        """The JSON object, if it was asked for."""
        if self.as_json:
            print(json.dumps(finite(value), ensure_ascii=False, allow_nan=False), flush=True)


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def finite(value: Any) -> Any:
    """Plain data for JSON, with null for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def quieten(progress: bool) -> None:
    """Keeps the libraries below from talking; call it before they are imported.

    Args:
        progress: leave them their bars.
    """
    if not progress:
        os.environ.setdefault("TQDM_DISABLE", "1")
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DATASETS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_choices(*choices: tuple[str, str, Iterable[str]]) -> None:
    """Raises `ConfigError` for the first (kind, got, allowed) whose value is not allowed."""
    for kind, got, allowed in choices:
        names = tuple(allowed)
        if got not in names:
            raise unknown(kind, got, names)


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

    Args:
        name: of the model.
        of: what names it; None for ``--model``.
        **options: of `load_model`.

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


def check_file(path: Path) -> Path:
    """Checks, before any work is done, that a file can be written.

    Raises:
        OutputError: it cannot be.
    """
    path = path.expanduser()
    if path.exists() and not path.is_file():
        raise OutputError(
            "the output is no plain file",
            got=path,
            allowed="the path of a file",
            fix="choose another path for the output",
        )
    check_folder(path.parent)
    return path


def name_list(text: str) -> str | list[str]:
    """``all-linear``, or the names in a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()] if "," in text else text


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
