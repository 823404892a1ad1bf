"""``retain report``: results as a page and as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retain.cli.options import AsJson, Quiet, Screen, check_file
from retain.errors import ConfigError
from retain.runs.folders import check_page

__all__ = ["EXAMPLE", "report"]

EXAMPLE = (
    "Example: retain report runs/demo/result.json --out report.html\n\n"
    "Example: retain report runs/glue runs/sequence --markdown tables.md --latex tables.tex"
)


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="The result.json of retain demo or retain eval; or study.json files, records of "
            "runs, and folders that hold such.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; report.html beside the result.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write a study's tables as Markdown.")
    ] = None,
    latex: Annotated[
        Path | None, typer.Option("--latex", help="Write a study's tables as LaTeX (booktabs).")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make one HTML page with figures and tables from results, without a model."""
    screen = Screen(as_json, quiet)
    given = [path.expanduser() for path in results]
    beside = given[0] / "report.html" if given[0].is_dir() else given[0].with_name("report.html")
    page = check_file(out if out is not None else beside)
    tables = [None if path is None else check_file(path) for path in (markdown, latex)]
    from retain.report.studies.records import RUN, STUDY, schema_of

    of_study = any(path.is_dir() or schema_of(path) in (STUDY, RUN) for path in given)
    if of_study or len(given) > 1:
        from retain.report.studies.page import write_study_report

        check_page(page)
        written = write_study_report(given, page, markdown_file=tables[0], latex_file=tables[1])
    elif any(tables):
        raise ConfigError(
            "tables are written for studies",
            got=given[0],
            allowed="the results of retain study",
            fix="leave --markdown and --latex out; the page of a demo holds its tables",
        )
    else:
        from retain.report.page import write_report

        check_page(page, "tradeoff.png", "training.png")
        written = write_report(given[0], page)
    screen.say("\n".join(map(str, written)))
    screen.emit({"written": written})
