"""The exceptions of retain, one tree:

    RetainError
    ├── ConfigError            an unknown key, name or value in what the user wrote
    ├── ModelError             a model or adapter that cannot be loaded or used
    ├── SourceError            a data set or text that cannot be read, or is too small
    ├── CurvatureError         a curvature that cannot be computed
    │   ├── ArtifactError      a file that is damaged or not ours
    │   └── MismatchError      a sound file that belongs to another model or adapter
    ├── MissingExtra           a package that only a part of retain needs (`retain.extras`)
    ├── TrainingError          training that cannot go on (a loss that is not finite)
    └── OutputError            a place that cannot be written

Each carries one line that says what was wrong, what was got, what is allowed and how to
mend it. The command line prints that line and exits with code 2.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
import warnings
from collections.abc import Iterable

_GOT = 600
"""Characters of what was found that an error repeats, at most."""

_MOST = 60
"""Known names that an error lists; of more it tells the nearest."""

__all__ = [
    "ArtifactError",
    "ConfigError",
    "CurvatureError",
    "MismatchError",
    "ModelError",
    "OutputError",
    "RetainError",
    "RetainWarning",
    "SourceError",
    "TrainingError",
    "check_number",
    "memory_full",
    "not_finite",
    "shown",
    "unknown",
]


class RetainError(Exception):
    """Base of all errors that retain raises on purpose.

    Args:
        what: what is wrong, a short clause.
        got: what was found.
        allowed: what would have been accepted.
        fix: what to do next.
    """

    exit_code = 2

    def __init__(
        self, what: str, *, got: object = None, allowed: object = None, fix: str | None = None
    ) -> None:
        self.what, self.got, self.allowed, self.fix = what, got, allowed, fix
        parts = [what]
        if got is not None:
            parts.append(f"got: {_cut(str(got), _GOT)}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if fix is not None:
            parts.append(f"fix: {fix}")
        line = " ".join("; ".join(parts).split())
        # What others wrote may be in it: nothing that a terminal would take for a command.
        super().__init__("".join(c if c.isprintable() else "\ufffd" for c in line))


class ConfigError(RetainError):
    """An unknown key, name or value in a configuration, a call or on the command line."""


class ModelError(RetainError):
    """A model or an adapter that cannot be found, loaded or used."""


class SourceError(RetainError):
    """A data set or text that cannot be read, is empty, or is too small."""


class CurvatureError(RetainError):
    """A curvature that cannot be computed."""


class ArtifactError(CurvatureError):
    """A curvature file that is truncated, altered, or not a curvature file."""


class MismatchError(CurvatureError):
    """A sound curvature that was measured on another base model, adapter or anchor."""


class TrainingError(RetainError):
    """Training that cannot go on, such as a loss that is not finite."""


class OutputError(RetainError):
    """A file or folder that cannot be written."""


_OTHER_NAMES = {
    "dtype": {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"},
}
"""Of a kind, what others call a name: fp16 is no slip of the finger for bfloat16."""


def unknown(kind: str, got: str, allowed: Iterable[str]) -> ConfigError:
    """A `ConfigError` for an unknown name, with the nearest known name where one is near.

    Of more than `_MOST` names the nearest are told, and how many there are.
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5) if len(got) < 200 else []
    short = [name for name in names if 1 < len(got.strip("-")) == len(_initials(name))]
    near = [name for name in short if _initials(name) == got.strip("-").lower()] or near  # lr
    if other := _OTHER_NAMES.get(kind, {}).get(got):
        near = [other] if other in names else []
    fix = f"did you mean {near[0]!r}?" if near else f"use one of the allowed {kind} names"
    told = ", ".join(names)
    if len(names) > _MOST:
        such = difflib.get_close_matches(got[:200], names, n=5, cutoff=0.3) or names[:5]
        told = f"{len(names)} names, such as {', '.join(such)}"
    return ConfigError(f"unknown {kind}", got=shown(got), allowed=told, fix=fix)


def with_point(text: str) -> str | None:
    """A number with a comma in place of its point, such as 0,02, written as it is read; or None."""
    found = re.fullmatch(r"(\d*),(\d+)", text)
    return found and f"{found[1]}.{found[2]}"


def not_finite() -> ModelError:
    """A `ModelError` for a model that predicts NaN or infinity."""
    return ModelError(
        "the model's predictions are not finite", got="NaN or infinity",
        allowed="finite numbers", fix="check the model's weights, or dtype='float32'",
    )  # fmt: skip


def _initials(name: str) -> str:
    return "".join(part[0] for part in re.split("[-_]+", name.strip("-_")) if part)


def shown(value: object, limit: int = 120, *, plain: bool = False) -> str:
    """What others wrote, for an error: its ``repr``, bounded in depth, time and `limit` characters.

    Where it is `plain`, a text has no quotation marks.
    """
    if plain and isinstance(value, str):
        return _cut(value, limit)
    return _cut(_Short(limit).repr(value), limit)


class _Short(reprlib.Repr):
    """Never walks more than a few parts of a value, however often these stand for one another."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, limit, limit
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 5

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 256 else f"<a number of {x.bit_length()} bits>"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def check_number(
    what: str,
    value: object,
    fix: str,
    *,
    positive: bool = False,
    least: float = 0,
    most: float = math.inf,
    whole: bool = False,
) -> None:
    """Checks a value that is to be finite and 0 or above, or within bounds.

    Args:
        what: what the error says is wrong.
        value: what was given.
        fix: see `RetainError`.
        positive: `least` itself is refused too.
        least: the smallest that is allowed.
        most: the largest that is allowed.
        whole: whether it is a count.

    Raises:
        ConfigError: any other value.
    """
    number = math.nan
    if isinstance(value, int if whole else int | float) and not isinstance(value, bool):
        number = value
    if math.isfinite(number) and least <= number <= most and not (positive and number == least):
        return
    allowed = f"a finite number above {least:g}" if positive else f"{least:g} to {most:g}"
    if not positive and most == math.inf:
        allowed = f"a {'whole' if whole else 'finite'} number, {least:g} or above"
    raise ConfigError(what, got=value, allowed=allowed, fix=fix)


class RetainWarning(UserWarning):
    """Something is done in a lesser way than was asked for; each is said once."""


def warn(text: str) -> None:
    """Says in what lesser way the model is held; a run makes a note of it in its record.

    It points at the line that called the function which calls this one.
    """
    warnings.warn(text, RetainWarning, stacklevel=3)


def memory_full(error: BaseException) -> bool:
    """Whether an error says that the machine, or its accelerator, has no memory left."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "Cannot allocate memory" in str(error)
    )
