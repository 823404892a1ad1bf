"""How far a study has come, from its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retain.documents import read_json
from retain.study.grid import Grid, Run
from retain.study.runner import Work, standing

__all__ = ["is_running", "study_status"]


def study_status(grid: Grid, work: Work) -> dict[str, Any]:
    """Counts, and what is running, has failed and is left.

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
        record = standing(run.key, run.config, work)
        if record is not None and record["status"] == "done":
            found["done"] += 1
            continue
        count = {"tasks_done": _tasks_done(run, work), "tasks": len(run.config["order"]["tasks"])}
        if is_running(run, work):
            found["running"].append(entry | count)
        elif record is not None:
            found["failed"].append(entry | {"error": record["error"]})
        elif count["tasks_done"]:
            found["started"].append(entry | count)
        else:
            found["left"].append(entry)
    return found


def is_running(run: Run, work: Work) -> bool:
    """Whether a living process holds the lock of a run."""
    path = work.lock(run.key)
    if not path.exists():
        return False
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _tasks_done(run: Run, work: Work) -> int:
    try:
        note: Mapping[str, Any] = read_json(work.state(run.key) / "state.json", sealed=True)
        return int(note["done"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
