"""The tables of a study, as data for the page and as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field

from retain.intervals import Estimate, estimate
from retain.report.cells import Cell, Group, by_task
from retain.report.fronts import fronts
from retain.report.metrics import METRICS, MISSING, Metric, metric
from retain.report.names import names

__all__ = [
    "Column",
    "Entry",
    "Row",
    "Table",
    "difference_table",
    "failures",
    "front_table",
    "results_table",
    "score_table",
    "study_tables",
]

_COSTS = ("share", "seconds", "memory")


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    name: str
    unit: str = ""
    key: str = ""

    @property
    def title(self) -> str:
        """Name and unit on one line."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Entry:
    """One value: its text, the half of its interval, and the numbers behind them.

    Attributes:
        text: the value for people.
        half: half the width of the interval for people; empty where there is none.
        value: what the column is sorted by; None sorts last.
        low, high: the ends of the interval.
        verdict: "better" or "worse" where the interval of a difference leaves 0 out.
        ends: in place of `half`, both ends for people.
    """

    text: str = MISSING
    half: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = ""
    ends: str = ""

    def line(self) -> str:
        """Value and interval on one line."""
        if self.ends:
            return f"{self.text} {self.ends}"
        return f"{self.text} ± {self.half}" if self.half else self.text


@dataclass(frozen=True)
class Row:
    """A row: its name, what qualifies that, and its values."""

    name: str
    note: str
    entries: list[Entry]
    plain: bool = False


@dataclass(frozen=True)
class Table:
    """A table ready to print; `key` names its file."""

    key: str
    title: str
    about: str
    head: list[Column]
    rows: list[Row] = field(default_factory=list)

    def csv(self) -> str:
        """All numbers in full, the ends of intervals in columns of their own."""
        wide = [any(row.entries[i].low is not None for row in self.rows) for i in self._places()]
        head = [self.head[0].name, "note"]
        for column, ends in zip(self.head[1:], wide, strict=True):
            head += [column.title, *([f"{column.name} {end}" for end in ("low", "high")] * ends)]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(head)
        for row in self.rows:
            line: list[object] = [row.name, row.note]
            for entry, ends in zip(row.entries, wide, strict=True):
                values = [entry.value, *([entry.low, entry.high] if ends else [])]
                line += ["" if value is None else value for value in values]
            writer.writerow(line)
        return out.getvalue()

    def _places(self) -> range:
        return range(len(self.head) - 1)

    def markdown(self) -> str:
        """The table in Markdown."""
        head = [_markdown(column.title) for column in self.head]
        out = [f"| {' | '.join(head)} |", "|" + "|".join([":--", *["--:"] * len(head[1:])]) + "|"]
        for row in self.rows:
            name = _markdown(row.name) + (f" ({_markdown(row.note)})" if row.note else "")
            cells = [
                f"**{entry.line()}**" if entry.verdict else entry.line() for entry in row.entries
            ]
            out.append("| " + " | ".join([name, *cells]) + " |")
        return "\n".join(out) + "\n"

    def latex(self, label: str) -> str:
        r"""The table as a LaTeX float; it needs ``\usepackage{booktabs}``."""
        units = [_latex(column.unit) for column in self.head]
        out = [
            r"\begin{table*}",
            r"\centering\small",
            rf"\caption{{{_latex(self.title)}. {_latex(self.about)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{l{'r' * len(self.head[1:])}}}",
            r"\toprule",
            " & ".join(_latex(column.name) for column in self.head) + r" \\",
        ]
        if any(units):
            out.append(" & ".join(units) + r" \\")
        out.append(r"\midrule")
        for row in self.rows:
            name = _latex(row.name) + (f" ({_latex(row.note)})" if row.note else "")
            if name.startswith(("[", "*")):
                name = "{}" + name  # else it is an option of the line's end before it
            cells = [
                rf"\textbf{{{_latex(entry.line())}}}" if entry.verdict else _latex(entry.line())
                for entry in row.entries
            ]
            out.append(" & ".join([name, *cells]) + r" \\")
        return "\n".join([*out, r"\bottomrule", r"\end{tabular}", r"\end{table*}"]) + "\n"


_MARKS = str.maketrans({c: f"\\{c}" for c in "|*_`<[\\"} | {"\n": " "})
_TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "±": r"$\pm$",
        "\N{MINUS SIGN}": "$-$",
        MISSING: "---",
        "\N{EN DASH}": "--",
        "→": r"$\to$",
        "λ": r"$\lambda$",
        "·": r"$\cdot$",
        "\n": " ",
    }
)


def _markdown(text: str) -> str:
    return text.translate(_MARKS)


def _latex(text: str) -> str:
    return text.translate(_TEX)


def _entry(m: Metric, found: Estimate | None, *, signed: bool = False) -> Entry:
    if found is None:
        return Entry()
    text, half = m.pair(found, signed=signed)
    verdict = ""
    if signed and m.better:
        verdict = {1: "better", -1: "worse"}.get(found.sided * m.better, "")
    return Entry(text, half, found.mean, found.low, found.high, verdict)


