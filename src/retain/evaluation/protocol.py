"""Two methods of a study compared: a bootstrap over tasks, seeds and rows, Holm, non-inferiority.

Tasks and seeds are crossed: each seed learns all tasks, and all runs of both methods are scored on
the same rows. So a draw takes tasks, seeds, and of each task rows, each with repetition and alike
for both methods. Such draws spread too far, since the noise of a single score comes in with each
factor (Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1). They are moved towards
the estimate until their standard deviation is that of two-way clusters, ``V_tasks + V_seeds
- V_cells`` and no less than the larger of the first two (Cameron, Gelbach and Miller 2011, Journal
of Business & Economic Statistics 29), times ``t / 1.96`` for Student's t with one degree of freedom
less than there are tasks, or seeds, whichever are fewer. Where that is less than the spread of
draws of rows alone, as where by chance every cell differs alike, they stay as they are. The
intervals are their percentiles.

A row counts as right or wrong, whatever the task's metric (`other_metrics`); of a task without such
rows (a regression, records of earlier versions), in either method, the score is taken as it is.
Metrics are those of `retain.evaluation.continual`, a mean over seeds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retain.errors import ConfigError
from retain.intervals import t_quantile
from retain.records import RunRecord, flags_of

__all__ = [
    "MEASURES", "Comparison", "cell_of", "compare", "half_width", "holm", "other_metrics",
]  # fmt: skip

MEASURES = ("average", "learning", "forgetting")

_SHARES = ("accuracy", "exact_match")
"""Metrics that are the share of rows that are right."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One metric of two methods on the seeds that both have.

    Attributes:
        metric: its name.
        ours, theirs: means over seeds.
        difference, interval: ours less theirs, and its 95 % interval.
        p: two-sided, of no difference; at least ``2 / (draws + 1)``.
        ratio, ratio_interval: ours over theirs; None where theirs is not above 0 in all draws but
            2.5 % at most.
        seeds, tasks, rows: how many, `rows` of all tasks together.
    """

    metric: str
    ours: float
    theirs: float
    difference: float
    interval: tuple[float, float]
    p: float
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    seeds: int
    tasks: int
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests (Holm 1979): below a level, its error is held."""
    order = sorted(range(len(p)), key=p.__getitem__)
    found, least = [0.0] * len(p), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[place]))
        found[place] = least
    return found


def cell_of(records: Sequence[RunRecord], name: str) -> dict[int, RunRecord]:
    """The finished runs of one cell by their seeds.

    Its name is a method's title, or ``ADAPTER METHOD`` where several adapters have it.

    Raises:
        ConfigError: no cell has this name, or several have.
    """
    cells: dict[tuple[str, ...], dict[int, RunRecord]] = {}
    for record in records:
        run = record.config
        place = (run.model, run.adapter.name, run.method.title, run.order.name)
        if record.done and len(record.tasks) > 1:
            cells.setdefault(place, {})[run.seed or 0] = record
    found = [p for p in cells if name in (p[2], f"{p[1]} {p[2]}", " ".join(p))]
    if len(found) != 1:
        names = ", ".join(" ".join(place) for place in found or cells)
        raise ConfigError(
            "several cells of the study have this name" if found else "no cell has this name",
            got=repr(name),
            allowed=names or "the name of a method with finished runs",
            fix="give adapter and method, or model, adapter, method and order",
        )
    return cells[found[0]]


