"""The numbers of a run that the report shows, once for page, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from retain.intervals import Estimate
from retain.records import Retention
from retain.records import RunRecord as Run

__all__ = ["METRICS", "Metric", "curve_of_kl", "metric", "number", "seen_so_far", "short"]

MISSING = "\N{EM DASH}"


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, without an exponent where it stays short."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def short(value: float) -> str:
    """A number as `number` has it, without zeros at its end."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


@dataclass(frozen=True)
class Metric:
    """One number of a run.

    Attributes:
        key: in the data.
        name: for people.
        unit: how it is counted; "points" are hundredths of a score.
        better: 1 where more is better, -1 where less is, 0 where neither.
        of: the number, from a run that is done; None where it was not measured.
    """

    key: str
    name: str
    unit: str
    better: int
    of: Callable[[Run], float | None]

    @property
    def factor(self) -> float:
        """What a value is multiplied by to be in the unit."""
        return 100.0 if self.unit in ("points", "%") else 1.0

    @property
    def title(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})"

    def text(self, found: Estimate | None) -> str:
        """The estimate with half its interval and its unit."""
        if found is None:
            return MISSING
        text, half = self.pair(found)
        return f"{text}{' ± ' + half if half else ''} {self.unit}"

    def pair(self, found: Estimate, *, signed: bool = False) -> tuple[str, str]:
        """Mean and half the interval with as many decimals; the half is empty for one seed."""
        half = None if found.low is None or found.high is None else (found.high - found.low) / 2
        places = self._places(found.mean, half)
        text = self._write(found.mean, places)
        if signed and found.mean > 0 and text.strip("0."):
            text = f"+{text}"
        return text, "" if half is None else self._write(half, places)

    def number(self, value: float, widest: float, *, signed: bool = False) -> str:
        """A value with the decimals that one of the size of `widest` has."""
        text = self._write(value, self._places(widest, None))
        return f"+{text}" if signed and value > 0 and text.strip("0.") else text

    def _places(self, value: float, half: float | None) -> int | None:
        """Decimals; None for a number that needs an exponent."""
        size = max(abs(value), half or 0.0)
        if self.unit == "points":
            return 1
        if self.unit == "%":
            return 1 if size >= 0.1 else 2
        if self.unit == "s":
            return 0 if size >= 10 else 1
        if size == 0:
            return 0
        if not 1e-4 <= size < 1e6:
            return None
        places = max(0, 2 - math.floor(math.log10(size)))
        if half:  # at least one digit of the half, as far as two more decimals show it
            places = max(places, min(places + 2, math.ceil(-math.log10(half))))
        return places

    def _write(self, value: float, places: int | None) -> str:
        value = float(f"{value:.6g}")
        scaled = self.factor * value
        text = number(scaled) if places is None else f"{scaled:.{places}f}"
        if not text.strip("-0."):
            text = text.lstrip("-")
        return f"\N{MINUS SIGN}{text[1:]}" if text.startswith("-") else text


def _summary(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.metrics_summary.get(key)


def _places(run: Run) -> dict[int, Retention]:
    """The measurements of retention by the place of the task they follow, from 0."""
    count, rows = len(run.tasks), run.retention
    if len(rows) == count:
        return dict(enumerate(sorted(rows, key=lambda row: row.after)))
    first = 1 if any(row.after == count for row in rows) else 0
    return {row.after - first: row for row in rows}


def _last(run: Run) -> Retention | None:
    return _places(run).get(len(run.tasks) - 1)


def _moved(key: str) -> Callable[[Run], float | None]:
    return lambda run: getattr(_last(run), key, None)


def _perplexity(run: Run) -> float | None:
    last = _last(run)
    if last is None or last.ppl is None or not last.ppl_base:
        return None
    return last.ppl / last.ppl_base


def _loss(run: Run) -> float | None:
    known = [loss for loss in run.losses if loss is not None]
    return sum(known) / len(known) if known else None


METRICS = (
    Metric("average", "Average score", "points", 1, _summary("average")),
    Metric("learning", "Learning accuracy", "points", 1, _summary("learning")),
    Metric("forgetting", "Forgetting", "points", -1, _summary("forgetting")),
    Metric("kl", "KL to the base", "nats per token", -1, _moved("kl")),
    Metric("perplexity", "Perplexity ratio", "tuned / base", -1, _perplexity),
    Metric("flips", "Flips", "%", -1, _moved("flips")),
    Metric(
        "general", "General tasks", "points", 1, lambda r: r.general.change if r.general else None
    ),
    Metric("log_ratio", "Own answers, tuned / base", "nats per token", -1, _summary("log_ratio")),
    Metric("first_word", "Same first word", "%", 1, _summary("first_word")),
    Metric("backward_transfer", "Backward transfer", "points", 1, _summary("backward_transfer")),
    Metric("forward_transfer", "Forward transfer", "points", 1, _summary("forward_transfer")),
    Metric("intransigence", "Intransigence", "points", -1, _summary("intransigence")),
    Metric(
        "share_of_independent", "Of one adapter a task", "%", 1, _summary("share_of_independent")
    ),
    Metric("loss", "Test loss", "nats", -1, _loss),
    Metric("share", "Trained", "%", 0, lambda r: r.parameters.share if r.parameters else None),
    Metric("update_size", "Size of the update", "log", 0, _summary("update_size")),
    Metric("seconds", "Time", "s", 0, lambda r: r.seconds.total if r.seconds else None),
    Metric("memory", "Peak memory", "GiB", 0, lambda r: r.peak_memory_gib),
)


def metric(key: str) -> Metric:
    """The metric of that key."""
    return next(found for found in METRICS if found.key == key)


def curve_of_kl(run: Run) -> list[float | None]:
    """KL to the base after each task, nats per token."""
    places = _places(run)
    rows = [places.get(place) for place in range(len(run.tasks))]
    return [row.kl if row else None for row in rows]


def seen_so_far(run: Run) -> list[float | None]:
    """After each task, the mean score of the tasks learned until then."""
    out: list[float | None] = []
    for place, row in enumerate(run.matrix):
        scores = [score for score in row[: place + 1] if score is not None]
        out.append(sum(scores) / len(scores) if len(scores) == place + 1 else None)
    return out
