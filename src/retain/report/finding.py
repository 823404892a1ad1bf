"""The finding on a group in one or two sentences, from the numbers and no kinder than they are."""

from __future__ import annotations

from collections.abc import Sequence

from retain.intervals import Estimate
from retain.records import Claim
from retain.report.cells import Cell, Group
from retain.report.metrics import Metric, metric, number
from retain.report.names import names

__all__ = ["claims_line", "finding"]


def _value(m: Metric, found: Estimate | None) -> str:
    if found is None:
        return "an unknown amount"
    text, half = m.pair(found)
    return f"{text} ± {half}" if half else text


def _measure(group: Group) -> Metric | None:
    """What forgetting is measured by: the scores of old tasks, or KL where there are none."""
    keys = ("forgetting", "kl") if group.length > 1 else ("kl",)
    plain = group.plain
    return next((metric(k) for k in keys if plain and plain.mean(k) is not None), None)


def _learns_as_much(cell: Cell) -> bool:
    found = cell.diffs.get("learning")
    return found is not None and found.sided >= 0


def _doubt(found: Estimate | None) -> str:
    if found is None or found.low is None:
        return "one seed, so no interval"
    if found.sided == 0:
        return "the 95 % interval of the paired difference contains 0"
    return "the 95 % interval of the paired difference leaves 0 out"


def _storeless(group: Group, m: Metric) -> list[Cell]:
    """The held cells that store no data and have a value of the metric."""
    held = (cell for cell in group.cells if cell.held and not cell.stores)
    return [cell for cell in held if cell.mean(m.key) is not None]


def _best(group: Group, m: Metric) -> tuple[Cell | None, int]:
    """The held cell that stores no data, learns as much and forgets least; of how many.

    Cells of fewer seeds than the others wait for theirs: one lucky seed would win.
    """
    fair = [cell for cell in _storeless(group, m) if _learns_as_much(cell)]
    most = max((cell.seeds for cell in fair), default=0)
    fair = [cell for cell in fair if cell.seeds == most]
    return min(fair, key=lambda cell: _mean(cell, m), default=None), len(fair)


def _why_none(group: Group, m: Metric) -> str:
    """Why `_best` has no cell."""
    measured = _storeless(group, m)
    if not measured:
        return "no setting without stored data was measured"
    known = [cell for cell in measured if cell.diffs.get("learning") is not None]
    if not known:
        return "no setting without stored data has a seed of plain LoRA's to be compared on"
    some = "" if len(known) == len(measured) else " that has a seed of plain LoRA's"
    return f"every setting without stored data{some} learns clearly less than plain LoRA"


def _mean(cell: Cell, m: Metric) -> float:
    found = cell.mean(m.key)
    return found.mean if found else float("inf")


def _adapters(group: Group) -> str:
    """Without any method, or anything forgotten: which way of tuning scores best."""
    m = metric("average")
    named = dict(zip(map(id, group.cells), names(group), strict=True))
    known = [cell for cell in group.cells if cell.mean(m.key) is not None]
    if not known:
        moved = [cell for cell in group.cells if cell.mean("kl") is not None]
        if not moved:
            return f"No run of {group.title} is done."
        kl = _value(metric("kl"), moved[0].mean("kl"))
        return f"On {group.title}, {named[id(moved[0])]} moves {kl} nats per token from the base."
    top = max(known, key=lambda cell: _mean(cell, m))
    score = f"{_value(m, top.mean(m.key))} points"
    if len(known) == 1:
        return f"On {group.title}, {named[id(top)]} has an {m.name.lower()} of {score}."
    text = f"{named[id(top)]} has the best {m.name.lower()}, {score}"
    plain = group.plain
    if plain is not None and plain is not top:
        text += f", against {_value(m, plain.mean(m.key))} of plain LoRA"
        text += f" ({_doubt(top.diffs.get(m.key))})"
    return f"On {group.title}, {text}."


