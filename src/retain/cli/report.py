"""``retain report``: results as a page and as tables."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from retain.cli.options import Screen, check_file, command
from retain.config import Options
from retain.runs.folders import check_page

__all__ = ["EXAMPLE", "report"]

EXAMPLE = (
    "Example: retain report runs/demo/result.json --out report.html\n\n"
    "Example: retain report runs/glue runs/sequence --markdown tables.md --pictures images"
)


class ReportConfig(Options):
    """Settings of ``retain report``."""

    results: list[Path] = Field(
        description="What retain study, demo, eval and soften wrote: study.json, result.json and "
        "soften.json files, records of runs, and folders that hold such"
    )
    out: Path | None = Field(None, description="The page; report.html beside the result")
    markdown: Path | None = Field(None, description="Write the tables as Markdown")
    latex: Path | None = Field(None, description="Write the tables as LaTeX (booktabs)")
    pictures: Path | None = Field(None, description="A folder for the figures as PNG and SVG")


@command(ReportConfig, "results")
def report(config: ReportConfig, screen: Screen) -> None:
    """Make one HTML page with figures and tables from results, without a model."""
    given = [path.expanduser() for path in config.results]
    beside = given[0] / "report.html" if given[0].is_dir() else given[0].with_name("report.html")
    page = check_file(config.out or beside)
    markdown, latex = (path and check_file(path) for path in (config.markdown, config.latex))
    check_page(page)
    from retain.report import write_report

    written = write_report(
        given, page, markdown_file=markdown, latex_file=latex, pictures=config.pictures
    )
    screen.say("\n".join(map(str, written)))
    screen.emit({"written": written})
