"""The contents of what a run reads: they are part of what it is, beside its configuration.

Digests of the tasks' local files and of a local model's. What comes from the hub, and a built-in
model, is told by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from retain.data.loading import local_file
from retain.data.specs import load_task
from retain.errors import RetainError
from retain.files import file_digest
from retain.study.known import task_path
from retain.study.runner import Work

__all__ = ["input_digests", "model_digest"]

_PIECES, _PIECE = 64, 4096
"""Of a large file of weights so many pieces of so many bytes are read."""


def input_digests(config: Mapping[str, Any], work: Work) -> dict[str, str]:
    """What the files of a run hold: a digest for each task and split, and for the model.

    Args:
        config: of the run.
        work: where the data lie; nothing is said of tasks whose files are not there.
    """
    found: dict[str, str] = {}
    if work.function is not None:
        return found
    model = model_digest(str(config["model"]))
    if model is not None:
        found["model"] = model
    for task in config["order"]["tasks"] if work.data_dir is not None else ():
        try:
            spec = load_task(task_path(task, work.base))
        except RetainError:
            continue
        for split in ("train", "eval"):
            path = local_file(spec, split, work.data_dir or Path())
            if path is not None:
                found[f"{task} {split}"] = _digest(path, _stamp(path))
    return found


def model_digest(name: str) -> str | None:
    """What tells a folder's model from another: its small files, and pieces of its weights."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".model", ".txt", ".jinja") and path.is_file():
            digest.update(f"{path.name}:{_pieces(path, _stamp(path))};".encode())
    return digest.hexdigest()[:32]


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
