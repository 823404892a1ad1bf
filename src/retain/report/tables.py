"""The tables of the report, as rows of text and as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from retain.report.scales import number
from retain.report.schema import Forgetting, Interval, Probe, Result, Row, Target, Train
from retain.report.series import strength_text

__all__ = ["Cell", "Line", "Table", "summary_table", "sweep_table"]

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A value and, in smaller type, what qualifies it."""

    text: str
    note: str = ""

    def line(self) -> str:
        """Both on one line."""
        return f"{self.text} {self.note}".strip()


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    name: str
    cells: list[Cell]
    unit: str = ""
    strong: bool = False
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a head, ready to print."""

    head: list[str]
    lines: list[Line]

    def markdown(self) -> str:
        """The table in Markdown."""
        rows = ["| " + " | ".join(map(_plain, self.head)) + " |"]
        rows.append("|" + "|".join([":--", *["--:"] * (len(self.head) - 1)]) + "|")
        for line in self.lines:
            name = f"{line.name} ({line.unit})" if line.unit else line.name
            name = f"**{_plain(name)}**" if line.strong else _plain(name)
            rows.append("| " + " | ".join([name, *(_plain(c.line()) for c in line.cells)]) + " |")
        return "\n".join(rows) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None, interval: Interval = None) -> Cell:
    if value is None:
        return Cell(MISSING)
    if interval is None or interval[0] == interval[1]:
        return Cell(number(value))
    return Cell(number(value), f"[{number(interval[0])}, {number(interval[1])}]")


def _percent(value: float | None, interval: Interval = None) -> Cell:
    if value is None:
        return Cell(MISSING)
    text = f"{100 * value:.1f}%"
    if interval is None:
        return Cell(text)
    return Cell(text, f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]")


def _points(value: float | None) -> Cell:
    return Cell(MISSING if value is None else f"{100 * value:.1f}")


def _perplexity(kept: Forgetting, role: str) -> Cell:
    if kept.ppl is None:
        return Cell(MISSING)
    if kept.ppl_base is None or role == "base":
        return Cell(number(kept.ppl))
    return Cell(f"{number(kept.ppl_base)} → {number(kept.ppl)}")


def _seconds(train: Train | None) -> Cell:
    if train is None or train.seconds is None:
        return Cell(MISSING)
    return Cell(f"{train.seconds:.0f}" if train.seconds >= 10 else f"{train.seconds:.1f}")


def _trainable(result: Result, row: Row) -> Cell:
    model = result.model
    if row.role == "base" or not model.parameters or model.trainable is None:
        return Cell(MISSING)
    return Cell(f"{100 * model.trainable / model.parameters:.2f}%")


@dataclass(frozen=True)
class _Metric:
    name: str
    unit: str
    group: str
    cell: Callable[[Result, Row], Cell]


def _target(row: Row) -> Target:
    return row.target or Target()


def _kept(row: Row) -> Forgetting:
    return row.forgetting or Forgetting()


def _probe(row: Row) -> Probe:
    return row.probe or Probe()


_METRICS = [
    _Metric(
        "Exact match",
        "95% interval",
        "Learned",
        lambda _, row: _percent(_target(row).exact_match, _target(row).interval),
    ),
    _Metric("Answer loss", "nats per token", "Learned", lambda _, row: _number(_target(row).loss)),
    _Metric(
        "KL to the base",
        "nats per token, 95% interval",
        "Forgotten",
        lambda _, row: _number(_kept(row).kl, _kept(row).kl_interval),
    ),
    _Metric(
        "Perplexity",
        "base → tuned",
        "Forgotten",
        lambda _, row: _perplexity(_kept(row), row.role),
    ),
    _Metric("Flips", "share of tokens", "Forgotten", lambda _, row: _percent(_kept(row).flips)),
    _Metric(
        "Knowledge probe",
        "95% interval",
        "Forgotten",
        lambda _, row: _percent(_probe(row).accuracy, _probe(row).interval),
    ),
    _Metric("Probe points lost", "", "Forgotten", lambda _, row: _points(_probe(row).lost)),
    _Metric("Seconds", "to train", "Cost", lambda _, row: _seconds(row.train)),
    _Metric("Trainable", "share of weights", "Cost", _trainable),
]


def summary_table(result: Result) -> Table:
    """Base, plain LoRA and the chosen strength, a metric a row."""
    rows = result.main_rows
    head = [""]
    for row in rows:
        held = f" (strength {strength_text(row)})" if row.role == "retain" else ""
        head.append(row.label + held)
    lines = []
    group = ""
    for metric in _METRICS:
        cells = [metric.cell(result, row) for row in rows]
        first = metric.group if metric.group != group else ""
        group = metric.group
        lines.append(Line(metric.name, cells, unit=metric.unit, group=first))
    return Table(head, lines)


def sweep_table(result: Result) -> Table:
    """Every model, one a row."""
    head = ["Model", "Strength", *(metric.name for metric in _METRICS)]
    lines = []
    for row in result.rows:
        chosen = row is result.chosen
        strength = Cell(strength_text(row) if row.role == "retain" else MISSING)
        cells = [strength]
        for metric in _METRICS:
            cell = metric.cell(result, row)
            if metric.name == "Perplexity":  # the base has its own row here
                cell = Cell(cell.text.rpartition(" ")[2])
            cells.append(cell)
        name = f"{row.label} (chosen)" if chosen else row.label
        lines.append(Line(name, cells, strong=chosen))
    return Table(head, lines)
