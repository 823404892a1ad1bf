"""What a study may say: models, adapters, methods, orders of tasks and seeds; and its reader.

Without ``runs`` every adapter meets every method, order and seed; ``adapter: lora`` is short for
``adapters: [lora]``. docs/studies.md has every key, ``benchmarks/studies`` has examples.
"""

from __future__ import annotations

import random
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from retain.config import Precision, Strict, TrainConfig, validate
from retain.documents import read_mapping
from retain.errors import ConfigError, shown, unknown
from retain.evaluation.continual import METRICS
from retain.records import Part, RunData, RunEvaluation, RunGeneral, RunSource
from retain.types import STRONGEST, HeadStart

__all__ = [
    "RUNNERS_OWN", "AdapterSpec", "CellSpec", "ClaimSpec", "DrawnOrder", "MethodSpec",
    "SourceSpec", "StudySpec", "parse_study", "read_study",
]  # fmt: skip

RUNNERS_OWN = {
    "seed": "seeds: [0, 1] at the top",
    "update": "methods: {kfac: {update: proximal}}",
    "save_steps": "remove it",
    "report_to": "remove it",
}
"""Keys of the training settings that are not a study's there, and where they are."""

_SHORT = {"model": "models", "adapter": "adapters", "method": "methods", "order": "orders"}


class AdapterSpec(Part):
    """One way to tune; keys that it does not name are the kind's `options`.

    Attributes:
        kind: of `retain.models.adapters`; the label by default.
        dtype, training: of the model, and settings, where they differ from the study's.
    """

    kind: str = ""
    dtype: Precision | None = None
    training: dict[str, Any] = Field(default_factory=dict)


class MethodSpec(Part):
    """One way to retain; keys that it does not name are the method's `options`.

    Attributes:
        kind: a name in `retain.retention`; the label by default.
        strength: a number, several that are each tried, or the method's own where it is null.
        head: how a classifier's outputs begin: ``drawn`` at random, ``fitted`` to the model as it
            is before each task, or as the method has it where it is null.
        training: settings that differ from the study's.
    """

    kind: str = ""
    strength: float | list[float] | None = None
    head: HeadStart | None = None
    training: dict[str, Any] = Field(default_factory=dict)

    @property
    def strengths(self) -> list[float | None]:
        """The strengths that are tried, one or more."""
        return [*self.strength] if isinstance(self.strength, list) else [self.strength]

    def titles(self, label: str) -> list[str]:
        """For people: the label, with the strength where there are several."""
        several = self.strength if isinstance(self.strength, list) else []
        return [f"{label} {s:g}" for s in several] if len(several) > 1 else [label]

    @model_validator(mode="after")
    def _sound(self) -> MethodSpec:
        if not all(0 <= (s or 0.0) <= STRONGEST for s in self.strengths) or not self.strengths:
            raise ValueError(
                f"strength must be a number from 0 to {STRONGEST:g}, or a list of such"
            )
        return self


class CellSpec(Strict):
    """A part of the grid; what it does not name is all that the study has.

    Attributes:
        independent: each task of the orders is learned alone, from the base model.
    """

    models: list[str] | None = None
    adapters: list[str] | None = None
    methods: list[str] | None = None
    orders: list[str] | None = None
    seeds: list[int] | None = None
    training: dict[str, Any] = Field({})
    independent: bool = False


class DrawnOrder(Strict):
    """Tasks in an order that the seed of a run draws.

    Attributes:
        drawn: the tasks.
    """

    drawn: list[str]

    def of(self, seed: int) -> list[str]:
        """The tasks in the order of a seed."""
        return random.Random(f"order:{seed}").sample(self.drawn, len(self.drawn))


class DataSpec(RunData, extra="forbid"):
    """How many rows of each task are used."""


class GeneralSpec(RunGeneral, extra="forbid"):
    """General tasks, measured before and after."""


class EvaluationSpec(RunEvaluation, extra="forbid"):
    """How tasks are scored."""


class SourceSpec(RunSource, extra="forbid"):
    """The text on which the base model is to stay what it was."""

    @model_validator(mode="after")
    def _named(self) -> SourceSpec:
        wanted = {"file": ("path", self.path), "data": ("name", self.name)}.get(self.kind)
        if wanted and not wanted[1]:
            raise ValueError(f"a source of kind {self.kind} with its {wanted[0]}")
        return self


class ClaimSpec(Strict):
    """What a study is to show: a method's mean of a metric over that of another, and its bound.

    Of several cells of the method all are to show it.

    Attributes:
        claim: in words.
        metric: of `retain.evaluation.continual.METRICS`, or ``score:TASK``.
        method, reference: labels, with the strength where a method has several.
        relation, bound: what the ratio is to keep.
    """

    claim: str
    metric: str
    method: str
    reference: str = "none"
    relation: Literal["<=", ">="] = "<="
    bound: float


