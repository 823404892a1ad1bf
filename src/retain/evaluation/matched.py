"""A study's methods read at the same score and at the same size, and the best setting of each.

A family is a method in all settings that were tried: runs of one model, order and make of adapter
(all of it but its name), whose method is NAME or NAME-NUMBER (``auto``, ``auto-100``); an adapter
stands for a rate. `lines` are what is read: settings that differ in the rate alone, or, of a method
at one rate, its strengths.

A line's curve is made for each seed, linear between its settings in the order of the value that is
matched; settings with one value are averaged. It is read at the reference's settings of that seed,
and not beyond its own ends. The differences are averaged within a seed, then over seeds. A line of
one setting has no curve: then the reference's is read at it. This describes: no interval, no test.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from retain.errors import ConfigError
from retain.records import RunRecord

__all__ = [
    "READINGS", "VALUES", "Choice", "Family", "Reading", "Setting", "choose", "families", "lines",
    "means", "named", "read", "value_of",
]  # fmt: skip

VALUES = ("average", "learning", "forgetting", "kl", "update_size")
READINGS = (("learning", "forgetting"), ("update_size", "forgetting"), ("update_size", "kl"))
"""What is matched, and what is read there."""

Runs = Mapping[int, RunRecord]
Point = tuple[float, float]

_NUMBER = re.compile(r"-\d[\d.]*(e[-+]?\d+)?$")


@dataclass(frozen=True)
class Setting:
    """One adapter with one method: their names, and the finished runs by their seeds."""

    adapter: str
    method: str
    runs: dict[int, RunRecord]

    @property
    def name(self) -> str:
        return f"{self.adapter} {self.method}"


@dataclass(frozen=True)
class Family:
    """Settings of one method; `adapter` and `method` are their names without the number."""

    model: str
    order: str
    adapter: str
    method: str
    settings: list[Setting]

    @property
    def name(self) -> str:
        return f"{self.adapter} {self.method}"


@dataclass(frozen=True)
class Reading:
    """What a method has of `metric` where it has as much of `at` as the reference.

    Attributes:
        ours, theirs, difference: means over seeds; None where nothing can be compared.
        seeds: the difference of each seed that could be read.
        points, read: at how many settings and seeds it was to be read, and was.
        our_range, their_range: of `at`, over all settings and seeds; None where not measured.
        curve: whose was read, ``method`` or ``reference``.
    """

    at: str
    metric: str
    ours: float | None
    theirs: float | None
    difference: float | None
    seeds: dict[int, float]
    points: int
    read: int
    our_range: Point | None
    their_range: Point | None
    curve: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """The setting of a family with the highest mean `average`; the first of equals.

    Attributes:
        setting: the best.
        means: of `VALUES` over its seeds.
        tried: how many settings there were to choose from.
        numbers: the numbers that tell the settings apart, in the best.
        ends: those that are the ``lowest`` or ``highest`` of what was tried.
        left_out: settings that lack a seed, or an average.
    """

    family: Family
    setting: Setting
    means: dict[str, float | None]
    tried: int
    numbers: dict[str, float]
    ends: dict[str, str]
    left_out: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "method": self.family.name, "setting": self.setting.name,
            "seeds": sorted(self.setting.runs), "means": self.means, "tried": self.tried,
            "numbers": self.numbers, "ends": self.ends, "left_out": self.left_out,
        }  # fmt: skip


def value_of(run: RunRecord, name: str) -> float | None:
    """One of `VALUES` at the end of a run; None where it was not measured."""
    if name == "kl":
        return run.retention[-1].kl if run.retention else None
    return run.metrics_summary.get(name)


def means(runs: Runs) -> dict[str, float | None]:
    """The mean of each of `VALUES` over seeds; None where a seed lacks it."""
    found = {name: [value_of(run, name) for run in runs.values()] for name in VALUES}
    return {
        name: None if None in values else float(np.mean(values))  # type: ignore[arg-type]
        for name, values in found.items()
    }


def families(records: Iterable[RunRecord]) -> list[Family]:
    """The finished runs of sequences, put together as the module tells, in the order they have."""
    found: dict[str, dict[tuple[str, str], dict[int, RunRecord]]] = {}
    for record in records:
        run = record.config
        make = {key: value for key, value in run.adapter.plain().items() if key != "name"}
        method = _NUMBER.sub("", run.method.name)
        place = repr((run.model, run.order.name, sorted(make.items()), run.method.kind, method))
        if record.done and len(record.tasks) > 1:
            settings = found.setdefault(place, {})
            settings.setdefault((run.adapter.name, run.method.title), {})[run.seed or 0] = record
    made = []
    for settings in found.values():
        run = next(iter(next(iter(settings.values())).values())).config
        adapters = {adapter for adapter, _ in settings}
        adapter = run.adapter.name if len(adapters) == 1 else _NUMBER.sub("", run.adapter.name)
        every = [Setting(*names, runs) for names, runs in settings.items()]
        method = every[0].method if len(every) == 1 else _NUMBER.sub("", run.method.name)
        made.append(Family(run.model, run.order.name, adapter, method, every))
    return made


def lines(family: Family) -> list[Family]:
    """The lines of a family: each method at its rates, or the strengths of one rate."""
    by_method: dict[str, list[Setting]] = {}
    for setting in family.settings:
        by_method.setdefault(setting.method, []).append(setting)
    if max(map(len, by_method.values())) == 1:
        return [family]
    return [
        Family(family.model, family.order, family.adapter if len(s) > 1 else s[0].adapter, name, s)
        for name, s in by_method.items()
    ]


def named(found: Sequence[Family], name: str) -> Family:
    """The one that a name is of: METHOD, ADAPTER METHOD, or MODEL ADAPTER METHOD ORDER.

    Raises:
        ConfigError: there is none, or several.
    """
    full = {f"{one.model} {one.name} {one.order}": one for one in found}
    fitting = [k for k, one in full.items() if name in (one.method, one.name, k)]
    if len(fitting) != 1:
        raise ConfigError(
            "several methods of the study have this name" if fitting else "no method has this name",
            got=repr(name),
            allowed=", ".join(fitting or full) or "the name of a method with finished runs",
            fix="give adapter and method, or model, adapter, method and order",
        )
    return full[fitting[0]]


def read(ours: Family, theirs: Family, at: str, metric: str) -> Reading:
    """One metric of two lines, of which the second is the reference's, where `at` is the same."""
    mine, other = (_points(line, at, metric) for line in (ours, theirs))
    of_ours = len(ours.settings) > 1 or len(theirs.settings) == 1
    curves, places = (mine, other) if of_ours else (other, mine)
    seeds: dict[int, Point] = {}
    points = count = 0
    for seed in sorted(set(curves) & set(places)):
        values = [(y, found) for x, y in places[seed]
                  if (found := _at(curves[seed], x)) is not None]  # fmt: skip
        points, count = points + len(places[seed]), count + len(values)
        if values:
            there, here = map(float, np.mean(values, axis=0))
            seeds[seed] = (here, there) if of_ours else (there, here)
    a, b = map(float, np.mean([*seeds.values()], axis=0)) if seeds else (None, None)
    gap = None if a is None or b is None else a - b
    return Reading(
        at, metric, a, b, gap, {seed: x - y for seed, (x, y) in seeds.items()}, points, count,
        _range(mine), _range(other), "method" if of_ours else "reference",
    )  # fmt: skip


