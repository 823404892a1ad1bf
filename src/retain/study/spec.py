"""What a study may say: models, adapters, methods, orders of tasks and seeds.

    {name: four-task, models: [smollm2-135m], seeds: [0, 1, 2],
     orders: {first: [cl15/dbpedia, cl15/sst2], paper: published/order4-14},
     adapters: {lora: {rank: 16}, prefix: {num_virtual_tokens: 8, training: {learning_rate: 0.01}}},
     methods: {none: {}, kfac: {strength: [1, 10]}},
     runs: [{adapter: lora, methods: [none, kfac]}, {adapter: prefix, method: none, seeds: [0]},
            {adapter: lora, method: none, independent: true}],
     training: {learning_rate: 5.0e-4, tasks: {cl15/sst2: {epochs: 2}}},
     data: {train: 160, test: 96}, source: {kind: data, name: text/wikitext2}}

Without ``runs`` every adapter meets every method, order and seed. The files in
``benchmarks/studies`` are examples.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from retain.types import STRONGEST, HeadStart

__all__ = ["AdapterSpec", "CellSpec", "MethodSpec", "SourceSpec", "StudySpec"]

DType = Literal["float32", "bfloat16", "float64"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Open(BaseModel):
    """Keys that it does not know are options of the adapter or the method."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """What is passed on to the adapter or the method."""
        return dict(self.model_extra or {})


class AdapterSpec(_Open):
    """One way to tune.

    Attributes:
        kind: lora, full, bottleneck, prefix or osf; the label by default.
        dtype: of the model, where it differs from the study's.
        training: settings that differ from the study's.
    """

    kind: str = ""
    dtype: DType | None = None
    training: dict[str, Any] = {}


class MethodSpec(_Open):
    """One way to retain.

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
    training: dict[str, Any] = {}

    @property
    def strengths(self) -> list[float | None]:
        """The strengths that are tried, one or more."""
        return [*self.strength] if isinstance(self.strength, list) else [self.strength]

    @model_validator(mode="after")
    def _sound(self) -> MethodSpec:
        if not all(0 <= (s or 0.0) <= STRONGEST for s in self.strengths) or not self.strengths:
            raise ValueError(
                f"strength must be a number from 0 to {STRONGEST:g}, or a list of such"
            )
        return self


class CellSpec(_Strict):
    """A part of the grid; what it does not name is all that the study has.

    Attributes:
        independent: each task of the orders is learned alone, from the base model.
    """

    models: list[str] | None = None
    adapters: list[str] | None = None
    methods: list[str] | None = None
    orders: list[str] | None = None
    seeds: list[int] | None = None
    training: dict[str, Any] = {}
    independent: bool = False


class DataSpec(_Strict):
    """How many rows of each task are used; all where it is null."""

    train: int | None = Field(None, ge=1)
    test: int | None = Field(None, ge=1)


class SourceSpec(_Strict):
    """The text on which the base model is to stay what it was.

    Attributes:
        kind: ``self`` (the model samples it), ``file``, ``data`` (a folder of the data
            directory) or ``none``.
        path: of a file, beside the study.
        name: of a folder of the data directory, such as ``text/wikitext2``.
        split: where rows to measure the curvature on are taken.
        heldout_split: where rows to measure forgetting on are taken.
        rows: to measure the curvature on.
        heldout: rows to measure forgetting on.
        max_length: tokens of a row.
        min_words: shorter rows are left out.
    """

    kind: Literal["self", "file", "data", "none"] = "none"
    path: str | None = None
    name: str | None = None
    split: str = "validation"
    heldout_split: str = "test"
    rows: int = Field(64, ge=1)
    heldout: int = Field(32, ge=1)
    max_length: int = Field(128, ge=2)
    min_words: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _named(self) -> SourceSpec:
        wanted = {"file": ("path", self.path), "data": ("name", self.name)}.get(self.kind)
        if wanted and not wanted[1]:
            raise ValueError(f"a source of kind {self.kind} with its {wanted[0]}")
        return self


class GeneralSpec(_Strict):
    """Tasks of lm-evaluation-harness, measured before and after the sequence."""

    tasks: list[str] = Field(min_length=1)
    limit: int | None = Field(None, ge=1)


class EvaluationSpec(_Strict):
    """How tasks are scored.

    Attributes:
        batch_size: rows a pass.
        retention: whether base retention is measured after each task or after the last one.
        unseen: which tasks are scored before they are learned: all, the next one alone, which is
            what forward transfer needs, or none. Before the first task all are scored.
        earlier: whether tasks learned earlier are scored after each task or after the last one.
            With ``last`` and ``unseen: none`` forgetting is what was lost since a task was learned.
    """

    batch_size: int = Field(16, ge=1)
    retention: Literal["each", "last"] = "each"
    unseen: Literal["all", "next", "none"] = "all"
    earlier: Literal["each", "last"] = "each"

    def for_key(self) -> dict[str, Any]:
        """As plain data; without `earlier` where it is the default, as records from before it."""
        found = self.model_dump(mode="json")
        if self.earlier == "each":
            del found["earlier"]
        return found


class StudySpec(_Strict):
    """A whole study; see the module for an example.

    Attributes:
        attention: an ``attn_implementation`` of transformers; its own choice where it is null.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")
    description: str = ""
    models: list[str] = Field(min_length=1)
    dtype: DType = "float32"
    attention: str | None = None
    seeds: list[int] = Field([0], min_length=1)
    orders: dict[str, list[str] | str] = Field(min_length=1)
    adapters: dict[str, AdapterSpec] = Field(min_length=1)
    methods: dict[str, MethodSpec] = Field(min_length=1)
    runs: list[CellSpec] = [CellSpec()]
    training: dict[str, Any] = {}
    data: DataSpec = DataSpec()
    source: SourceSpec = SourceSpec()
    general: GeneralSpec | None = None
    evaluation: EvaluationSpec = EvaluationSpec()

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """The training settings of all its parts."""
        parts: list[AdapterSpec | MethodSpec] = [*self.adapters.values(), *self.methods.values()]
        cells = [cell.training for cell in self.runs]
        return [self.training, *(part.training for part in parts), *cells]

    @model_validator(mode="after")
    def _sound(self) -> StudySpec:
        for seeds in (self.seeds, *(c.seeds for c in self.runs if c.seeds is not None)):
            if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
                raise ValueError("seeds must be different whole numbers of 0 or more")
        for name, tasks in self.orders.items():
            if isinstance(tasks, list) and (not tasks or len(set(tasks)) < len(tasks)):
                raise ValueError(f"order {name} must have tasks, each once")
        return self
