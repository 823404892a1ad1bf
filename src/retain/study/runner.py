"""Do one run of a study once: locked, written whole, its failure recorded."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain.errors import RetainError
from retain.files import clear_scratch, first_rank, whole_file, write_json

__all__ = ["RUN_SCHEMA", "Outcome", "RunFunction", "Work", "execute", "read_record"]

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
        status: ``done``, ``failed``, or ``elsewhere`` (another process is at it).
        error: one line, for a failed one.
        fresh: whether it was done now, and not before.
    """

    key: str
    status: str
    error: str | None = None
    fresh: bool = True


def read_record(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none, or what is there is no record."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and found.get("schema") == RUN_SCHEMA
    return found if good else None


def execute(
    key: str, config: Mapping[str, Any], work: Work, say: Callable[[str], None] | None = None
) -> Outcome:
    """Does one run, unless it is done, or another process is at it.

    Whatever goes wrong in it is recorded; only Ctrl-C and a folder that cannot be written stop
    the study. A lock belongs to a living process: that of a killed one is free.

    Args:
        key: hash of `config`.
        config: the whole configuration of the run.
        work: where.
        say: told in a few words what is being done.

    Raises:
        OutputError: the record cannot be written.
    """
    known = _known(key, work)
    if known is not None:
        return known
    if not first_rank():
        record = _attempt(key, config, work, say)
        return Outcome(key, record["status"], record["error"])
    from filelock import FileLock, Timeout

    path = work.lock(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=1):
            known = _known(key, work)
            if known is not None:
                return known
            record = _attempt(key, config, work, say)
            clear_scratch(work.record(key))
            write_json(work.record(key), record)
            if record["status"] == "done":
                _state(key, work, {}).clear()
                work.trace(key).unlink(missing_ok=True)
    except Timeout:
        return Outcome(key, "elsewhere", fresh=False)
    return Outcome(key, record["status"], record["error"])


def write_failure(key: str, config: Mapping[str, Any], work: Work, error: str) -> Outcome:
    """Records a run whose process died."""
    from retain.study.provenance import provenance

    header = _header(key, config, work, provenance(int(config["seed"])))
    write_json(work.record(key), header | {"status": "failed", "error": error})
    return Outcome(key, "failed", error)


def _known(key: str, work: Work) -> Outcome | None:
    record = read_record(work.record(key))
    if record is None or (record["status"] == "failed" and work.retry_failed):
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

    from retain.study.provenance import provenance

    if work.threads is not None:
        torch.set_num_threads(work.threads)
    where = provenance(int(config["seed"]))
    where["hardware"]["threads"] = torch.get_num_threads()
    commit = (where["commit"] or "").rstrip("+")  # files beside the code may come while it runs
    state = _state(key, work, {"versions": where["versions"], "commit": commit})
    header = _header(key, config, work, where)
    function = work.function or _run_sequence()
    try:
        body = function(config, state=state, work=work, say=say or (lambda text: None))
        return {**header, **finite(body)}
    except Exception as error:
        _write_trace(work.trace(key), traceback.format_exc())
        return header | {"status": "failed", "error": one_line(error)}


def _run_sequence() -> RunFunction:
    from retain.study.sequence import run_sequence

    return run_sequence


def one_line(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    if isinstance(error, RetainError):
        return text
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if full or "can't allocate memory" in text:
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
