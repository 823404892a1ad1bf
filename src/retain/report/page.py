"""Writes a report: one self-contained HTML page, and tables and pictures where asked."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from retain.files import check_ours, whole_file
from retain.records import EvalRecord, RunRecord, StudyRecord
from retain.report.axes import Panel, Row
from retain.report.cells import Group, groups
from retain.report.charts import panels
from retain.report.draw import MARK, asset, compiled, picture, png, svg
from retain.report.evaluation import (
    answers_of,
    blocks,
    eval_facts,
    eval_finding,
    eval_panel,
    eval_tables,
)
from retain.report.finding import claims_line, finding
from retain.report.metrics import short
from retain.report.names import names, slug
from retain.report.read import check, load, read_studies, results_in, schema_of
from retain.report.soften import SOFTEN, Softening, soften_panel, soften_table, soften_title
from retain.report.tables import failures, study_tables

__all__ = [
    "download", "group_ids", "latex", "made", "markdown", "page_of", "refused", "render", "section",
    "write_report",
]  # fmt: skip


SHOWN = 10
"""Prompts whose answers are shown; the others are folded away."""


def write_report(
    results: Sequence[Path],
    page: Path,
    *,
    markdown_file: Path | None = None,
    latex_file: Path | None = None,
    pictures: Path | None = None,
) -> list[Path]:
    """Write the page and, where asked, tables and pictures; each file whole or not at all.

    Args:
        results: the files of studies, runs, results and softenings, or folders that hold such.
        page: where the HTML goes.
        markdown_file: where the tables go as Markdown.
        latex_file: where the tables go as LaTeX.
        pictures: the folder for a PNG and an SVG of each comparison.

    Returns:
        The paths that were written.

    Raises:
        SourceError: a result cannot be read.
        OutputError: a file cannot be written, or tables or pictures would take the place of what
            no report has written.
    """
    softened = {path: _softenings(path) for path in results}
    rest = [p for p in results if not softened[p] or (p.is_dir() and results_in(p))]
    studies = read_studies(rest) if rest or not results else []
    every = dict.fromkeys(file for found in softened.values() for file in found)
    curves = [check(file, Softening, load(file)) for file in every]
    files: dict[Path, bytes] = {page: render(studies, curves).encode()}
    if markdown_file is not None:
        files[markdown_file] = markdown(studies, curves).encode()
    if latex_file is not None:
        files[latex_file] = latex(studies, curves).encode()
    if pictures is not None:
        found = groups(_grids(studies))
        drawn = [*zip(group_ids(found), map(panels, found), strict=True)]
        shown = [eval_panel(one) for one in _evals(studies)]
        drawn += [(f"eval-{i}", [panel]) for i, panel in enumerate(shown, 1) if panel is not None]
        drawn += [(f"soften-{i}", [soften_panel(curve)]) for i, curve in enumerate(curves, 1)]
        for name, figures in drawn:
            if (vega := picture(figures)) is not None:
                files[pictures / f"{name}.png"] = png(vega)
                files[pictures / f"{name}.svg"] = svg(vega).encode()
    for path, option in ((markdown_file, "--markdown"), (latex_file, "--latex")):
        if path is not None:
            check_ours(path, _are_tables, "the tables of a report", path, option)
    for path in files:
        if path.parent == pictures:
            check_ours(path, _is_picture, "a picture of a report", path)
    for path, content in files.items():
        with whole_file(path, "the report") as scratch:
            scratch.write_bytes(content)
    return list(files)


def _softenings(path: Path) -> list[Path]:
    """The files of softenings that a path is, or holds."""
    files = sorted(path.rglob("soften.json")) if path.is_dir() else [path]
    return [file for file in files if schema_of(file) == SOFTEN]


def _evals(studies: Sequence[StudyRecord]) -> list[EvalRecord]:
    """What was measured by ``retain eval``."""
    return [study.evaluated for study in studies if study.evaluated is not None]


def _grids(studies: Sequence[StudyRecord]) -> list[StudyRecord]:
    """All others."""
    return [study for study in studies if study.evaluated is None]


def _is_picture(path: Path) -> bool:
    return path.is_file() and MARK.encode() in path.read_bytes()


def _are_tables(path: Path) -> bool:
    """Those of `markdown` and `latex` end in a comment that tells them from others' texts."""
    return path.is_file() and MARK.encode() in path.read_bytes().rstrip().rpartition(b"\n")[2]


