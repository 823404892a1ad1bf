"""The numbers behind each figure, once for the SVG, the PNG and the CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from retain.report.scales import number
from retain.report.schema import Interval, Result, Role, Row

__all__ = [
    "Point",
    "Run",
    "Tradeoff",
    "smooth",
    "strength_text",
    "tradeoff",
    "tradeoff_csv",
    "training",
    "training_csv",
]

Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """One model in the trade-off."""

    role: Role
    label: str
    title: str
    x: float
    y: float
    x_interval: Interval
    y_interval: Interval
    chosen: bool
    strength: float | None


@dataclass(frozen=True)
class Tradeoff:
    """All models that have both numbers; `by_loss` where no exact match is known."""

    points: list[Point]
    by_loss: bool

    @property
    def y_label(self) -> str:
        """The label of the vertical axis."""
        return "answer loss (nats per token)" if self.by_loss else "exact match on the task"


@dataclass(frozen=True)
class Run:
    """The history of one run as (step, value) pairs."""

    role: Role
    label: str
    loss: Pairs
    predicted: Pairs
    measured: Pairs


def strength_text(row: Row) -> str:
    """The strength in its shortest form."""
    return "\N{EN DASH}" if row.strength is None else f"{row.strength:g}".replace("e+0", "e")


def _label(row: Row, chosen: Row | None) -> str:
    if row.role == "base":
        return "base"
    if row.role == "lora":
        return "plain LoRA"
    return f"strength {strength_text(row)} (chosen)" if row is chosen else strength_text(row)


def tradeoff(result: Result) -> Tradeoff:
    """Target score against nats forgotten, one point a model."""
    scored = any(row.target and row.target.exact_match is not None for row in result.rows)
    points = []
    for row in result.rows:
        target, kept = row.target, row.forgetting
        if target is None or kept is None or kept.kl is None:
            continue
        y = target.exact_match if scored else target.loss
        if y is None:
            continue
        score = f"{100 * y:.1f}% exact match" if scored else f"answer loss {number(y)}"
        held = f", strength {strength_text(row)}" if row.role == "retain" else ""
        points.append(
            Point(
                role=row.role,
                label=_label(row, result.chosen),
                title=f"{row.label}{held}: {score}, {number(kept.kl)} nats per token forgotten",
                x=kept.kl,
                y=y,
                x_interval=kept.kl_interval,
                y_interval=target.interval if scored else None,
                chosen=row is result.chosen,
                strength=row.strength,
            )
        )
    return Tradeoff(points, by_loss=not scored)


def training(result: Result) -> list[Run]:
    """The histories of plain LoRA and of the chosen held run, where there are such."""
    runs = []
    for row in (result.lora, result.chosen):
        if row is None or not row.history:
            continue
        log = sorted(row.history, key=lambda entry: entry.step)
        runs.append(
            Run(
                role=row.role,
                label="plain LoRA" if row.role == "lora" else "retention",
                loss=[(e.step, e.loss) for e in log if e.loss is not None],
                predicted=[(e.step, e.predicted) for e in log if e.predicted is not None],
                measured=[(e.step, e.measured) for e in log if e.measured is not None],
            )
        )
    return runs


def smooth(pairs: Pairs) -> Pairs:
    """A moving average over about a twelfth of the run; short runs are left alone."""
    half = len(pairs) // 24
    if half < 1:
        return pairs
    out = []
    for i, (step, _) in enumerate(pairs):
        reach = min(half, i)  # a falling start stays where it is; a noisy end is averaged
        window = [value for _, value in pairs[i - reach : i + reach + 1]]
        out.append((step, sum(window) / len(window)))
    return out


def _csv(header: list[str], rows: list[list[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return text.getvalue()


def tradeoff_csv(result: Result) -> str:
    """The numbers of the trade-off figure."""
    rows: list[list[object]] = []
    for row in result.rows:
        target, kept = row.target, row.forgetting
        score = (target.interval if target else None) or (None, None)
        nats = (kept.kl_interval if kept else None) or (None, None)
        match, loss = (target.exact_match, target.loss) if target else (None, None)
        kl = kept.kl if kept else None
        chosen = row is result.chosen
        rows.append([row.name, row.strength, chosen, match, *score, loss, kl, *nats])
    head = "name strength chosen exact_match exact_match_low exact_match_high answer_loss"
    return _csv([*head.split(), "kl", "kl_low", "kl_high"], rows)


def training_csv(result: Result) -> str:
    """The numbers of the training figures, every run that has a history."""
    rows: list[list[object]] = [
        [row.name, e.step, e.loss, e.predicted, e.measured, e.strength]
        for row in result.rows
        for e in row.history
    ]
    return _csv(["name", "step", "loss", "predicted", "measured", "strength"], rows)
