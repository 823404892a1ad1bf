"""``retain demo``: the whole story on one machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from retain.cli.options import Screen, command, quieten
from retain.config import Options
from retain.files import check_folder, locked
from retain.records import General, StudyRecord
from retain.runs.folders import check_demo
from retain.runs.messages import interruption

__all__ = ["EXAMPLE", "demo"]

KNOWN = "knowledge"

EXAMPLE = "Example: retain demo --quick --out runs/quick"


class DemoConfig(Options):
    """Settings of ``retain demo``."""

    out: Path = Field(Path("runs/demo"), description="Folder of the results")
    seed: int = Field(0, ge=0, description="Seed of everything")
    quick: bool = Field(
        False, description="A short run that shows all stages; its numbers mean nothing"
    )


@command(DemoConfig)
def demo(config: DemoConfig, screen: Screen) -> None:
    """Teach a small model word problems with and without retention, and compare the two."""
    out = check_folder(config.out)
    quieten(screen.progress)
    kept = f"what is done is kept in {out}; the same command goes on from there"
    with interruption(kept):
        from retain.report import write_report
        from retain.study.demo import run_demo

        with locked(out):
            check_demo(out)
            study = run_demo(
                out=out, seed=config.seed, quick=config.quick, progress=screen.progress,
                say=screen.say,
            )  # fmt: skip
            page = write_report([out / "study.json"], out / "report.html")[0]
    _show(screen, study)
    if config.quick:
        screen.say("a quick run: the numbers mean nothing")
    screen.say(f"report: {page}; again, with changes: retain study {out / 'study.yaml'}")
    claims = [claim.plain() for claim in study.claims]
    screen.emit({"result": out / "study.json", "report": page, "summary": claims})


def _show(screen: Screen, study: StudyRecord) -> None:
    """What the base, plain LoRA and retention can do, answers of each, and the claims."""
    done = [run for run in study.runs if run.done]
    rows: list[list[str]] = []
    answers: dict[str, list[list[str]]] = {}
    for number, run in enumerate(done):
        general = run.general or General()
        if not number:
            rows.append(
                ["base model", _share(run.before[0]), "0", _share(general.before.get(KNOWN))]
            )
            answers = {g.prompt: [["base model", g.before or ""]] for g in run.generations}
        name = "plain LoRA" if run.config.method.kind == "none" else "LoRA + retention"
        last = run.retention[-1].kl if run.retention else None
        kl = "" if last is None else f"{last:.3f}"
        rows.append([name, _share(run.matrix[-1][0]), kl, _share(general.after.get(KNOWN))])
        for told in run.generations:
            answers[told.prompt].append([name, told.text or ""])
    heads = ["", "new word problems", "KL to the base, nats", "common knowledge"]
    screen.table("one model, taught word problems twice", heads, rows)
    for prompt, given in answers.items():
        lines = [[name, " ".join(text.split())[:72]] for name, text in given]
        screen.table(f"asked: {prompt}", ["", "answer"], lines)
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
