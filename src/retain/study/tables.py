"""The tables of a study: mean, 95 % interval and paired difference of each cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from retain.evaluation.continual import METRICS, continual_metrics
from retain.intervals import Estimate, estimate, paired
from retain.records import RunRecord
from retain.study.spec import ClaimSpec

__all__ = ["judged", "tables", "with_intransigence"]

Numbers = dict[str, float | None]
Cell = tuple[str, str, str, str]


def tables(records: Iterable[RunRecord]) -> dict[str, Any]:
    """Cells of a study, from its runs, done or failed, in the order of the grid.

    Returns:
        ``{"cells": [{"model", "adapter", "method", "order", "n", "failed", "seeds", "metrics":
        {name: {"mean", "low", "high", "values"}}, "paired": {name: {"mean", "low", "high",
        "n"}}}]}``: ``method`` is the label, ``seeds`` in ascending order are those of the finished
        runs, ``values`` one for each, ``paired`` the mean difference to plain LoRA (adapter "lora",
        method "none", or the first of kind "none" where none has that name) on the seeds that both
        have. Intervals are Student's t, null for one seed. A metric that no seed has is left out.
    """
    records = with_intransigence(list(records))
    done = [record for record in records if record.done]
    cells: dict[Cell, dict[int | None, Numbers]] = {_cell(record): {} for record in records}
    for record in done:
        cells[_cell(record)][record.config.seed] = _numbers(record)
    plain: dict[tuple[str, str], Cell] = {}
    for r in _plain_methods(done):
        if r.config.adapter.name == "lora":
            plain.setdefault((r.config.model, r.config.order.name), _cell(r))
    out = []
    for cell, seeds in cells.items():
        seeds = {seed: seeds[seed] for seed in sorted(seeds, key=lambda seed: seed or 0)}
        reference = plain.get((cell[0], cell[3]))
        metrics, differences = {}, {}
        for name in _metric_names(seeds.values()):
            ours = {seed: numbers.get(name) for seed, numbers in seeds.items()}
            found = estimate(list(ours.values()))
            if found is None:
                continue
            metrics[name] = _plain(found) | {"values": list(ours.values())}
            if reference is not None and reference != cell:
                theirs = {seed: numbers.get(name) for seed, numbers in cells[reference].items()}
                difference = paired(ours, theirs)
                if difference is not None:
                    differences[name] = _plain(difference) | {"n": difference.n}
        failed = sum(r.status == "failed" and _cell(r) == cell for r in records)
        out.append(
            dict(zip(("model", "adapter", "method", "order"), cell, strict=True))
            | {"n": len(seeds), "failed": failed, "seeds": list(seeds)}
            | {"metrics": metrics, "paired": differences}
        )
    return {"cells": out}


def judged(claims: Sequence[ClaimSpec], cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims of a study with their values, null where not told, and whether they hold.

    Each is judged in every cell of its method whose reference was run: the value is the one that is
    farthest from holding. A claim that holds elsewhere is not told where one cell tells nothing.
    """
    out = []
    for claim in claims:
        least = claim.relation == "<="
        ratios = _ratios(claim, cells)
        known = [ratio for ratio in ratios if ratio is not None]
        value = (max if least else min)(known, default=None)
        holds = None
        if value is not None:
            holds = value <= claim.bound if least else value >= claim.bound
        if holds and len(known) < len(ratios):
            value = holds = None
        said = claim.model_dump(include={"claim", "relation", "bound"})
        out.append(said | {"value": value, "holds": holds})
    return out


