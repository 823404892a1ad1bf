"""``retain report``: results as a page and as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retain.cli.options import AsJson, Quiet, Screen, check_file
from retain.runs.folders import check_page

__all__ = ["EXAMPLE", "report"]

EXAMPLE = (
    "Example: retain report runs/demo/result.json --out report.html\n\n"
    "Example: retain report runs/glue runs/sequence --markdown tables.md --pictures images"
)


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="What retain study, demo, eval and soften wrote: study.json, result.json and "
            "soften.json files, records of runs, and folders that hold such.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; report.html beside the result.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the tables as Markdown.")
    ] = None,
    latex: Annotated[
        Path | None, typer.Option("--latex", help="Write the tables as LaTeX (booktabs).")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option("--pictures", help="A folder for the figures as PNG and SVG."),
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
    check_page(page)
    from retain.report import write_report

    written = write_report(
        given, page, markdown_file=tables[0], latex_file=tables[1], pictures=pictures
    )
    screen.say("\n".join(map(str, written)))
    screen.emit({"written": written})
