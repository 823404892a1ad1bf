"""What each part of the recipe gives, from a study in which all of them are in and out.

    python benchmarks/factorial.py benchmarks/results/parts-decoder/study.json [--json effects.json]
    python benchmarks/factorial.py benchmarks/results/parts-decoder-chats/study.json --pair auto no-filter
    python benchmarks/factorial.py .../parts-decoder-chats/study.json --pair auto auto --than .../parts-decoder/study.json

A part's effect is the mean over the settings of the others of what a run has more with it than
without it, of one seed; with three parts that is four differences a seed. Intervals are 95 %, of
10,000 draws of tasks, seeds and rows (scores: a drawn seed is drawn for all tasks) or of seeds and
prompts (own answers), and Student's over seeds for the logarithm of the KL. The effects on scores
are in points; on the KL a factor; on own answers nats per token, and points of those that begin
with the base's word. ``--pair`` is one method of a study less another, maybe of another study.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from retain.files import write_json
from retain.intervals import estimate
from retain.records import RunRecord, flags_of
from retain.study.work import read_study_file

PARTS = ("rows", "filter", "force")
DRAWS, SEED = 10_000, 0
Array = np.ndarray[Any, Any]
Cells = dict[tuple[frozenset[str], int], RunRecord]


def parts_of(run: RunRecord) -> frozenset[str]:
    """Those that acted in a run."""
    method = run.config.method
    if method.kind == "none":
        return frozenset()
    return frozenset(method.options.get("parts") or PARTS) & frozenset(PARTS)


def effect(cells: Cells, part: str, seed: int, of: Callable[[RunRecord], Array]) -> Array:
    """Of one seed: what `of` a run is more with a part, the mean over the others' settings."""
    others = [p for p in PARTS if p != part]
    found = []
    for flags in product((False, True), repeat=len(others)):
        rest = frozenset(p for p, there in zip(others, flags, strict=True) if there)
        found.append(of(cells[rest | {part}, seed]) - of(cells[rest, seed]))
    mean: Array = np.mean(found, axis=0)
    return mean


def right(run: RunRecord, what: str) -> Array:
    """Of each task (by name) and row: [tasks, rows], right at the end, after learning, or lost."""
    rows = []
    for task in sorted(run.tasks):
        j, end = run.tasks.index(task), len(run.tasks) - 1
        last, learned = (np.array(flags_of(str(run.right[i][j])), dtype=float) for i in (end, j))
        if what == "forgetting":  # of the last task nothing can be lost: it has no part in the mean
            lost = learned - last
            rows.append(lost if j < end else np.full_like(lost, np.nan))
        else:
            rows.append({"average": last, "learning": learned}[what])
    return np.array(rows)


def answers(run: RunRecord, what: str) -> Array:
    """Of each prompt: nats a token, or whether its answer begins as the base's, [prompts]."""
    assert run.own_answers is not None
    rows = run.own_answers.rows
    if what == "log_ratio":
        return np.array([row["log_ratio"] / row["tokens"] for row in rows])
    return np.array([float(row["first_word"]) for row in rows])


def log_kl(run: RunRecord) -> Array:
    """Of the KL to the base after the last task, []."""
    kl = run.retention[-1].kl
    assert kl
    return np.array(math.log(kl))


READ: dict[str, tuple[int, Callable[..., Array]]] = {
    "average": (100, right), "learning": (100, right), "forgetting": (100, right),
    "log_ratio": (1, answers), "first_word": (100, answers),
}  # fmt: skip


def drawn(values: Sequence[Array], random: np.random.Generator) -> tuple[float, float, float]:
    """The mean of [seeds][groups, units], with its interval; NaN counts for nothing."""
    data = np.stack([np.atleast_2d(v) for v in values])  # [seeds, groups, units]
    seeds, groups, units = data.shape
    means = []
    for _ in range(DRAWS):
        s, g = random.integers(seeds, size=seeds), random.integers(groups, size=groups)
        u = random.integers(units, size=(groups, units))
        some = data[s][:, g]
        means.append(np.nanmean(np.take_along_axis(some, u[None].repeat(seeds, 0), 2)))
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(np.nanmean(data)), float(low), float(high)


def effects(runs: Sequence[RunRecord]) -> dict[str, dict[str, Any]]:
    """``{part: {metric: {"effect", "low", "high"}}}``, of the seeds that have all settings."""
    cells: Cells = {(parts_of(r), r.config.seed or 0): r for r in runs if r.done}
    every = [
        frozenset(p for p, there in zip(PARTS, flags, strict=True) if there)
        for flags in product((False, True), repeat=len(PARTS))
    ]
    seeds = [s for s in sorted({s for _, s in cells}) if all((c, s) in cells for c in every)]
    found: dict[str, dict[str, Any]] = {"of": {"seeds": seeds}}
    for part in PARTS:
        random = np.random.default_rng(SEED)
        here: dict[str, list[float | None]] = {}
        for what, (unit, of) in READ.items():
            rows = [effect(cells, part, s, partial(of, what=what)) for s in seeds]
            here[what] = [unit * v for v in drawn(rows, random)]
        logs = [float(effect(cells, part, s, log_kl)) for s in seeds]
        spread = estimate(logs)
        assert spread is not None
        ends = (spread.mean, spread.low, spread.high)
        here["kl"] = [None if v is None else math.exp(v) for v in ends]
        found[part] = {
            k: dict(zip(("effect", "low", "high"), v, strict=True)) for k, v in here.items()
        }
    return found


def pair(
    ours: Sequence[RunRecord], theirs: Sequence[RunRecord], names: tuple[str, str]
) -> dict[str, dict[str, Any]]:
    """What a method has more than another on the seeds that both have, as `effects` says it."""
    one, other = (
        {r.config.seed: r for r in runs if r.done and r.config.method.label == name}
        for runs, name in zip((ours, theirs), names, strict=True)
    )
    seeds = sorted(seed for seed in one.keys() & other.keys() if seed is not None)
    random = np.random.default_rng(SEED)
    found: dict[str, dict[str, Any]] = {"of": {"seeds": seeds}}
    for what, (unit, of) in READ.items():
        rows = [of(one[s], what=what) - of(other[s], what=what) for s in seeds]
        found[what] = dict(
            zip(("effect", "low", "high"), (unit * v for v in drawn(rows, random)), strict=True)
        )
    return found


def told(one: dict[str, Any]) -> str:
    """An effect with its interval."""
    ends = "" if one["low"] is None else f" ({one['low']:.3g} to {one['high']:.3g})"
    return f"{one['effect']:.3g}{ends}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pair", nargs=2, metavar=("METHOD", "THAN"))
    parser.add_argument("--than", type=Path, help="the study of the second of a pair")
    given = parser.parse_args()
    runs = read_study_file(given.study).runs
    if given.pair:
        there = runs if given.than is None else read_study_file(given.than).runs
        found = pair(runs, there, tuple(given.pair))
        print(f"seeds {', '.join(map(str, found.pop('of')['seeds']))}")
        for name, one in found.items():
            print(f"{name}: {told(one)}")
        return
    found = effects(runs)
    print(f"seeds {', '.join(map(str, found['of']['seeds']))}")
    names = list(found[PARTS[0]])
    print("| | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for part in PARTS:
        print(f"| {part} | " + " | ".join(told(found[part][name]) for name in names) + " |")
    if given.json is not None:
        write_json(given.json, found)
        print(json.dumps(found["of"]))


if __name__ == "__main__":
    main()