def _overlap(a: Estimate, b: Estimate) -> bool | None:
    """Whether two intervals meet; None where one is unknown."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    return a.high >= b.low and b.high >= a.low


def _less_forgotten(ours: Estimate | None, theirs: Estimate | None) -> str:
    if ours is not None and theirs is None:
        return f"moves {_value(metric('kl'), ours)} nats per token from the base"
    if ours is None or theirs is None or theirs.mean <= 0:
        return "was trained, but how much it forgets against plain LoRA is not known"
    numbers = f"{number(ours.mean)} against {number(theirs.mean)} nats per token"
    if ours.mean >= theirs.mean:
        return f"does not forget less than plain LoRA ({numbers})"
    doubt = ", with overlapping 95 % intervals" if _overlap(ours, theirs) else ""
    saved = 100 * (1 - ours.mean / theirs.mean)
    percent = f"{saved:.0f}" if 1 <= saved <= 99 else f"{saved:.1f}"
    return f"forgets {percent} % less than plain LoRA ({numbers}{doubt})"


def _as_much_learned(ours: Estimate | None, theirs: Estimate | None, start: float | None) -> str:
    if ours is None:
        return "its score on the task is not known"
    base = "" if start is None else f"; the base {100 * start:.1f}"
    if theirs is None:
        return f"it scores {_value(metric('average'), ours)} points{base}"
    score = f"{100 * ours.mean:.1f} points against {100 * theirs.mean:.1f}"
    if start is not None and ours.mean <= start:
        return f"it does not learn the task ({score}{base})"
    if ours.mean == theirs.mean:
        return f"it scores the same on the task ({score}{base})"
    less, meet = ours.mean < theirs.mean, _overlap(ours, theirs)
    if meet is False:
        return f"it learns {'less' if less else 'more'} of the task ({score}{base})"
    doubt = ", with overlapping 95 % intervals" if meet else ""
    return f"it scores {'lower' if less else 'higher'} on the task ({score}{doubt}{base})"


def _of_chosen(group: Group, ours: Cell) -> str:
    """The method that the study chose beforehand against plain LoRA and the base."""
    plain = group.plain
    kept = _less_forgotten(ours.mean("kl"), plain.mean("kl") if plain else None)
    first = next((run.before for run in ours.runs if run.before), [None])
    score = plain.mean("average") if plain else None
    learned = _as_much_learned(ours.mean("average"), score, first[0])
    name = names(group)[group.cells.index(ours)]
    return f"On {group.title}, {name} {kept}, and {learned}."


def _least(group: Group, m: Metric, lost: str) -> str:
    """What `_best` found, or why there is none."""
    best, count = _best(group, m)
    if best is None:
        return _why_none(group, m)
    name, diff = names(group)[group.cells.index(best)], best.diffs.get(m.key)
    ours = f"{_value(m, best.mean(m.key))} ({_doubt(diff)})"
    if diff is None or diff.mean >= 0:
        return f"of the settings without stored data that learn as much none {lost} less"
    if count > 1:
        run = f" and of {best.seeds} seeds" if best.seeds > 1 else ""
        return (
            f"of the {count} settings without stored data{run} that do not learn clearly less, "
            f"{name} {lost} least: {ours}, picked after the fact"
        )
    return (
        "the only setting without stored data that does not learn clearly less, "
        f"{name}, {lost} {ours}"
    )


def finding(group: Group) -> str:
    """What forgets least at equal learning, how sure that is, and what replay does."""
    m, plain = _measure(group), group.plain
    if group.chosen and len(group.tasks) == 1:
        return _of_chosen(group, group.chosen)
    alone = m is None and plain is not None and plain.mean("average") is not None
    if alone or not any(cell.held for cell in group.cells):
        return _adapters(group)  # of single tasks without KL there is nothing forgotten to tell
    if m is None or plain is None:
        return f"Plain LoRA is not done on {group.title}, so there is nothing to compare with."
    unit = "points" if m.key == "forgetting" else "nats per token"
    lost = "forgets" if m.key == "forgetting" else "moves from the base"
    text = f"On {group.title}, plain LoRA {lost} {_value(m, plain.mean(m.key))} {unit}"
    text += f"; {_least(group, m, lost)}"
    stored = [cell for cell in group.cells if cell.stores and cell.mean(m.key) is not None]
    if stored:
        least = min(stored, key=lambda cell: _mean(cell, m))
        name = names(group)[group.cells.index(least)]
        text += f". With stored data, {name} {lost} {_value(m, least.mean(m.key))}"
    return text + "."


def claims_line(claims: Sequence[Claim]) -> str:
    """How many of the claims hold."""
    verdicts = [claim.verdict for claim in claims]
    total, holding = len(verdicts), verdicts.count("holds")
    if holding == total:
        return "The claim holds." if total == 1 else f"All {total} claims hold."
    parts = [f"{holding} of {total} claims hold"]
    if failed := verdicts.count("does not hold"):
        parts.append(f"{failed} {'does' if failed == 1 else 'do'} not")
    if unknown := verdicts.count("not measured"):
        parts.append(f"{unknown} not measured")
    return ", ".join(parts) + "."