def compare(
    ours: Mapping[int, RunRecord],
    theirs: Mapping[int, RunRecord],
    *,
    margin: float = 0.03,
    draws: int = 4000,
    seed: int = 0,
) -> tuple[list[Comparison], dict[str, Any]]:
    """The metrics of two cells.

    Args:
        ours: runs by their seeds, as `cell_of` gives them.
        theirs: of the reference.
        margin: of learning; ours is not inferior where it is above ``1 - margin`` of theirs.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        The comparisons of `MEASURES`, and of the test of non-inferiority in learning
        ``{"margin", "bound", "p", "holds"}``: the one-sided 95 % lower bound of the ratio, and
        whether it is above ``1 - margin``.

    Raises:
        ConfigError: no seed in both, or runs on other tasks or rows.
    """
    tables = _tables(ours, theirs)
    one = [np.ones((1, n)) for n in tables[0].sizes]
    shape = tables[0].last.shape
    whole = [t.measures(one, np.ones((1, shape[1])), np.ones((1, shape[0]))) for t in tables]
    cells = [table.cells(one) for table in tables]
    random = np.random.default_rng(seed)

    def drawn(count: int) -> Array:
        return random.multinomial(count, np.full(count, 1 / count), draws).astype(float)

    weights = [drawn(n) for n in tables[0].sizes]
    chosen = drawn(shape[1]), drawn(shape[0])
    many = [table.measures(weights, *chosen) for table in tables]
    fixed = np.ones((draws, shape[1])), np.ones((draws, shape[0]))
    by_rows = [table.measures(weights, *fixed) for table in tables]
    found, learning = [], np.empty(0)
    for name in MEASURES:
        a, b = (float(table[name][0]) for table in whole)
        known = np.isfinite(many[0][name]) & np.isfinite(many[1][name])
        x, y = many[0][name][known], many[1][name][known]
        ours_cells, theirs_cells = (cell[name] for cell in cells)
        x_rows, y_rows = (drawn[name] for drawn in by_rows)
        least = float((x_rows - y_rows).std())
        gap = _drawn_together(x - y, a - b, ours_cells - theirs_cells, least)
        ratio = ratio_interval = None
        if b > 0 and np.quantile(y, 0.025) > 0:
            ratio, sure = a / b, y > 0
            spread = (ours_cells - a / b * theirs_cells) / b
            least = float((x_rows - ratio * y_rows).std()) / b
            ratios = _drawn_together(x[sure] / y[sure], ratio, spread, least)
            ratio_interval = _interval(ratios)
            if name == "learning":
                learning = ratios
        found.append(
            Comparison(
                name, a, b, a - b, _interval(gap), _two_sided(gap), ratio, ratio_interval,
                shape[0], shape[1], sum(tables[0].sizes),
            )
        )  # fmt: skip
    if not len(learning):  # the reference has learned nothing
        return found, {"margin": margin, "bound": None, "p": None, "holds": None}
    p = float((1 + (learning <= 1 - margin).sum()) / (1 + len(learning)))
    bound = float(np.quantile(learning, 0.05))
    return found, {"margin": margin, "bound": bound, "p": p, "holds": bound > 1 - margin}


def other_metrics(*cells: Mapping[int, RunRecord]) -> dict[str, str]:
    """Tasks that `compare` counts right rows of, though their metric, the value, is another."""
    runs = [run for cell in cells for run in cell.values()]
    metrics = {t: m for run in runs for t, m in zip(run.tasks, run.metrics, strict=False)}
    return {
        task: metric
        for task, metric in metrics.items()
        if metric not in _SHARES and all(_has_flags(run, task) for run in runs)
    }


def _drawn_together(draws: Array, centre: float, cells: Array, least: float = 0.0) -> Array:
    """Draws around a value, with the spread that the module tells.

    Args:
        draws: of the bootstrap.
        centre: the value.
        cells: [seeds, tasks], whose mean the value is; NaN where a cell does not count.
        least: the standard deviation of draws of rows alone.
    """
    wanted, spread = half_width(cells), float(draws.std())
    if wanted is None or wanted / 1.96 < least:
        return draws
    return centre + (draws - centre) * (wanted / 1.96 / spread if spread else 1.0)


def half_width(cells: Array) -> float | None:
    """Half the 95 % interval of a mean over two crossed factors; see the module.

    Args:
        cells: [seeds, tasks], or [seeds, prompts]; NaN where a cell does not count.

    Returns:
        Student's t times the standard deviation of two-way clusters; of one factor with a single
        level, that of the other alone. A level without any cell is none. None for a single cell,
        or none.
    """
    known = np.isfinite(cells)
    cells = cells[known.any(1)][:, known.any(0)]
    several = [n for n in cells.shape if n > 1]
    if not several:
        return None
    parts = np.nan_to_num((cells - np.nanmean(cells)) / np.isfinite(cells).sum())
    by_task, by_seed = ((parts.sum(axis) ** 2).sum() for axis in (0, 1))
    seeds, tasks = cells.shape
    by_task *= tasks / max(1, tasks - 1)
    by_seed *= seeds / max(1, seeds - 1)
    variance = max(by_task + by_seed - (parts**2).sum(), by_task, by_seed)
    return float(variance**0.5) * t_quantile(min(several) - 1)


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _two_sided(values: Array) -> float:
    tail = min((values <= 0).sum(), (values >= 0).sum())
    return min(1.0, float(2 * (1 + tail) / (1 + len(values))))


