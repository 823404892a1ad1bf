"""What all records are made of: their base class, numbers with intervals, digests of plain data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = [
    "Hardware", "Interval", "Known", "Listed", "Measure", "Part", "Score", "Step", "Values",
    "bits_of", "digest_of", "finite", "flags_of",
]  # fmt: skip

T = TypeVar("T")


def digest_of(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of plain data as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def bits_of(flags: Sequence[bool]) -> str:
    """Flags as text, ``count:hexadecimal digits``: the first flag is the highest bit."""
    padded = [*flags, *[False] * (-len(flags) % 4)]
    fours = (padded[i : i + 4] for i in range(0, len(padded), 4))
    return f"{len(flags)}:" + "".join(f"{8 * a + 4 * b + 2 * c + d:x}" for a, b, c, d in fours)


def flags_of(text: str) -> list[bool]:
    """The flags of `bits_of`; raises ValueError for text of another form."""
    count, digits = text.split(":")
    if len(digits) != -(-int(count) // 4):
        raise ValueError(f"{count} flags in {len(digits)} hexadecimal digits")
    return [digit == "1" for one in digits for digit in f"{int(one, 16):04b}"][: int(count)]


def finite(value: Any) -> Any:
    """Plain data for JSON: null for a number that is not finite, text for a path."""
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


class Part(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """As plain data for JSON: what was set, and nothing else."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    @property
    def options(self) -> dict[str, Any]:
        """The fields that the class does not name."""
        return dict(self.model_extra or {})


def _whole_interval(value: Any) -> Any:
    """An interval with an unknown end is an unknown interval."""
    if isinstance(value, list | tuple) and any(end is None for end in value):
        return None
    return value


Interval = Annotated[tuple[float, float] | None, BeforeValidator(_whole_interval)]
Listed = Annotated[list[T], BeforeValidator(lambda value: [] if value is None else value)]
"""A list; empty where the file has null."""
Score = float | None
Known = BeforeValidator(lambda value: {} if value is None else value)
Values = Annotated[dict[str, float | None], Known]


class Hardware(Part):
    """The machine of a run."""

    cpu: str | None = None
    cores: int | None = None
    memory_gib: float | None = None
    accelerator: str | None = None
    threads: int | None = None


class Step(Part):
    """A point of the training curve; KL in nats per token."""

    step: int
    loss: float | None = None
    predicted: float | None = None
    measured: float | None = None
    strength: float | None = None


class Measure(Part):
    """A number with its 95 % interval, and how many rows it is of; null where there were none."""

    value: float | None = None
    interval: Interval = None
    n: int = 0
