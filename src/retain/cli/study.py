"""``retain study``: a grid of runs from one YAML file, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from pydantic import Field
from typer.core import TyperGroup

from retain.cli.compare import EXAMPLE as COMPARE
from retain.cli.compare import compared
from retain.cli.options import Screen, command, quieten
from retain.config import Options
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


class StatusConfig(Options):
    """Settings of ``retain study status``."""

    study: Path = Field(description="The study's YAML file")
    out: Path | None = Field(None, description="Folder of the results; runs/NAME by default")
    limit: int | None = Field(None, ge=1, description="At most so many train and test rows a task")
    seeds: str | None = Field(None, description="Runs of these in place of the study's: 0,1,2")


class RunsConfig(StatusConfig):
    """Settings of ``retain study run``."""

    data_dir: Path | None = Field(None, description="Local copies of the data; else from the hub")
    engine: str = Field("local", description="local, or ray (an extra)")
    jobs: int = Field(1, ge=1, description="Runs at a time")
    threads: int | None = Field(None, ge=1, description="Processor threads of a run")
    only: str | None = Field(None, description="Runs whose title holds this; * is anything")
    retry_failed: bool = Field(False, description="Do failed runs again")
    known: Path | None = Field(
        None, description="A study.json from elsewhere; its finished runs count as done"
    )


@app.command("run", epilog=EXAMPLE)
@command(RunsConfig, "study")
def run(config: RunsConfig, screen: Screen) -> None:
    """Do the runs that are not done yet; exit code 1 where one failed.

    It may be stopped, killed and started again.
    """
    spec, work = _open(config, config.data_dir)
    check_folder(work.out)
    check_study(work.out, spec.name)
    from dataclasses import replace

    from retain.provenance import cores
    from retain.study.engines import check_engine
    from retain.study.grid import expand
    from retain.study.spec import read_study
    from retain.study.studies import left_out, run_study, take_known

    check_engine(config.engine)
    if spec.general is not None:
        from retain.evaluation.general import check_general

        check_general(spec.general.tasks, work.data_dir)
    threads = config.threads or (max(1, (cores() or 1) // config.jobs) if config.jobs > 1 else None)
    work = replace(work, retry_failed=config.retry_failed, threads=threads)
    grid = expand(spec, work.base)
    if config.seeds is not None:
        asked = {run.key for run in grid.runs}
        whole = expand(read_study(config.study, limit=config.limit), work.base)
        grid.others = [run for run in whole.runs if run.key not in asked]
    _say_skipped(grid.skipped, screen)
    if count := left_out(grid, work):
        screen.say(
            f"finished runs of other settings, which leave study.json: {count}; "
            f"their records stay in {work.out / 'runs'}"
        )
    if config.known is not None:
        screen.say(f"{take_known(config.known, grid, work)} finished runs are from {config.known}")
    kept = f"what is done is kept in {work.out}; the same command goes on after the last finished"
    with (
        interruption(f"{kept} task"),
        _progress(screen, len(grid.matching(config.only))) as (say, tell),
    ):
        counts = run_study(
            spec, grid, work, only=config.only, engine=config.engine, jobs=config.jobs, say=say,
            tell=tell,
        )  # fmt: skip
    lines = [[name, str(counts[name])] for name in ("done", "failed", "unfinished", "elsewhere")]
    screen.table(f"study {spec.name}", ["runs", ""], lines)
    if counts["failed"]:
        screen.say(f"why: retain study status {config.study} --out {work.out}")
    if counts["unfinished"]:
        screen.say("the machine lacked something: the same command tries unfinished runs again")
    screen.say(f"results: {work.out / 'study.json'}")
    screen.emit({"study": spec.name, "results": work.out / "study.json", **counts})
    if counts["failed"]:
        raise typer.Exit(1)


@app.command("status", epilog="Example: retain study status STUDY.yaml --out runs/four")
@command(StatusConfig, "study")
def status(config: StatusConfig, screen: Screen) -> None:
    """Say which runs are done, running, failed (and why) and left."""
    spec, work = _open(config, None)
    from retain.study.grid import expand
    from retain.study.studies import study_status

    found = study_status(expand(spec, work.base), work)
    names = ("running", "started", "failed", "left", "skipped")
    rows = [["done", f"{found['done']} of {found['total']}"]]
    rows += [[name, str(len(found[name]))] for name in names]
    screen.table(f"study {spec.name}", ["runs", ""], rows)
    for name in ("running", "started"):
        for entry in found[name]:
            screen.say(f"{name}: {entry['run']}: {entry['tasks_done']} of {entry['tasks']} tasks")
    for entry in found["failed"]:
        screen.say(f"failed: {entry['run']}: {entry['error']}")
    _say_skipped(found["skipped"], screen)
    screen.emit(found)


app.command("compare", epilog=COMPARE)(compared)


def _say_skipped(found: Any, screen: Screen) -> None:
    for entry in found:
        screen.say(f"skipped: {entry['adapter']} with {entry['method']}: {entry['reason']}")


def _open(config: StatusConfig, data: Path | None) -> Any:
    """The study and where it works."""
    from retain.study.spec import read_study

    seeds = None
    if config.seeds is not None:
        parts = [part.strip() for part in config.seeds.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise ConfigError(
                "the seeds are not accepted",
                got=repr(config.seeds),
                allowed="whole numbers of 0 or more, with commas",
                fix="--seeds 0,1,2",
            )
        seeds = list(map(int, parts))
    spec = read_study(config.study, limit=config.limit, seeds=seeds)
    if data is not None and not data.expanduser().is_dir():
        raise ConfigError(
            "no such data folder",
            got=data,
            allowed="a folder that holds the local data",
            fix="check --data-dir",
        )
    quieten(False)
    from retain.study.work import Work

    folder = (config.out or Path("runs") / spec.name).expanduser().absolute()
    data = data and data.expanduser().absolute()
    return spec, Work(spec.name, folder, config.study.expanduser().absolute().parent, data)


@contextmanager
def _progress(
    screen: Screen, total: int
) -> Iterator[tuple[Callable[[str], None], Callable[[Any, Any], None]]]:
    """A bar of runs with what is being done, on a terminal, and a line for each run."""

    def lines(run: Any, outcome: Any) -> list[str]:
        why = f": {outcome.error}" if outcome.error else ""
        notes = [f"{run.title}: {note}" for note in outcome.notes]
        return [f"{outcome.status}: {run.title}{why}", *notes]

    if not screen.progress:

        def told(run: Any, outcome: Any) -> None:
            first, *notes = lines(run, outcome)
            screen.say(first)
            for note in notes:
                screen.note(note)

        yield (lambda text: None), told
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def shown(run: Any, outcome: Any) -> None:
            bar.advance(task)
            bar.console.print("\n".join(lines(run, outcome)), markup=False)

        yield (lambda text: bar.update(task, description=text)), shown
