"""The tables of a study: mean, 95 % interval and paired difference of each cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retain.evaluation.continual import continual_metrics
from retain.intervals import Estimate, estimate, paired

__all__ = ["METRICS", "tables", "with_intransigence"]

Record = Mapping[str, Any]

METRICS = (
    "average", "learning", "forgetting", "backward_transfer", "forward_transfer",
    "intransigence", "share_of_independent", "loss", "kl", "ppl_ratio", "flips", "general",
    "share",
)  # fmt: skip
"""Names in a cell's ``metrics``, besides ``score:TASK``; times and memory are left out.

``share_of_independent`` is the average score over the mean score of one adapter a task, each
trained alone; ``general`` the mean change of the general tasks; ``share`` the trained parameters
over those of the base model.
"""


def tables(records: Iterable[Record]) -> dict[str, Any]:
    """Cells of a study.

    Args:
        records: of runs, done or failed, in the order of the grid.

    Returns:
        ``{"cells": [{"model", "adapter", "method", "order", "n", "failed", "metrics": {name:
        {"mean", "low", "high", "values"}}, "paired": {name: {"mean", "low", "high", "n"}}}]}``:
        ``method`` is the label, ``values`` one a seed in ascending order, ``paired`` the mean
        difference to plain LoRA (adapter "lora", method "none", or the first of kind "none" where
        none has that name) on the seeds that both have. Intervals are Student's t, null for one
        seed. A metric that no seed has is left out.
    """
    records = list(records)
    done = with_intransigence([r for r in records if r["status"] == "done"])
    names: dict[tuple[str, str, str, str], None] = {_cell(r): None for r in records}
    by_cell: dict[tuple[str, str, str, str], dict[int, dict[str, float | None]]] = {}
    for record in done:
        by_cell.setdefault(_cell(record), {})[record["config"]["seed"]] = _numbers(record)
    plain: dict[tuple[str, str], tuple[str, str, str, str]] = {}
    for r in _plain_methods(done):
        if r["config"]["adapter"]["name"] == "lora":
            plain.setdefault((_cell(r)[0], _cell(r)[3]), _cell(r))
    out = []
    for cell in names:
        mine = by_cell.get(cell, {})
        reference = plain.get((cell[0], cell[3]))
        metrics, pairs = {}, {}
        for name in _metric_names(mine.values()):
            ours = {seed: mine[seed].get(name) for seed in sorted(mine)}
            found = estimate(list(ours.values()))
            if found is None:
                continue
            metrics[name] = _plain(found) | {"values": list(ours.values())}
            if reference is not None and reference != cell:
                plain_ones = {seed: run.get(name) for seed, run in by_cell[reference].items()}
                difference = paired(ours, plain_ones)
                if difference is not None:
                    pairs[name] = _plain(difference) | {"n": difference.n}
        failed = sum(r["status"] == "failed" and _cell(r) == cell for r in records)
        out.append(
            dict(zip(("model", "adapter", "method", "order"), cell, strict=True))
            | {"n": len(mine), "failed": failed, "metrics": metrics, "paired": pairs}
        )
    return {"cells": out}


def with_intransigence(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Fills in the intransigence of the runs whose tasks were also learned alone.

    The reference of a task is the score of a run of that task alone: same model and seed; the
    same adapter, else "lora"; method "none", or the first of its kind. See
    `retain.evaluation.continual`.
    """
    alone: dict[tuple[str, str, int, str], float | None] = {}
    for r in _plain_methods(records):
        c = r["config"]
        if len(r["tasks"]) == 1:
            place = c["model"], c["adapter"]["name"], c["seed"], r["tasks"][0]
            alone.setdefault(place, r["matrix"][0][0])
    out = []
    for r in records:
        c, new = r["config"], dict(r)
        found: list[float] = []
        for adapter in (c["adapter"]["name"], "lora"):
            scores = [alone.get((c["model"], adapter, c["seed"], task)) for task in r["tasks"]]
            known = [score for score in scores if score is not None]
            if len(known) == len(scores):
                found = known
                break
        matrix = [[math.nan if s is None else s for s in row] for row in r["matrix"]]
        needed = [*(matrix[-1] if matrix else []), *(row[i] for i, row in enumerate(matrix))]
        if found and len(found) > 1 and not any(map(math.isnan, needed)):
            metrics = continual_metrics(matrix, references=found)
            mean = sum(found) / len(found)
            new["metrics_summary"] = dict(r["metrics_summary"]) | {
                "intransigence": metrics.intransigence,
                "share_of_independent": metrics.average / mean if mean > 0 else None,
            }
        out.append(new)
    return out


def _plain_methods(records: Sequence[Record]) -> list[Record]:
    """The runs of methods of kind "none", those that are called so first."""
    kind = [r for r in records if r["config"]["method"]["kind"] == "none"]
    return sorted(kind, key=lambda r: bool(r["config"]["method"]["label"] != "none"))  # stable


def _cell(record: Record) -> tuple[str, str, str, str]:
    c = record["config"]
    return c["model"], c["adapter"]["name"], c["method"]["label"], c["order"]["name"]


def _numbers(record: Record) -> dict[str, float | None]:
    """All numbers of a run that go into tables."""
    found: dict[str, float | None] = dict(record["metrics_summary"])
    losses = [loss for loss in record["losses"] if loss is not None]
    found["loss"] = sum(losses) / len(losses) if losses else None
    last = record["retention"][-1] if record["retention"] else {}
    found["kl"], found["flips"] = last.get("kl"), last.get("flips")
    if last.get("ppl") is not None and last.get("ppl_base"):
        found["ppl_ratio"] = last["ppl"] / last["ppl_base"]
    general = record.get("general")
    if general:
        changes = [
            general["after"][n] - score
            for n, score in general["before"].items()
            if score is not None and general["after"].get(n) is not None
        ]
        found["general"] = sum(changes) / len(changes) if changes else None
    found["share"] = record["parameters"]["share"]
    for task, score in zip(record["tasks"], record["matrix"][-1], strict=True):
        found[f"score:{task}"] = score
    return found


def _metric_names(runs: Iterable[Mapping[str, float | None]]) -> list[str]:
    scores: dict[str, None] = {}
    for run in runs:
        scores |= {name: None for name in run if name.startswith("score:")}
    return [*METRICS, *scores]


def _plain(found: Estimate) -> dict[str, Any]:
    return {"mean": found.mean, "low": found.low, "high": found.high}
