"""`StudyRecord` and its `RunRecord`s: what a study writes of its runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from retain.config import TrainConfig, validate
from retain.records.answers import AnswersRecord
from retain.records.evals import EvalRecord
from retain.records.parts import (
    Hardware,
    Interval,
    Known,
    Listed,
    Part,
    Score,
    Step,
    Values,
    digest_of,
)
from retain.types import HeadStart

__all__ = [
    "RUN_SCHEMA", "STUDY_SCHEMA", "Claim", "General", "Generation", "Parameters", "Retention",
    "RunAdapter", "RunData", "RunEvaluation", "RunGeneral", "RunMethod", "RunOrder",
    "RunRecord", "RunSource", "RunSpec", "RunTraining", "Seconds", "Sizes", "Skipped",
    "StudyRecord",
]  # fmt: skip

RUN_SCHEMA: Final = "retain.run/1"
STUDY_SCHEMA: Final = "retain.study/1"
_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq,
}  # fmt: skip


# What a run was told.


class RunAdapter(Part):
    """What is trained: its name in the study, its kind, and its `options`."""

    name: str
    kind: str = ""


class RunMethod(Part):
    """How the model is held; the method's own settings are the `options`.

    Attributes:
        name: in the study; one name may have several strengths.
        label: for people; the name where there is none.
        kind: the method.
        strength: its multiplier; null where it has none.
        stores_data: whether rows of earlier tasks are kept; null where the file does not say.
    """

    name: str
    label: str | None = None
    kind: str = ""
    strength: float | None = None
    stores_data: bool | None = None

    @property
    def title(self) -> str:
        """Its label, or its name."""
        return self.label or self.name

    @property
    def stores(self) -> bool:
        """Whether rows of earlier tasks are kept; replay of own samples keeps none."""
        if self.stores_data is not None:
            return self.stores_data
        words = f"{self.kind} {self.name}".lower()
        return "replay" in words and not any(w in words for w in ("self", "own", "sample", "gen"))


class RunOrder(Part):
    """The tasks in the order in which they are learned."""

    name: str
    tasks: list[str]


class RunTraining(Part):
    """Settings of `retain.config.TrainConfig`, in the `options`, and those of single tasks."""

    tasks: dict[str, dict[str, Any]] = {}

    def settings(self, task: str, seed: int = 0) -> TrainConfig:
        """The training settings of one task."""
        return validate(self.options | self.tasks.get(task, {}) | {"seed": seed}, TrainConfig)


class RunData(Part):
    """How many rows of each task are used; all where it is null."""

    train: int | None = Field(None, ge=1)
    test: int | None = Field(None, ge=1)


class RunSource(Part):
    """The text on which the base model is to stay what it was.

    Attributes:
        kind: ``self`` (the model samples it), ``file``, ``data`` (a folder of the data
            directory) or ``none``.
        path: of a file, beside the study; its ``digest`` is among the options.
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


class RunGeneral(Part):
    """Tasks of lm-evaluation-harness, measured before and after the sequence."""

    tasks: list[str] = Field(min_length=1)
    limit: int | None = Field(None, ge=1)


class RunEvaluation(Part):
    """How tasks are scored.

    Attributes:
        batch_size: rows a pass.
        retention: whether base retention is measured after each task or after the last one.
        unseen: which tasks are scored before they are learned: all, the next one alone, which is
            what forward transfer needs, or none. Before the first task all are scored.
        earlier: whether tasks learned earlier are scored after each task or after the last one.
            With ``last`` and ``unseen: none`` forgetting is what was lost since a task was learned.
        measure_every: optimiser steps between two measurements of the KL during training, which
            are kept in the record; 0 keeps nothing of the training.
        answers: general questions that the model answers, before and after, to be read.
        own_answers: how many general prompts of the held-out half (the skills take turns) the
            trained model and its base answer at the end, to be compared.
        split: the rows that tasks are scored on: ``test``, or ``validation``, which are held out
            of the training rows, so that settings are chosen without a look at the test rows.
    """

    batch_size: int = Field(16, ge=1)
    retention: Literal["each", "last"] = "each"
    unseen: Literal["all", "next", "none"] = "all"
    earlier: Literal["each", "last"] = "each"
    measure_every: int = Field(0, ge=0)
    answers: int = Field(0, ge=0)
    own_answers: int = Field(0, ge=0, le=152)
    split: Literal["test", "validation"] = "test"

    def for_key(self) -> dict[str, Any]:
        """As plain data, without later keys that have their defaults: older records have none."""
        later = {"earlier": "each", "measure_every": 0, "answers": 0, "own_answers": 0,
                 "split": "test"}  # fmt: skip
        return self.model_dump(
            mode="json", exclude={name for name, old in later.items() if getattr(self, name) == old}
        )


