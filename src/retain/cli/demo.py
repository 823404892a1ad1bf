"""``retain demo``: the whole story on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retain.cli.options import AsJson, Quiet, Screen, quieten
from retain.files import check_folder, locked
from retain.runs.folders import check_demo
from retain.runs.messages import interruption

__all__ = ["EXAMPLE", "demo"]

EXAMPLE = "Example: retain demo --quick --out runs/quick"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A short run that shows all stages; its numbers mean nothing."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Teach a small model word problems with and without retention, and compare the two."""
    screen = Screen(as_json, quiet)
    out = check_folder(out)
    quieten(screen.progress)
    kept = f"the stages that are done are kept in {out}; the same command goes on from there"
    with interruption(kept):
        from retain.report.page import write_report
        from retain.study.demo import run_demo

        with locked(out):
            check_demo(out)
            result = run_demo(
                out=out,
                seed=seed,
                quick=quick,
                progress=screen.progress,
                verbose=not (quiet or as_json),
            )
            page = write_report(out / "result.json", out / "report.html")[0]
    claims = [
        [
            str(claim["claim"]),
            "unknown" if claim["value"] is None else f"{claim['value']:.3g}",
            f"{claim['relation']} {claim['bound']:.3g}",
            {True: "holds", False: "does not hold", None: "not measured"}[claim["holds"]],
        ]
        for claim in result["summary"]
    ]
    screen.table("what the demo claims", ["", "measured", "bound", ""], claims)
    if quick:
        screen.say("a quick run: the numbers mean nothing")
    screen.say(f"report: {page}")
    screen.emit({"result": out / "result.json", "report": page, "summary": result["summary"]})
