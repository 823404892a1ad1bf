"""What of a folder this package wrote, and what is somebody else's and stays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from retain.documents import read_json
from retain.errors import OutputError

__all__ = ["check_ours", "foreign", "has_schema", "remove_ours"]


def has_schema(path: Path, schema: str) -> bool:
    """Whether a file is JSON with a schema of ours."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("schema") == schema


def check_ours(path: Path, ours: Callable[[Path], bool], what: str, out: Path) -> None:
    """Refuses to write over what this package did not write.

    An empty folder is nobody's.

    Args:
        path: what would be replaced or added to; it need not exist.
        ours: tells whether this package wrote it.
        what: what is to be written there.
        out: the output that was asked for.

    Raises:
        OutputError: it is there, and not ours.
    """
    try:
        if not path.exists() and not path.is_symlink():
            return
        if path.is_dir() and not any(path.iterdir()):
            return
    except OSError as error:
        raise OutputError(
            f"{what} cannot be written",
            got=f"{path}: {error.strerror}",
            allowed="a folder that can be read and written",
            fix="check its permissions, or choose another --out",
        ) from error
    if not ours(path):
        raise OutputError(
            f"{what} would take the place of something that this command did not write",
            got=path,
            allowed=f"a new folder, or one of an earlier {what.partition(' of ')[2] or 'run'}",
            fix=f"move it, or choose another --out than {out}",
        )


def foreign(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """What lies in a folder under names that this package does not give."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if not any(fnmatchcase(p.name, n) for n in patterns))


def remove_ours(folder: Path, patterns: Sequence[str]) -> None:
    """Removes a folder's files of ours, and the folder if nothing else is in it.

    Raises:
        OSError: one of them cannot be removed.
    """
    if not folder.is_dir():
        return
    others = {path.name for path in foreign(folder, patterns)}
    for path in folder.iterdir():
        if path.name not in others and (path.is_symlink() or not path.is_dir()):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
