"""Do a study: all runs of its grid that are not done yet, the file with its tables, its status."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from retain.documents import read_json, sealed
from retain.errors import ConfigError, unknown
from retain.files import check_folder, clear_scratch, first_rank, write_json
from retain.records import STUDY_SCHEMA, RunSpec, StudyRecord, finite
from retain.study.engines import ENGINES, check_engine, in_order, in_processes, on_ray
from retain.study.fits import forget_fits, sharing
from retain.study.grid import Grid
from retain.study.runner import Outcome, Say
from retain.study.spec import StudySpec
from retain.study.tables import judged, tables, with_intransigence
from retain.study.work import (
    Work,
    holding,
    read_record,
    read_study_file,
    standing,
    write_shared,
)

__all__ = ["collect", "is_running", "left_out", "run_study", "study_status", "take_known"]

Tell = Callable[[RunSpec, Outcome], None]


def run_study(
    spec: StudySpec,
    grid: Grid,
    work: Work,
    *,
    only: str | None = None,
    engine: str = "local",
    jobs: int = 1,
    say: Say | None = None,
    tell: Tell | None = None,
) -> dict[str, int]:
    """Does the runs that are not done, and writes ``study.json`` after each and at the end.

    Args:
        spec: the study.
        grid: its runs.
        work: where.
        only: a part of the titles of the runs to do.
        engine: ``local`` or ``ray``.
        jobs: runs at a time.
        say: told in a few words what is being done (one job only).
        tell: told of each run that has ended.

    Returns:
        How many runs are ``done``, ``failed``, ``unfinished`` (the machine lacked something; they
        are tried again next time) or ``elsewhere``, and how many were done ``before``.

    Raises:
        ConfigError: an unknown engine, or one that is not installed; nothing matches `only`.
        OutputError: the folder cannot be written.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    check_engine(engine)
    check_folder(work.out)
    by_key = {run.key: run for run in grid.matching(only)}
    before = {key: standing(run, work) for key, run in by_key.items()}
    counts: Counter[str] = Counter(
        record.status for record in before.values() if record is not None
    )
    counts["before"] = counts.total()
    left = [run for key, run in by_key.items() if before[key] is None]
    work, unended = replace(work, shares=sharing(left)), list(left)
    if engine == "ray":
        outcomes = on_ray(left, work, jobs if jobs > 1 else None)
    elif jobs > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        outcomes = in_processes(left, work, jobs)
    else:
        outcomes = in_order(left, work, say)
    for outcome in outcomes:
        counts[outcome.status] += 1
        counts["before"] += not outcome.fresh and outcome.status != "elsewhere"
        collect(spec, grid, work)
        if outcome.status in ("done", "failed"):
            unended.remove(by_key[outcome.key])
            forget_fits(work, by_key[outcome.key], unended)
        if tell is not None:
            tell(by_key[outcome.key], outcome)
    collect(spec, grid, work)
    return {name: counts[name] for name in ("done", "failed", "unfinished", "elsewhere", "before")}


def take_known(path: Path, grid: Grid, work: Work) -> int:
    """Finished runs of another ``study.json`` become this folder's, where they are not done here.

    Under ``torchrun`` each process writes them: none may go on before they are there.

    Returns:
        How many.

    Raises:
        ConfigError: the file is no study's.
        OutputError: the folder cannot be written.
    """
    here = {run.key: read_record(work.record(run.key)) for run in grid.runs}
    wanted = {key for key, record in here.items() if record is None or not record.done}
    taken = [run for run in read_study_file(path).runs if run.done and run.key in wanted]
    for record in taken:
        write_shared(work, work.record(record.key), sealed(record.plain()))
        work.trace(record.key).unlink(missing_ok=True)
    return len(taken)


def left_out(grid: Grid, work: Work) -> int:
    """How many finished runs of the folder's ``study.json`` `collect` will not write again."""
    try:
        before = read_study_file(work.out).runs
    except ConfigError:  # there is none, or it is damaged
        return 0
    keys = {run.key for run in (*grid.runs, *grid.others)}
    return sum(run.done and run.key not in keys for run in before)


def collect(spec: StudySpec, grid: Grid, work: Work) -> None:
    """Writes ``study.json`` from the records that are there, in the order of the grid.

    Those of its other runs, which were not asked for now, come last.

    Raises:
        OutputError: it cannot be written.
    """
    if first_rank():
        path = work.out / "study.json"
        with holding(work.lock("study")):  # around the reading too: the last to write has all
            clear_scratch(path)
            write_json(path, _collected(spec, grid, work).plain())


def _collected(spec: StudySpec, grid: Grid, work: Work) -> StudyRecord:
    kept = replace(work, retry_failed=False)  # what failed is shown until it is done
    there = [standing(run, kept) for run in (*grid.runs, *grid.others)]
    records = [record for record in there if record is not None]
    more = sum(record is not None for record in there[len(grid.runs) :])
    found = tables(records)
    made: dict[str, Any] = {
        "schema": STUDY_SCHEMA,
        "name": spec.name,
        "description": spec.description,
        "spec": spec.model_dump(mode="json", exclude_none=True),
        "skipped": grid.skipped,
        "planned": len(grid.runs) + more,
        "runs": with_intransigence(records),
        "tables": finite(found),
    }
    if spec.claims:
        made["claims"] = judged(spec.claims, found["cells"])
        made["chosen"] = spec.claims[0].method
    return StudyRecord.model_validate(made)


def study_status(grid: Grid, work: Work) -> dict[str, Any]:
    """How far a study has come, from its files.

    Returns:
        ``{"study", "total", "done", "failed": [{"key", "run", "error"}], "running": [{"key",
        "run", "tasks_done", "tasks"}], "started": [the same], "left": [{"key", "run"}],
        "skipped": [{"adapter", "method", "reason"}]}``; ``started`` runs were stopped and go on
        after their last task, ``left`` ones have not begun.
    """
    found: dict[str, Any] = {
        "study": work.study, "total": len(grid.runs), "done": 0, "failed": [], "running": [],
        "started": [], "left": [], "skipped": grid.skipped,
    }  # fmt: skip
    for run in grid.runs:
        entry: dict[str, Any] = {"key": run.key, "run": run.title}
        record = standing(run, work)
        if record is not None and record.done:
            found["done"] += 1
            continue
        count = {"tasks_done": _tasks_done(run, work), "tasks": len(run.order.tasks)}
        if is_running(run, work):
            found["running"].append(entry | count)
        elif record is not None:
            found["failed"].append(entry | {"error": record.error})
        elif count["tasks_done"]:
            found["started"].append(entry | count)
        else:
            found["left"].append(entry)
    return found


def is_running(run: RunSpec, work: Work) -> bool:
    """Whether a living process holds the lock of a run."""
    path = work.lock(run.key)
    if not path.exists():
        return False
    with holding(path, wait=0) as mine:
        return not mine


def _tasks_done(run: RunSpec, work: Work) -> int:
    try:
        return int(read_json(work.state(run.key) / "state.json", sealed=True)["done"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
