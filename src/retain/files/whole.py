"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retain.files.digests import sync
from retain.files.faults import writing
from retain.files.ours import foreign

__all__ = [
    "check_folder",
    "clear_scratch",
    "first_rank",
    "recover",
    "settle",
    "whole_file",
    "whole_folder",
    "write_json",
]


def first_rank() -> bool:
    """Whether this process writes: the first of those that ``torchrun`` started, or the only."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[Path]:
    """A scratch file beside `path` to write to; it takes that name when the block ends well.

    An older file stays until then, and nothing is left behind when the block fails. The contents
    are on the disk before the name is, so that a power cut leaves the old file or the new one.

    Args:
        path: where the file shall be; where it is a link, what it points at is replaced.
        what: what is written, for the error.

    Raises:
        OutputError: the place cannot be written, or is no plain file.
    """
    scratch = None
    try:
        with writing(what, path):
            place = Path(os.path.realpath(path))
            if place.exists() and not place.is_file():
                raise OSError("not a plain file")
            place.parent.mkdir(parents=True, exist_ok=True)
            # In a folder of its own, so that what a killed process leaves is all in one place.
            folder = tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent)
            scratch = Path(folder) / place.name
            yield scratch
            settle(scratch)
            os.replace(scratch, place)
            sync(place.parent)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch.parent, ignore_errors=True)


@contextmanager
def whole_folder(folder: Path, what: str, ours: Sequence[str] = ()) -> Iterator[Path]:
    """A scratch folder to write to; it takes the place of `folder` when the block ends well.

    Files of others in the older folder go along: what `ours` does not name and the new folder does
    not hold.

    Args:
        folder: where it shall be; where it is a link, what it points at is replaced.
        what: what is written, for the error.
        ours: patterns of the names that an earlier writing may have left.

    Raises:
        OutputError: the place cannot be written, or the disk is full.
    """
    scratch = None
    try:
        with writing(what, folder):
            place = Path(os.path.realpath(folder))
            place.parent.mkdir(parents=True, exist_ok=True)
            recover(place)
            scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
            new, old = scratch / "new", scratch / "old"
            new.mkdir()
            yield new
            for path in foreign(place, ours):
                if not (new / path.name).exists():
                    _second_name(path, new / path.name)
            settle(new)
            if place.exists():
                os.replace(place, old)
            try:
                os.replace(new, place)
            finally:
                if old.exists() and not place.exists():  # whatever broke in, the older one stays
                    os.replace(old, place)
            sync(place.parent)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _second_name(source: Path, target: Path) -> None:
    """The same file, folder or link under a second name; a copy where the disk has no such."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(str(source), str(target))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def settle(path: Path) -> None:
    """Gives a file, or all files of a new folder, the mode of the umask, and waits for the disk.

    Raises:
        OSError: they cannot be written.
    """
    mask = os.umask(0)
    os.umask(mask)
    if not path.is_dir():
        path.chmod(0o666 & ~mask)
        sync(path)
        return
    for part in path.iterdir():
        if part.is_file() and not part.is_symlink() and part.stat().st_nlink == 1:
            part.chmod(0o666 & ~mask)
            sync(part)
    sync(path)


def recover(folder: Path) -> None:
    """Puts back a folder whose writer was killed between moving it aside and the new one in."""
    if not folder.exists():
        for old in folder.parent.glob(f".{glob.escape(folder.name)}-*/old"):
            os.replace(old, folder)
            return


def clear_scratch(path: Path) -> None:
    """Deletes what killed processes have left of writing a `whole_file`.

    Of a `whole_folder` too, once `recover` has been called.
    """
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
    with writing("the output folder", folder, fix="choose another path"):
        while not here.exists():
            if here.is_symlink():
                raise FileNotFoundError(errno.ENOENT, "a link to a place that is not there")
            here = here.parent
        with tempfile.TemporaryFile(dir=here) as file:
            file.write(b"x")
    return folder
