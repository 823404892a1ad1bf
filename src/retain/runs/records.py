"""What a run of ``retain train`` writes and later commands read: one class for both.

    TrainRecord   ``train.json``: what was trained, from what, and how it went
    StateRecord   ``state/state.json``: what a run leaves for the next

``run.json``, the settings, is a `retain.config.RunConfig`. All three are sealed with a digest;
those of earlier versions may have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, Field

from retain.config import RunConfig
from retain.documents import Unreadable, read_json, sealed
from retain.files import write_json
from retain.records import Part, Step, finite

__all__ = [
    "RUN", "STATE_SCHEMA", "TRAIN", "TRAIN_SCHEMA", "CurvatureOf", "Digests", "HeldTo", "Labels",
    "ModelOf", "Month", "StateRecord", "TrainRecord", "read_record", "why_unread",
    "write_record",
]  # fmt: skip

RUN, TRAIN = "run.json", "train.json"
"""Names of the settings and of the record in a run's folder."""

TRAIN_SCHEMA: Final = "retain.train/1"
STATE_SCHEMA: Final = "retain.state/1"


class ModelOf(Part):
    """The base model: its name, its parameters without and in the adapter, its fingerprint."""

    name: str
    parameters: int | None = None
    trainable: int | None = None
    fingerprint: str


class CurvatureOf(Part):
    """A curvature: its file, the seconds that it took if it was made now, its `CurvatureInfo`."""

    path: str
    seconds: float | None = None
    info: dict[str, Any] = Field({})


class HeldTo(Part):
    """Of a named budget: what it allows, and what was spent of it, in nats per source token.

    Attributes:
        budget: that may be spent.
        predicted_nats: at the end, by its curvature.
        measured_nats: at the end, the KL divergence on a few rows of its text; None without any.
        bound_nats: with a confidence, the upper bound of these on other text like it.
        strength: that was found for it.
        curvature: of its source.
    """

    budget: float
    predicted_nats: float | None = None
    measured_nats: float | None = None
    bound_nats: float | None = None
    strength: float | None = None
    curvature: CurvatureOf


class Labels(Part):
    """What the rows of a classifier are labelled with.

    Attributes:
        count: outputs of the head; one is a regression.
        names: of the classes, in their order, where the rows name them.
        known: the base model comes with a head of so many outputs, which goes on.
        head: the fit of a new head (`retain.retention.head.HeadFit`), if there was one.
    """

    count: int
    names: tuple[str, ...] = ()
    known: bool = False
    head: dict[str, Any] | None = None

    @property
    def regression(self) -> bool:
        """Whether labels are values."""
        return self.count == 1


class Digests(Part):
    """What a run is of, told by contents: rows, base model, curvature, state of the run before."""

    data: str | None = None
    base: str | None = None
    source: str | None = None
    past: str | None = None


class TrainRecord(Part):
    """``train.json``.

    Attributes:
        seed, versions, commit, hardware, created: where it comes from, see `retain.provenance`.
        config: the settings, with absolute paths.
        curvature: what the run was held by; None for plain LoRA, and for named budgets.
        held_to: of named budgets, what each allowed and what was spent of it.
        resumed_from: the checkpoint that it went on from.
        predicted_nats: predicted forgetting at its end, nats per source token, of a classifier per
            row; of named budgets the mean.
        measured_nats: with a budget, the KL divergence at its end on a few rows of source text; of
            named budgets see ``held_to``.
        bound_nats: with a confidence, the upper bound of these on other text like it.
        examples: rows that were learned; ``rows`` counts what was left out or cut.
        notes: what was done in a lesser way than was asked for.
        seconds: of training; ``steps``: optimiser steps.
    """

    schema_name: Literal["retain.train/1"] = Field(TRAIN_SCHEMA, alias="schema")
    created: str | None = None
    seed: int | None = None
    versions: dict[str, str] = Field({})
    commit: str | None = None
    hardware: dict[str, Any] = Field({})
    config: RunConfig
    model: ModelOf
    curvature: CurvatureOf | None = None
    held_to: dict[str, HeldTo] = Field({})
    resumed_from: str | None = None
    predicted_nats: float | None = None
    measured_nats: float | None = None
    bound_nats: float | None = None
    examples: int | None = None
    rows: dict[str, Any] | None = None
    labels: Labels | None = None
    digests: Digests | None = None
    why_no_filter: str | None = None
    notes: list[str] = Field([])
    steps: int = 0
    seconds: float | None = None
    history: list[Step] = Field([])

    @property
    def held(self) -> bool:
        """Whether anything but plain LoRA was asked for."""
        return self.config.method != "none"

    @property
    def strength(self) -> float | None:
        """The strength that was given, or the last one that the budget found."""
        if self.config.budget is None:
            return self.config.strength
        found = [step.strength for step in self.history if step.strength is not None]
        return found[-1] if found else None


class Month(Part):
    """One run of a chain of runs that continue each other."""

    data: str
    examples: int
    seed: int
    data_digest: str | None = None
    budget: float | dict[str, float] | None = None
    predicted_nats: float | None = None


class StateRecord(Part):
    """``state/state.json``: all runs so far, and digests of the files beside it and the adapter.

    Attributes:
        labels: of a classifier; None for a language model.
        texts: digests of the rows that the last run measured on (`retain.retention.recipe.Recipe`).
    """

    schema_name: Literal["retain.state/1"] = Field(STATE_SCHEMA, alias="schema")
    runs: list[Month]
    digests: dict[str, str] = Field({})
    labels: Labels | None = None
    texts: dict[str, str] = Field({})


Record = TypeVar("Record", bound=BaseModel)


def read_record(path: Path, kind: type[Record]) -> Record:
    """A record of ours; its digest is checked, if it has one.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, was changed, or is something else.
    """
    return kind.model_validate(read_json(path, sealed=True))


def why_unread(error: Exception) -> str:
    """Why `read_record` failed, in a few words."""
    return str(error) if isinstance(error, Unreadable) else type(error).__name__


def write_record(path: Path, record: BaseModel, *, seal: bool = False) -> None:
    """Writes a record, whole; numbers that are not finite become null.

    Raises:
        OutputError: the place cannot be written.
    """
    plain = finite(record.model_dump(mode="json", by_alias=True))
    write_json(path, sealed(plain) if seal else plain)
