"""Checkpoints of `retain.training.loop.train`: sealed with digests of their files, written last.

A checkpoint whose files are not those of its seal (a kill, a full disk, a changed byte) is none.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retain.documents import read_json, sealed
from retain.files import clear_scratch, file_digest, remove_ours, sync, to_disk, write_json
from retain.training.keeping import TENSORS

__all__ = [
    "SEAL",
    "Seal",
    "checkpoints",
    "last_whole",
    "remove_checkpoint",
    "seal_of",
    "why_broken",
]

SEAL = "digests.json"
SCHEMA = "retain.checkpoint/1"

KEPT = 2
"""Checkpoints of a run that stay."""

FILES = (
    "adapter_config.json", "adapter_model.safetensors", "README.md", "optimizer.pt",
    "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin",
    "retention.json", TENSORS, SEAL, ".tmp??????",
)  # fmt: skip
"""What they put into one that has no seal; safetensors writes under a name of the last kind."""


class Seal(TrainerCallback):
    """Writes the digests into each checkpoint, and removes all but the last two.

    Args:
        of: what the run is of (digests of its rows, base and curvature), kept in the seal.
    """

    def __init__(self, of: Mapping[str, Any]) -> None:
        self.of = dict(of)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # each process has written its random state
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        place = folder / f"checkpoint-{state.global_step}"
        to_disk(place)
        files = {p.name: file_digest(p) for p in sorted(place.iterdir()) if p.is_file()}
        write_json(place / SEAL, sealed({"schema": SCHEMA, "of": self.of, "files": files}))
        sync(folder)
        for old in checkpoints(folder)[:-KEPT]:
            remove_checkpoint(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, by step."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and _step(p) >= 0]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def why_broken(path: Path) -> str | None:
    """Why a checkpoint cannot be gone on from; None for one that is as it was written."""
    try:
        seal = read_json(path / SEAL, sealed=True)
        files, good = dict(seal["files"]), seal["schema"] == SCHEMA
    except OSError:
        return f"it was not written to its end (no {SEAL})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{SEAL} is damaged"
    if not good or "trainer_state.json" not in files:
        return f"{SEAL} is damaged"
    for name, digest in files.items():
        try:
            if Path(name).name != name or file_digest(path / name) != digest:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, whole or not; what others put into it stays."""
    clear_scratch(path / SEAL)
    remove_ours(path, _own_files(path))


def _own_files(path: Path) -> tuple[str, ...]:
    """Patterns of what the trainer and this package put into a checkpoint."""
    try:
        files = read_json(path / SEAL)["files"]
        return (*FILES, *(glob.escape(name) for name in files))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return FILES


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that is as it was written."""
    found = reversed(checkpoints(folder))
    return next((path for path in found if why_broken(path) is None), None)


def seal_of(checkpoint: Path) -> dict[str, Any]:
    """What the run of a whole checkpoint is of."""
    found = read_json(checkpoint / SEAL)
    return dict(found["of"])
