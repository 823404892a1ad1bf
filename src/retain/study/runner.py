"""Do one run of a study once: locked, written whole, its failure recorded.

A failure is recorded where the run's configuration or data caused it. What the machine lacked
(disk, memory, a connection) says nothing of the run: it is told, and tried again next time.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain.documents import read_json, sealed
from retain.errors import OutputError, RetainError, memory_full
from retain.files import clear_scratch, first_rank, whole_file, write_json, writing
from retain.study.heard import heard
from retain.study.lacking import lacks_disk, lacks_something

__all__ = ["RUN_SCHEMA", "Outcome", "RunFunction", "Work", "execute", "read_record", "standing"]

RUN_SCHEMA = "retain.run/1"

RunFunction = Callable[..., dict[str, Any]]
"""``(config, *, state, work, say) -> body of the record``; `retain.study.sequence` has it."""


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
    """

    study: str
    out: Path
    base: Path = Path()
    data_dir: Path | None = None
    threads: int | None = None
    retry_failed: bool = False
    function: RunFunction | None = None

    def record(self, key: str) -> Path:
        """The file of a run's record."""
        return self.out / "runs" / f"{key}.json"

    def state(self, key: str) -> Path:
        """The folder of what a run keeps between tasks."""
        return self.out / "state" / key

    def earlier(self, key: str, number: int) -> Path:
        """The file of a record that was put aside, since the run's data have changed."""
        return self.out / "earlier" / f"{key}-{number}.json"

    def lock(self, key: str) -> Path:
        """The file that is locked while a run is done."""
        return self.out / "locks" / f"{key}.lock"

    def trace(self, key: str) -> Path:
        """The file with the traceback of a failed run."""
        return self.out / "failures" / f"{key}.txt"


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        key: of the run.
        status: ``done``, ``failed``, ``unfinished`` (the machine lacked something; it is tried
            again next time), or ``elsewhere`` (another process is at it).
        error: one line, for a failed or unfinished one.
        fresh: whether it was done now, and not before.
        notes: what was done in a lesser way than was asked for, or again.
    """

    key: str
    status: str
    error: str | None = None
    fresh: bool = True
    notes: tuple[str, ...] = ()


def read_record(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none, or what is there is no record."""
    try:
        found = read_json(path, sealed=True)
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and found.get("schema") == RUN_SCHEMA
    return found if good else None


def standing(key: str, config: Mapping[str, Any], work: Work) -> dict[str, Any] | None:
    """The record of a run, if it stands: its data and model are those that are there now.

    A failed one stands unless it is to be done again.
    """
    record = read_record(work.record(key))
    if record is None:
        return None
    if record["status"] == "failed":
        again = work.retry_failed or _changed(record, config, work, gone=True)
        return None if again else record
    return None if _changed(record, config, work) else record


def _changed(
    record: Mapping[str, Any], config: Mapping[str, Any], work: Work, *, gone: bool = False
) -> list[str]:
    """Which inputs of a record have other contents now.

    Args:
        record: of the run; those of earlier versions do not say what they are of.
        config: of the run.
        work: where the data lie.
        gone: one that is there now and was not counts too.
    """
    then = record.get("inputs")
    if not isinstance(then, dict):
        return []
    now = _inputs(config, work)
    return [n for n, d in now.items() if then.get(n, d if not gone else None) != d]


def _inputs(config: Mapping[str, Any], work: Work) -> dict[str, str]:
    from retain.study.inputs import input_digests

    return input_digests(config, work)


