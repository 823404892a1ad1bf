"""``retain demo``: the whole story on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retain.cli.options import AsJson, Quiet, Screen, quieten
from retain.files import check_folder, locked
from retain.records import General, StudyRecord
from retain.runs.folders import check_demo
from retain.runs.messages import interruption

__all__ = ["EXAMPLE", "demo"]

KNOWN = "knowledge"

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
    kept = f"what is done is kept in {out}; the same command goes on from there"
    with interruption(kept):
        from retain.report import write_report
        from retain.study.demo import run_demo

        with locked(out):
            check_demo(out)
            study = run_demo(
                out=out, seed=seed, quick=quick, progress=screen.progress, say=screen.say
            )
            page = write_report([out / "study.json"], out / "report.html")[0]
    _show(screen, study)
    if quick:
        screen.say("a quick run: the numbers mean nothing")
    screen.say(f"report: {page}; again, with changes: retain study {out / 'study.yaml'}")
    claims = [claim.plain() for claim in study.claims]
    screen.emit({"result": out / "study.json", "report": page, "summary": claims})


def _show(screen: Screen, study: StudyRecord) -> None:
    """What the base, plain LoRA and retention can do, an answer of each, and the claims."""
    done = [run for run in study.runs if run.done]
    rows, answers = [], []
    for number, run in enumerate(done):
        general = run.general or General()
        told = run.generations[0] if run.generations else None
        if not number:
            rows.append(
                ["base model", _share(run.before[0]), "0", _share(general.before.get(KNOWN))]
            )
            answers += [["base model", told.before or ""]] if told else []
        name = "plain LoRA" if run.config.method.kind == "none" else "LoRA + retention"
        last = run.retention[-1].kl if run.retention else None
        kl = "" if last is None else f"{last:.3f}"
        rows.append([name, _share(run.matrix[-1][0]), kl, _share(general.after.get(KNOWN))])
        answers += [[name, told.text or ""]] if told else []
    heads = ["", "new word problems", "KL to the base, nats", "common knowledge"]
    screen.table("one model, taught word problems twice", heads, rows)
    if answers:
        lines = [[name, " ".join(text.split())[:72]] for name, text in answers]
        screen.table(f"asked: {done[0].generations[0].prompt}", ["", "answer"], lines)
    claims = [
        [
            claim.claim,
            "unknown" if claim.value is None else f"{claim.value:.3g}",
            f"{claim.relation} {claim.bound:.3g}",
            {True: "holds", False: "does not hold", None: "not measured"}[claim.holds],
        ]
        for claim in study.claims
    ]
    screen.table("what the demo claims", ["", "measured", "bound", ""], claims)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
