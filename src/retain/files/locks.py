"""One writer of a folder or a file at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retain.errors import OutputError
from retain.files.faults import writing
from retain.files.whole import first_rank

__all__ = ["LOCK", "locked"]

LOCK = ".retain.lock"
"""The file in a folder that its writer has locked; it goes when the writer ends."""


@contextmanager
def locked(path: Path, *, file: bool = False) -> Iterator[None]:
    """Holds the lock of a folder, which is made where there is none, while the block runs.

    It is the system's lock: that of a process that was killed is free. Under ``torchrun`` the
    first process holds it for all.

    Args:
        path: of the folder, or of the file to write.
        file: it is a file; the lock lies beside it.

    Raises:
        OutputError: another process is writing there, or the folder cannot be written.
    """
    if not first_rank():
        yield
        return
    from filelock import FileLock, Timeout

    folder = path.parent if file else path
    place = folder / (f".{path.name}.lock" if file else LOCK)
    lock = FileLock(place)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing("the lock of the output", place, fix="choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                "another process is writing to this output",
                got=path,
                allowed="one process at a time",
                fix="wait until it has ended, or choose another --out",
            ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # an error of the block is the one to tell
            place.unlink(missing_ok=True)  # who waits for it sees that it has no name, and retries
            for empty in made:
                empty.rmdir()
        lock.release()
