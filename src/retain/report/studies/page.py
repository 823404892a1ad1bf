"""The page of one or several studies: one self-contained HTML file."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from retain.files import whole_file
from retain.report.studies.cells import groups
from retain.report.studies.finding import finding
from retain.report.studies.payload import group_ids, payload
from retain.report.studies.records import Run, Study, read_studies
from retain.report.studies.tables import failures, study_tables

__all__ = ["latex", "made", "markdown", "refused", "render_study", "write_study_report"]

_SCRIPTS = ("core.js", "tools.js", "tradeoff.js", "sequence.js", "matrix.js", "main.js")


def write_study_report(
    results: Sequence[Path],
    page: Path,
    *,
    markdown_file: Path | None = None,
    latex_file: Path | None = None,
) -> list[Path]:
    """Write the page and, where asked, the tables as Markdown and LaTeX.

    Args:
        results: study files, records of runs, or folders that hold such.
        page: where the HTML goes.
        markdown_file: where the tables go as Markdown.
        latex_file: where the tables go as LaTeX.

    Returns:
        The paths that were written.

    Raises:
        SourceError: a result cannot be read.
        OutputError: a file cannot be written.
    """
    studies = read_studies(results)
    files = {page: render_study(studies)}
    if markdown_file is not None:
        files[markdown_file] = markdown(studies)
    if latex_file is not None:
        files[latex_file] = latex(studies)
    for path, text in files.items():
        with whole_file(path, "the report") as scratch:
            scratch.write_text(text, encoding="utf-8")
    return list(files)


def _once(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _hardware(run: Run) -> str | None:
    box = run.hardware
    if box is None:
        return None
    memory = None if box.memory_gib is None else f"{box.memory_gib:g} GiB memory"
    cores = None if box.cores is None else f"{box.cores} cores"
    return ", ".join(p for p in (box.cpu, cores, memory, box.accelerator or "no GPU") if p)


def _days(runs: Sequence[Run]) -> str:
    days = sorted({run.created[:10] for run in runs if run.created})
    return " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""


def made(studies: Sequence[Study]) -> list[tuple[str, str]]:
    """How the runs were made, as name and value; what is not known is left out."""
    runs = [run for study in studies for run in study.runs]
    done = sum(run.done for run in runs)
    left = sum(max(0, (study.planned or 0) - len(study.runs)) for study in studies)
    seeds = sorted({run.config.seed for run in runs if run.config.seed is not None})
    versions = _once(", ".join(f"{k} {v}" for k, v in r.versions.items() if v) for r in runs)
    models = [f"{r.config.model}, {r.config.dtype}" if r.config.dtype else r.config.model
              for r in runs]  # fmt: skip
    facts = [
        ("Models", "; ".join(_once(models))),
        (
            "Runs",
            f"{done} done, {len(runs) - done} failed" + (f", {left} not yet run" if left else ""),
        ),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Hardware", "; ".join(_once(map(_hardware, runs)))),
        ("Versions", "; ".join(versions)),
        ("Commit", ", ".join(_once(run.commit for run in runs))),
        ("Created", _days(runs)),
    ]
    return [(name, value) for name, value in facts if value]


def refused(studies: Sequence[Study]) -> list[str]:
    """One line for each combination that was not run because its method refuses it."""
    several = len(studies) > 1
    return [
        (f"{study.name}: " if several else "")
        + f"{skip.method} on {skip.adapter}: {skip.reason or 'no reason recorded'}"
        for study in studies
        for skip in study.skipped
    ]


def _download(text: str) -> str:
    return "data:text/csv;charset=utf-8;base64," + b64encode(text.encode()).decode()


def _kicker(studies: Sequence[Study]) -> str:
    runs = [run for study in studies for run in study.runs]
    day = _days(runs)
    count = f"{len(studies)} studies" if len(studies) > 1 else "study"
    return " · ".join(["retain report", count, f"{len(runs)} runs", *([day] if day else [])])


def render_study(studies: Sequence[Study]) -> str:
    """The page as text."""
    package = resources.files("retain.report")
    assets = package.joinpath("studies").joinpath("assets")
    page = assets.joinpath("page.html.j2").read_text(encoding="utf-8")
    style = "".join(
        place.joinpath(name).read_text(encoding="utf-8")
        for place, name in ((package, "style.css"), (assets, "study.css"))
    )
    code = "".join(assets.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f"\n(() => {{\n{code}}})();\n"
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=DictLoader({"page": page}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = groups(studies)
    ids = group_ids(found)
    several = len({group.study for group in found}) > 1
    parts = [
        {
            "id": name,
            "title": f"{group.study}: {group.title}" if several else group.title,
            "finding": finding(group),
            "failures": failures(group),
            "tables": [
                {"table": table, "csv": _download(table.csv()), "file": f"{table.key}-{name}.csv"}
                for table in study_tables(group)
            ],
        }
        for name, group in zip(ids, found, strict=True)
    ]
    return environment.get_template("page").render(
        title=", ".join(study.name for study in studies),
        kicker=_kicker(studies),
        descriptions=_once(study.description for study in studies),
        groups=parts,
        made=made(studies),
        refused=refused(studies),
        style=Markup(style),
        script=Markup(script),
        digest=digest,
        data=Markup(payload(found)),
    )


def markdown(studies: Sequence[Study]) -> str:
    """All tables in Markdown, a heading each."""
    out = []
    for group in groups(studies):
        out += [f"## {group.study}: {group.title}", finding(group)]
        for table in study_tables(group):
            out += [f"### {table.title}", table.markdown().rstrip(), f"{table.about}."]
        failed = failures(group)
        if failed:
            out += ["### Failed runs", "\n".join(f"- {line}" for line in failed)]
    if skipped := refused(studies):
        out += ["## Not run", "\n".join(f"- {line}" for line in skipped)]
    return "\n\n".join(out) + "\n"


def latex(studies: Sequence[Study]) -> str:
    """All tables in LaTeX; they need the package booktabs."""
    found = groups(studies)
    out = ["% Needs \\usepackage{booktabs}.\n"]
    for name, group in zip(group_ids(found), found, strict=True):
        out += [table.latex(f"{table.key}-{name}") for table in study_tables(group)]
    return "\n".join(out)
