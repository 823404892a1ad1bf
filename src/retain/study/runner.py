"""Do one run of a study once: locked, written whole, its failure recorded.

A failure is recorded where the run's configuration or data caused it. What the machine lacked
(disk, memory, a connection) says nothing of the run: it is told, and tried again next time.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from retain.documents import sealed
from retain.errors import OutputError
from retain.files import clear_scratch, first_rank, whole_file, write_json, writing
from retain.provenance import provenance
from retain.records import RUN_SCHEMA, RunRecord, RunSpec, finite
from retain.runs.messages import Messages
from retain.study.faults import lacks_disk, lacks_something, one_line
from retain.study.state import SequenceState
from retain.study.work import (
    Work,
    changed_inputs,
    holding,
    input_digests,
    method_digest,
    read_record,
    standing,
)

__all__ = ["Outcome", "Say", "execute"]

Say = Callable[[str], None]


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


def execute(run: RunSpec, work: Work, say: Say | None = None) -> Outcome:
    """Does one run, unless it is done, or another process is at it.

    What its configuration makes go wrong is recorded; what the machine lacks is not, and a disk
    that cannot be written stops the study, as Ctrl-C does. A lock belongs to a living process: that
    of a killed one is free.

    Raises:
        OutputError: the record, or something that the run keeps, cannot be written.
    """
    key = run.key
    known = _known(run, work)
    if known is not None:
        return known
    if not first_rank():
        record = _attempt(run, work, say)
        return Outcome(key, record.status, record.error)
    with holding(work.lock(key), wait=1) as mine:
        if not mine:
            return Outcome(key, "elsewhere", fresh=False)
        known = _known(run, work)
        if known is not None:
            return known
        again = _put_aside(run, work)
        record = _attempt(run, work, say)
        if record.status != "unfinished":
            clear_scratch(work.record(key))
            write_json(work.record(key), sealed(record.plain()))
        if record.done:
            _state(key, work, {}).clear()
            work.trace(key).unlink(missing_ok=True)
    return Outcome(key, record.status, record.error, notes=(*again, *record.notes))


def _known(run: RunSpec, work: Work) -> Outcome | None:
    record = standing(run, work)
    if record is None:
        return None
    return Outcome(run.key, record.status, record.error, fresh=False)


def _put_aside(run: RunSpec, work: Work) -> list[str]:
    """Moves the record of other data out of the way; says so."""
    record = read_record(work.record(run.key))
    if record is None or not record.done:
        return []
    number = 1
    while (place := work.earlier(run.key, number)).exists():
        number += 1
    with writing("the earlier record of a run", place):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work.record(run.key), place)
    changed = ", ".join(changed_inputs(record, run, work))
    return [f"done again, since {changed} changed; the earlier record: {place}"]


def _state(key: str, work: Work, stamp: dict[str, Any], method: str = "") -> SequenceState:
    return SequenceState(work.state(key), stamp, method=method, writes=first_rank())


def _attempt(run: RunSpec, work: Work, say: Say | None) -> RunRecord:
    if work.function is None:
        from retain.study.sequence import run_sequence as function
    else:
        function = work.function
    if work.threads is not None:
        torch.set_num_threads(work.threads)
    where = provenance(run.seed or 0)
    where["hardware"]["threads"] = torch.get_num_threads()
    commit = (where["commit"] or "").rstrip("+")  # files beside the code may come while it runs
    inputs = input_digests(run, work)
    stamp: dict[str, Any] = {"versions": where["versions"], "commit": commit}
    stamp |= {"inputs": inputs} if inputs else {}
    state = _state(run.key, work, stamp, method_digest(run.method.kind))
    messages = Messages(quiet=True)

    def record(status: str, error: str | None, body: dict[str, Any]) -> RunRecord:
        head = {"schema": RUN_SCHEMA, "study": work.study, "key": run.key, "status": status,
                "error": error, "config": run, **where, "inputs": inputs}  # fmt: skip
        return RunRecord.model_validate({**head, **finite(body), "notes": messages.notes})

    try:
        with messages.listening():
            body = function(run, state=state, work=work, say=say or (lambda text: None))
        return record("done", None, body)
    except Exception as error:
        if lacks_disk(error):
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                "a run cannot be kept", got=one_line(error), allowed="room on the disk",
                fix="free some disk; the same command goes on after the last finished task",
            ) from error  # fmt: skip
        if first_rank():
            with whole_file(work.trace(run.key), "the traceback of a run") as scratch:
                scratch.write_text(traceback.format_exc(), encoding="utf-8")
        return record("unfinished" if lacks_something(error) else "failed", one_line(error), {})