class RunSpec(Part):
    """One run of a study.

    Attributes:
        model: a name or a folder.
        dtype: of its weights.
        attention: an ``attn_implementation`` of transformers; null is its own choice.
        adapter, method, order: what is trained, how it is held, and on what.
        definitions: what tells one definition of each task from another.
        seed: of everything random; null in files that do not say.
        training, data, source, general, evaluation: see the classes.
        head: how a classifier's outputs begin; not there for a decoder, or at random.
    """

    model: str
    dtype: str | None = None
    attention: str | None = None
    adapter: RunAdapter
    method: RunMethod
    order: RunOrder
    definitions: list[str] = []
    seed: int | None = None
    training: RunTraining = RunTraining()
    data: RunData = RunData()
    source: RunSource = RunSource()
    general: RunGeneral | None = None
    evaluation: RunEvaluation = RunEvaluation()
    head: HeadStart | None = None

    @property
    def key(self) -> str:
        """16 hexadecimal digits: the digest of all that is set."""
        return digest_of(self.plain())

    @property
    def cell(self) -> str:
        """In words, the cell that the run is averaged in with those of other seeds."""
        return f"{self.model} {self.adapter.name} {self.method.title} {self.order.name}"

    @property
    def title(self) -> str:
        """The run in words."""
        return f"{self.cell} seed {self.seed}"

    @property
    def shared(self) -> dict[str, Any]:
        """What all runs of a cell have in common: all but the seed, and the tasks in any order.

        A seed may draw the order; what a file of an earlier version lacks has its default.
        """
        made = self.model_dump(mode="json", by_alias=True, exclude={"seed"})
        made["order"]["tasks"] = sorted(self.order.tasks)
        return made | {"definitions": sorted(self.definitions)}

    def settings(self, index: int, seed: int = 0) -> TrainConfig:
        """The training settings of one task, by its place in the order."""
        return self.training.settings(self.order.tasks[index], seed)


# What came of it.


class Sizes(Part):
    """Rows of each task."""

    train: list[int]
    test: list[int]


class Retention(Part):
    """How far the model has moved from the base after task `after` (from 0)."""

    after: int
    kl: float | None = None
    kl_interval: Interval = None
    ppl_base: float | None = None
    ppl: float | None = None
    flips: float | None = None
    tokens: int | None = None


class General(Part):
    """Scores on general tasks, by name."""

    before: Values = {}
    after: Values = {}

    @property
    def change(self) -> float | None:
        """The mean of after less before over the tasks that have both."""
        pairs = [(self.before.get(name), score) for name, score in self.after.items()]
        known = [b - a for a, b in pairs if a is not None and b is not None]
        return sum(known) / len(known) if known else None


class Parameters(Part):
    """How many parameters a task trains (the first, where it matters), without a new head."""

    trainable: int | None = None
    base: int | None = None
    share: float | None = None


class Seconds(Part):
    """Where the time went."""

    train: float | None = None
    method: float | None = None
    evaluate: float | None = None
    total: float | None = None


class Generation(Part):
    """What the model answered, and what it answered before it learned anything, to be read."""

    prompt: str
    text: str | None = None
    before: str | None = None


class RunRecord(Part):
    """The record of one run; docs/studies.md tells its fields.

    Attributes:
        status: ``unfinished`` is never written: the machine lacked something.
        inputs: digests of the files that were read; null in files of earlier versions.
        matrix: the score of each task after each; null where it was not measured.
        right: as `matrix`, which rows were answered rightly (`bits_of`); null where it was not
            measured and for a regression; empty in files of earlier versions.
        intervals: 95 % intervals within the run, by the name of what they are of.
        history: of the training, and `generations`, where they were asked for.
        own_answers: of the trained model beside its base, where they were asked for.
    """

    schema_name: Literal["retain.run/1"] = Field(RUN_SCHEMA, alias="schema")
    study: str = ""
    key: str = ""
    status: Literal["done", "failed", "unfinished"] = "done"
    error: str | None = None
    config: RunSpec
    created: str | None = None
    seed: int | None = None
    versions: Annotated[dict[str, str | None], Known] = {}
    commit: str | None = None
    hardware: Hardware | None = None
    inputs: dict[str, str] | None = None
    tasks: Listed[str] = []
    metrics: Listed[str] = []
    before: Listed[Score] = []
    matrix: Listed[list[Score]] = []
    right: Listed[list[str | None]] = []
    sizes: Sizes | None = None
    retention: Listed[Retention] = []
    general: General | None = None
    metrics_summary: Values = {}
    parameters: Parameters | None = None
    method_bytes: int | None = None
    seconds: Seconds | None = None
    peak_memory_gib: float | None = None
    losses: Listed[Score] = []
    extras: Listed[Mapping[str, float | None] | None] = []
    predicted: Listed[Score] = []
    intervals: dict[str, Interval] = {}
    history: Listed[Step] = []
    generations: Listed[Generation] = []
    own_answers: AnswersRecord | None = None
    notes: Listed[str] = []

    @property
    def done(self) -> bool:
        """Whether the run came to its end."""
        return self.status == "done"


class Skipped(Part):
    """A combination that a method refuses, and why."""

    adapter: str
    method: str
    reason: str | None = None


class Claim(Part):
    """What a study was to show, its bound, and whether it holds; null where not measured."""

    claim: str
    value: float | None = None
    bound: float | None = None
    relation: str | None = "<="
    holds: bool | None = None

    @property
    def verdict(self) -> Literal["holds", "does not hold", "not measured"]:
        """Holds only where neither the file nor its own numbers say otherwise."""
        said = [] if self.holds is None else [self.holds]
        compare = _RELATIONS.get(self.relation or "")
        if compare and self.value is not None and self.bound is not None:
            said.append(compare(self.value, self.bound))
        if not said:
            return "not measured"
        return "holds" if all(said) else "does not hold"


class StudyRecord(Part):
    """A study with the runs that it has.

    Attributes:
        planned: how many runs there are to be.
        chosen: the title of the method that the claims are about.
        evaluated: the whole of a ``retain eval``, which is read as a study; never in a file.
    """

    schema_name: Literal["retain.study/1"] = Field(STUDY_SCHEMA, alias="schema")
    name: str
    description: str | None = None
    spec: dict[str, Any] = {}
    skipped: Listed[Skipped] = []
    planned: int | None = None
    chosen: str | None = None
    runs: list[RunRecord]
    tables: dict[str, Any] = {}
    claims: Listed[Claim] = []
    evaluated: EvalRecord | None = None
