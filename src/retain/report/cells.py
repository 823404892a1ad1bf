"""Runs put together: a cell is one adapter and method over its seeds, a group is what compares.

A group holds the cells of one study, model and order. Where orders of a single task have several
tasks, one more group holds the mean over these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retain.intervals import Estimate, estimate, paired, wilson
from retain.records import Interval, StudyRecord
from retain.records import RunRecord as Run
from retain.report.metrics import METRICS, curve_of_kl, seen_so_far

__all__ = ["Cell", "Group", "by_task", "groups", "short_name"]

Seed = int | None
BySeed = dict[Seed, float | None]

NOTHING = 0.05
"""A score that tells no cells apart where all are below it."""


@dataclass
class Cell:
    """One adapter and method of one strength, over its seeds.

    Attributes:
        adapter, method, label, strength: what was run.
        plain: plain LoRA, which the others are compared with.
        held: whether any method was used.
        stores: whether the method keeps rows of earlier tasks.
        values: for each metric, the value of each seed.
        diffs: for each metric, the paired difference to plain LoRA.
        within: for some metrics the interval within the only run.
        final: for each task of the group, the last score of each seed.
        runs: the runs that are done.
        failed: the runs that failed.
    """

    adapter: str
    method: str
    label: str
    strength: float | None
    held: bool
    stores: bool
    plain: bool = False
    values: dict[str, BySeed] = field(default_factory=dict)
    diffs: dict[str, Estimate | None] = field(default_factory=dict)
    within: dict[str, Interval] = field(default_factory=dict)
    final: list[BySeed] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)

    @property
    def seeds(self) -> int:
        """How many seeds are behind its means."""
        return len(self.values["average"]) if self.values else 0

    def mean(self, key: str) -> Estimate | None:
        """Mean and interval of a metric: over seeds, or within the only run."""
        found, ends = estimate(list(self.values.get(key, {}).values())), self.within.get(key)
        return Estimate(found.mean, *ends, 1) if found and ends else found

    def curve(self, kind: str) -> list[Estimate | None]:
        """After each task: "kl" to the base, or the mean score of the tasks "seen"."""
        rows = [curve_of_kl(run) if kind == "kl" else seen_so_far(run) for run in self.runs]
        return [estimate(list(column)) for column in zip(*rows, strict=True)]

    def matrix(self) -> list[list[Estimate | None]]:
        """The accuracy matrix with the scores before learning as row 0, over seeds, by place."""
        tables = [[run.before, *run.matrix] for run in self.runs if run.before and run.matrix]
        return [
            [estimate([table[i][j] for table in tables]) for j in range(len(row))]
            for i, row in enumerate(tables[0] if tables else [])
        ]


@dataclass
class Group:
    """The cells that are compared with one another.

    Attributes:
        study, model, order: what they share.
        tasks: in the order they were learned, or each alone where `pooled`; where seeds draw the
            order, in that of the first run.
        metrics: the name of each task's metric.
        named: all runs have learned them in this order, so that a place has a task's name.
        cells: in the order of the study's grid.
        pooled: each task was learned alone, and values are means over the tasks.
        choice: the label of the method that the study chose beforehand.
    """

    study: str
    model: str
    order: str
    tasks: list[str]
    metrics: list[str]
    cells: list[Cell]
    named: bool = True
    pooled: bool = False
    choice: str | None = None

    @property
    def chosen(self) -> Cell | None:
        """The cell of the method that the study chose beforehand."""
        return next((cell for cell in self.cells if cell.held and cell.label == self.choice), None)

    @property
    def plain(self) -> Cell | None:
        """The cell of plain LoRA."""
        return next((cell for cell in self.cells if cell.plain), None)

    @property
    def length(self) -> int:
        """How many tasks are learned one after another."""
        return 1 if self.pooled else len(self.tasks)

    @property
    def title(self) -> str:
        """The group in words."""
        if self.pooled:
            return f"{self.model}, {len(self.tasks)} tasks, each alone"
        tasks = f"{len(self.tasks)} tasks" if len(self.tasks) > 1 else self.tasks[0]
        named = self.order not in ("", "default", *self.tasks)
        return f"{self.model}, {tasks}" + (f" (order {self.order})" if named else "")

    @property
    def seeds(self) -> int:
        """The largest number of seeds of a cell."""
        return max((cell.seeds for cell in self.cells), default=0)

    @property
    def learned(self) -> str:
        """The metric that tells how much was learned: a loss where scores tell nothing.

        An exact match may be near 0 for every cell though they have learned unlike amounts.
        """
        key = "learning" if self.has("learning") else "average"
        scores = {found.mean for cell in self.cells if (found := cell.mean(key))}
        alike = len(self.cells) > 1 and (len(scores) < 2 or max(scores) < NOTHING)
        return "loss" if alike and self.has("loss") else key

    @property
    def about(self) -> str:
        """What its numbers are."""
        if any(cell.within for cell in self.cells):
            return f"{self.title}; one seed ± half the 95 % interval within the run"
        per = "mean over the tasks, then over seeds" if self.pooled else "mean over seeds"
        return f"{self.title}; {per} ± half the 95 % interval"

    def has(self, key: str) -> bool:
        """Whether any cell has a value of this metric."""
        return any(cell.mean(key) is not None for cell in self.cells)


def short_name(model: str) -> str:
    """A model's name without the folders that it lies in."""
    return model.rstrip("/").rpartition("/")[2] or model


