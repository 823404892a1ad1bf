"""What a study writes of its runs, and the report reads: one set of classes for both.

    StudyRecord  ``study.json``, schema ``retain.study/1``: a study with its runs
    RunRecord    ``runs/KEY.json``, schema ``retain.run/1``: one run, what was done and came of it
    RunSpec      ``config`` of a run: all that its result depends on, data files and versions aside
    EvalRecord   ``result.json`` of ``retain eval``, schema ``retain.result/2``

Fields that a class does not know are kept, so that a record survives being read and written, and a
file of a newer version opens; what was not measured is null. `Part.plain` gives the fields that
were set and no others, so a `RunSpec` is the same text again, and has the same key.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from retain.config import TrainConfig, validate
from retain.types import HeadStart

__all__ = [
    "CERTIFICATE_SCHEMA", "RESULT_SCHEMA", "RUN_SCHEMA", "STUDY_SCHEMA", "AnswerGroup",
    "AnswersRecord", "Between", "CertificateRecord", "Claim", "EvalAdapter", "EvalAnswer",
    "EvalData", "EvalItem", "EvalRecord", "EvalScore", "General", "Generation", "Hardware",
    "Interval", "Measure",
    "Parameters", "Part", "Retention", "RunAdapter", "RunData", "RunEvaluation", "RunGeneral",
    "RunMethod", "RunOrder", "RunRecord", "RunSource", "RunSpec", "RunTraining", "Seconds", "Sizes",
    "SkillRecord", "Skipped", "Step", "StudyRecord", "bits_of", "digest_of", "finite", "flags_of",
]  # fmt: skip

RUN_SCHEMA: Final = "retain.run/1"
STUDY_SCHEMA: Final = "retain.study/1"
CERTIFICATE_SCHEMA: Final = "retain.certificate/1"
RESULT_SCHEMA: Final = "retain.result/2"

T = TypeVar("T")

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq,
}  # fmt: skip


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


class Hardware(Part):
    """The machine of a run."""

    cpu: str | None = None
    cores: int | None = None
    memory_gib: float | None = None
    accelerator: str | None = None
    threads: int | None = None


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


class Step(Part):
    """A point of the training curve; KL in nats per token."""

    step: int
    loss: float | None = None
    predicted: float | None = None
    measured: float | None = None
    strength: float | None = None


class Generation(Part):
    """What the model answered, and what it answered before it learned anything, to be read."""

    prompt: str
    text: str | None = None
    before: str | None = None


class Measure(Part):
    """A number with its 95 % interval, and how many rows it is of; null where there were none."""

    value: float | None = None
    interval: Interval = None
    n: int = 0


class AnswerGroup(Part):
    """What was measured of the answers to some prompts; see `retain.evaluation.answers`.

    Attributes:
        log_ratio: nats per token of the tuned model's own answers.
        repeats, repeats_base, task_form, task_form_base: of the tuned model's, and of the base's.
        right_before, right_after, kept: of the prompts that a script can score.
    """

    prompts: int
    log_ratio: Measure
    first_word: Measure
    first_token: Measure
    unlikely: Measure
    repeats: Measure
    repeats_base: Measure
    task_form: Measure
    task_form_base: Measure
    right_before: Measure
    right_after: Measure
    kept: Measure


class AnswersRecord(Part):
    """What a tuned model and its base answered to general prompts.

    Attributes:
        threshold: nats per token; what the base finds less likely is `unlikely`.
        rows: the answers; their fields are those of `retain.evaluation.answers.Answer`.
    """

    new_tokens: int
    threshold: float | None = None
    overall: AnswerGroup
    skills: dict[str, AnswerGroup] = {}
    rows: Listed[dict[str, Any]] = []


class SkillRecord(Part):
    """What is left of a skill; the fields are those of `retain.evaluation.certify.SkillLoss`."""

    HEAD: ClassVar = (
        "skill", "items", "right before", "right after", "lost", "won", "chance", "share lost",
        "at most", "allowed", "verdict",
    )  # fmt: skip

    skill: str
    items: int
    before: int
    after: int
    lost: int
    won: int
    chance: float
    share: float | None
    bound: float
    allowed: float | None
    verdict: str
    reason: str = ""

    def cells(self) -> list[str]:
        """One line of a table, under `HEAD`; bounds are rounded up, and an en dash is nothing."""
        shares = [None if v is None else f"{v:.1%}" for v in (self.chance or None, self.share)]
        allowed = None if self.allowed is None else f"{100 * self.allowed:.4g}%"
        upper = f"{math.ceil(1e4 * self.bound - 1e-6) / 100:.2f}%"
        counts = (self.items, self.before, self.after, self.lost, self.won)
        told = [self.skill, *map(str, counts), *shares, upper, allowed, self.verdict or None]
        return ["–" if text is None else text for text in told]


class CertificateRecord(Part):
    """What ``retain certify`` writes: ``certify.json``.

    Attributes:
        level: at which the bounds of all skills with an allowance hold together.
        rows: one an item, with both answers and whether they are right.
    """

    schema_name: Literal["retain.certificate/1"] = Field(CERTIFICATE_SCHEMA, alias="schema")
    created: str
    versions: dict[str, str | None] = {}
    commit: str | None = None
    adapter: str
    model: dict[str, Any]
    source: str
    digests: dict[str, str | None] = {}
    held: bool
    level: float
    skills: list[SkillRecord]
    rows: list[dict[str, Any]]

    def sentence(self) -> str:
        """What was found, in one line."""
        found = [s.skill for s in self.skills if s.verdict == ("held" if self.held else "broken")]
        verdict = "Held: kept" if self.held else "Broken: not shown to be kept"
        return f"{verdict} at {self.level:.0%} confidence: {', '.join(found)}"


class Between(Measure):
    """A difference of two adapters: of the first of the pair less the second, by their places."""

    pair: tuple[int, int]


class EvalScore(Part):
    """One number of a base model and of adapters on it, on the same items.

    Attributes:
        label: what was measured.
        unit: of the values; those in % are shares from 0 to 1.
        better: 1 where more is better, -1 where less is, 0 where neither.
        tuned: an adapter each.
        changes: of each adapter less the base, item by item; empty where the base is 0 anyway.
        between: of each later adapter less each earlier one.
    """

    label: str
    unit: str = ""
    better: int = 0
    base: Measure
    tuned: list[Measure]
    changes: Listed[Measure] = []
    between: Listed[Between] = []


class EvalAdapter(Part):
    """An adapter that was measured.

    Attributes:
        name: its folder's, and another than that of every other adapter here.
        label: how it was trained, as far as its ``train.json`` says.
        digest: of its weights and settings.
        history: of its training, where that is known.
    """

    name: str
    path: str
    label: str = "LoRA"
    digest: str | None = None
    trainable: int | None = None
    history: Listed[Step] = []
    answers: AnswersRecord | None = None


class EvalAnswer(Part):
    """A model's loss on a held-out row in nats, what it wrote, and whether that is right."""

    nats: float
    said: str | None = None
    right: bool | None = None


