"""Where a study works: its files, what several processes share, and which records stand."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retain.data.loading import inside, local_file
from retain.documents import read_json
from retain.errors import ConfigError, RetainError
from retain.files import clear_scratch, file_digest, write_json, writing
from retain.records import RUN_SCHEMA, RunRecord, RunSource, RunSpec, StudyRecord
from retain.retention.method import Method
from retain.retention.registry import METHODS
from retain.study.grid import task_at

__all__ = [
    "RunFunction", "Work", "changed_inputs", "holding", "input_digests", "method_digest",
    "model_digest", "read_record", "read_shared", "read_study_file", "source_file", "standing",
    "write_shared",
]  # fmt: skip

RunFunction = Callable[..., dict[str, Any]]
"""``(run, *, state, work, say) -> body of the record``; `retain.study.sequence` has it."""

_PIECES, _PIECE = 64, 4096
"""Of a large file of weights so many pieces of so many bytes are read."""


@dataclass(frozen=True)
class Work:
    """Where a study works; plain data that other processes can be handed.

    Attributes:
        study: its name.
        out: folder of everything that is written.
        base: folder of the study's file; paths in it start there.
        data_dir: local copies of the data, or None.
        threads: of a run; None leaves torch's own choice.
        retry_failed: do runs again that have failed before.
        function: does the run; `retain.study.sequence.run_sequence` where None.
        progress: show bars of what a run does, and not of runs alone.
        adapters: keep what each run has trained.
        shares: keys of runs that may have a fit of the source in common (`retain.study.fits`).
    """

    study: str
    out: Path
    base: Path = Path()
    data_dir: Path | None = None
    threads: int | None = None
    retry_failed: bool = False
    function: RunFunction | None = None
    progress: bool = False
    adapters: bool = False
    shares: frozenset[str] = frozenset()

    def adapter(self, run: RunSpec) -> Path:
        """The folder of what a run has trained, if it is kept."""
        return self.out / "adapters" / re.sub(r"[^\w.-]+", "-", run.title)

    def record(self, key: str) -> Path:
        """The file of a run's record."""
        return self.out / "runs" / f"{key}.json"

    def state(self, key: str) -> Path:
        """The folder of what a run keeps between tasks."""
        return self.out / "state" / key

    def earlier(self, key: str, number: int) -> Path:
        """The file of a record that was put aside, since the run's data have changed."""
        return self.out / "earlier" / f"{key}-{number}.json"

    def lock(self, name: str) -> Path:
        """The file that is locked while a run is done, or a file that runs share is written."""
        return self.out / "locks" / f"{name}.lock"

    def trace(self, key: str) -> Path:
        """The file with the traceback of a failed run."""
        return self.out / "failures" / f"{key}.txt"


@contextmanager
def holding(path: Path, *, wait: float = -1) -> Iterator[bool]:
    """Holds a lock while the block runs, or yields False where another process has it.

    It is the system's lock: that of a process that was killed is free. It is waited for so many
    seconds, for ever where they are negative.

    Raises:
        OutputError: the file cannot be written.
    """
    from filelock import FileLock, Timeout

    with writing("a lock of the study", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        with suppress(Timeout):
            lock.acquire(timeout=wait)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def write_shared(work: Work, path: Path, value: dict[str, Any]) -> None:
    """Writes JSON that several runs share, one process at a time.

    Raises:
        OutputError: the place cannot be written.
    """
    with holding(work.lock("shared")):
        clear_scratch(path)  # what killed processes have left of writing it
        write_json(path, value)


def read_shared(path: Path) -> dict[str, Any] | None:
    """What `write_shared` wrote, sealed; None where there is nothing of use."""
    try:
        found = read_json(path, sealed=True)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_record(path: Path) -> RunRecord | None:
    """A record; None where there is none, or what is there is no record."""
    found = read_shared(path) or {}
    try:
        return RunRecord.model_validate(found) if found.get("schema") == RUN_SCHEMA else None
    except ValidationError:
        return None


def read_study_file(path: Path) -> StudyRecord:
    """What ``study.json`` holds: a file, or the folder of a study with it.

    Raises:
        ConfigError: it is not there, or is no study's.
    """
    place = path / "study.json" if path.is_dir() else path
    try:
        return StudyRecord.model_validate(read_json(place))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "no study there", got=place,
            allowed="the folder of retain study run, or its study.json", fix="check the path",
        ) from error  # fmt: skip


