"""Configuration: what a YAML file or the command line may say, checked by pydantic."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from retain.documents import read_mapping
from retain.errors import ConfigError, shown, unknown, with_point
from retain.types import STRENGTH, STRONGEST, Update

__all__ = [
    "DTYPES", "AdapterConfig", "Measured", "Options", "Precision", "RunConfig", "Strict",
    "TrainConfig", "names_of", "read_config", "read_settings", "validate",
]  # fmt: skip

Precision = Literal["float32", "bfloat16", "float64"]
DTYPES: tuple[str, ...] = get_args(Precision)

Model = TypeVar("Model", bound=BaseModel)

_WIDE, _MANY = 1 << 16, 1 << 40
"""What no adapter is wider than, and what nobody does so often."""

_NAME = re.compile(r"[^\W_][\w-]{0,39}")
"""Of a budget: a part of a file's name, and of a dotted key."""


class Strict(BaseModel):
    """Refuses unknown keys and numbers that are not finite, and stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Settings(Strict):
    @field_validator("*", mode="before")
    @classmethod
    def _no_cast(cls, value: Any, info: ValidationInfo) -> Any:
        """``true`` is no number, and an empty text (a shell's unset variable) no path or name."""
        kinds = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in kinds:
            raise ValueError("a number" if "int" in kinds or "float" in kinds else "text")
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            raise ValueError("text that is not empty")
        return value


class Options(BaseModel):
    """Settings of a command, whose options are its fields, descriptions and defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """A path may stand where a file's name is text."""
        return str(value) if isinstance(value, Path) else value


class Measured(Options):
    """Text on which a model is measured."""

    rows: int = Field(64, ge=1, description="Read at most so many texts")
    max_length: int = Field(128, ge=2, description="Cut texts to so many tokens")
    batch_size: int = Field(8, ge=1, description="Texts at once")
    seed: int = Field(0, ge=0, description="Seed of the text")
    dtype: Precision = Field("float32", description=f"Precision: {', '.join(DTYPES)}")
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the model. For models you trust"
    )