class StudySpec(Strict):
    """A whole study; see the module for an example.

    Attributes:
        attention: an ``attn_implementation`` of transformers; its own choice where it is null.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")
    description: str = ""
    models: list[str] = Field(min_length=1)
    dtype: Precision = "float32"
    attention: str | None = None
    seeds: list[int] = Field([0], min_length=1)
    orders: dict[str, list[str] | str | DrawnOrder] = Field(min_length=1)
    adapters: dict[str, AdapterSpec] = Field(min_length=1)
    methods: dict[str, MethodSpec] = Field(min_length=1)
    runs: list[CellSpec] = Field([CellSpec()])
    training: dict[str, Any] = Field({})
    data: DataSpec = DataSpec()
    source: SourceSpec = SourceSpec()
    general: GeneralSpec | None = None
    evaluation: EvaluationSpec = EvaluationSpec()
    claims: list[ClaimSpec] = Field([])

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """The training settings of all its parts."""
        parts: list[AdapterSpec | MethodSpec | CellSpec] = [*self.adapters.values(), *self.runs]
        return [self.training, *(p.training for p in (*parts, *self.methods.values()))]

    @model_validator(mode="after")
    def _sound(self) -> StudySpec:
        for seeds in (self.seeds, *(c.seeds for c in self.runs if c.seeds is not None)):
            if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
                raise ValueError("seeds must be different whole numbers of 0 or more")
        for name, order in self.orders.items():
            tasks = order.drawn if isinstance(order, DrawnOrder) else order
            if isinstance(tasks, list) and (not tasks or len(set(tasks)) < len(tasks)):
                raise ValueError(f"order {name} must have tasks, each once")
        return self


def read_study(
    path: Path, *, limit: int | None = None, seeds: list[int] | None = None
) -> StudySpec:
    """Reads and checks a study, of which at most `limit` training and test rows a task are used.

    Seeds that are given stand in place of the file's.

    Raises:
        ConfigError: no such file, no YAML, an unknown key or name, or a value out of range.
    """
    fix = "check the path and the file; see benchmarks/studies for examples"
    return parse_study(read_mapping(path, "the study", fix), limit=limit, seeds=seeds)


def parse_study(
    found: dict[str, Any], *, limit: int | None = None, seeds: list[int] | None = None
) -> StudySpec:
    """A study from plain data, with short forms spelled out; see `read_study`."""
    found = _spelled_out(found, "models")
    for key in ("adapters", "methods"):
        if isinstance(found.get(key), dict):
            parts = {str(k): {} if v is None else v for k, v in found[key].items()}
            found[key] = {
                label: {"kind": label} | part if isinstance(part, dict) else part
                for label, part in parts.items()
            }
    if isinstance(found.get("runs"), list):
        found["runs"] = [_spelled_out(cell) for cell in found["runs"]]
        if seeds is not None:
            for cell in found["runs"]:
                if isinstance(cell, dict):
                    cell.pop("seeds", None)
    if seeds is not None:
        found["seeds"] = seeds
    if limit is not None:
        found["data"] = _limited(found.get("data") or {}, limit)
    _refuse_unknown(found, StudySpec)
    spec = validate(found, StudySpec)
    for cell in spec.runs:
        for kind in _SHORT.values():
            for name in getattr(cell, kind) or []:
                if name not in getattr(spec, kind):
                    raise unknown(kind.removesuffix("s"), name, getattr(spec, kind))
    titles = [title for name, method in spec.methods.items() for title in method.titles(name)]
    for claim in spec.claims:
        if claim.metric not in METRICS and not claim.metric.startswith("score:"):
            raise unknown("metric", claim.metric, METRICS)
        for title in (claim.method, claim.reference):
            if title not in titles:
                raise unknown("method of a claim", title, titles)
    for training in spec.trainings:
        _check_training(training)
    return spec


def _limited(data: Any, limit: int) -> Any:
    """At most `limit` rows; what is no number is left for the check to name."""
    if not isinstance(data, dict):
        return data
    counts = {split: data.get(split) or limit for split in ("train", "test")}
    return data | {s: min(limit, n) if isinstance(n, int) else n for s, n in counts.items()}


def _spelled_out(found: Any, *only: str) -> Any:
    """``adapter: lora`` as ``adapters: [lora]``; of `only` these keys."""
    if not isinstance(found, dict):
        return found
    found = dict(found)
    for one, many in _SHORT.items():
        if only and many not in only:
            continue
        if one in found and many not in found:
            found[many] = found.pop(one)
        if isinstance(found.get(many), str):
            found[many] = None if found[many] == "all" else [found[many]]
    return found


def _refuse_unknown(found: Any, kind: Any) -> None:
    """Raises for a key that no part of the study has, however deep it lies."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for key, value in found.items() if isinstance(found, Mapping) else ():
            if key in kind.model_fields:
                _refuse_unknown(value, kind.model_fields[key].annotation)
            elif kind.model_config.get("extra") == "forbid":
                raise unknown("key", str(key), kind.model_fields)
        return
    inner = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for part in inner:
            _refuse_unknown(found, part)
    elif inner and isinstance(found, Mapping | list):
        for value in found.values() if isinstance(found, Mapping) else found:
            _refuse_unknown(value, inner[-1])


def _check_training(training: Mapping[str, Any]) -> None:
    tasks = training.get("tasks") or {}
    if not isinstance(tasks, dict) or not all(isinstance(t, dict) for t in tasks.values()):
        raise ConfigError(
            "training.tasks is no mapping",
            got=shown(tasks, 80),
            allowed="names of tasks, each with settings",
            fix="tasks: {cl15/sst2: {epochs: 2}}",
        )
    for part in (training, *tasks.values()):
        for key, value in part.items():  # one by one: the others may be elsewhere
            if key in RUNNERS_OWN:
                raise ConfigError(
                    f"{key} is no setting of a study's training",
                    got=f"{key}: {shown(value, plain=True)}",
                    allowed="the other training settings",
                    fix=RUNNERS_OWN[key],
                )
            if key != "tasks":
                whole = {"batch_size": value} if key == "accumulation" else {}
                validate(whole | {key: value}, TrainConfig)