def standing(run: RunSpec, work: Work) -> RunRecord | None:
    """The record of a run, if it stands: its data and model are those that are there now.

    A failed one stands unless it is to be done again.
    """
    record = read_record(work.record(run.key))
    if record is None or (record.status == "failed" and work.retry_failed):
        return None
    return None if changed_inputs(record, run, work) else record


def changed_inputs(record: RunRecord, run: RunSpec, work: Work) -> list[str]:
    """Which inputs of a record have other contents now.

    Of a failed one also those that were not there then. Records of earlier versions do not say
    what they are of.
    """
    then = record.inputs
    if then is None:
        return []
    now = input_digests(run, work)
    return [n for n, d in now.items() if then.get(n, d if record.done else None) != d]


def input_digests(run: RunSpec, work: Work) -> dict[str, str]:
    """What the files of a run hold: a digest for each split of a task or source, a local model.

    They are part of what a run is, beside its configuration. What comes from the hub, and a
    built-in model, is told by its name; nothing is said of files that are not there.
    """
    found: dict[str, str] = {}
    if work.function is not None:
        return found
    model = model_digest(run.model)
    if model is not None:
        found["model"] = model
    for task in run.order.tasks if work.data_dir is not None else ():
        try:
            spec = task_at(task, work.base)
        except RetainError:
            continue
        for split in ("train", "eval"):
            path = local_file(spec, split, work.data_dir or Path())
            if path is not None:
                found[f"{task} {split}"] = _digest(path, _stamp(path))
    source = run.source
    for split in (source.split, source.heldout_split) if source.kind == "data" else ():
        with suppress(RetainError):  # its run says so
            if (path := source_file(source, split, work.data_dir)) is not None:
                found[f"source {split}"] = _digest(path, _stamp(path))
    return found


def source_file(source: RunSource, split: str, data_dir: Path | None) -> Path | None:
    """The file of a split of a source of kind ``data``; None where there is none.

    Raises:
        SourceError: the source names a place outside the data folder.
    """
    names = (f"{source.name}/{split}{suffix}" for suffix in (".jsonl.gz", ".jsonl", ".txt"))
    paths = (inside(data_dir or Path(), name, "source.name") for name in names)
    return next((path for path in paths if path.is_file()), None)


def model_digest(name: str) -> str | None:
    """What tells a local model from another: a folder's small files, and pieces of its weights.

    Of a ``.gguf`` file pieces of all. None for other names.
    """
    folder = Path(name).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return _pieces(folder, _stamp(folder))[:32]
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".model", ".txt", ".jinja") and path.is_file():
            digest.update(f"{path.name}:{_pieces(path, _stamp(path))};".encode())
    return digest.hexdigest()[:32]


def method_digest(kind: str) -> str:
    """What tells a method's code from another: the files of its class and of those it is made of.

    A class that was typed in has no file, and an unknown method no digest.
    """
    return _code(METHODS[kind]) if kind in METHODS else ""  # type: ignore[arg-type]


@cache  # as it was when first asked for: later changes are not what runs
def _code(method: type[Method]) -> str:
    files = []
    for part in method.__mro__:
        with suppress(TypeError, OSError):
            files.append(file_digest(Path(inspect.getfile(part))))
    return hashlib.sha256("".join(files).encode()).hexdigest()[:16]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=1024)
def _digest(path: Path, stamp: tuple[int, int]) -> str:
    return file_digest(path)[:32]


@lru_cache(maxsize=1024)
def _pieces(path: Path, stamp: tuple[int, int]) -> str:
    size = stamp[1]
    if size <= _PIECES * _PIECE:
        return file_digest(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_PIECES):
            file.seek(number * (size - _PIECE) // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return digest.hexdigest()