def choose(family: Family) -> Choice | None:
    """The best setting of a family on validation rows; None where no run has an average.

    Raises:
        ConfigError: a run was scored on other rows.
    """
    every = [run for setting in family.settings for run in setting.runs.values()]
    wrong = {run.config.evaluation.split for run in every} - {"validation"}
    if wrong:
        raise ConfigError(
            "settings are chosen on validation rows alone",
            got=f"runs of {family.name} that were scored on {wrong.pop()} rows",
            allowed="a study with evaluation: {split: validation}",
            fix="do such a study, with other seeds than those of the comparison",
        )
    seeds = {seed for setting in family.settings for seed in setting.runs}
    scores = [(setting, means(setting.runs)) for setting in family.settings]
    whole = [p for p in scores if p[1]["average"] is not None and set(p[0].runs) == seeds]
    if not whole:
        return None
    best, values = max(whole, key=lambda pair: pair[1]["average"] or 0.0)
    numbers = [_numbers(setting) for setting, _ in whole]
    own, tried = _numbers(best), {k: {n[k] for n in numbers if k in n} for k in _numbers(best)}
    own = {key: value for key, value in own.items() if len(tried[key]) > 1}
    ends = {k: "lowest" for k, value in own.items() if value == min(tried[k])}
    ends |= {k: "highest" for k, value in own.items() if value == max(tried[k])}
    out = [setting.name for setting, _ in scores if all(setting is not s for s, _ in whole)]
    return Choice(family, best, values, len(whole), own, ends, out)


def _numbers(setting: Setting) -> dict[str, float]:
    """The settings of training and method that are numbers."""
    run = next(iter(setting.runs.values())).config
    every = run.training.options | run.method.options | {"strength": run.method.strength}
    return {
        key: float(value)
        for key, value in every.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _points(line: Family, at: str, metric: str) -> dict[int, list[Point]]:
    """The settings of each seed that have both values."""
    found: dict[int, list[Point]] = {}
    for setting in line.settings:
        for seed, run in setting.runs.items():
            x, y = value_of(run, at), value_of(run, metric)
            if x is not None and y is not None:
                found.setdefault(seed, []).append((x, y))
    return found


def _at(points: Sequence[Point], x: float) -> float | None:
    """A curve's value; None beyond its ends."""
    places = sorted({place for place, _ in points})
    if not places[0] <= x <= places[-1]:
        return None
    values = [float(np.mean([v for place, v in points if place == p])) for p in places]
    return float(np.interp(x, places, values))


def _range(points: Mapping[int, Sequence[Point]]) -> Point | None:
    every = [x for several in points.values() for x, _ in several]
    return (min(every), max(every)) if every else None