def _once(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _hardware(run: RunRecord) -> str | None:
    box = run.hardware
    if box is None:
        return None
    memory = None if box.memory_gib is None else f"{box.memory_gib:g} GiB memory"
    cores = None if box.cores is None else f"{box.cores} cores"
    return ", ".join(p for p in (box.cpu, cores, memory, box.accelerator or "no GPU") if p)


def _days(runs: Iterable[RunRecord]) -> str:
    days = sorted({run.created[:10] for run in runs if run.created})
    return " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""


def made(studies: Sequence[StudyRecord]) -> list[tuple[str, str]]:
    """How the runs were made, as name and value; what is not known is left out."""
    runs = [run for study in studies for run in study.runs]
    grids = [run for study in _grids(studies) for run in study.runs]
    done = sum(run.done for run in grids)
    left = sum(max(0, (study.planned or 0) - len(study.runs)) for study in studies)
    seeds = sorted({run.config.seed for run in runs if run.config.seed is not None})
    versions = _once(", ".join(f"{k} {v}" for k, v in r.versions.items() if v) for r in runs)
    models = [", ".join(_once([r.config.model, r.config.dtype])) for r in runs]
    more = f", {left} not yet run" if left else ""
    facts = [fact for found in _evals(studies) for fact in eval_facts(found)]
    facts += [
        ("Models", "; ".join(_once(models))),
        ("Runs", f"{done} done, {len(grids) - done} failed{more}" if grids else ""),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Scored on", "; ".join(_once(_scored(run) for run in runs))),
        ("Hardware", "; ".join(_once(map(_hardware, runs)))),
        ("Versions", "; ".join(versions)),
        ("Commit", ", ".join(_once(run.commit for run in runs))),
        ("Created", _days(runs)),
    ]
    return [(name, value) for name, value in facts if value]


def _scored(run: RunRecord) -> str:
    """Nothing for test rows, which are what a reader takes for granted."""
    held = run.config.evaluation.split == "validation"
    return "validation rows, held out of the training rows" if held else ""


def refused(studies: Sequence[StudyRecord]) -> list[str]:
    """One line for each combination that was not run because its method refuses it."""
    several = len(studies) > 1
    return [
        (f"{study.name}: " if several else "")
        + f"{skip.method} on {skip.adapter}: {skip.reason or 'no reason recorded'}"
        for study in studies
        for skip in study.skipped
    ]


def group_ids(found: Sequence[Group]) -> list[str]:
    """A name for each group that is fit for a file and an attribute, each once."""
    out: list[str] = []
    for group in found:
        base = slug(f"{group.study} {group.model} {group.order}") or "group"
        name, more = base, 2
        while name in out:
            name, more = f"{base}-{more}", more + 1
        out.append(name)
    return out


def download(text: str) -> str:
    """CSV as the address of a link."""
    return "data:text/csv;charset=utf-8;base64," + b64encode(text.encode()).decode()


def _numbers(rows: Sequence[Row]) -> str:
    """What a figure shows, as CSV."""
    kept = list(dict.fromkeys(key for row in rows for key in row if not key.endswith("_text")))
    out = io.StringIO()
    writer = csv.DictWriter(out, kept, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _json(value: Any) -> Markup:
    """JSON that may stand inside an HTML element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for mark, code in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(mark, code)
    return Markup(text)


def _figures(panels: Sequence[Panel], of: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The figures of a group by what they stand below."""
    out: dict[str, list[dict[str, Any]]] = {}
    for panel in panels:
        chart = panel.chart.copy(deep=False)
        for side, length in (("width", "container"), ("height", 340 if panel.wide else 290)):
            if chart[side] is alt.Undefined:
                chart[side] = length
        out.setdefault(panel.part, []).append({
            "panel": panel, "spec": _json(compiled(chart)), "file": f"{panel.key}-{of}",
            "csv": download(_numbers(panel.rows)),
        })  # fmt: skip
    return list(out.items())


def _answers(group: Group) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """For each prompt what the models say: before, plain LoRA, and the chosen method or all."""
    shown = [cell for cell in group.cells if cell.runs and cell.runs[0].generations]
    if group.chosen:
        shown = [cell for cell in shown if not cell.held or cell is group.chosen]
    named = dict(zip(map(id, group.cells), names(group), strict=True))
    runs = [(named[id(cell)], cell.runs[0].generations) for cell in shown]
    said = [(name, {g.prompt: g.text for g in told}) for name, told in runs]
    first: dict[str, str | None] = {
        g.prompt: g.before for _, told in runs for g in told if g.before is not None
    }
    said = [("before learning", first), *said] if first else said
    prompts = dict.fromkeys(prompt for _, texts in said for prompt in texts)
    return [(prompt, [(name, texts.get(prompt)) for name, texts in said]) for prompt in prompts]


def _part(group: Group, name: str, title: str) -> dict[str, Any]:
    return {
        "id": name, "title": title, "finding": finding(group), "failures": failures(group),
        "figures": _figures(panels(group), name),
        "tables": [(table, download(table.csv()), f"{table.key}-{name}.csv")
                   for table in study_tables(group)],
        "answers": _answers(group),
    }  # fmt: skip


def _eval_part(study: StudyRecord, found: EvalRecord, name: str) -> dict[str, Any]:
    """The part of a page about a ``retain eval``."""
    asked = [
        {"what": what, "first": blocks(every[:SHOWN]), "rest": blocks(every[SHOWN:]),
         "count": max(0, len(every) - SHOWN)}
        for what, every in answers_of(found)
    ]  # fmt: skip
    shown = [panel for panel in (eval_panel(found),) if panel is not None]
    if any(run.history for run in study.runs):
        shown += [p for group in groups([study]) for p in panels(group) if p.part == "Training"]
    tables = eval_tables(found)
    return {
        "id": name, "title": study.name, "finding": eval_finding(found), "failures": [],
        "figures": _figures(shown, name), "answers": [], "asked": asked,
        "tables": [(table, download(table.csv()), f"{table.key}-{i}-{name}.csv")
                   for i, table in enumerate(tables)],
    }  # fmt: skip


def render(studies: Sequence[StudyRecord], curves: Sequence[Softening] = ()) -> str:
    """The page as text."""
    found = groups(_grids(studies))
    several = len(studies) > 1
    parts = [
        _part(group, name, f"{group.study}: {group.title}" if several else group.title)
        for name, group in zip(group_ids(found), found, strict=True)
    ]
    for i, study in enumerate([s for s in studies if s.evaluated is not None], 1):
        assert study.evaluated is not None
        parts.append(_eval_part(study, study.evaluated, f"eval-{i}"))
    for i, curve in enumerate(curves, 1):
        table = soften_table(curve)
        parts.append({
            "id": f"soften-{i}", "title": soften_title(curve),
            "finding": "", "figures": _figures([soften_panel(curve)], f"{i}"),
            "tables": [(table, download(table.csv()), f"{table.key}-soften-{i}.csv")],
            "failures": [], "answers": [],
        })  # fmt: skip
    runs = [run for study in studies for run in study.runs]
    grids = _grids(studies)
    kinds = [f"{len(grids)} studies" if len(grids) > 1 else "study"] if grids else []
    count = f"{sum(len(study.runs) for study in grids)} runs"
    kinds = [*kinds, count] if grids else ["eval"] * bool(studies)
    vega: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return page_of(
        [vega, asset("page.js")],
        title=", ".join(study.name for study in studies) or parts[0]["title"],
        kicker=" · ".join(["retain report", *kinds, *_once([_days(runs)])]),
        descriptions=_once(study.description for study in studies),
        claims=[claim for study in studies for claim in study.claims],
        claims_line=claims_line([claim for study in studies for claim in study.claims]),
        parts=parts,
        made=made(studies) if runs else [],
        refused=refused(studies),
    )  # fmt: skip


def page_of(scripts: Sequence[str], **told: Any) -> str:
    """The page's template, filled with what it names; no other scripts run in it."""
    environment = Environment(
        loader=DictLoader({"page": asset("page.html.j2")}), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["short"] = short
    return environment.get_template("page").render(
        style=Markup(asset("style.css")),
        scripts=[(Markup(code), b64encode(hashlib.sha256(code.encode()).digest()).decode())
                 for code in scripts],
        **told,
    )  # fmt: skip


def section(group: Group, head: str, title: str) -> list[str]:
    """The finding, the tables and the failures of a group as paragraphs of Markdown.

    `head` is the first; a table's title goes where `title` has ``{}``.
    """
    out = [head, finding(group)]
    for table in study_tables(group):
        out += [title.format(table.title), table.markdown().rstrip(), f"{table.about}."]
    if failed := failures(group):
        out += [title.format("Failed runs"), "\n".join(f"- {line}" for line in failed)]
    return out


def markdown(studies: Sequence[StudyRecord], curves: Sequence[Softening] = ()) -> str:
    """All tables in Markdown, a heading each, and the mark of a report."""
    out = []
    for group in groups(_grids(studies)):
        out += section(group, f"## {group.study}: {group.title}", "### {}")
    for study in studies:
        if (found := study.evaluated) is not None:
            out += [f"## {study.name}", eval_finding(found)]
            for table in eval_tables(found):
                out += [f"### {table.title}", table.markdown().rstrip(), f"{table.about}."]
    for curve in curves:
        table = soften_table(curve)
        out += [f"## {soften_title(curve)}", table.markdown().rstrip(), f"{table.about}."]
    if skipped := refused(studies):
        out += ["## Not run", "\n".join(f"- {line}" for line in skipped)]
    return "\n\n".join([*out, f"<!-- {MARK} -->"]) + "\n"


def latex(studies: Sequence[StudyRecord], curves: Sequence[Softening] = ()) -> str:
    """All tables in LaTeX, which need the package booktabs, and the mark of a report."""
    found = groups(_grids(studies))
    out = ["% Needs \\usepackage{booktabs}.\n"]
    for name, group in zip(group_ids(found), found, strict=True):
        out += [table.latex(f"{table.key}-{name}") for table in study_tables(group)]
    for i, one in enumerate(_evals(studies), 1):
        out += [table.latex(f"{table.key}-eval-{i}") for table in eval_tables(one)]
    for i, table in enumerate(map(soften_table, curves), 1):
        out.append(table.latex(f"{table.key}-soften-{i}"))
    return "\n".join([*out, f"% {MARK}\n"])
