"""``retain study compare``: methods of a finished study against a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from retain.cli.options import Screen, check_file, command
from retain.config import Options
from retain.errors import ConfigError
from retain.files import write_record
from retain.runs.folders import check_record

if TYPE_CHECKING:
    from retain.evaluation.matched import Family, Reading
    from retain.records import RunRecord

__all__ = ["EXAMPLE", "compared"]

EXAMPLE = "Example: retain study compare runs/four --method auto --reference none"

COMPARISON = "retain.compare/1"

_SHOWN = {"average": "average", "learning": "learning", "forgetting": "forgetting", "kl": "KL",
          "update_size": "size"}  # fmt: skip


class CompareConfig(Options):
    """Settings of ``retain study compare``."""

    study: Path = Field(description="The study's folder")
    method: str | None = Field(None, description="Method, or ADAPTER METHOD; several with commas")
    reference: str = Field("none", description="What they are compared with")
    matched: bool = Field(False, description="Read them at the same learning and update size")
    choose: bool = Field(False, description="Say the best setting of each, on validation rows")
    margin: float = Field(0.03, gt=0, lt=1, description="Share of learning that may be lost")
    draws: int = Field(4000, ge=100, description="Draws of the bootstrap")
    out: Path | None = Field(None, description="Where it is written; compare.json of the study")


@command(CompareConfig, "study")
def compared(config: CompareConfig, screen: Screen) -> None:
    """Compare methods of a finished study with a reference: intervals, Holm, non-inferiority.

    With --matched or --choose, of all its methods if none is named, without tests.
    """
    from retain.evaluation.matched import families
    from retain.study.work import read_study_file

    records = read_study_file(config.study).runs
    place = config.study if config.study.is_dir() else config.study.parent
    target = check_file(config.out or place / "compare.json")
    check_record(target, "a comparison", COMPARISON)
    names = [name.strip() for name in config.method.split(",")] if config.method else []
    made: dict[str, Any] = {"schema": COMPARISON, "reference": config.reference}
    made |= {"margin": config.margin, "draws": config.draws, "methods": {}}
    if config.choose or config.matched:
        found = families(records)
        if config.choose:
            made["chosen"] = _choose(found, names, screen)
        if config.matched:
            made["matched"] = _match(found, names, config.reference, screen)
    elif names:
        made |= _test(records, names, config, screen)
    else:
        raise ConfigError(
            "no method is named", got="no --method",
            allowed="--method, or --matched or --choose for all of the study",
            fix=f"--method auto --reference {config.reference}",
        )  # fmt: skip
    write_record(target, made)
    screen.say(f"results: {target}")
    screen.emit(made)


def _test(
    records: Sequence[RunRecord], names: Sequence[str], config: CompareConfig, screen: Screen
) -> dict[str, Any]:
    """The tests against the reference, and the means of all."""
    from retain.evaluation.matched import means
    from retain.evaluation.protocol import cell_of, compare, holm, other_metrics

    reference = cell_of(records, config.reference)
    cells = {name: cell_of(records, name) for name in names}
    options: dict[str, Any] = {"margin": config.margin, "draws": config.draws}
    found = {name: compare(cell, reference, **options) for name, cell in cells.items()}
    tests = [c for several, _ in found.values() for c in several]
    adjusted = iter(holm([c.p for c in tests]))
    inferior = iter(holm([1.0 if t["p"] is None else t["p"] for _, t in found.values()]))
    methods, lines = {}, []
    for name, (several, learning) in found.items():
        parts = [c.to_dict() | {"holm": next(adjusted)} for c in several]
        learning |= {"holm": next(inferior)}
        methods[name] = {"comparisons": parts, "non_inferiority": learning}
        for c, part in zip(several, parts, strict=True):
            ends = " to ".join(f"{100 * end:+.1f}" for end in c.interval)
            ratio = "" if c.ratio is None else f"{c.ratio:.2f}"
            lines.append(
                [name, c.metric, f"{100 * c.ours:.1f}", f"{100 * c.theirs:.1f}",
                 f"{100 * c.difference:+.1f} ({ends})", ratio, f"{part['holm']:.3f}"]
            )  # fmt: skip
    heads = ["method", "metric", "its", config.reference, "difference, points", "ratio", "p (Holm)"]
    screen.table(f"{tests[0].seeds} seeds, {tests[0].tasks} tasks", heads, lines)
    others = other_metrics(reference, *cells.values())
    if others:
        which = ", ".join(f"{metric.replace('_', ' ')} of {t}" for t, metric in others.items())
        screen.say(f"compared in shares of right rows; means and the study's tables have {which}")
    for name, (_, learning) in found.items():
        shown = "learns as much" if learning["holds"] else "is not shown to learn as much"
        least = "" if learning["bound"] is None else f", {learning['bound']:.3f} at least"
        screen.say(f"{name} {shown} as {config.reference}{least} (margin {config.margin:g})")
    values = {
        name: {"seeds": sorted(runs), **means(runs)}
        for name, runs in ({config.reference: reference} | cells).items()
    }
    _say_means("method", values, screen)
    return {"methods": methods, "means": values, "other_metrics": others}


def _match(
    found: Sequence[Family], names: Sequence[str], reference: str, screen: Screen
) -> dict[str, Any]:
    """The readings at the same score and size, of the reference's model and order."""
    from retain.evaluation.matched import READINGS, lines, means, named, read

    every = [line for family in found for line in lines(family)]
    theirs = named(every, reference)
    near = [one for one in every if (one.model, one.order) == (theirs.model, theirs.order)]
    ours = [named(near, name) for name in names] or [one for one in near if one is not theirs]
    settings = {
        s.name: {"seeds": sorted(s.runs), **means(s.runs)}
        for line in (theirs, *ours) for s in line.settings
    }  # fmt: skip
    _say_means("setting", settings, screen)
    made = [(line, read(line, theirs, *pair)) for line in ours for pair in READINGS]
    made = [(line, r) for line, r in made if r.metric != "kl" or r.our_range or r.their_range]
    heads = ["method", "metric, at the same", "its", theirs.name, "difference", "read at"]
    screen.table("not tested, without intervals", heads, [_line(*pair) for pair in made])
    for line, r in made:
        if r.difference is None and r.our_range and r.their_range:
            ranges = (_range(r.at, ends) for ends in (r.our_range, r.their_range))
            screen.say(
                f"{line.name}: not comparable at the same {_SHOWN[r.at]}: "
                f"{' against '.join(ranges)} of {theirs.name}"
            )
    readings = [{"method": line.name, **r.to_dict()} for line, r in made]
    return {"reference": theirs.name, "settings": settings, "readings": readings}


