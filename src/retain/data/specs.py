"""Tasks as data: one YAML file a task, checked, and turned from rows into items.

The files lie in ``retain/tasks``. One may say ``include: FILE`` and then holds only what differs
from that file; FILE is looked for beside it, then among the tasks of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from pydantic import Field, field_validator, model_validator

from retain.config import Strict, validate
from retain.data.layers import read_layers
from retain.data.patterns import PatternError, compile_pattern
from retain.data.rows import Row, place_of
from retain.data.templates import constants, expression, template
from retain.errors import ConfigError, SourceError, shown, unknown

__all__ = [
    "Hub", "Item", "Splits", "TaskSpec", "list_tasks", "load_orders", "load_task", "missing",
    "template_text",
]  # fmt: skip

Kind = Literal["choice", "generate", "regression"]
Metric = Literal[
    "accuracy", "f1", "f1_macro", "matthews", "pearson", "spearman", "pearson_spearman",
    "exact_match", "token_f1", "f1a", "group_em", "f1a_em",
]  # fmt: skip

_MOST = 1_000
"""Options, or fields, of a task: each is a template."""

_ORDERS = "orders.yaml"
_TEMPLATE = "custom"
_NUMBERS = {"pearson", "spearman", "pearson_spearman"}
_TEXTS = {"exact_match", "token_f1"}


@dataclass(frozen=True)
class Item:
    """One row of a task, rendered, as every way of training and scoring wants it."""

    prompt: str  # what a decoder reads, up to where the answer begins (no trailing space)
    # the continuations among which a decoder chooses, each with its leading space, so that prompt
    # + option is the whole text; empty for generation and regression
    options: tuple[str, ...]
    answer: int | str | float  # index of the true option; reference text; or number (regression)
    texts: tuple[str, ...] = ()  # the one or two texts that an encoder reads
    group: str = ""  # rows of one group are scored together (MultiRC's questions, ReCoRD's)
    row: int = 0  # its place in the split, from 0; people are told it from 1
    references: tuple[str, ...] = ()  # all texts that count as right, where there are several

    @property
    def completion(self) -> str:
        """What a decoder is to learn to say after the prompt, with its leading space."""
        if self.options and isinstance(self.answer, int):
            return self.options[self.answer]
        return f" {self.answer}"


def missing(gold: object) -> bool:
    """True for what data sets of any kind write where a row has no gold label."""
    nan = isinstance(gold, float) and math.isnan(gold)
    return gold is None or nan or gold in ("", [])


def _number(found: float) -> float | None:
    """The answer of a regression; None for NaN. An infinite one would make every score 0."""
    if math.isinf(found):
        raise ValueError(f"the answer is {found}, and no finite number")
    return None if math.isnan(found) else found


class _NoText(ValueError):
    """A list or an object where a text is wanted; `fix` is what to write."""

    def __init__(self, what: str, value: object, fix: str) -> None:
        kind = "an object" if isinstance(value, dict) else "a list"
        super().__init__(f"{what} is {kind}, and not a text: {value!s:.60}")
        self.fix = fix


def _first_text(value: Any) -> str:
    """Where the first text of a list or an object lies in it, as an expression goes on."""
    path = ""
    while isinstance(value, list | tuple | dict):
        key: Any = next(iter(value), "") if isinstance(value, dict) else 0
        path += f".{key}" if str(key).isidentifier() else f"[{key!r}]"
        value = value[key] if value else None
    return path


class Splits(Strict):
    """The names of the two splits of a task."""

    train: str = "train"
    eval: str = "validation"


class Hub(Strict):
    """Where a task lies on the Hugging Face hub."""

    path: str = ""  # id of the data set; "" if it is not there
    name: str | None = None  # its configuration
    splits: Splits = Splits()
    fields: dict[str, str] = Field({})  # templates that make the task's fields, where they differ


class TaskSpec(Strict):
    """One task."""

    name: str  # such as "glue/sst2"; by default from the file's own
    version: int = Field(1, ge=1)  # raised whenever scores may change
    description: str  # one line
    citation: str = ""  # who made it, short
    hub: Hub = Hub()
    local: str = ""  # its folder under ``--data-dir``
    files: Splits = Splits()  # names of the splits' files in that folder
    kind: Kind  # choose among options, generate text, or predict a number
    prompt: str  # template of what a decoder reads
    # label words, or templates over the row; or one expression that gives the row's own list. In
    # the prompt the list is called ``options``
    options: tuple[str, ...] | str = ()
    # field of the gold label; rows where it is null, NaN, "" or [] are out; of a choice also those
    # where it is -1 or "-", unless that is an option or stands in ``answer``
    gold: str = "label"
    # expression over the row, ``gold`` and ``options`` that gives the index of the true option, the
    # reference text, or the number; none (or NaN) for a row without one
    answer: str = "gold"
    # expression for the list of all texts that count as right, or for the one that does
    references: str = ""
    texts: tuple[str, ...] = ()  # one or two templates for an encoder, where one makes sense
    group: str = ""  # expression for what rows are scored together
    metric: Metric = "accuracy"  # the primary metric, the official one where there is one
    metrics: tuple[Metric, ...] = ()  # further ones
    max_new_tokens: int = Field(16, ge=1)  # where a generated answer is cut
    stop: tuple[str, ...] = ()  # strings at which a generated answer ends
    # regular expression whose first group is the answer, in the generated text and in the reference
    pattern: str = ""
    max_length: int = Field(256, ge=16)  # tokens of prompt and answer together
    truncate: Literal["left", "middle"] = "left"  # where a prompt that is too long loses tokens

    @field_validator("options", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        if isinstance(value, list) and not all(isinstance(word, str) for word in value):
            raise ValueError(
                "words in quotation marks (YAML takes true, false, null and 1 for no words)"
            )
        return value

    @model_validator(mode="after")
    def _sound(self) -> TaskSpec:
        if (self.kind == "choice") != bool(self.options):
            raise ValueError("options for kind 'choice', and for no other kind")
        words = () if isinstance(self.options, str) else self.options
        for wrong, wanted in (
            (len(words) > _MOST, f"at most {_MOST} options"),
            (len(words) == 1 or len(set(words)) < len(words), "two or more different options"),
            (
                any(word != word.strip() or not word for word in words),
                "options without spaces around them; they get one in front",
            ),
            (len(self.hub.fields) > _MOST, f"at most {_MOST} fields of the hub"),
            (len(self.texts) > 2, "at most two texts"),
        ):
            if wrong:
                raise ValueError(wanted)
        allowed = {"choice": {*Metric.__args__} - _NUMBERS, "generate": _TEXTS}  # type: ignore[attr-defined]
        for metric in (self.metric, *self.metrics):
            if metric not in allowed.get(self.kind, _NUMBERS):
                raise ValueError(f"a metric for kind {self.kind!r}, which {metric!r} is not")
        self._compile()
        return self

    def _compile(self) -> None:
        one, each = (self.options, ()) if isinstance(self.options, str) else ("", self.options)
        templates = (self.prompt, *each, *self.texts, *self.hub.fields.values())
        expressions = filter(None, (one, self.answer, self.references, self.group))
        parts: list[tuple[str, Callable[[str], object]]] = [(text, template) for text in templates]
        parts += [*((text, expression) for text in expressions), (self.pattern, compile_pattern)]
        for text, compiles in parts:
            try:
                compiles(text)
            except (TemplateError, PatternError) as error:
                why = shown(str(error), 200, plain=True)
                raise ValueError(f"a template that compiles ({why} in {shown(text)})") from error

    @property
    def labels(self) -> tuple[str, ...]:
        """The label words, where all rows have the same; else none."""
        if isinstance(self.options, str) or any("{" in option for option in self.options):
            return ()
        return self.options

    @property
    def classes(self) -> int | None:
        """How many classes a classifier's head needs: None where rows have their own options."""
        return len(self.labels) or None

    def solution(self, row: Row, number: int = 0) -> int | str | float | None:
        """The answer of a row, or None where it has no gold label.

        Raises:
            SourceError: the row lacks a field, or its answer is none of its options.
        """
        with self._fitting(row, number):
            gold = row[self.gold]
            if missing(gold):
                return None
            choices = self._choices(row)
            if self._hidden(gold, choices):
                return None
            found = expression(self.answer)({**row, "gold": gold, "options": choices})
            if found is None:
                return None
            if self.kind == "regression":
                return _number(float(found))
            if self.kind == "generate":
                return self._text(found)
            whole = not isinstance(found, float) or found.is_integer()
            if not whole or int(found) not in range(len(choices)):
                raise ValueError(f"the answer is {found}, of {len(choices)} options")
            return int(found)

    def render(self, row: Row, number: int = 0) -> Item | None:
        """A row as an item, or None where it has no gold label.

        Args:
            row: fields by name.
            number: the row's place in its split, from 0.

        Raises:
            SourceError: the row lacks a field, or its answer is none of its options.
        """
        answer = self.solution(row, number)
        return None if answer is None else self.item(row, number, answer)

    def item(self, row: Row, number: int, answer: int | str | float) -> Item:
        """A row as an item, with the answer that `solution` gives.

        Raises:
            SourceError: the row lacks a field.
        """
        with self._fitting(row, number):
            choices = self._choices(row)
            fields = {**row, "options": choices}
            several = expression(self.references)(fields) if self.references else ()
            return Item(
                prompt=template(self.prompt)(fields),
                options=tuple(f" {choice}" for choice in choices),
                answer=answer,
                texts=tuple(template(text)(fields) for text in self.texts),
                group=str(expression(self.group)(fields)) if self.group else "",
                row=number,
                references=self._references(several),
            )

    def from_hub(self, row: Row, number: int = 0) -> Row:
        """A row of the hub with the task's fields.

        Raises:
            SourceError: the row lacks a field that they are made of.
        """
        gold = row.get(self.gold, 0)
        if not self.hub.fields or missing(gold) or self._hidden(gold, self.labels):
            return dict(row)
        with self._fitting(row, number):
            return {**row} | {f: template(text)(row) for f, text in self.hub.fields.items()}

    @contextmanager
    def _fitting(self, row: Row, number: int) -> Iterator[None]:
        try:
            yield
        except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise SourceError(
                f"{place_of(row, number + 1)} does not fit task {self.name}",
                got=f"{why[:160]}; fields: {', '.join(map(str, row))}",
                allowed="the fields that the task's templates name",
                fix=error.fix
                if isinstance(error, _NoText)
                else "fill the field or take the row out; {{ field or '' }} writes nothing for null"
                if why.endswith("is null")
                else "write the label as one of the options, or take the row out"
                if "is not in list" in why or why.endswith(" options")
                else "rename the fields of the data, or change the templates of the task",
            ) from error

    def _hidden(self, gold: object, options: Sequence[str]) -> bool:
        """Whether a gold label stands for none: -1 or "-" where a choice has no such label."""
        if self.kind != "choice" or gold not in (-1, "-1", "-"):
            return False
        return ("-" if gold == "-" else "-1") not in {*options, *constants(self.answer)}

    def _text(self, found: object) -> str:
        """A generated answer; a list or an object is refused, as templates refuse to write one."""
        if not isinstance(found, list | tuple | dict):
            return str(found).strip()
        whole, path = "gold" if self.answer == "gold" else f"({self.answer})", _first_text(found)
        fix = f"name one text, such as answer: {whole}{path}"
        if whole == "gold" and path.endswith("[0]"):
            fix += f"; where each text counts, also references: {self.gold}{path[:-3]}"
        raise _NoText(f"answer: {self.answer}", found, fix)

    def _references(self, found: Any) -> tuple[str, ...]:
        """What counts as right: one text, or all of a list."""
        if isinstance(found, str | int | float):
            return (str(found),)
        what, fix = f"references: {self.references}", "name a text or a list of texts"
        if isinstance(found, dict):
            path = _first_text(found).removesuffix("[0]")
            raise _NoText(what, found, f"{fix}, such as references: ({self.references}){path}")
        for each in found:
            if isinstance(each, list | tuple | dict):
                raise _NoText(f"one of {what}", each, fix)
        return tuple(map(str, found))

    def _choices(self, row: Row) -> list[str]:
        if isinstance(self.options, str):
            return [str(choice) for choice in expression(self.options)(row)]
        return [template(option)(row) for option in self.options]


