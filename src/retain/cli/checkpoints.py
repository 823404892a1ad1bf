"""Checkpoints of a training run: which of them are whole, and what they remember."""

from __future__ import annotations

import contextlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from retain.errors import ConfigError, OutputError

__all__ = [
    "checkpoints",
    "clear",
    "drop_broken",
    "history",
    "last_whole",
    "refuse_leftovers",
    "set_aside_broken",
    "tidy",
]

_STATE, _WEIGHTS, _HELD = "trainer_state.json", "adapter_model.safetensors", "retention.json"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, by step."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and _step(p) >= 0]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _whole(path: Path, held: bool) -> bool:
    """Whether a checkpoint was written to its end.

    Its last file is the trainer's state, or in a run with retention what that has learned.
    """
    from safetensors import SafetensorError, safe_open

    try:
        for name in (_STATE, _HELD) if held else (_STATE,):
            json.loads((path / name).read_text(encoding="utf-8"))
        with safe_open(path / _WEIGHTS, framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    return zipfile.is_zipfile(path / "optimizer.pt")


def set_aside_broken(folder: Path, held: bool) -> Path | None:
    """The last whole checkpoint; newer ones that a crash cut short are renamed out of the way."""
    for path in reversed(checkpoints(folder)):
        if _whole(path, held):
            return path
        aside = path.with_name(f"broken-{path.name}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        except OSError as error:
            raise OutputError(
                "a broken checkpoint cannot be moved aside",
                got=f"{path}: {error.strerror}",
                allowed="a folder that can be written",
                fix=f"remove {path}",
            ) from error
    return None


def drop_broken(folder: Path, held: bool) -> None:
    """Removes what a failure left of the checkpoint that was being written."""
    for path in checkpoints(folder):
        if not _whole(path, held):
            shutil.rmtree(path, ignore_errors=True)


def last_whole(folder: Path, held: bool) -> Path | None:
    """The last whole checkpoint.

    Args:
        folder: of the checkpoints.
        held: the run has retention, not plain LoRA.
    """
    return next((p for p in reversed(checkpoints(folder)) if _whole(p, held)), None)


def refuse_leftovers(folder: Path) -> None:
    """Raises `ConfigError` where another run's checkpoints lie, which would be mixed up."""
    found = checkpoints(folder)
    if found:
        raise ConfigError(
            "the output folder holds checkpoints of an earlier run",
            got=found[-1],
            allowed="a folder without checkpoints",
            fix="--resume to go on with that run, --overwrite to start again, or another --out",
        )


def clear(folder: Path) -> None:
    """Removes the checkpoints in a folder."""
    for path in [*checkpoints(folder), *folder.glob("broken-checkpoint-*")]:
        shutil.rmtree(path, ignore_errors=True)


def tidy(out: Path, kept: Path, settings: str) -> None:
    """Leaves no empty folder, and no settings of a run of which nothing else is left."""
    with contextlib.suppress(OSError):
        kept.rmdir()
    if not kept.exists() and not (out / "train.json").exists():
        with contextlib.suppress(OSError):
            (out / settings).unlink()
    with contextlib.suppress(OSError):
        out.rmdir()


def history(checkpoint: Path) -> list[dict[str, Any]]:
    """The log up to a checkpoint, in the form of `retain.training.loop.TrainResult`."""
    log = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))["log_history"]
    return [
        {
            "step": entry["step"],
            "loss": float(entry["loss"]),
            "predicted": entry.get("predicted_nats"),
            "measured": None,
            "strength": entry.get("retention_strength"),
        }
        for entry in log
        if "loss" in entry
    ]
