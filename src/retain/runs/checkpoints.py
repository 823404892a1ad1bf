"""Checkpoints in a run's folder: which is gone on from, and what becomes of the others."""

from __future__ import annotations

import contextlib
from pathlib import Path
from shlex import quote
from typing import Any

from retain.config import RunConfig, read_config
from retain.documents import read_json
from retain.errors import ConfigError, RetainError
from retain.files import has_schema, writing
from retain.runs.months import previous_run
from retain.runs.records import RUN, STATE_SCHEMA, TRAIN, Digests, TrainRecord, read_record

__all__ = [
    "adapter_in", "check_digests", "clear", "drop_broken", "drop_unfinished", "ended", "history",
    "refuse_leftovers", "set_aside_broken", "tidy", "usable",
]  # fmt: skip

_PLACES = {
    "data": ("the rows to learn from", "data"),
    "base": ("the base model", "model"),
    "source": ("the source's curvature", "curvature"),
    "past": ("the state of the run before", "continue-from"),
}


def set_aside_broken(folder: Path) -> list[str]:
    """Renames the checkpoints that are newer than the last whole one out of the way.

    Returns:
        For each, why.

    Raises:
        OutputError: it cannot be renamed.
    """
    from retain.training.checkpoints import checkpoints, remove_checkpoint, why_broken

    said = []
    for path in reversed(checkpoints(folder)):
        reason = why_broken(path)
        if reason is None:
            break
        aside = path.with_name(f"broken-{path.name}")
        with writing("the folder of the checkpoints", folder):
            remove_checkpoint(aside)
            for number in range(2, 100):
                if not aside.exists():
                    break
                aside = aside.with_name(f"broken-{path.name}-{number}")  # it holds others' files
            path.rename(aside)
        said.append(f"{path.name} is passed over: {reason}")
    return said


def drop_broken(folder: Path) -> None:
    """Removes what a failure left of the checkpoint that was being written."""
    from retain.training.checkpoints import SEAL, checkpoints, remove_checkpoint

    for path in checkpoints(folder):
        if not (path / SEAL).is_file():
            with contextlib.suppress(OSError):
                remove_checkpoint(path)


def drop_unfinished(folder: Path) -> None:
    """Removes, once a run has ended, checkpoints that kills have left half written, or too many."""
    from retain.training.checkpoints import KEPT, SEAL, checkpoints, remove_checkpoint

    for path in checkpoints(folder)[:-KEPT]:
        with contextlib.suppress(OSError):
            remove_checkpoint(path)
    for path in folder.glob("broken-checkpoint-*"):
        if path.is_dir() and not (path / SEAL).is_file():
            with contextlib.suppress(OSError):
                remove_checkpoint(path)


def check_digests(checkpoint: Path, now: Digests) -> None:
    """Refuses to go on with other rows, another base model or another curvature.

    Where they lie does not count.

    Raises:
        ConfigError: one of them is not what the run began with.
    """
    from retain.training.checkpoints import seal_of

    then = Digests(**seal_of(checkpoint)).model_dump()
    for name, (what, option) in _PLACES.items():
        if then[name] != (found := getattr(now, name)):
            raise ConfigError(
                f"{what} changed since the run began",
                got=f"digest {str(found)[:12]}",
                allowed=f"{str(then[name])[:12]}, that of {checkpoint.name}",
                fix=f"put back what it was, or say with --{option} where it lies now; "
                "or start again with --overwrite",
            )


