"""`EvalRecord`: the ``result.json`` of ``retain eval``."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field

from retain.records.answers import AnswersRecord
from retain.records.parts import Hardware, Listed, Measure, Part, Step

__all__ = [
    "RESULT_SCHEMA", "Between", "EvalAdapter", "EvalAnswer", "EvalData", "EvalItem",
    "EvalRecord", "EvalScore",
]  # fmt: skip

RESULT_SCHEMA: Final = "retain.result/2"


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