class EvalItem(Part):
    """A held-out row; not asked where its prompt is null."""

    prompt: str | None = None
    answer: str
    tokens: int
    base: EvalAnswer
    tuned: list[EvalAnswer]


class EvalData(Part):
    """Held-out rows of a task.

    Attributes:
        asked: rows whose answers the models wrote.
        new_tokens: where those were cut; sooner where a model's positions ended.
        counts: of `retain.data.counts.RowCounts`: what was left out, cut or not read.
    """

    name: str
    digest: str | None = None
    rows: int
    asked: int
    new_tokens: int
    counts: dict[str, int] = {}
    items: Listed[EvalItem] = []


class EvalRecord(Part):
    """What ``retain eval`` writes: ``result.json``. ``retain.result/1`` is that of 0.1.

    Attributes:
        scores: by their names, such as ``data.loss``, ``general.hellaswag`` and ``source.kl``.
    """

    schema_name: Literal["retain.result/2"] = Field(RESULT_SCHEMA, alias="schema")
    created: str | None = None
    seed: int | None = None
    versions: dict[str, str | None] = {}
    commit: str | None = None
    hardware: Hardware | None = None
    model: dict[str, Any]
    source: dict[str, Any] = {}
    adapters: list[EvalAdapter] = Field(min_length=1)
    data: EvalData | None = None
    general: dict[str, Any] | None = None
    scores: dict[str, EvalScore]
    notes: Listed[str] = []


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