def ended(out: Path, folder: Path, now: Digests) -> TrainRecord | None:
    """The record of the run in a folder if that has ended, and has no checkpoint to go on from.

    None where it has not: its adapter or its state is missing, or the record is of the run whose
    place it was to take. `now` tells what this command would learn, as far as that is known yet.

    Raises:
        ConfigError: it learned something else, which would be lost.
    """
    from retain.training.checkpoints import last_whole

    if last_whole(folder) is not None:
        return None
    try:
        record = read_record(out / TRAIN, TrainRecord)
    except (OSError, ValueError, RecursionError):
        return None
    if read_config(out / RUN, {"out": record.config.out}, RunConfig) != record.config:
        return None
    then = record.digests or Digests()
    for name, (what, _) in _PLACES.items():
        was, found = getattr(then, name), getattr(now, name)
        if None not in (was, found) and was != found:
            raise ConfigError(
                f"the run has ended, and {what} changed since",
                got=f"digest {found[:12]}",
                allowed=f"{was[:12]}, that of {out / TRAIN}; there is nothing to resume",
                fix="another --out without --resume; or --overwrite to put a new run in its place",
            )
    return record if _is_whole(out, record) else None


def _is_whole(out: Path, record: TrainRecord) -> bool:
    """Whether a run has left its adapter, and its state if it was to keep one."""
    from retain.models.saved import check_adapter

    try:
        check_adapter(out / "adapter")
        if record.config.keep_state and (record.curvature or record.held_to):
            previous_run(out)
    except RetainError:
        return False
    return True


def refuse_leftovers(out: Path, folder: Path) -> None:
    """Refuses to mix a run's checkpoints up with another's, or to take a kept state's place.

    Raises:
        ConfigError: there are checkpoints in `folder`, or there is a state in `out`.
    """
    from retain.training.checkpoints import checkpoints

    found = checkpoints(folder)
    if found:
        raise ConfigError(
            "the output folder holds checkpoints of an earlier run",
            got=found[-1],
            allowed="a folder without checkpoints",
            fix="--resume to go on with that run, --overwrite to start again, or another --out",
        )
    if has_schema(out / "state" / "state.json", STATE_SCHEMA):
        raise ConfigError(
            "the output folder holds the state of an earlier run, from which later months go on",
            got=out / "state",
            allowed="a folder without one",
            fix="another --out, or --overwrite to put this run in its place",
        )


def clear(folder: Path) -> None:
    """Removes the run's checkpoints in a folder; what others put there stays.

    Raises:
        OutputError: one cannot be removed.
    """
    from retain.training.checkpoints import checkpoints, remove_checkpoint

    with writing("the folder of the checkpoints", folder):
        for path in [*checkpoints(folder), *folder.glob("broken-checkpoint-*")]:
            remove_checkpoint(path)


def adapter_in(out: Path) -> int | None:
    """What tells the adapter in a run's folder from one that takes its place; None without one."""
    try:
        return (out / "adapter" / "adapter_model.safetensors").stat().st_ino
    except OSError:
        return None


def usable(config: RunConfig, folder: Path, older: int | None) -> str:
    """What stays usable of a run that is stopped; `older` is `adapter_in` before it began."""
    from retain.training.checkpoints import last_whole

    last, resume = last_whole(folder), f"retain train --resume --out {quote(config.out)}"
    if last is not None:
        return f"{last} is whole; go on with: {resume}"
    none = "no checkpoint yet" if config.training.save_steps else "no checkpoint (--save-steps 50)"
    now = adapter_in(Path(config.out).expanduser())
    if now is None:
        return none
    if now == older:
        return f"{none}; an older adapter in {config.out} is unchanged"
    return (
        f"the adapter in {config.out} is this run's, but not all that goes with it is written; "
        f"for all of it, train again with: {resume}"
    )


def tidy(out: Path, kept: Path) -> None:
    """Leaves no empty folder, and no settings of a run of which nothing else is left."""
    with contextlib.suppress(OSError):
        kept.rmdir()
    if not any(path.exists() for path in (kept, out / TRAIN, out / "adapter")):
        with contextlib.suppress(OSError):
            (out / RUN).unlink()
    with contextlib.suppress(OSError):
        out.rmdir()


def history(checkpoint: Path) -> list[dict[str, Any]]:
    """The log up to a checkpoint, in the form of `retain.training.loop.TrainResult`."""
    from retain.training.loop import history_entry

    log = read_json(checkpoint / "trainer_state.json", nan=True)["log_history"]
    return [history_entry(entry["step"], entry) for entry in log if "loss" in entry]
