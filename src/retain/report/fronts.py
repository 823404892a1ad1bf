"""The front of each family of settings: how well it scores within any budget of nats.

A family is all that a study tries of one method on one kind of adapter: its strengths, learning
rates, ranks and lengths of training. Within a budget k it is as good as its best setting whose KL
to the base is at most k, and never worse than no training at all. The mean of that over budgets
from 0 to a limit is the hypervolume that its settings dominate (E. Zitzler and L. Thiele, PPSN V,
1998) over the limit, so it is in points of score. The limit is the largest KL of plain LoRA's
settings. Settings are picked with the score that is reported, which flatters families of many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from retain.intervals import Estimate, estimate, paired
from retain.report.cells import BySeed, Cell, Group

__all__ = ["Front", "front_area", "front_score", "fronts", "has_sweeps"]

SCORE, COST = "average", "kl"


@dataclass(frozen=True)
class Front:
    """One family.

    Attributes:
        name: for people.
        stores: whether it keeps rows of earlier tasks.
        settings: how many the study tried.
        area: the mean best score over budgets, over seeds.
        diff: the paired difference to plain LoRA's family; None for itself.
        points: of each seed that has all settings, (KL, score) of each.
        start: the score before learning.
        limit: the largest budget, in nats.
    """

    name: str
    stores: bool
    settings: int
    area: Estimate | None
    diff: Estimate | None
    points: list[list[tuple[float, float]]]
    start: float
    limit: float

    def score(self, budget: float) -> float:
        """The best score within a budget, a mean over seeds; its mean over budgets is the area."""
        found = [front_score(points, self.start, budget) for points in self.points]
        return sum(found) / len(found)


def front_score(points: Iterable[tuple[float, float]], start: float, budget: float) -> float:
    """The best score of a point (cost, score) with a cost within the budget; `start` at least."""
    return max([start, *(score for cost, score in points if cost <= budget)])


def front_area(points: Iterable[tuple[float, float]], start: float, limit: float) -> float:
    """The mean of `front_score` over budgets from 0 to the limit."""
    best, at, area = start, 0.0, 0.0
    for cost, score in sorted(points):
        if score <= best or cost >= limit:
            continue
        cost = max(cost, 0.0)
        area += best * (cost - at)
        best, at = score, cost
    return (area + best * (limit - at)) / limit


def fronts(group: Group) -> list[Front]:
    """The families of a group, plain LoRA's first; none where KL or its sweep is missing."""
    families: dict[tuple[str, str], list[Cell]] = {}
    for cell in group.cells:
        if cell.runs:
            config = cell.runs[0].config
            families.setdefault((config.adapter.kind, config.method.kind), []).append(cell)
    plain = families.get(("lora", "none"), [])
    costs = [found.mean for cell in plain if (found := cell.mean(COST)) is not None]
    if len(plain) < 2 or not costs or max(costs) <= 0:
        return []
    limit, start = max(costs), _start(plain)
    points = _points(plain)
    reference = _areas(points, start, limit)
    area = estimate(list(reference.values()))
    out = [Front("plain LoRA", False, len(plain), area, None, [*points.values()], start, limit)]
    for (adapter, method), cells in families.items():
        if cells is plain:
            continue
        points = _points(cells)
        areas = _areas(points, start, limit)
        text = adapter if method == "none" else cells[0].method if len(cells) == 1 else method
        if method != "none" and adapter not in ("lora", method):
            text += f" on {adapter}"
        found = estimate(list(areas.values()))
        if found is not None:
            stores = any(cell.stores for cell in cells)
            diff, own = paired(areas, reference), [*points.values()]
            out.append(Front(text, stores, len(cells), found, diff, own, start, limit))
    return out


def has_sweeps(found: Sequence[Front]) -> bool:
    """Whether other families than plain LoRA's were tried at several settings, two at least."""
    return sum(front.settings > 1 for front in found) > 2


def _start(cells: Sequence[Cell]) -> float:
    """The mean score before learning."""
    rows = [run.before for cell in cells for run in cell.runs if run.before]
    means = [
        sum(known) / len(known) for row in rows if (known := [v for v in row if v is not None])
    ]
    return sum(means) / len(means) if means else 0.0


def _areas(
    points: Mapping[int, Sequence[tuple[float, float]]], start: float, limit: float
) -> BySeed:
    return {seed: front_area(known, start, limit) for seed, known in points.items()}


def _points(cells: Sequence[Cell]) -> dict[int, list[tuple[float, float]]]:
    """(KL, score) of each setting, for each seed that every setting of the family has."""
    out: dict[int, list[tuple[float, float]]] = {}
    for seed in cells[0].values[SCORE]:
        pairs = [(c.values[COST].get(seed), c.values[SCORE].get(seed)) for c in cells]
        known = [(cost, score) for cost, score in pairs if cost is not None and score is not None]
        if seed is not None and len(known) == len(cells):
            out[seed] = known
    return out