def list_tasks() -> list[str]:
    """The names of all tasks in the package, sorted."""
    return sorted(
        path.relative_to(_folder()).with_suffix("").as_posix()
        for path in _folder().rglob("*.yaml")
        if not path.name.startswith("_") and path.stem != _TEMPLATE and path.name != _ORDERS
    )


def load_task(name: str | Path) -> TaskSpec:
    """A task by its name, or from a YAML file.

    Raises:
        ConfigError: an unknown name, or a file that is missing, damaged or no task.
    """
    names = list_tasks()
    path = Path(name).expanduser()
    if str(name) in {*names, _TEMPLATE}:
        path = _folder() / f"{name}.yaml"
        own = str(name)
    elif path.suffix in {".yaml", ".yml"}:
        own = path.stem
    else:
        raise unknown("task", str(name), names)
    found = read_layers(path, _folder())
    try:
        return validate({"name": own, **found}, TaskSpec)
    except ConfigError as error:
        raise ConfigError(
            f"task {own}: {error.what}",
            got=error.got,
            allowed=error.allowed,
            fix=error.fix if "did you mean" in str(error.fix) else f"change it in {path}",
        ) from error


def template_text() -> str:
    """The commented template of a task for own data."""
    return (_folder() / f"{_TEMPLATE}.yaml").read_text(encoding="utf-8")


def load_orders() -> dict[str, tuple[str, ...]]:
    """The published orders of the continual benchmark, by name: the tasks as they are learned."""
    found = read_layers(_folder() / _ORDERS, _folder())
    return {str(name): tuple(f"cl15/{task}" for task in tasks) for name, tasks in found.items()}


def _folder() -> Path:
    return Path(str(resources.files("retain"))) / "tasks"
