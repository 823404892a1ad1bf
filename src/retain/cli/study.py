"""``retain study``: a grid of runs from one YAML file, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from retain.cli.options import AsJson, Quiet, Screen, quieten
from retain.errors import ConfigError, unknown
from retain.files import check_folder
from retain.runs.folders import check_study
from retain.runs.messages import interruption

__all__ = ["EXAMPLE", "app"]

EXAMPLE = "Example: retain study benchmarks/studies/four-task.yaml --out runs/four --data-dir data"


class _Group(TyperGroup):
    """``retain study STUDY.yaml`` is ``retain study run STUDY.yaml``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = args[0] if args else "--help"
        if first not in self.commands and first not in ("-h", "--help"):
            bare = not first.startswith("-") and not Path(first).suffix and "/" not in first
            if bare and not Path(first).exists():
                raise unknown("study command or file", first, self.commands)
            args = ["run", *args]
        return super().parse_args(ctx, args or ["--help"])


app = typer.Typer(
    cls=_Group,
    help="Run a study: a grid of models, adapters, methods, orders of tasks and seeds.",
    epilog=EXAMPLE,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Study = Annotated[Path, typer.Argument(help="The study's YAML file.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the results; runs/NAME by default.")
]
Data = Annotated[
    Path | None, typer.Option("--data-dir", help="Local copies of the data; else from the hub.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="At most so many train and test rows a task.")
]
Seeds = Annotated[
    str | None, typer.Option("--seeds", help="Instead of the study's: 0,1,2.", metavar="0,1,2")
]


@app.command("run", epilog=EXAMPLE)
def run(
    study: Study,
    out: Out = None,
    data_dir: Data = None,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray (an extra).")] = "local",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Processor threads of a run.")
    ] = None,
    limit: Limit = None,
    seeds: Seeds = None,
    only: Annotated[
        str | None, typer.Option("--only", help="Runs whose title holds this; * is anything.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do failed runs again.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Do the runs that are not done yet. It may be stopped, killed and started again."""
    screen = Screen(as_json, quiet)
    spec, work = _open(study, out, data_dir, limit, seeds)
    check_folder(work.out)
    check_study(work.out)
    from dataclasses import replace

    from retain.study.engines import check_engine
    from retain.study.grid import expand
    from retain.study.studies import run_study

    check_engine(engine)
    if spec.general is not None:
        from retain.evaluation.lm_eval import check_tasks

        check_tasks(spec.general.tasks)
    cores = _cores()
    work = replace(
        work,
        retry_failed=retry_failed,
        threads=threads or (max(1, cores // jobs) if jobs > 1 else None),
    )
    grid = expand(spec, work.base)
    for skipped in grid.skipped:
        screen.say(f"skipped: {skipped['adapter']} with {skipped['method']}: {skipped['reason']}")
    kept = (
        f"what is done is kept in {work.out}; the same command goes on after the last finished task"
    )
    with interruption(kept), _progress(screen, len(grid.matching(only))) as (say, tell):
        counts = run_study(
            spec, grid, work, only=only, engine=engine, jobs=jobs, say=say, tell=tell
        )
    lines = [[name, str(counts[name])] for name in ("done", "failed", "unfinished", "elsewhere")]
    screen.table(f"study {spec.name}", ["runs", ""], lines)
    if counts["failed"]:
        screen.say(f"why: retain study status {study} --out {work.out}")
    if counts["unfinished"]:
        screen.say("the machine lacked something: the same command tries unfinished runs again")
    screen.say(f"results: {work.out / 'study.json'}")
    screen.emit({"study": spec.name, "results": work.out / "study.json", **counts})


@app.command("status", epilog="Example: retain study status STUDY.yaml --out runs/four")
def status(
    study: Study,
    out: Out = None,
    limit: Limit = None,
    seeds: Seeds = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say which runs are done, running, failed (and why) and left."""
    screen = Screen(as_json, quiet)
    spec, work = _open(study, out, None, limit, seeds)
    from retain.study.grid import expand
    from retain.study.studies import study_status

    found = study_status(expand(spec, work.base), work)
    rows = [["done", f"{found['done']} of {found['total']}"]]
    rows += [[name, str(len(found[name]))] for name in ("running", "started", "failed", "left")]
    rows += [["skipped", str(len(found["skipped"]))]]
    screen.table(f"study {spec.name}", ["runs", ""], rows)
    for name in ("running", "started"):
        for entry in found[name]:
            screen.say(f"{name}: {entry['run']}: {entry['tasks_done']} of {entry['tasks']} tasks")
    for entry in found["failed"]:
        screen.say(f"failed: {entry['run']}: {entry['error']}")
    for entry in found["skipped"]:
        screen.say(f"skipped: {entry['adapter']} with {entry['method']}: {entry['reason']}")
    screen.emit(found)


def _open(
    study: Path, out: Path | None, data_dir: Path | None, limit: int | None, seeds: str | None
) -> Any:
    """The study and where it works."""
    from retain.study.spec import read_study

    spec = read_study(study, limit=limit, seeds=_numbers(seeds))
    if data_dir is not None and not data_dir.expanduser().is_dir():
        raise ConfigError(
            "no such data folder",
            got=data_dir,
            allowed="a folder that holds the local data",
            fix="check --data-dir",
        )
    quieten(False)
    from retain.study.work import Work

    folder = (out or Path("runs") / spec.name).expanduser().absolute()
    data = data_dir and data_dir.expanduser().absolute()
    return spec, Work(spec.name, folder, study.expanduser().absolute().parent, data)


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(
            "the seeds are not accepted",
            got=repr(text),
            allowed="whole numbers of 0 or more, with commas",
            fix="--seeds 0,1,2",
        )
    return [int(part) for part in parts]


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _progress(
    screen: Screen, total: int
) -> Iterator[tuple[Callable[[str], None], Callable[[Any, Any], None]]]:
    """A bar of runs with what is being done, on a terminal; else a line for each run."""
    if not screen.progress:

        def line(run: Any, outcome: Any) -> None:
            why = f": {outcome.error}" if outcome.error else ""
            screen.say(f"{outcome.status}: {run.title}{why}")
            for note in outcome.notes:
                screen.note(f"{run.title}: {note}")

        yield (lambda text: None), line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def told(run: Any, outcome: Any) -> None:
            bar.advance(task)
            why = f": {outcome.error}" if outcome.error else ""
            bar.console.print(f"{outcome.status}: {run.title}{why}", markup=False)
            for note in outcome.notes:
                bar.console.print(f"{run.title}: {note}", markup=False)

        yield (lambda text: bar.update(task, description=text)), told
