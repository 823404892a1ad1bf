"""``retain report``: a result as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retain.cli.common import AsJson, Quiet, Screen, check_file

__all__ = ["EXAMPLE", "report"]

EXAMPLE = "Example: retain report runs/demo/result.json --out report.html"


def report(
    result: Annotated[
        Path,
        typer.Argument(metavar="RESULT", help="The result.json of retain demo or retain eval."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; report.html beside the result.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make one HTML page and two figures from a result, without a model."""
    screen = Screen(as_json, quiet)
    page = check_file(out if out is not None else result.with_name("report.html"))
    from retain.report.page import write_report

    written = write_report(result.expanduser(), page)
    screen.say("\n".join(map(str, written)))
    screen.emit({"written": written})
