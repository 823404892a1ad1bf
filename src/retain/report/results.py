"""A ``retain.result/1``, of ``retain eval`` and of earlier demos, read as a study of one task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from retain.records import (
    Claim,
    General,
    Generation,
    Hardware,
    Interval,
    Listed,
    Parameters,
    Part,
    Retention,
    RunAdapter,
    RunMethod,
    RunOrder,
    RunRecord,
    RunSpec,
    Seconds,
    Step,
    StudyRecord,
)  # fmt: skip
from retain.report.metrics import number

__all__ = ["RESULT", "Result", "study_of"]

RESULT = "retain.result/1"

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Target(Part):
    exact_match: Share | None = None
    interval: Interval = None
    loss: float | None = None
    items: int | None = None


class _Forgetting(Retention):
    after: int = 0
    flips: Share | None = None


class _Knowledge(Part):
    accuracy: Share | None = None


class _Train(Part):
    seconds: float | None = None
    peak_memory_mib: float | None = None


class _Model(Part):
    name: str
    parameters: int | None = None
    trainable: int | None = None
    dtype: str | None = None


class _Task(Part):
    name: str
    train: int | None = None
    test: int | None = None
    metric: str | None = None


class _Row(Part):
    """One model: the base (no method), plain LoRA (``none``), or LoRA held at one strength."""

    name: str
    label: str
    method: str | None = None
    strength: float | None = None
    chosen: bool | None = False
    target: _Target | None = None
    forgetting: _Forgetting | None = None
    probe: _Knowledge | None = None
    train: _Train | None = None
    history: Listed[Step] = Field([])
    generations: Listed[Generation] = Field([])


class Result(Part):
    """The whole of a `result.json`; the report does not show fields that are not named here."""

    schema_name: Literal["retain.result/1"] = Field(alias="schema")
    created: str | None = None
    seed: int | None = None
    versions: dict[str, str | None] = Field({})
    commit: str | None = None
    hardware: Hardware | None = None
    model: _Model
    task: _Task
    source: dict[str, Any] | None = None
    curvature: dict[str, Any] | None = None
    rows: list[_Row] = Field(min_length=1)
    summary: Listed[Claim] = Field([])


def _title(row: _Row) -> str | None:
    if row.method in (None, "none"):
        return None
    strength = "" if row.strength is None else f" {row.strength:g}"
    return row.label.removeprefix("LoRA + ") + strength.replace("e+0", "e")


def _about(result: Result) -> str:
    """What the run read, in one sentence."""
    task, source, fit = result.task, result.source or {}, result.curvature or {}
    size = fit.get("bytes")
    parts = [
        f"{task.name} ({task.train or '?'} rows to train on, {task.test or '?'} to test on)",
        f"source text: {source['name']}" if source.get("name") else "",
        f"{source['heldout_tokens']} held-out tokens" if source.get("heldout_tokens") else "",
        f"curvature: {fit['structure']}" if fit.get("structure") else "",
        f"{fit['fisher']} Fisher" if fit.get("fisher") else "",
        f"{fit['tokens']} tokens" if fit.get("tokens") else "",
        f"{number(size / 2**20)} MiB" if isinstance(size, int | float) else "",
    ]
    return ", ".join(part for part in parts if part) + "."


def _run(result: Result, row: _Row, base: _Row | None) -> RunRecord:
    model, task, target = result.model, result.task, row.target or _Target()
    title = _title(row)
    method = RunMethod(
        name="none" if title is None else "retention", label=title, kind=row.method or "none",
        strength=row.strength, stores_data=False,
    )  # fmt: skip
    keys = () if target.exact_match is None else ("average", "learning")
    before = {g.prompt: g.text for g in base.generations} if base else {}
    asked = [None if r is None or r.probe is None else r.probe.accuracy for r in (base, row)]
    train = row.train
    share = model.trainable and model.parameters and model.trainable / model.parameters
    return RunRecord(
        key=row.name, created=result.created, seed=result.seed, commit=result.commit,
        versions=result.versions, hardware=result.hardware,
        config=RunSpec(
            model=model.name, dtype=model.dtype, adapter=RunAdapter(name="lora", kind="lora"),
            method=method, order=RunOrder(name=task.name, tasks=[task.name]), seed=result.seed,
        ),
        tasks=[task.name], metrics=[task.metric or ""],
        before=[base.target.exact_match if base and base.target else None],
        matrix=[[target.exact_match]], metrics_summary=dict.fromkeys(keys, target.exact_match),
        intervals=dict.fromkeys(keys, target.interval),
        retention=[] if row.forgetting is None else [row.forgetting],
        general=General(before={"knowledge": asked[0]}, after={"knowledge": asked[1]}),
        parameters=Parameters(share=share),
        seconds=train and Seconds(total=train.seconds),
        peak_memory_gib=train.peak_memory_mib / 1024 if train and train.peak_memory_mib else None,
        losses=[target.loss], history=row.history,
        generations=[
            Generation(prompt=g.prompt, text=g.text, before=before.get(g.prompt))
            for g in row.generations
        ],
    )  # fmt: skip


def study_of(result: Result) -> StudyRecord:
    """The result as a study of one task; the base model is what its runs were before."""
    base = next((row for row in result.rows if row.method is None), None)
    held = [row for row in result.rows if _title(row) is not None]
    marked = [row for row in held if row.chosen] or held[: len(held) == 1]
    return StudyRecord(
        name=f"{result.model.name} on {result.task.name}", description=_about(result),
        chosen=_title(marked[0]) if marked else None, claims=result.summary,
        runs=[_run(result, row, base) for row in result.rows if row.method is not None],
    )  # fmt: skip