def _short_names(models: Iterable[str]) -> dict[str, str]:
    """Of each model as much of the end of its path as tells it from the others."""
    parts = {model: model.rstrip("/").split("/") for model in models}
    out: dict[str, str] = {}
    for model, mine in parts.items():
        others = [theirs for other, theirs in parts.items() if other != model]
        alone = (n for n in range(1, len(mine)) if mine[-n:] not in [o[-n:] for o in others])
        out[model] = "/".join(mine[-next(alone, len(mine)) :]) or model
    return out


def _cell(run: Run) -> Cell:
    method, adapter = run.config.method, run.config.adapter
    held = "none" not in (method.name, method.kind)
    return Cell(adapter.name, method.name, method.title, method.strength, held, method.stores)


def _compare(cells: Sequence[Cell], runs: Sequence[Run]) -> None:
    """Marks plain LoRA and fills in the differences to it."""
    kinds = {run.config.adapter.name: run.config.adapter.kind for run in runs}
    bare = [cell for cell in cells if not cell.held]
    lora = [cell for cell in bare if cell.adapter == "lora"]
    lora = lora or [cell for cell in bare if kinds.get(cell.adapter) == "lora"]
    if not lora:
        return
    plain = min(lora, key=lambda cell: cell.label != "none")  # the first, where none is called so
    plain.plain = True
    for cell in cells:
        if cell is not plain:
            cell.diffs = {
                m.key: paired(cell.values.get(m.key, {}), plain.values.get(m.key, {}))
                for m in METRICS
            }


def _tasks(run: Run) -> list[str]:
    """Of a run, in the order that it learned them."""
    return run.tasks or run.config.order.tasks


def by_task(run: Run, scores: Sequence[float | None], tasks: Sequence[str]) -> list[float | None]:
    """Scores in the order in which a run learned its tasks, in that of `tasks`."""
    own = _tasks(run)
    return [scores[own.index(task)] if scores else None for task in tasks]


def _fill(cell: Cell, tasks: Sequence[str]) -> None:
    for m in METRICS:
        cell.values[m.key] = {run.config.seed: m.of(run) for run in cell.runs}
    last = [
        (run.config.seed, by_task(run, run.matrix[-1] if run.matrix else [], tasks))
        for run in cell.runs
    ]
    cell.final = [{seed: scores[j] for seed, scores in last} for j in range(len(tasks))]


def _within(run: Run) -> dict[str, Interval]:
    """The intervals of a run alone; of a share of test rows that is right it is Wilson's."""
    known: dict[str, Interval] = {}
    score = run.metrics_summary.get("average")
    if run.sizes and score is not None and run.metrics[:1] in (["accuracy"], ["exact_match"]):
        n = run.sizes.test[0]
        known = dict.fromkeys(("average", "learning"), wilson(round(score * n), n))
    known |= run.intervals
    if run.retention:
        known["kl"] = run.retention[-1].kl_interval
    return {key: ends for key, ends in known.items() if ends and ends[0] < ends[1]}


