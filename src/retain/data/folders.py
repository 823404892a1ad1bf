"""Paths that stay inside the folder that the user names."""

from __future__ import annotations

from pathlib import Path

from retain.errors import SourceError

__all__ = ["inside"]


def inside(folder: Path, below: str | Path, what: str) -> Path:
    """A path below a folder, as a file that somebody else may have written names it.

    Args:
        folder: what the user has named.
        below: relative to it.
        what: names the path, for the error.

    Raises:
        SourceError: it leads out of the folder: by "..", as an absolute path or by a link.
    """
    path = folder / below
    try:
        if "\x00" in str(below):
            raise ValueError("a NUL byte")
        home, real = folder.resolve(), path.resolve()
        path.is_file()  # raises if no file can have such a name
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(
            f"{what} is no path",
            got=f"{str(below)[:80]!r}: {reason}",
            allowed=f"a path below {folder}",
            fix="correct it",
        ) from error
    if real.is_relative_to(home) and not Path(below).is_absolute():
        return path
    raise SourceError(
        f"{what} leads out of the data folder",
        got=f"{str(below)!r}, which is {real}",
        allowed=f"a path below {home}, without links that lead out of it",
        fix=f"name the folder that holds both with --data-dir, or copy the files into {home}",
    )
