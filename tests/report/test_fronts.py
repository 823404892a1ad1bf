"""The score within any budget, against its definition point by point."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from synthetic import METHODS, TASKS, group_of, make_run, make_study

from retain.report.cells import Group
from retain.report.fronts import front_area, fronts, has_sweeps
from retain.report.tables import front_table

LORA = METHODS[0]


def _study(extra: list[dict[str, Any]]) -> Group:
    study = make_study()
    study["runs"] += extra
    return group_of(study)


def _slow(share: float) -> tuple[str, str, float, bool, float, float, float]:
    """Plain LoRA at a lower rate: it learns and forgets less."""
    return (f"rate {share:g}", "none", 0.0, False, share, 0.55 * share, 0.41 * share)


def _swept() -> Group:
    runs = [make_run(TASKS, _slow(s), seed) for s in (0.25, 0.5) for seed in (0, 1, 2)]
    return _study(runs)


@pytest.mark.parametrize("seed", range(20))
def test_area_is_the_mean_best_score_over_budgets(seed: int) -> None:
    draw = random.Random(seed)
    points = [(draw.uniform(-0.1, 1.5), draw.uniform(-0.2, 1.0)) for _ in range(draw.randint(0, 8))]
    start, limit, steps = draw.uniform(0, 0.4), draw.uniform(0.3, 1.2), 20_000
    total = 0.0
    for i in range(steps):
        budget = limit * (i + 0.5) / steps
        total += max([start, *(score for cost, score in points if cost <= budget)])
    assert front_area(points, start, limit) == pytest.approx(total / steps, abs=1e-3)


def test_more_settings_never_shrink_a_front() -> None:
    points = [(0.1, 0.5), (0.3, 0.6)]
    alone = front_area(points, 0.2, 0.4)
    assert front_area([*points, (0.2, 0.55)], 0.2, 0.4) > alone
    assert front_area([*points, (0.2, 0.45)], 0.2, 0.4) == alone
    assert front_area([(0.0, 0.7)], 0.2, 0.4) == pytest.approx(0.7)
    assert front_area([(0.4, 0.9)], 0.2, 0.4) == pytest.approx(0.2)  # it spends all there is


def test_families_of_a_study() -> None:
    group = _swept()
    found = {front.name: front for front in fronts(group)}
    plain, kfac = found["plain LoRA"], found["kfac"]
    assert next(iter(found)) == "plain LoRA"
    assert (plain.settings, plain.diff, kfac.settings) == (3, None, 3)
    assert found["replay"].stores
    assert not kfac.stores
    assert kfac.area and kfac.diff and plain.area
    assert kfac.area.n == 3
    assert kfac.diff.mean == pytest.approx(kfac.area.mean - plain.area.mean)
    cells = [cell for cell in group.cells if cell.method == "K-FAC"]
    costs = [cell.values["kl"][1] for cell in cells]
    scores = [cell.values["average"][1] for cell in cells]
    limit = max(e.mean for c in group.cells if c.label in ("none", "rate 0.25", "rate 0.5")
                if (e := c.mean("kl")))  # fmt: skip
    runs = [r for c in group.cells if c.label in ("none", "rate 0.25", "rate 0.5") for r in c.runs]
    start = sum(sum(v for v in r.before if v is not None) / 4 for r in runs) / len(runs)
    pairs = [(k, s) for k, s in zip(costs, scores, strict=True) if k is not None and s is not None]
    by_hand = front_area(pairs, start, limit)
    others = [
        front_area(
            [(c.values["kl"][s] or 0.0, c.values["average"][s] or 0.0) for c in cells], start, limit
        )
        for s in (0, 2)
    ]
    assert kfac.area.mean == pytest.approx((by_hand + sum(others)) / 3)


def test_a_seed_that_a_setting_lacks_is_left_out() -> None:
    runs = [make_run(TASKS, _slow(0.5), seed) for seed in (0, 1)]
    found = {front.name: front for front in fronts(_study(runs))}
    assert found["plain LoRA"].area
    assert found["plain LoRA"].area.n == 2
    diff = found["kfac"].diff
    assert diff
    assert diff.n == 2


def test_no_table_without_a_sweep_of_plain_lora() -> None:
    assert front_table(_study([])) is None
    table = front_table(_swept())
    assert table
    assert table.rows[0].plain
    assert "Score within a budget" in table.markdown()


def test_the_steps_of_a_front_have_its_area() -> None:
    for front in fronts(_swept()):
        assert front.area is not None and len(front.points) == front.area.n
        steps = 4000
        mean = sum(front.score(front.limit * (i + 0.5) / steps) for i in range(steps)) / steps
        assert mean == pytest.approx(front.area.mean, abs=2e-3)
        assert front.score(0.0) >= front.start


def test_fronts_are_drawn_where_methods_were_swept() -> None:
    few = _swept()
    assert not has_sweeps([f for f in fronts(few) if f.settings == 1 or f.diff is None])
    many = [replace(f, settings=3) for f in fronts(few)]
    assert has_sweeps(many)
