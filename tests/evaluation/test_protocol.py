"""The comparison of two methods: against loops over what was drawn, and by its coverage."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from retain.errors import ConfigError
from retain.evaluation.continual import continual_metrics
from retain.evaluation.protocol import (
    MEASURES,
    _drawn_together,
    _table,
    cell_of,
    compare,
    half_width,
    holm,
    other_metrics,
)
from retain.intervals import t_quantile
from retain.records import RunRecord, bits_of, flags_of

TASKS = ("a", "b", "c", "d")


def record(seed: int, method: str, chances: Any, random: Any, rows: int = 12) -> RunRecord:
    """A run in an order of its seed; `chances` [tasks] are of (learned, at the end)."""
    order = [str(t) for t in np.random.default_rng(seed).permutation(TASKS[: len(chances)])]
    by_name = dict(zip(TASKS, chances, strict=False))
    right: list[list[str | None]] = []
    for i in range(len(order)):
        row: list[str | None] = []
        for j, name in enumerate(order):
            learned, end = by_name[name]
            chance = end if i + 1 == len(order) and j < i else learned
            scored = i == j or i + 1 == len(order)
            row.append(bits_of(list(random.random(rows) < chance)) if scored else None)
        right.append(row)
    config = {"model": "m", "adapter": {"name": "lora"}, "method": {"name": method},
              "order": {"name": "o", "tasks": order}, "seed": seed}  # fmt: skip
    matrix = [[None if t is None else sum(flags_of(t)) / rows for t in row] for row in right]
    return RunRecord.model_validate(
        {"config": config, "tasks": order, "right": right, "matrix": matrix}
    )


def cells(
    seeds: int, random: Any, shift: float = 0.1, **options: Any
) -> list[dict[int, RunRecord]]:
    """Two methods; seeds and tasks differ in how hard they are, and in the difference too."""
    task, found = random.normal(0, 0.04, (2, 4)), []
    for method, sign in (("ours", 1), ("theirs", -1)):
        cell = {}
        for seed in range(seeds):
            noise = random.normal(0, 0.02, (2, 4))
            end = 0.5 + task[0] + sign * (shift / 2 + task[1] / 2) + noise[0]
            learned = 0.75 + task[0] / 2 + noise[1]
            chances = np.clip(np.stack([learned, end], 1), 0, 1)
            cell[seed] = record(seed, method, chances, random, **options)
        found.append(cell)
    return found


def test_the_means_are_those_of_the_records() -> None:
    ours, theirs = cells(3, np.random.default_rng(1))
    found, learning = compare(ours, theirs, draws=200)
    for one in found:
        for cell, value in ((ours, one.ours), (theirs, one.theirs)):
            want = []
            for run in cell.values():
                matrix = [[np.nan if s is None else s for s in row] for row in run.matrix]
                want.append(getattr(continual_metrics(matrix), one.metric))
            assert value == pytest.approx(np.mean(want))
        assert one.difference == pytest.approx(one.ours - one.theirs)
        assert one.interval[0] < one.difference < one.interval[1]
        assert (one.seeds, one.tasks, one.rows) == (3, 4, 48)
    assert learning["holds"] is (learning["bound"] > 0.97)
    again, _ = compare(ours, theirs, draws=200)
    assert again == found


def test_a_draw_is_that_of_loops() -> None:
    random = np.random.default_rng(2)
    cell, _ = cells(3, random)
    runs = list(cell.values())
    table = _table(runs, TASKS, ())
    assert table is not None
    rows = [random.integers(0, 12, 12) for _ in TASKS]
    tasks, seeds = [0, 2, 2, 3], [1, 1, 2]
    got = table.measures(
        [np.bincount(r, minlength=12)[None].astype(float) for r in rows],
        np.bincount(tasks, minlength=4)[None].astype(float),
        np.bincount(seeds, minlength=3)[None].astype(float),
    )
    want: dict[str, list[float]] = {name: [] for name in MEASURES}
    for s in seeds:
        run, sums = runs[s], {name: [] for name in MEASURES}
        end = len(TASKS) - 1
        for t in tasks:
            j = run.tasks.index(TASKS[t])

            def score(i: int, j: int = j, run: RunRecord = run, t: int = t) -> float:
                flags = flags_of(str(run.right[i][j]))
                return sum(flags[r] for r in rows[t]) / 12

            sums["average"].append(score(end))
            sums["learning"].append(score(j))
            if j < end:
                sums["forgetting"].append(score(j) - score(end))
        for name, values in sums.items():
            want[name].append(sum(values) / len(values))
    for name in MEASURES:
        assert got[name][0] == pytest.approx(np.mean(want[name])), name


def test_the_interval_covers_what_is_true() -> None:
    random, hits, clear = np.random.default_rng(3), 0, 0
    for _ in range(60):
        ours, theirs = cells(5, random, shift=0.2, rows=60)
        found, _ = compare(ours, theirs, draws=200)
        low, high = found[0].interval
        hits += low <= 0.15 <= high  # the last of four tasks has nothing to forget
        clear += found[0].p < 0.05
    assert hits >= 54  # of 60, of a nominal 57
    assert clear >= 30  # and it is no interval of everything


@pytest.mark.parametrize(("rows", "seeds", "tasks"), [(9, 1, 4), (60, 6, 1), (60, 6, 4)])
def test_the_spread_is_that_of_two_way_clusters(rows: int, seeds: int, tasks: int) -> None:
    random = np.random.default_rng(5)
    cells = random.normal(0.1, 1, (seeds, tasks)) + random.normal(0, 1, tasks)
    draws = random.normal(0, 3, 2000)
    n, (s, t) = cells.size, cells.shape
    z = (cells - cells.mean()) / n
    by_task = sum(z[:, j].sum() ** 2 for j in range(t)) * t / max(1, t - 1)
    by_seed = sum(z[i].sum() ** 2 for i in range(s)) * s / max(1, s - 1)
    want = max(by_task + by_seed - (z**2).sum(), by_task, by_seed) ** 0.5
    want *= t_quantile(min(c for c in (s, t) if c > 1) - 1) / 1.96
    got = _drawn_together(draws, float(cells.mean()), cells)
    assert got.std() == pytest.approx(want)


def runs_of(hits: list[list[int]], method: str, rows: int = 12) -> dict[int, RunRecord]:
    """Runs of two tasks with so many right rows, the first ones, [seeds, tasks]."""
    found = {}
    for seed, (a, b) in enumerate(hits):
        first, second = (bits_of([i < k for i in range(rows)]) for k in (a, b))
        found[seed] = RunRecord.model_validate({
            "config": {"model": "m", "adapter": {"name": "lora"}, "method": {"name": method},
                       "order": {"name": "o", "tasks": ["a", "b"]}, "seed": seed},
            "tasks": ["a", "b"], "right": [[first, None], [first, second]],
            "matrix": [[a / rows, None], [a / rows, b / rows]],
        })  # fmt: skip
    return found


def test_cells_that_differ_alike_have_the_spread_of_their_rows() -> None:
    """One row in each of four cells: the clusters tell of no spread, the rows do."""
    ours, theirs = runs_of([[7, 8], [9, 6]], "ours"), runs_of([[6, 7], [8, 5]], "theirs")
    average = compare(ours, theirs, draws=1000)[0][0]
    assert average.difference == pytest.approx(1 / 12)
    assert average.interval[0] <= 0 < average.interval[1] and average.p > 0.05
    assert average.ratio_interval is not None
    assert average.ratio_interval[0] <= 1 < average.ratio_interval[1]
    same, _ = compare(ours, runs_of([[7, 8], [9, 6]], "theirs"), draws=200)
    assert (same[0].interval, same[0].p) == ((0.0, 0.0), 1.0)


def test_a_task_that_never_counts_is_no_task() -> None:
    random = np.random.default_rng(6)
    known = random.normal(0.1, 1, (6, 3))
    with_last = np.concatenate([known, np.full((6, 1), np.nan)], 1)  # nothing to forget in it
    assert half_width(with_last) == half_width(known)
    with warnings.catch_warnings(action="error"):
        assert half_width(np.full((2, 2), np.nan)) is None
    two = np.concatenate([known[:, :1], np.full((6, 1), np.nan)], 1)
    assert half_width(two) == half_width(known[:, :1])


def test_rows_of_one_method_alone_are_scores() -> None:
    random = np.random.default_rng(7)
    ours, theirs = cells(4, random)
    bare = {seed: run.model_copy(update={"right": []}) for seed, run in theirs.items()}
    both = [{s: r.model_copy(update={"right": []}) for s, r in c.items()} for c in (ours, theirs)]
    mixed, whole = compare(ours, bare, draws=200), compare(*both, draws=200)
    assert mixed == whole and mixed[0][0].rows == 4
    assert compare(ours, theirs, draws=200)[0][0].rows == 48


def test_tasks_of_other_metrics_are_told() -> None:
    """Their right rows are compared, and the tables of the study have their metric."""
    ours, theirs = cells(2, np.random.default_rng(8))
    names = {"a": "matthews", "b": "accuracy", "c": "exact_match", "d": "f1"}
    told = [
        {s: r.model_copy(update={"metrics": [names[t] for t in r.tasks]}) for s, r in c.items()}
        for c in (ours, theirs)
    ]
    assert other_metrics(*told) == {"a": "matthews", "d": "f1"}
    told[1][0] = told[1][0].model_copy(update={"right": []})  # then all scores count as they are
    assert other_metrics(*told) == {} == other_metrics(ours, theirs)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_what_cannot_be_compared_is_refused() -> None:
    random = np.random.default_rng(4)
    ours, theirs = cells(2, random)
    every = [*ours.values(), *theirs.values()]
    assert cell_of(every, "ours") == cell_of(every, "lora ours") == ours
    with pytest.raises(ConfigError, match="no cell has this name; got: 'outs'"):
        cell_of(every, "outs")
    with pytest.raises(ConfigError, match="no seed in common"):
        compare(ours, {9: theirs[0]})
    with pytest.raises(ConfigError, match="not of the same tasks and rows"):
        compare(ours, {s: record(s, "x", [(0.5, 0.5)] * 4, random, rows=9) for s in (0, 1)})