def _group(study: StudyRecord, runs: list[Run], model: str) -> Group:
    cells: dict[tuple[object, ...], Cell] = {}
    for run in runs:
        new = _cell(run)
        cell = cells.setdefault((new.adapter, new.method, new.label, new.strength), new)
        (cell.runs if run.done else cell.failed).append(run)
    first = next((run for run in runs if run.done), runs[0])
    tasks = _tasks(first)
    named = all(_tasks(run) == tasks for run in runs if run.done)
    for cell in cells.values():
        _fill(cell, tasks)
        if len(tasks) == 1 and len({run.config.seed for run in runs}) == 1 and len(cell.runs) == 1:
            cell.within = _within(cell.runs[0])
    made = list(cells.values())
    _compare(made, runs)
    order, choice = first.config.order.name, study.chosen
    return Group(study.name, model, order, tasks, first.metrics, made, named, choice=choice)


def _pooled(parts: list[Group], runs: list[Run]) -> Group:
    """The mean over groups of one task each, no two the same; a seed counts where all have it."""
    cells: dict[tuple[object, ...], list[Cell]] = {}
    for part in parts:
        for cell in part.cells:
            key = (cell.adapter, cell.method, cell.label, cell.strength)
            cells.setdefault(key, []).append(cell)
    made = []
    for found in cells.values():
        first = found[0]
        failed = [run for cell in found for run in cell.failed]
        fresh: dict[str, Any] = {"values": {}, "diffs": {}, "within": {}, "final": [], "runs": []}
        new = replace(first, plain=False, failed=failed, **fresh)
        whole = len(found) == len(parts)
        seeds = [
            seed
            for seed in first.values["average"]
            if whole and all(seed in cell.values["average"] for cell in found)
        ]
        for m in METRICS:
            new.values[m.key] = {}
            for seed in seeds:
                got = [cell.values[m.key].get(seed) for cell in found]
                known = [value for value in got if value is not None]
                mean = sum(known) / len(known) if len(known) == len(got) else None
                new.values[m.key][seed] = mean
        for part in parts:
            mine = [cell for cell in found if any(cell is other for other in part.cells)]
            new.final.append(mine[0].final[0] if mine else {})
        made.append(new)
    _compare(made, runs)
    first_part = parts[0]
    tasks = [part.tasks[0] for part in parts]
    metrics = [name for part in parts for name in part.metrics[:1]]
    return Group(first_part.study, first_part.model, "all", tasks, metrics, made, pooled=True)


def _once_a_task(parts: list[Group], orders: dict[str, list[Run]]) -> list[Group]:
    """Of groups of one task each, one for each task: the order that has its name, or the first."""
    own = [part for part in parts if orders[part.order][0].config.order.tasks == [part.order]]
    found: dict[str, Group] = {}
    for part in (*own, *parts):
        found.setdefault(part.tasks[0], part)
    return [part for part in parts if found[part.tasks[0]] is part]


def groups(studies: Sequence[StudyRecord]) -> list[Group]:
    """All groups of the studies: sequences, then tasks learned alone, their mean first."""
    out: list[Group] = []
    names = _short_names(run.config.model for study in studies for run in study.runs)
    for study in studies:
        by_model: dict[str, dict[str, list[Run]]] = {}
        for run in study.runs:
            orders = by_model.setdefault(run.config.model, {})
            orders.setdefault(run.config.order.name, []).append(run)
        for model, orders in by_model.items():
            parts = [_group(study, runs, names[model]) for runs in orders.values()]
            alone = [part for part in parts if len(part.tasks) == 1]
            out += [part for part in parts if len(part.tasks) > 1]
            single = _once_a_task(alone, orders)
            if len(single) > 1:
                kept = {part.order for part in single}
                runs = [r for name, runs in orders.items() if name in kept for r in runs]
                out.append(_pooled(single, runs))
            out += alone
    return out