def _line(line: Family, r: Reading) -> list[str]:
    known = r.our_range and r.their_range
    said = "–" if known else "not measured"
    gap = said if r.difference is None else _value(r.metric, r.difference, "+")
    places = f"{r.read} of {r.points}" + ("" if r.curve == "method" else ", its own")
    return [line.name, f"{_SHOWN[r.metric]}, {_SHOWN[r.at]}", _value(r.metric, r.ours),
            _value(r.metric, r.theirs), gap, places]  # fmt: skip


def _choose(found: Sequence[Family], names: Sequence[str], screen: Screen) -> list[dict[str, Any]]:
    """The best setting of each family.

    Raises:
        ConfigError: there is none.
    """
    from retain.evaluation.matched import choose, named

    asked = [named(found, name) for name in names] or found
    chosen = [choice for family in asked if (choice := choose(family)) is not None]
    if not chosen:
        raise ConfigError(
            "there is nothing to choose from",
            got=", ".join(names) or "no finished run of several tasks",
            allowed="a setting whose finished runs learn several tasks, of all seeds of its method",
            fix="finish the study's runs: retain study status STUDY.yaml",
        )
    rows = [
        [c.family.name, c.setting.name, *_values(c.means), str(c.tried),
         ", ".join(f"{end} {name}" for name, end in c.ends.items())]
        for c in chosen
    ]  # fmt: skip
    heads = ["method", "best", *_SHOWN.values(), "tried", "at an end"]
    screen.table("highest average on validation rows", heads, rows)
    for c in chosen:
        for name in c.left_out:
            screen.say(f"left out: {name}: it lacks a seed, or an average")
    return [c.to_dict() for c in chosen]


def _say_means(head: str, found: Mapping[str, Mapping[str, Any]], screen: Screen) -> None:
    rows = [[name, str(len(one["seeds"])), *_values(one)] for name, one in found.items()]
    screen.table("means over seeds", [head, "seeds", *_SHOWN.values()], rows)


def _values(found: Mapping[str, Any]) -> list[str]:
    return [_value(name, found[name]) for name in _SHOWN]


def _value(name: str, value: float | None, sign: str = "") -> str:
    """Points of a score, nats of KL, and the logarithm that a size is."""
    if value is None:
        return ""
    if name in ("kl", "update_size"):
        return f"{value:{sign}.{3 if name == 'kl' else 2}f}"
    return f"{100 * value:{sign}.1f}"


def _range(name: str, ends: tuple[float, float]) -> str:
    return " to ".join(_value(name, end) for end in ends)
