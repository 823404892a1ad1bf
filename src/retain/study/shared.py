"""Files that several runs of a study share: one process writes at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retain.documents import sealed
from retain.files import clear_scratch, write_json, writing
from retain.study.runner import Work

__all__ = ["write_shared"]


def write_shared(work: Work, path: Path, value: dict[str, Any]) -> None:
    """Writes sealed JSON, and clears what killed processes have left of writing it.

    Raises:
        OutputError: the place cannot be written.
    """
    from filelock import FileLock

    place = work.out / "locks" / "shared.lock"
    with writing("the lock of the study", place):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place)
        lock.acquire()
    try:
        clear_scratch(path)
        write_json(path, sealed(value))
    finally:
        lock.release()