def _note(cell: Cell) -> str:
    parts = ["stores data"] if cell.stores else []
    if cell.failed:
        parts.append(f"{len(cell.failed)} failed")
    return ", ".join(parts)


def results_table(group: Group) -> Table:
    """Every cell a row: what it learned, forgot and cost."""
    shown = [m for m in METRICS if group.has(m.key)]
    rows = []
    for name, cell in zip(names(group), group.cells, strict=True):
        entries = [Entry(str(cell.seeds), value=float(cell.seeds))]
        for m in shown:
            found = cell.mean(m.key)
            if m.key in _COSTS and found:  # what it cost is told, not tested
                found = Estimate(found.mean, None, None, found.n)
            entries.append(_entry(m, found))
        rows.append(Row(name, _note(cell), entries, cell.plain))
    head = [Column("Method"), Column("Seeds"), *(Column(m.name, m.unit, m.key) for m in shown)]
    return Table("results", "Results", group.about, head, rows)


def difference_table(group: Group) -> Table | None:
    """Every cell but plain LoRA a row: the paired difference to that; None without it."""
    if group.plain is None or len(group.cells) < 2:
        return None
    others = [cell for cell in group.cells if not cell.plain]
    shown = [
        m for m in METRICS if m.better and any(cell.diffs.get(m.key) is not None for cell in others)
    ]
    rows = []
    for name, cell in zip(names(group), group.cells, strict=True):
        if not cell.plain:
            entries = [_entry(m, cell.diffs.get(m.key), signed=True) for m in shown]
            rows.append(Row(name, _note(cell), entries))
    head = [Column("Method"), *(Column(m.name, m.unit, m.key) for m in shown)]
    about = f"{group.title}; paired over the same seeds; strong where the 95 % interval omits 0"
    return Table("difference", "Difference to plain LoRA", about, head, rows) if shown else None


def score_table(group: Group) -> Table | None:
    """Every cell a row, every task a column: the score after the last task; general ones last."""
    if not any(any(cell.final) for cell in group.cells):
        return None
    points = metric("average")
    runs = [] if group.pooled else [run for cell in group.cells for run in cell.runs]
    general = list(dict.fromkeys(name for run in runs if run.general for name in run.general.after))
    rows = []
    known = [cell for cell in group.cells if any(run.before for run in cell.runs)]
    cell = group.plain if group.plain in known else next(iter(known), None)
    if runs and cell and (first := [run for run in cell.runs if run.before]):
        each = [by_task(run, run.before, group.tasks) for run in first]
        columns = [list(column) for column in zip(*each, strict=True)]
        columns += [[r.general.before.get(n) for r in first if r.general] for n in general]
        entries = [_entry(points, estimate(column)) for column in columns]
        rows.append(Row("before learning", "", entries))
    for name, cell in zip(names(group), group.cells, strict=True):
        columns = [list(final.values()) for final in cell.final]
        columns += [[r.general.after.get(n) for r in cell.runs if r.general] for n in general]
        entries = [_entry(points, estimate(column)) for column in columns]
        rows.append(Row(name, _note(cell), entries, cell.plain))
    kinds = [*group.metrics, *[""] * len(group.tasks)][: len(group.tasks)]
    kinds = [kind.replace("_", " ") for kind in kinds] + ["general task"] * len(general)
    head = [Column(t, k) for t, k in zip([*group.tasks, *general], kinds, strict=True)]
    when = "each task learned alone" if group.pooled else "after the last task"
    about = f"{group.title}; score in points {when}, mean over seeds ± half the 95 % interval"
    return Table("scores", "Score of each task", about, [Column("Method"), *head], rows)


def front_table(group: Group) -> Table | None:
    """Every family of settings a row: its score within any budget; None without a sweep."""
    found = fronts(group)
    points = metric("average")
    rows = [
        Row(
            front.name,
            "stores data" if front.stores else "",
            [
                Entry(str(front.settings), value=float(front.settings)),
                _entry(points, front.area),
                _entry(points, front.diff, signed=True),
            ],
            plain=front.diff is None,
        )
        for front in found
    ]
    head = [
        Column("Family"),
        Column("Settings"),
        Column("Score within a budget", "points"),
        Column("Difference to plain LoRA", "points"),
    ]
    about = (
        f"{group.title}; the best average score of a family's settings within a budget of KL to "
        "the base, averaged over all budgets from 0 to the largest KL of plain LoRA's settings "
        "(hypervolume over the limit), mean over seeds ± half the 95 % interval"
    )
    return Table("front", "Fronts", about, head, rows) if rows else None


def failures(group: Group) -> list[str]:
    """One line for each run that failed, with the reason."""
    out = []
    for name, cell in zip(names(group), group.cells, strict=True):
        for run in cell.failed:
            where = f" ({run.config.order.name})" if group.pooled else ""
            out.append(
                f"{name}{where}, seed {run.config.seed}: {run.error or 'no reason recorded'}"
            )
    return out


def study_tables(group: Group) -> list[Table]:
    """All tables of a group that have something to show."""
    made = [
        results_table(group),
        difference_table(group),
        front_table(group),
        score_table(group),
    ]
    return [table for table in made if table is not None and table.rows]
