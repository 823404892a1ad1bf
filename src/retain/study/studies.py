"""Do a study: all runs of its grid that are not done yet, and the file with its tables."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from retain.errors import unknown
from retain.files import check_folder, clear_scratch, first_rank, write_json, writing
from retain.study.engines import ENGINES, check_engine, in_order, in_processes, on_ray
from retain.study.grid import Grid, Run
from retain.study.runner import Outcome, Work, finite, standing
from retain.study.spec import StudySpec
from retain.study.tables import tables, with_intransigence

__all__ = ["STUDY_SCHEMA", "collect", "run_study"]

STUDY_SCHEMA = "retain.study/1"

Tell = Callable[[Run, Outcome], None]


def run_study(
    spec: StudySpec,
    grid: Grid,
    work: Work,
    *,
    only: str | None = None,
    engine: str = "local",
    jobs: int = 1,
    say: Callable[[str], None] | None = None,
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
    wanted = grid.matching(only)
    counts: Counter[str] = Counter()
    by_key = {run.key: run for run in wanted}
    left = []
    for run in wanted:
        record = standing(run.key, run.config, work)
        if record is None:
            left.append(run)
        else:
            counts[record["status"]] += 1
            counts["before"] += 1
    for outcome in _outcomes(left, work, engine, jobs, say):
        counts[outcome.status] += 1
        counts["before"] += not outcome.fresh and outcome.status != "elsewhere"
        collect(spec, grid, work)
        if tell is not None:
            tell(by_key[outcome.key], outcome)
    collect(spec, grid, work)
    return {name: counts[name] for name in ("done", "failed", "unfinished", "elsewhere", "before")}


def _outcomes(
    left: list[Run], work: Work, engine: str, jobs: int, say: Callable[[str], None] | None
) -> Iterator[Outcome]:
    if engine == "ray":
        return on_ray(left, work, jobs if jobs > 1 else None)
    if jobs > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return in_processes(left, work, jobs)
    return in_order(left, work, say)


def collect(spec: StudySpec, grid: Grid, work: Work) -> None:
    """Writes ``study.json`` from the records that are there, in the order of the grid.

    Raises:
        OutputError: it cannot be written.
    """
    if not first_rank():
        return
    from filelock import FileLock

    place = work.out / "locks" / "study.lock"
    with writing("the lock of the study", place):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place)
        lock.acquire()
    try:
        clear_scratch(work.out / "study.json")
        write_json(work.out / "study.json", study_file(spec, grid, work))
    finally:
        lock.release()


def study_file(spec: StudySpec, grid: Grid, work: Work) -> dict[str, Any]:
    """What ``study.json`` holds."""
    kept = replace(work, retry_failed=False)  # what failed is shown until it is done
    found = (standing(run.key, run.config, kept) for run in grid.runs)
    records = [record for record in found if record is not None]
    filled = iter(with_intransigence([r for r in records if r["status"] == "done"]))
    whole = [next(filled) if r["status"] == "done" else r for r in records]
    return {
        "schema": STUDY_SCHEMA,
        "name": spec.name,
        "description": spec.description,
        "spec": spec.model_dump(mode="json", exclude_none=True),
        "skipped": grid.skipped,
        "planned": len(grid.runs),
        "runs": finite(whole),
        "tables": finite(tables(records)),
    }
