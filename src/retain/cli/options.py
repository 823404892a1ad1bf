"""What the commands share: options, output as text or JSON, and checks that come first."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from retain.errors import OutputError, unknown
from retain.files import check_folder, first_rank
from retain.runs.messages import Messages

__all__ = [
    "DTYPES", "AdapterRank", "AsJson", "BatchSize", "DType", "MaxLength", "Quiet", "Screen",
    "Targets", "Trust", "check_choices", "check_file", "name_list", "quieten",
]  # fmt: skip

DTYPES = ("float32", "bfloat16", "float64")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that comes with the model. For models you trust."
    ),
]
DType = Annotated[str, typer.Option(help=f"Precision: {', '.join(DTYPES)}.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Cut texts to so many tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts at once.")]
AdapterRank = Annotated[int, typer.Option(min=1, help="Rank of the adapter.")]
Targets = Annotated[
    str, typer.Option(help="Layers that get an adapter: all-linear, or names with commas.")
]


class Screen(Messages):
    """Where a command prints: text for people, or one JSON object, on stdout.

    What this package warns of becomes a note.
    """

    def __init__(self, as_json: bool, quiet: bool) -> None:
        super().__init__(quiet=quiet or as_json, progress=sys.stderr.isatty())
        self.as_json = as_json and first_rank()
        # `retain.cli.app.main` lets our own warnings alone through, and puts this back at its end.
        warnings.showwarning = lambda message, *args, **kwargs: self.note(str(message))

    def libraries(self) -> None:
        quieten(self.progress)

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
            from retain.records import finite

            print(json.dumps(finite(value), ensure_ascii=False, allow_nan=False), flush=True)


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