def _ratios(claim: ClaimSpec, cells: Sequence[dict[str, Any]]) -> list[float | None]:
    """Of the means of two cells that differ in the method alone, on the seeds that both have.

    None where the reference has nothing to lose; a loss of ability is a change below 0.
    """
    place = ("model", "adapter", "order")
    lost = claim.metric in ("general", "backward_transfer")
    found: list[float | None] = []
    for cell in (cell for cell in cells if cell["method"] == claim.method):
        others = (c for c in cells if all(c[name] == cell[name] for name in place))
        other = next((c for c in others if c["method"] == claim.reference), None)
        sides = [_by_seed(one, claim.metric) for one in (cell, other)]
        both = sides[0].keys() & sides[1].keys()
        if both:
            ours, theirs = (math.fsum(side[seed] for seed in both) / len(both) for side in sides)
            found.append(ours / theirs if (theirs < 0 if lost else theirs > 0) else None)
    return found


def _by_seed(cell: dict[str, Any] | None, metric: str) -> dict[int | None, float]:
    """What is known of a metric in a cell of `tables`."""
    if cell is None or metric not in cell["metrics"]:
        return {}
    pairs = zip(cell["seeds"], cell["metrics"][metric]["values"], strict=True)
    return {seed: value for seed, value in pairs if value is not None}


def with_intransigence(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Fills in the intransigence of the runs whose tasks were also learned alone.

    The reference of a task is the score of a run of that task alone: same model and seed; the
    same adapter, else "lora"; method "none", or the first of its kind. See
    `retain.evaluation.continual`.
    """
    alone: dict[tuple[str, str, int | None, str], float | None] = {}
    for r in _plain_methods(records):
        if r.done and len(r.tasks) == 1:
            place = r.config.model, r.config.adapter.name, r.config.seed, r.tasks[0]
            alone.setdefault(place, r.matrix[0][0])
    return [_filled(record, alone) if record.done else record for record in records]


def _filled(
    record: RunRecord, alone: dict[tuple[str, str, int | None, str], float | None]
) -> RunRecord:
    run = record.config
    found: list[float] = []
    for adapter in (run.adapter.name, "lora"):
        scores = [alone.get((run.model, adapter, run.seed, task)) for task in record.tasks]
        known = [score for score in scores if score is not None]
        if len(known) == len(scores):
            found = known
            break
    matrix = [[math.nan if s is None else s for s in row] for row in record.matrix]
    needed = [*(matrix[-1] if matrix else []), *(row[i] for i, row in enumerate(matrix))]
    if len(found) < 2 or any(map(math.isnan, needed)):
        return record
    metrics = continual_metrics(matrix, references=found)
    mean = sum(found) / len(found)
    more = {
        "intransigence": metrics.intransigence,
        "share_of_independent": metrics.average / mean if mean > 0 else None,
    }
    return record.model_copy(update={"metrics_summary": record.metrics_summary | more})


def _plain_methods(records: Iterable[RunRecord]) -> list[RunRecord]:
    """The runs of methods of kind "none", those that are called so first."""
    kind = [r for r in records if r.config.method.kind == "none"]
    return sorted(kind, key=lambda r: r.config.method.title != "none")  # stable


def _cell(record: RunRecord) -> Cell:
    run = record.config
    return run.model, run.adapter.name, run.method.title, run.order.name


def _numbers(record: RunRecord) -> Numbers:
    """All numbers of a run that go into tables."""
    found = dict(record.metrics_summary)
    losses = [loss for loss in record.losses if loss is not None]
    found["loss"] = sum(losses) / len(losses) if losses else None
    if record.retention:
        last = record.retention[-1]
        found["kl"], found["flips"] = last.kl, last.flips
        if last.ppl is not None and last.ppl_base:
            found["ppl_ratio"] = last.ppl / last.ppl_base
    found["general"] = record.general.change if record.general else None
    found["share"] = record.parameters.share if record.parameters else None
    for task, score in zip(record.tasks, record.matrix[-1], strict=True):
        found[f"score:{task}"] = score
    return found


def _metric_names(runs: Iterable[Numbers]) -> list[str]:
    scores = {name: None for run in runs for name in run if name.startswith("score:")}
    return [*METRICS, *scores]


def _plain(found: Estimate) -> dict[str, Any]:
    return {"mean": found.mean, "low": found.low, "high": found.high}
