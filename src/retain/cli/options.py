"""What commands share: options from settings, output as text or JSON, and first checks."""

from __future__ import annotations

import inspect
import json
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from retain.config import Measured, validate
from retain.errors import OutputError, unknown
from retain.files import check_folder, first_rank
from retain.runs.messages import Messages

__all__ = [
    "COMMON", "Screen", "check_choices", "check_file", "command", "has_all", "name_list", "option",
    "quieten", "signed",
]  # fmt: skip

_SHORT = {"out": "-o", "output": "-o", "config": "-c"}

Config = TypeVar("Config", bound=BaseModel)


def command(
    config: type[Config], *arguments: str
) -> Callable[[Callable[[Config, Screen], None]], Callable[..., None]]:
    """Makes a command of a function of checked settings and a screen.

    Each field of `config` is an option, with its default, bounds and description; but for
    `arguments`, which have no name on the command line.
    """
    shared = Measured.model_fields

    def made(act: Callable[[Config, Screen], None]) -> Callable[..., None]:
        def run(*, as_json: bool, quiet: bool, **given: Any) -> None:
            act(validate(given, config), Screen(as_json, quiet))

        fields = dict(sorted(config.model_fields.items(), key=lambda f: f[0] in shared))
        every = [
            *(option(name, fields[name], argument=True) for name in arguments),
            *(option(name, field) for name, field in fields.items() if name not in arguments),
        ]
        return signed(run, act.__doc__, [*every, *COMMON])

    return made


def option(
    name: str, field: FieldInfo, *, argument: bool = False, unset: bool = False
) -> inspect.Parameter:
    """A field as a parameter that typer reads.

    Args:
        name: of the option.
        field: with a description.
        argument: it has no name on the command line.
        unset: None where it is not given; its default is said in the help, and its bounds are left
            to whoever checks the settings.
    """
    kind, text = _type(field.annotation), field.description or ""
    default = inspect.Parameter.empty if field.is_required() else field.default
    if unset:
        if not field.is_required() and not any(default is v for v in (None, False, -1)):
            text += f" ({default:g})" if isinstance(default, float) else f" ({default})"
        default, kind = None, kind | None
    elif type(None) in get_args(field.annotation):
        kind = kind | None
    least = [m.ge for m in field.metadata if hasattr(m, "ge") and not unset]
    bounds: Any = {"help": f"{text}.", "min": least[0] if least else None}
    flag = f"--{name.replace('_', '-')}"
    flags = [flag, *([_SHORT[name]] if name in _SHORT else [])]
    made = typer.Option(*flags, **bounds)
    if argument:
        several = "..." if get_origin(kind) is list else ""
        made = typer.Argument(metavar=name.upper() + several, **bounds)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made]
    )


COMMON = [
    inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, made]
    )
    for name, made in {
        "as_json": typer.Option("--json", help="Print one JSON object instead of text."),
        "quiet": typer.Option("--quiet", "-q", help="Print nothing but errors."),
    }.items()
]


def signed(
    run: Callable[..., None], doc: str | None, every: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """A function with the parameters that typer is to see."""
    run.__doc__ = doc
    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in every}
    return run


def _type(annotation: Any) -> Any:
    """What the command line reads for a field: text, unless it can only be of one other type.

    Of what may be by name it is a list of texts, such as ``facts=0.02``.
    """
    if get_origin(annotation) in (Union, types.UnionType):
        if any(get_origin(part) is dict for part in get_args(annotation)):
            return list[str]
        kinds = {_type(part) for part in get_args(annotation)} - {type(None)}
        return kinds.pop() if len(kinds) == 1 else str
    plain = (int, float, bool, Path, list[str], list[Path], type(None))
    return annotation if annotation in plain else str


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
        """A table for people; its first column names the rest; one without values is left out.

        It is as wide as its lines where stdout is no terminal and COLUMNS does not say how wide:
        programs read lines.
        """
        if self.quiet:
            return
        lines = list(rows)
        kept = [i for i in range(len(head)) if not i or any(line[i] for line in lines)]
        from rich.console import Console
        from rich.table import Table

        console, edges = Console(), 3 * len(kept) + 1
        columns = [[line[i] for line in (head, *lines)] for i in kept]
        if sys.stdout.isatty() or os.environ.get("COLUMNS"):
            widths = _widths(columns, console.width - edges)
        else:
            widths = _widths(columns, None)
            console = Console(width=sum(widths) + edges)
        table = Table(title=title, title_justify="left", title_style="bold", show_header=any(head))
        for i, width in zip(kept, widths, strict=True):
            justify: Literal["left", "right"] = "right" if i else "left"
            table.add_column(head[i], justify=justify, overflow="fold", width=width)
        for line in lines:
            table.add_row(*(line[i] for i in kept))
        console.print(table)

    def emit(self, value: Mapping[str, Any]) -> None:
        """The JSON object, if it was asked for."""
        if self.as_json:
            from retain.records import finite

            escape = not has_all(sys.stdout)
            print(json.dumps(finite(value), ensure_ascii=escape, allow_nan=False), flush=True)


def has_all(stream: TextIO) -> bool:
    """Whether a stream's encoding has all characters."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def _widths(columns: Sequence[Sequence[str]], room: int | None) -> list[int]:
    """How wide columns of texts are in so much room; None for as wide as they like.

    The widest gives way first, down to its longest word, or to half the room. Where that is not
    enough the words of one column are broken, down to 10 characters, before those of the next.
    """
    from rich.cells import cell_len

    widths = [max([1, *(cell_len(t) for text in c for t in text.splitlines())]) for c in columns]
    if room is None:
        return widths
    words = [max([1, *(cell_len(t) for text in c for t in text.split())]) for c in columns]
    words = [min(word, room // 2) for word in words]
    while sum(widths) > max(room, len(widths)):
        _, _, _, i = max(
            (width > word, word if word >= width > 10 else 0, width, i)
            for i, (width, word) in enumerate(zip(widths, words, strict=True))
        )
        widths[i] -= 1
    return widths


def quieten(progress: bool) -> None:
    """Keeps the libraries below from talking, but for their bars where `progress` is wanted.

    Call it before they are imported.
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
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


def check_choices(*choices: tuple[str, str, Iterable[str]]) -> None:
    """Raises `ConfigError` for the first (kind, got, allowed) whose value is not allowed."""
    for kind, got, allowed in choices:
        names = tuple(allowed)
        if got not in names:
            raise unknown(kind, got, names)


def check_file(path: Path) -> Path:
    """Checks that a file can be written, before any work is done; raises `OutputError` if not."""
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
