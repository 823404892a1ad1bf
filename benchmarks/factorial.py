"""What each part of the recipe gives, from a study in which all of them are in and out.

    python benchmarks/factorial.py benchmarks/results/parts-decoder/study.json
    python benchmarks/factorial.py benchmarks/results/parts-decoder-prompts/study.json --pair auto no-filter
    python benchmarks/factorial.py .../parts-decoder-prompts/study.json --pair auto auto --than .../parts-decoder/study.json

A part's effect is the mean over the settings of the others of what a run has more with it than
without it, of one seed; with three parts that is four differences a seed. ``--pair`` is one method
of a study less another, maybe of another study. Intervals are 95 %, those of `retain study compare`
(`retain.evaluation.protocol.half_width`): over tasks and seeds, of own answers over prompts and
seeds, of the KL over seeds. The effects on scores are in points; on the KL a factor; on own answers
nats per token, and points of those that begin with the base's word, where a study asked for them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from retain.evaluation.protocol import cell_of, half_width
from retain.records import RunRecord
from retain.study.work import read_study_file

PARTS = ("rows", "filter", "force")
UNITS = {"average": 100, "learning": 100, "forgetting": 100, "log_ratio": 1, "first_word": 100}
Array = np.ndarray[Any, Any]
Runs = Mapping[int, RunRecord]


def parts_of(run: RunRecord) -> frozenset[str]:
    """Those that acted in a run."""
    method = run.config.method
    if method.kind == "none":
        return frozenset()
    return frozenset(method.options.get("parts") or PARTS) & frozenset(PARTS)


def measures(run: RunRecord) -> dict[str, Array]:
    """What the metrics are means of: of each task by its name, or of each prompt.

    Nothing can be lost of the last task: it has no part in the mean.
    """
    assert run.retention[-1].kl
    places = [run.tasks.index(task) for task in sorted(run.tasks)]
    final = np.array([run.matrix[-1][j] for j in places], dtype=float)
    learned = np.array([run.matrix[j][j] for j in places], dtype=float)
    last = np.array([j == len(run.tasks) - 1 for j in places])
    found = {
        "average": final,
        "learning": learned,
        "forgetting": np.where(last, np.nan, learned - final),
        "kl": np.log([run.retention[-1].kl]),
    }
    if run.own_answers is not None:
        rows = run.own_answers.rows
        found["log_ratio"] = np.array([row["log_ratio"] / row["tokens"] for row in rows])
        found["first_word"] = np.array([row["first_word"] for row in rows], dtype=float)
    return found


def differences(pairs: Sequence[tuple[Runs, Runs]]) -> tuple[list[int], dict[str, str]]:
    """The seeds that all have, and what the first of each pair has more, the mean over pairs."""
    seeds = sorted(set.intersection(*({*runs} for pair in pairs for runs in pair)))
    every = [[[measures(runs[s]) for s in seeds] for runs in pair] for pair in pairs]
    found = {}
    asked = [n for n in (*UNITS, "kl") if all(n in run for p in every for c in p for run in c)]
    for name in asked:
        ours, theirs = (
            np.array([[run[name] for run in pair[i]] for pair in every]) for i in (0, 1)
        )
        cells = (ours - theirs).mean(0)  # [seeds, tasks or prompts]
        mean, half = float(np.nanmean(cells)), half_width(cells)
        ends = [mean] if half is None else [mean, mean - half, mean + half]
        ends = [math.exp(v) if name == "kl" else UNITS[name] * v for v in ends]
        places = ".2f" if name == "kl" else "+.1f" if UNITS[name] == 100 else "+.3f"
        told = [f"{v:{places}}" for v in ends]
        found[name] = told[0] if half is None else f"{told[0]} ({told[1]} to {told[2]})"
    return seeds, found


def effects(runs: Sequence[RunRecord]) -> tuple[list[int], dict[str, dict[str, str]]]:
    """The seeds that have all settings, and the effect of each part on each metric."""
    cells: dict[frozenset[str], dict[int, RunRecord]] = {}
    for run in runs:
        if run.done:
            cells.setdefault(parts_of(run), {})[run.config.seed or 0] = run
    seeds: list[int] = []
    found = {}
    for part in PARTS:
        others = [p for p in PARTS if p != part]
        rests = [
            frozenset(p for p, there in zip(others, flags, strict=True) if there)
            for flags in product((False, True), repeat=len(others))
        ]
        pairs = [(cells[rest | {part}], cells[rest]) for rest in rests]
        seeds, found[part] = differences(pairs)
    return seeds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--pair", nargs=2, metavar=("METHOD", "THAN"))
    parser.add_argument("--than", type=Path, help="the study of the second of a pair")
    given = parser.parse_args()
    runs = read_study_file(given.study).runs
    if given.pair:
        there = read_study_file(given.than or given.study).runs
        pair = cell_of(runs, given.pair[0]), cell_of(there, given.pair[1])
        seeds, one = differences([pair])
        found = {f"{given.pair[0]} less {given.pair[1]}": one}
    else:
        seeds, found = effects(runs)
    print(f"seeds {', '.join(map(str, seeds))}")
    known = list(next(iter(found.values())))
    print("| | " + " | ".join(known) + " |")
    print("|---" * (len(known) + 1) + "|")
    for name, one in found.items():
        print(f"| {name} | " + " | ".join(one.values()) + " |")


if __name__ == "__main__":
    main()