class AdapterConfig(_Settings):
    """The LoRA adapter."""

    rank: int = Field(16, ge=1, le=_WIDE, description="Rank of the adapter")
    alpha: float | None = Field(None, gt=0, description="LoRA's alpha (twice the rank)")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = Field(
        "all-linear", description="Layers: all-linear, or names with commas"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the adapter's start")


class TrainConfig(_Settings):
    """The optimisation."""

    learning_rate: float = Field(5e-4, gt=0, description="Step size")
    epochs: float = Field(1.0, gt=0, le=_MANY, description="Passes over the data")
    max_steps: int = Field(-1, le=_MANY, description="Stop after so many steps")
    batch_size: int = Field(16, ge=1, le=_MANY, description="Rows a step")
    accumulation: int = Field(1, ge=1, le=_MANY, description="Micro-batches a step")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup: float = Field(0.05, ge=0, description="Steps, or a share of all steps when below 1")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    max_length: int = Field(256, ge=2, le=_MANY, description="Cut rows to so many tokens")
    pad_multiple: int = Field(16, ge=1, le=_WIDE)
    update: Update = Field(
        "gradient", description="How the force acts: in the gradient, or as a proximal step"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the order of the data")
    save_steps: int = Field(
        0, ge=0, le=_MANY, description="Keep a checkpoint every so many steps, or none"
    )
    gradient_checkpointing: bool = False
    report_to: str = "none"

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.batch_size % self.accumulation:
            raise ValueError("batch_size must be a multiple of accumulation")
        return self

    @field_validator("max_steps")
    @classmethod
    def _none_or_some(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError("1 or more; -1 for as many as the epochs have")
        return value

    @property
    def micro_batch(self) -> int:
        """Rows a forward pass."""
        return self.batch_size // self.accumulation


class RunConfig(_Settings):
    """One training run: ``retain train``, `retain.train_run`, and a run's ``run.json``."""

    model: str = Field("smollm2-135m", description="A built-in name, hub id, folder or .gguf file")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="float32 or bfloat16")
    data: str = Field(description="What to learn: word-problems[:N], or a file of rows")
    out: str = Field(description="Folder of the results")
    method: Literal["auto", "laplace", "none"] = Field(
        "auto", description="auto filters and holds, laplace only holds, none is plain LoRA"
    )
    curvature: str | None = Field(
        None, description="A file of retain fit; made in --out by default"
    )
    source: str | dict[str, str] | None = Field(
        None,
        description="Text to measure the curvature on, in place of the model's own: a file, as for "
        "retain fit; beside --curvature, what a budget and the KL read; of a named budget "
        "NAME=FILE. May be repeated",
    )
    factor_rank: Annotated[int, Field(ge=1, le=_WIDE)] | Literal["auto"] = Field(
        "auto",
        description="Of that curvature, and of the tasks': 64 takes a tenth of the memory and disk",
    )
    num_labels: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="Train a classifier of text and label: the number of classes, 1 for values, or "
        "auto (an encoder's default) to count the labels",
    )
    strength: float = Field(
        STRENGTH, ge=0, le=STRONGEST,
        description="How much keeping weighs against learning, 0 or more",
    )  # fmt: skip
    budget: Annotated[float, Field(gt=0)] | dict[str, float] | None = Field(
        None,
        description="In its place: nats per source token (of a classifier per row) that may be "
        "spent, such as 0.05; or of each skill its own: facts=0.02. May be repeated",
    )
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] | None = Field(
        None,
        description="How sure it is to be, such as 0.95, that the budget also holds on other text "
        "like the rows that it is measured on; by default their mean counts",
    )
    parts: list[Literal["head", "rows", "filter", "force"]] | None = Field(
        None,
        description="Of the recipe, those that act: head, rows, filter and force, all by default",
    )
    kl: float = Field(
        0.0, ge=0,
        description="What one nat of the true divergence on source rows weighs, beside the "
        "strength: such as 1",
    )  # fmt: skip
    gain: Annotated[float, Field(gt=0)] | Literal["matched"] = Field(
        3.0, description="How much larger than PEFT's A begins, before the filter; or matched"
    )
    weight: float = Field(1.0, ge=0, description="Of the source text in the filter")
    continue_from: str | None = Field(
        None,
        description="Folder of an earlier run: start at its adapter, keep its tasks too, within "
        "its budget. Implies --keep-state",
    )
    max_rank: int | None = Field(
        None, ge=2, le=_WIDE, description="Of runs that continue; 4 times the rank"
    )
    keep_state: bool = Field(False, description="Leave state/ in --out, so that a run can continue")
    limit: int | None = Field(None, ge=1, description="Use at most so many rows, drawn from all")
    loss: Literal["assistant", "all"] = Field(
        "assistant", description="Of a chat, learn the assistant's turns alone; or all"
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model")
    adapter: AdapterConfig = AdapterConfig()
    training: TrainConfig = TrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _as_before_0_2(cls, value: Any) -> Any:
        """``start`` was what `parts` is now."""
        if not isinstance(value, dict) or "start" not in value:
            return value
        parts = {"wiener": ["rows", "filter", "force"], "random": ["force"], None: None}
        start = value["start"]
        if start not in parts:
            raise unknown("start", shown(start, plain=True), ["parts"])
        given = {k: v for k, v in value.items() if k != "start"}
        return given if parts[start] is None else {"parts": parts[start], **given}

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """Budgets and sources as the command line has them: ``NAME=VALUE``, or a list of such."""
        if not isinstance(value, dict):
            return value
        found = dict(value)
        if "budget" in found:
            found["budget"] = _budget(found["budget"])
        if "source" in found:
            several = isinstance(found.get("budget"), dict)
            found["source"] = _source(found["source"], several)
        return found

    @field_validator("parts", mode="before")
    @classmethod
    def _one_part(cls, value: Any) -> Any:
        """One without a comma, as the command line has it."""
        return [value] if isinstance(value, str) else value

    @field_validator("adapter", "training", mode="before")
    @classmethod
    def _nothing_said(cls, value: Any) -> Any:
        """A heading in the file with nothing below it."""
        return {} if value is None else value


def names_of(value: float | str | Mapping[str, Any] | None) -> tuple[str, ...]:
    """The names of a budget or of a source; none of a plain one."""
    return tuple(value) if isinstance(value, Mapping) else ()


def _texts(value: Any) -> list[str] | None:
    """One text or a list of texts, as a list; None of anything else."""
    texts = value if isinstance(value, list) else [value]
    return texts if texts and all(isinstance(text, str) for text in texts) else None


def _budget(value: Any) -> Any:
    """A budget, or numbers by name.

    Raises:
        ConfigError: a name that is none, that is there twice, or that has no number above 0.
    """
    texts = _texts(value)
    if texts is not None:
        parts = [part.strip() for text in texts for part in text.split(",")]
        if len(texts) == 1 and "=" not in texts[0]:
            return _plain(texts[0].strip())
        value = _pairs("budget", parts, "facts=0.02")
    if not isinstance(value, dict):
        return value
    _check_each("budget", value, "facts=0.02")
    return {name: _nats(name, nats) for name, nats in value.items()}


def _plain(text: str) -> str:
    """A budget without a name; whether it is in range is seen later.

    Raises:
        ConfigError: it is no number, as 0,02 and 5% are none.
    """
    try:
        float(text)
    except ValueError as error:
        point = with_point(text)
        meant = point if point and float(point) > 0 else "0.05"
        raise ConfigError(
            "the budget is not accepted", got=shown(text, plain=True),
            allowed="nats per token: a number above 0, or NAME=NUMBER for each name",
            fix=f"--budget {meant}",
        ) from error  # fmt: skip
    return text


def _source(value: Any, several: bool) -> Any:
    """A source, or sources by name; a path may hold commas, and without names ``=`` too."""
    texts = _texts(value)
    if texts is not None and (several or len(texts) > 1):
        value = _pairs("source", texts, "facts=FILE")
    elif texts is not None:
        return texts[0]
    if not isinstance(value, dict):
        return value
    _check_each("source", value, "facts=FILE")
    return {name: str(text) if isinstance(text, Path) else text for name, text in value.items()}


def _pairs(what: str, parts: list[str], such: str) -> dict[str, str]:
    """``NAME=VALUE`` as a dictionary."""
    found: dict[str, str] = {}
    for part in parts:
        name, equals, value = (text.strip() for text in part.partition("="))
        if not equals or not value or name in found:
            reason = "twice" if name in found else "no name" if not equals else "no value"
            raise ConfigError(
                f"a {what} by name is not accepted", got=f"{shown(part)}: {reason}",
                allowed=f"NAME=VALUE for each name, such as {such}", fix=f"--{what} {such}",
            )  # fmt: skip
        found[name] = value
    return found


def _check_each(what: str, value: dict[Any, Any], such: str) -> None:
    """Checks that there are names, and that each is one."""
    odd = [n for n in value if not isinstance(n, str) or not _NAME.fullmatch(n)]
    if odd or not value or len({str(name).casefold() for name in value}) < len(value):
        raise ConfigError(
            f"the {what} has no names that can be used", got=shown(odd or list(value)),
            allowed="letters, digits, - and _, each name once; a letter or digit first",
            fix=f"--{what} {such}",
        )  # fmt: skip


def _nats(name: str, value: Any) -> float:
    try:
        nats = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        nats = math.nan
    if not 0 < nats < math.inf:
        raise ConfigError(
            f"the budget of {name} is not accepted", got=shown(value, plain=True),
            allowed="nats per token: a number above 0", fix=f"--budget {name}=0.02",
        )  # fmt: skip
    return nats


def read_config(
    where: str | Path | Mapping[str, Any], overrides: Mapping[str, Any], kind: type[Model]
) -> Model:
    """Reads a YAML file (or a mapping), lays `overrides` (dotted keys) over it, and checks it.

    Raises:
        ConfigError: no such file, no YAML, an unknown key or a value out of range.
    """
    return validate(read_settings(where, overrides), kind)


def read_settings(
    where: str | Path | Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """What `read_config` checks, unchecked: settings with `overrides` over them.

    Args:
        where: a YAML file ("" for none), or the settings themselves.
        overrides: by dotted keys; those that are None are left out.

    Raises:
        ConfigError: no such file, or no YAML mapping.
    """
    if isinstance(where, Mapping):
        found = copy.deepcopy(dict(where))
    else:
        fix = "check the path and the file"
        found = read_mapping(where, "the configuration", fix) if where else {}
    for dotted, value in overrides.items():
        if value is None:
            continue
        *parents, leaf = dotted.split(".")
        here = found
        for parent in parents:
            if not isinstance(here.get(parent), dict):
                here[parent] = {}
            here = here[parent]
        here[leaf] = value
    return found


def validate(found: dict[str, Any], kind: type[Model]) -> Model:
    """A configuration object from plain data; one line says what is wrong with it."""
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = _where(first)
        if first["type"] == "extra_forbidden":
            model: Any = kind
            for part in where[:-1]:
                model = model.model_fields[part].annotation
            raise unknown("key", where[-1], model.model_fields) from error
        if first["type"] == "missing":
            key = ".".join(where)
            option = f"give --{key}, or " if kind is RunConfig else ""
            raise ConfigError(
                f"{key} is missing",
                got=f"no {key}",
                allowed="a value",
                fix=f"{option}write {key.replace('.', ': {')}:{' ... }' * (len(where) - 1)} in the "
                "file",
            ) from error
        if first["type"] == "literal_error":
            allowed = re.findall(r"'([^']*)'", first["ctx"]["expected"])
            name = next(part for part in reversed(where) if not part.isdigit())
            raise unknown(name, shown(first["input"], plain=True), allowed) from error
        raise ConfigError(
            f"the value of {'.'.join(where) or 'the configuration'} is not accepted",
            got=shown(first.get("input")),
            allowed=" or ".join(_allowed(e) for e in error.errors() if _where(e) == where),
            fix=_left_out(kind, where),
        ) from error


def _left_out(kind: type[BaseModel], where: list[str]) -> str:
    """What to do about a value that is out of range: its default always will do."""
    model, field = kind, None
    for part in where:
        found = model.model_fields.get(part) if isinstance(model, type) else None
        field, model = found, getattr(found, "annotation", None)  # type: ignore[assignment]
    if field is None or field.is_required():
        return "change it in the file or on the command line"
    default = field.get_default(call_default_factory=True)
    plain = isinstance(default, int | float | str) and default != -1
    return f"leave {where[-1]} out{f', for {default}' if plain else ''}, or give what is allowed"


def _where(error: Any) -> list[str]:
    """The keys that lead to a value, without pydantic's names for the kinds in a union."""
    where = [str(part) for part in error["loc"]]
    while len(where) > 1 and re.fullmatch(r"constrained-\w+|\w+\[.*|int|float|str", where[-1]):
        where.pop()
    return where


_KINDS = {
    "int": "a whole number", "float": "a number", "finite": "a finite number",
    "bool": "true or false", "string": "text", "list": "a list",
    "dict": "keys with values", "model": "keys with values",
}  # fmt: skip


def _allowed(error: Any) -> str:
    """What pydantic would have accepted, in our words where its own are of its kinds."""
    kind = error["type"].partition("_")[0]
    if error["type"] != "greater_than" and kind in _KINDS:
        return _KINDS[kind]
    return str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