@dataclass(frozen=True)
class _Table:
    """What is known of a cell.

    Attributes:
        rows: of each task [seeds, scores, rows], 1 for a right one: at the end, after learning, and
            after each task before the last (NaN where it was not scored).
        last: [seeds, tasks], whether a task is the last of its run.
    """

    rows: list[Array]
    last: NDArray[np.bool_]

    @property
    def sizes(self) -> list[int]:
        return [part.shape[2] for part in self.rows]

    def measures(self, rows: Sequence[Array], tasks: Array, seeds: Array) -> dict[str, Array]:
        """The metrics [draws], from how often rows [draws, rows], tasks and seeds were drawn."""
        every, earlier = np.ones(self.last.shape), (~self.last).astype(float)
        parts = zip(MEASURES, self._scores(rows), (every, every, earlier), strict=True)
        found = {}
        with np.errstate(invalid="ignore", divide="ignore"):
            for name, values, mask in parts:
                above = np.einsum("dst,dt,st->ds", values, tasks, mask)
                mean = above / np.einsum("dt,st->ds", tasks, mask)
                found[name] = (mean * seeds).sum(1) / seeds.sum(1)
        return found

    def cells(self, rows: Sequence[Array]) -> dict[str, Array]:
        """What the metrics are means of, [seeds, tasks]; NaN where there is nothing to forget."""
        final, learned, lost = (values[0] for values in self._scores(rows))
        lost = np.where(self.last, np.nan, lost)
        return dict(zip(MEASURES, (final, learned, lost), strict=True))

    def _scores(self, rows: Sequence[Array]) -> tuple[Array, Array, Array]:
        """Of each task at the end, after learning, and what was lost, [draws, seeds, tasks]."""
        shape = (len(rows[0]), *self.last.shape)
        final, learned, lost = (np.empty(shape) for _ in range(3))
        for place, (part, weight) in enumerate(zip(self.rows, rows, strict=True)):
            score = np.einsum("dn,skn->dsk", weight, part) / weight.sum(1)[:, None, None]
            final[:, :, place], learned[:, :, place] = score[..., 0], score[..., 1]
            lost[:, :, place] = np.nanmax(score[..., 1:], axis=-1) - score[..., 0]
        return final, learned, lost


def _tables(
    ours: Mapping[int, RunRecord], theirs: Mapping[int, RunRecord]
) -> tuple[_Table, _Table]:
    both = sorted(set(ours) & set(theirs))
    if not both:
        raise ConfigError(
            "the two methods have no seed in common",
            got=f"seeds {sorted(ours)} and {sorted(theirs)}", allowed="one at least",
            fix="do the runs of both",
        )  # fmt: skip
    names = sorted(ours[both[0]].tasks)
    cells = [[cell[seed] for seed in both] for cell in (ours, theirs)]
    scored = {name for cell in cells for run in cell for name in names if not _has_flags(run, name)}
    one, other = (_table(cell, names, scored) for cell in cells)
    alike = all(ours[seed].tasks == theirs[seed].tasks for seed in both)
    if not alike or one is None or other is None or one.sizes != other.sizes:
        raise ConfigError(
            "the runs are not of the same tasks and rows",
            got=f"{len(both)} seeds, of which the first has {', '.join(names)}"[:200],
            allowed="for each seed the same order of the same tasks, scored on the same rows",
            fix="compare methods of one study",
        )
    return one, other


def _table(
    runs: Sequence[RunRecord], names: Sequence[str], scored: Collection[str]
) -> _Table | None:
    """None where the runs differ in their tasks or rows; of those `scored` the scores count."""
    if any(sorted(run.tasks) != list(names) for run in runs):
        return None
    rows = []
    for name in names:
        parts = []
        for run in runs:
            j, end = run.tasks.index(name), len(run.tasks) - 1
            read = _score if name in scored else _flags
            parts.append([read(run, i, j) for i in (end, j, *range(end))])
        if len({len(flags) for part in parts for flags in part if flags is not None}) != 1:
            return None
        size = next(len(flags) for part in parts for flags in part if flags is not None)
        blank = np.full(size, np.nan)
        rows.append(np.array([[blank if f is None else f for f in part] for part in parts]))
    last = np.array([[run.tasks[-1] == name for name in names] for run in runs])
    return _Table(rows, last)


def _has_flags(run: RunRecord, name: str) -> bool:
    """Whether the rows of a task are told one by one, wherever it was scored."""
    j = run.tasks.index(name) if name in run.tasks else None
    return j is None or all(
        score is None or (i < len(run.right) and run.right[i][j] is not None)
        for i, score in enumerate(row[j] for row in run.matrix)
    )


def _flags(run: RunRecord, i: int, j: int) -> Array | None:
    """Which rows of task j were right after task i."""
    text = run.right[i][j]
    return None if text is None else np.array(flags_of(text), dtype=float)


def _score(run: RunRecord, i: int, j: int) -> Array | None:
    """The score of task j after task i, as one row."""
    score = run.matrix[i][j]
    return None if score is None else np.array([score], dtype=float)
