"""What a `result.json` holds, as pydantic models, and the reader of it.

Unknown fields are ignored, so that a file written by a newer version still opens. A value
that was not measured is `null` in the file and `None` here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from retain.documents import read_json
from retain.errors import SourceError, shown

__all__ = ["SCHEMA", "Claim", "Result", "Role", "Row", "read_result"]

SCHEMA = "retain.result/1"

Role = Literal["base", "lora", "retain"]
Verdict = Literal["holds", "does not hold", "not measured"]

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}


def _known_interval(value: Any) -> Any:
    """An interval with an unknown end is an unknown interval."""
    if isinstance(value, (list, tuple)) and any(end is None for end in value):
        return None
    return value


def _known_list(value: Any) -> Any:
    """A list that is null is an empty list."""
    return [] if value is None else value


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Interval = Annotated[tuple[float, float] | None, BeforeValidator(_known_interval)]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, populate_by_name=True
    )


class Hardware(_Part):
    """The machine the runs were made on."""

    cpu: str | None = None
    cores: int | None = None
    memory_gib: float | None = None
    accelerator: str | None = None


class Model(_Part):
    """The base model and the size of what was trained."""

    name: str
    parameters: int | None = None
    trainable: int | None = None
    dtype: str | None = None


class Task(_Part):
    """What was learned."""

    name: str
    train: int | None = None
    test: int | None = None
    metric: str | None = None


class Source(_Part):
    """The text that the curvature was measured on and forgetting is measured on."""

    name: str | None = None
    fit_tokens: int | None = None
    heldout_tokens: int | None = None


class Curvature(_Part):
    """The curvature behind the retention force."""

    structure: str | None = None
    space: str | None = None
    fisher: str | None = None
    tokens: int | None = None
    seconds: float | None = None
    size: int | None = Field(default=None, alias="bytes")


class Target(_Part):
    """How well the task was learned."""

    exact_match: Share | None = None
    interval: Interval = None
    loss: float | None = None
    items: int | None = None


class Forgetting(_Part):
    """How far the model moved from the base on held-out text."""

    kl: float | None = None
    kl_interval: Interval = None
    ppl_base: float | None = None
    ppl: float | None = None
    flips: Share | None = None
    tokens: int | None = None


class Probe(_Part):
    """Knowledge that the base model had, asked again."""

    accuracy: Share | None = None
    interval: Interval = None
    items: int | None = None
    lost: float | None = Field(default=None, ge=-1.0, le=1.0)


class Train(_Part):
    """The cost of a run."""

    seconds: float | None = None
    steps: int | None = None
    examples: int | None = None
    peak_memory_mib: float | None = None


class Step(_Part):
    """One logged step of a run."""

    step: int
    loss: float | None = None
    predicted: float | None = None
    measured: float | None = None
    strength: float | None = None


class Generation(_Part):
    """A continuation of a general prompt."""

    prompt: str
    text: str | None = None


class Row(_Part):
    """One model: the base, plain LoRA, or LoRA held at one strength."""

    name: str
    label: str
    method: str | None = None
    strength: float | None = None
    chosen: bool | None = False
    target: Target | None = Target()
    forgetting: Forgetting | None = Forgetting()
    probe: Probe | None = Probe()
    train: Train | None = None
    history: Annotated[list[Step], BeforeValidator(_known_list)] = []
    generations: Annotated[list[Generation], BeforeValidator(_known_list)] = []

    @property
    def role(self) -> Role:
        """Base, plain LoRA, or held."""
        if self.method is None:
            return "base"
        return "lora" if self.method == "none" else "retain"


class Claim(_Part):
    """A claim with the number that supports or refutes it."""

    claim: str
    value: float | None = None
    bound: float | None = None
    relation: str | None = None
    holds: bool | None = None

    @property
    def verdict(self) -> Verdict:
        """Holds only where neither the file nor its own numbers say otherwise."""
        said = [] if self.holds is None else [self.holds]
        compare = _RELATIONS.get(self.relation or "")
        if compare and self.value is not None and self.bound is not None:
            said.append(compare(self.value, self.bound))
        if not said:
            return "not measured"
        return "holds" if all(said) else "does not hold"


class Result(_Part):
    """The whole of a `result.json`."""

    schema_name: Literal["retain.result/1"] = Field(alias="schema")
    kind: str = "result"
    created: str | None = None
    seed: int | None = None
    versions: dict[str, str | None] = {}
    commit: str | None = None
    hardware: Hardware | None = None
    model: Model
    task: Task
    source: Source | None = None
    curvature: Curvature | None = None
    rows: list[Row] = Field(min_length=1)
    summary: Annotated[list[Claim], BeforeValidator(_known_list)] = []

    def _first(self, role: Role) -> Row | None:
        return next((row for row in self.rows if row.role == role), None)

    @property
    def base(self) -> Row | None:
        """The base model's row."""
        return self._first("base")

    @property
    def lora(self) -> Row | None:
        """The plain LoRA row."""
        return self._first("lora")

    @property
    def chosen(self) -> Row | None:
        """The held row that was chosen; the only held row counts as chosen."""
        held = [row for row in self.rows if row.role == "retain"]
        marked = [row for row in held if row.chosen]
        return marked[0] if marked else held[0] if len(held) == 1 else None

    @property
    def main_rows(self) -> list[Row]:
        """Base, plain LoRA and the chosen held row, where there are such."""
        return [row for row in (self.base, self.lora, self.chosen) if row is not None]


def read_result(path: Path) -> Result:
    """Read and check a `result.json`.

    Raises:
        SourceError: the file is missing, is not JSON, or is not a result.
    """
    again = "run the command that makes the result again"
    try:
        data = read_json(path, nan=True)
    except OSError as error:
        raise SourceError(
            "the result cannot be read",
            got=f"{path} ({error.strerror or type(error).__name__})",
            allowed="a readable result.json",
            fix="give the path of a result.json",
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise SourceError(
            f"{path} is not JSON", got=error, allowed=f"a {SCHEMA} file", fix=again
        ) from error
    name = data.get("schema") if isinstance(data, dict) else None
    if name != SCHEMA:
        raise SourceError(
            f"{path} is not a result this version reads",
            got=f"schema {shown(name)}",
            allowed=repr(SCHEMA),
            fix="give a result.json, or use the version of retain that wrote it",
        )
    try:
        return Result.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise SourceError(
            f"{path} does not follow {SCHEMA} at {where}{more}",
            got=shown(first["input"], 60),
            allowed=first["msg"],
            fix=again,
        ) from error
