"""Files and folders of results: whole or not at all, ours or refused, one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from retain.documents import read_json
from retain.errors import OutputError

__all__ = [
    "LOCK", "check_folder", "check_ours", "clear_scratch", "file_digest", "first_rank", "foreign",
    "has_schema", "locked", "recover", "remove_ours", "sync", "to_disk", "whole_file",
    "whole_files", "whole_folder", "why_unwritable", "write_json", "write_record", "writing",
]  # fmt: skip

LOCK = ".retain.lock"
"""The file in a folder that its writer has locked; it goes when the writer ends."""

_MARK = ".retain-"
"""In the name of a scratch folder, before what `tempfile` draws."""

_DRAWN = "[a-z0-9_]" * 8

_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error", "basic_ios")
_SIGNS = (  # of torch's and safetensors' writers, which raise no OSError
    "No space left", "File too large", "Disk quota", "Read-only file system", "Input/output error",
    "os error", "cannot be opened",
)  # fmt: skip


def first_rank() -> bool:
    """Whether this process writes: the first of those that ``torchrun`` started, or the only."""
    return int(os.environ.get("RANK", "0")) == 0


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits; OSError for a pipe, which would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why_unwritable(error: BaseException) -> str | None:
    """What the system said of a file that could not be written or read; None for other errors."""
    text = str(error).strip().partition("\n")[0][:160]
    if isinstance(error, OSError):
        return error.strerror or text or type(error).__name__
    if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        if any(sign in text for sign in _TORCH) and "Reader" not in text:
            return "not all of it could be written, as on a full disk"  # torch tells of its code
        return text if any(sign in str(error) for sign in (*_SIGNS, *_TORCH)) else None
    return None


@contextmanager
def writing(
    what: str, path: Path, *, fix: str = "free some disk, or choose another path"
) -> Iterator[None]:
    """Turns whatever a full or broken disk makes of its block into one `OutputError`."""
    try:
        yield
    except Exception as error:
        reason = why_unwritable(error)
        if reason is None:
            raise
        raise OutputError(
            f"{what} cannot be written",
            got=f"{path}: {reason}",
            allowed="a folder that can be written, with room on the disk",
            fix=fix,
        ) from error


# --- whole or not at all


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[Path]:
    """A scratch file beside `path` to write to; it takes that name when the block ends well.

    An older file stays until then, and nothing is left behind when the block fails. The contents
    are on the disk before the name is, so that a power cut leaves the old file or the new one. The
    new one has the older one's mode.

    Args:
        path: where the file shall be; where it is a link, what it points at is replaced.
        what: what is written, for the error.

    Raises:
        OutputError: the place cannot be written, or is no plain file.
    """
    with _scratch(path, what) as (place, scratch):
        if place.exists() and not place.is_file():
            raise OSError("not a plain file")
        yield scratch / place.name
        to_disk(scratch / place.name)
        _replace(scratch / place.name, place)
        sync(place.parent)


@contextmanager
def whole_files(folder: Path, what: str, last: str) -> Iterator[Path]:
    """A scratch folder to write to; its files go to `folder` when the block ends well.

    A new folder comes whole. To one that is there, whoever else writes in it, they go one by one;
    its other files are not touched. Where the file `last` is another than before, the old one goes
    before the others come and the new one comes after them: what a kill leaves between is without
    it, and never half of the one set and half of the other.

    Args:
        folder: where they shall be.
        what: what is written, for the error.
        last: the name of the file without which the others are nothing.

    Raises:
        OutputError: the place cannot be written, or the disk is full.
    """
    if not folder.is_dir():
        with whole_folder(folder, what) as new:
            yield new
        return
    with _scratch(folder, what, inside=True) as (place, new):
        yield new
        to_disk(new)
        files = sorted(new.iterdir(), key=lambda path: path.name == last)
        then, now = place / last, new / last
        if then.is_file() and then.read_bytes() != now.read_bytes():
            now.chmod(stat.S_IMODE(then.stat().st_mode))
            then.unlink()
            sync(place)
        for path in files:
            _replace(path, place / path.name)
        sync(place)


def _replace(new: Path, old: Path) -> None:
    """Puts a file in the place of another, with its mode."""
    if old.is_file():
        new.chmod(stat.S_IMODE(old.stat().st_mode))
    os.replace(new, old)


@contextmanager
def whole_folder(folder: Path, what: str, ours: Sequence[str] = ()) -> Iterator[Path]:
    """A scratch folder to write to; it takes the place of `folder` when the block ends well.

    Files of others in the older folder go along: what `ours` does not name and the new folder does
    not hold. What killed processes have left there does not.

    Args:
        folder: where it shall be; where it is a link, what it points at is replaced.
        what: what is written, for the error.
        ours: patterns of the names that an earlier writing may have left.

    Raises:
        OutputError: the place cannot be written, or the disk is full.
    """
    with _scratch(folder, what) as (place, scratch):
        recover(place)
        if place.exists() and not place.is_dir():
            raise OSError("not a folder")
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        for path in foreign(place, ours):
            if not (new / path.name).exists() and not fnmatchcase(path.name, f".?*{_MARK}{_DRAWN}"):
                _second_name(path, new / path.name)
        to_disk(new)
        if place.exists():
            new.chmod(stat.S_IMODE(place.stat().st_mode))
            os.replace(place, old)
        try:
            os.replace(new, place)
        finally:
            if old.exists() and not place.exists():  # whatever broke in, the older one stays
                os.replace(old, place)
        sync(place.parent)


@contextmanager
def _scratch(path: Path, what: str, inside: bool = False) -> Iterator[tuple[Path, Path]]:
    """Where a path really is, and a scratch folder beside or in it, which is removed at the end."""
    scratch = None
    try:
        with writing(what, path):
            place = Path(os.path.realpath(path))
            around = place if inside else place.parent
            around.mkdir(parents=True, exist_ok=True)
            # In a folder of its own, so that what a killed process leaves is all in one place.
            scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}{_MARK}", dir=around))
            yield place, scratch
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _second_name(source: Path, target: Path) -> None:
    """The same file, folder or link under a second name; a copy where the disk has no such."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new, follow_symlinks=False)
        except OSError:
            shutil.copy2(old, new, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(str(source), str(target))


def to_disk(path: Path) -> None:
    """Gives a file, or all files of a new folder, the mode of the umask, and waits for the disk.

    Raises:
        OSError: they cannot be written.
    """
    mask = os.umask(0)
    os.umask(mask)
    for part in path.iterdir() if path.is_dir() else [path]:
        if part.is_file() and not part.is_symlink() and part.stat().st_nlink == 1:
            part.chmod(0o666 & ~mask)
            sync(part)
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk.

    A rename is safe from a power cut only when what is renamed was written before, and the folder
    after. A file system that cannot do it for a folder is left alone.

    Raises:
        OSError: a file's contents cannot be written.
    """
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def recover(folder: Path) -> None:
    """Puts back a folder whose writer was killed between moving it aside and the new one in."""
    place = Path(os.path.realpath(folder))
    if not place.exists():
        for old in (left / "old" for left in _left(place)):
            if old.is_dir():
                os.replace(old, place)
                return


def clear_scratch(path: Path) -> None:
    """Deletes what killed processes have left of writing a `whole_file`.

    Of a `whole_folder` or `whole_files` too, once `recover` has been called. What others have
    called alike stays.
    """
    for left in _left(Path(os.path.realpath(path))):
        shutil.rmtree(left, ignore_errors=True)


def _left(place: Path) -> list[Path]:
    """Scratch folders that are left of a place, beside it and (of `whole_files`) in it."""
    pattern = f".{glob.escape(place.name)}{_MARK}{_DRAWN}"
    return [*place.parent.glob(pattern), *place.glob(pattern)]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole.

    Raises:
        OutputError: the place cannot be written.
    """
    with whole_file(path, "the result") as scratch:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        scratch.write_text(text + "\n", encoding="utf-8")


def write_record(path: Path, value: Any) -> None:
    """Writes JSON, whole, while no other process does, and clears what a killed one has left.

    Raises:
        OutputError: the place cannot be written, or is in use.
    """
    with locked(path, file=True):
        clear_scratch(path)
        write_json(path, value)


def check_folder(folder: Path) -> Path:
    """Checks that files can be put into a folder, before any work is done; `OutputError` if not.

    It need not exist.
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


# --- ours, or somebody else's


def has_schema(path: Path, schema: str) -> bool:
    """Whether a file is JSON with a schema of ours."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("schema") == schema


def check_ours(
    path: Path, ours: Callable[[Path], bool], what: str, out: Path, option: str = "--out"
) -> None:
    """Refuses to write over what this package did not write; an empty folder is nobody's.

    Args:
        path: what would be replaced or added to; it need not exist.
        ours: tells whether this package wrote it.
        what: what is to be written there.
        out: the output that was asked for.
        option: with which it was.

    Raises:
        OutputError: it is there, and not ours.
    """
    with writing(what, path, fix=f"check its permissions, or choose another {option}"):
        if not path.exists() and not path.is_symlink():
            return
        if path.is_dir() and not any(path.iterdir()):
            return
    if not ours(path):
        raise OutputError(
            f"{what} would take the place of something that this command did not write",
            got=path,
            allowed="a new folder, or one that the same command has written",
            fix=f"move it, or choose another {option} than {out}",
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
    others = set(foreign(folder, patterns))
    for path in folder.iterdir():
        if path not in others and (path.is_symlink() or not path.is_dir()):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


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
