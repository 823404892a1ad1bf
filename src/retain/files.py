"""Files that are written whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retain.errors import OutputError

__all__ = ["check_folder", "clear_scratch", "first_rank", "whole_file", "write_json"]


def first_rank() -> bool:
    """Whether this process writes: the first of those that ``torchrun`` started, or the only."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[Path]:
    """A scratch file beside `path` to write to; it takes that name when the block ends well.

    An older file stays until then, and nothing is left behind when the block fails.

    Args:
        path: where the file shall be.
        what: what is written, for the error.

    Raises:
        OutputError: the place cannot be written, or is no plain file.
    """
    scratch = None
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a plain file")
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, so that what a killed process leaves is all in one place.
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)) / path.name
        yield scratch
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o666 & ~mask)
        os.replace(scratch, path)
    except OSError as error:
        raise _unwritable(what, path, error) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch.parent, ignore_errors=True)


def clear_scratch(path: Path) -> None:
    """Deletes what killed processes have left of writing a `whole_file`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}-*"):
        shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole.

    Raises:
        OutputError: the place cannot be written.
    """
    with whole_file(path, "the result") as scratch:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        scratch.write_text(text + "\n", encoding="utf-8")


def check_folder(folder: Path) -> Path:
    """Checks, before any work is done, that files can be put into a folder, which need not exist.

    Raises:
        OutputError: they cannot.
    """
    folder = folder.expanduser()
    here = folder
    try:
        while not here.exists():
            here = here.parent
        with tempfile.TemporaryFile(dir=here) as file:
            file.write(b"x")
    except OSError as error:
        raise _unwritable("the output folder", folder, error) from error
    return folder


def _unwritable(what: str, path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{what} cannot be written",
        got=f"{path}: {error.strerror or error}",
        allowed="a folder that can be written, with room on the disk",
        fix="choose another path",
    )