def execute(
    key: str, config: Mapping[str, Any], work: Work, say: Callable[[str], None] | None = None
) -> Outcome:
    """Does one run, unless it is done, or another process is at it.

    What its configuration makes go wrong is recorded; what the machine lacks is not, and a disk
    that cannot be written stops the study, as Ctrl-C does. A lock belongs to a living process: that
    of a killed one is free.

    Args:
        key: hash of `config`.
        config: the whole configuration of the run.
        work: where.
        say: told in a few words what is being done.

    Raises:
        OutputError: the record, or something that the run keeps, cannot be written.
    """
    known = _known(key, config, work)
    if known is not None:
        return known
    if not first_rank():
        record = _attempt(key, config, work, say)
        return Outcome(key, record["status"], record["error"])
    from filelock import FileLock, Timeout

    path = work.lock(key)
    with writing("the lock of a run", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            return Outcome(key, "elsewhere", fresh=False)
    try:
        known = _known(key, config, work)
        if known is not None:
            return known
        again = _put_aside(key, config, work)
        record = _attempt(key, config, work, say)
        notes = (*again, *record.get("notes", ()))
        if record["status"] != "unfinished":
            clear_scratch(work.record(key))
            write_json(work.record(key), sealed(record))
        if record["status"] == "done":
            _state(key, work, {}).clear()
            work.trace(key).unlink(missing_ok=True)
    finally:
        lock.release()
    return Outcome(key, record["status"], record["error"], notes=notes)


def _put_aside(key: str, config: Mapping[str, Any], work: Work) -> list[str]:
    """Moves the record of other data out of the way; says so."""
    record = read_record(work.record(key))
    if record is None or record["status"] != "done":
        return []
    changed = _changed(record, config, work)
    number = 1
    while work.earlier(key, number).exists():
        number += 1
    place = work.earlier(key, number)
    with writing("the earlier record of a run", place):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work.record(key), place)
    return [f"done again, since {', '.join(changed)} changed; the earlier record: {place}"]


def _known(key: str, config: Mapping[str, Any], work: Work) -> Outcome | None:
    record = standing(key, config, work)
    if record is None:
        return None
    return Outcome(key, record["status"], record["error"], fresh=False)


def _header(
    key: str, config: Mapping[str, Any], work: Work, where: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema": RUN_SCHEMA,
        "study": work.study,
        "key": key,
        "status": "done",
        "error": None,
        "config": dict(config),
        **where,
    }


def _state(key: str, work: Work, stamp: Mapping[str, Any]) -> Any:
    from retain.study.state import SequenceState

    return SequenceState(work.state(key), stamp, writes=first_rank())


def _attempt(
    key: str, config: Mapping[str, Any], work: Work, say: Callable[[str], None] | None
) -> dict[str, Any]:
    import torch

    from retain.provenance import provenance

    if work.threads is not None:
        torch.set_num_threads(work.threads)
    where = provenance(int(config["seed"]))
    where["hardware"]["threads"] = torch.get_num_threads()
    commit = (where["commit"] or "").rstrip("+")  # files beside the code may come while it runs
    inputs = _inputs(config, work)
    stamp = {"versions": where["versions"], "commit": commit}
    state = _state(key, work, stamp | ({"inputs": inputs} if inputs else {}))
    header = _header(key, config, work, where) | {"inputs": inputs}
    function = work.function or _run_sequence()
    notes: list[str] = []
    try:
        with heard(notes):
            body = function(config, state=state, work=work, say=say or (lambda text: None))
        notes += [note for note in body.pop("notes", ()) if note not in notes]
        return {**header, **finite(body), "notes": notes}
    except Exception as error:
        if lacks_disk(error):
            reason = one_line(error)
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                "a run cannot be kept", got=reason, allowed="room on the disk",
                fix="free some disk; the same command goes on after the last finished task",
            ) from error  # fmt: skip
        _write_trace(work.trace(key), traceback.format_exc())
        status = "unfinished" if lacks_something(error) else "failed"
        return header | {"status": status, "error": one_line(error), "notes": notes}


def _run_sequence() -> RunFunction:
    from retain.study.sequence import run_sequence

    return run_sequence


def one_line(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    if isinstance(error, RetainError):
        return text
    if memory_full(error):
        return (
            f"the memory is full; got: {text[:160] or type(error).__name__}; fix: smaller batches"
        )
    return f"{type(error).__name__}: {text[:240]}" if text else type(error).__name__


def finite(value: Any) -> Any:
    """Plain data for JSON, with null for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_trace(path: Path, text: str) -> None:
    if first_rank():
        with whole_file(path, "the traceback of a run") as scratch:
            scratch.write_text(text, encoding="utf-8")
