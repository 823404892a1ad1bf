"""What a run keeps between its tasks, so that a killed one goes on after the last it finished."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from retain.documents import read_json, sealed
from retain.errors import RetainWarning
from retain.files import file_digest, whole_file, write_json

__all__ = ["Constant", "Kept", "SequenceState"]

_PARTS = ("adapter", "method")


@dataclass
class Kept:
    """What was kept after the last finished task.

    Attributes:
        done: tasks that are finished.
        data: scores and times, as JSON.
        adapter: tensors of `Adapter.state`.
        method: tensors of `Method.state` and `Method.constant`.
    """

    done: int
    data: dict[str, Any]
    adapter: dict[str, Tensor]
    method: dict[str, Tensor]


Constant = Callable[[], Mapping[str, Tensor]]
"""Tensors that are the same after each task, made when they are to be written."""


class SequenceState:
    """A folder with the tensors of one finished task and a JSON file that points at them.

    What no task changes is a file of its own, written with the first task and left alone.

    The JSON file is replaced last, as a whole: a kill at any moment leaves either the old state or
    the new one. A state with another stamp, or of another `method`'s code, is not gone on from. Of
    several processes that train together the first one `writes`.
    """

    def __init__(
        self, folder: Path, stamp: Mapping[str, Any], *, method: str = "", writes: bool = True
    ) -> None:
        self.folder, self.stamp, self.writes = folder, dict(stamp), writes
        self._made_by = self.stamp | ({"method": method} if method else {})
        self._fixed: dict[str, str] | None = None  # files that stay, with their digests

    def load(self) -> Kept | None:
        """What was kept; None where there is nothing that can be gone on from."""
        from safetensors import SafetensorError

        from retain.data.tensors import read_tensors

        if not (self.folder / "state.json").exists():
            return None
        try:
            note = read_json(self.folder / "state.json", sealed=True)
            if note["stamp"] != self._made_by:
                _say_anew("is of other versions, code or data")
                return None
            paths = [self._tensors(part, note["done"]) for part in _PARTS]
            fixed: dict[str, str] = note["fixed"]
            every = [*paths, *(self.folder / name for name in fixed)]
            files = [file_digest(path) for path in every]
            if [*note["files"], *fixed.values()] != files:
                raise ValueError("tensors that are not those of the note")
            adapter, method, *more = (read_tensors(path)[0] for path in every)
            for tensors in more:
                method |= tensors
            self._fixed = fixed
            return Kept(note["done"], note["data"], adapter, method)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            _say_anew("is damaged")
            return None

    def save(
        self, done: int, data: Mapping[str, Any], adapter: Mapping[str, Tensor],
        method: Mapping[str, Tensor], constant: Constant = dict,
    ) -> None:  # fmt: skip
        """Replaces what was kept.

        Args:
            done: tasks that are finished.
            data: scores and times, as JSON.
            adapter: its tensors.
            method: tensors that tasks change.
            constant: those of the method that stay as they were when first saved.

        Raises:
            OutputError: the folder cannot be written.
        """
        if not self.writes:
            return
        paths = [self._tensors(part, done) for part in _PARTS]
        for path, tensors in zip(paths, (adapter, method), strict=True):
            _write_tensors(path, tensors)
        if self._fixed is None:
            self._fixed = {}
            if tensors := constant():
                path = self.folder / "constant.safetensors"
                _write_tensors(path, tensors)
                self._fixed = {path.name: file_digest(path)}
        files = [file_digest(path) for path in paths]
        note = {"done": done, "stamp": self._made_by, "files": files, "fixed": self._fixed,
                "data": dict(data)}  # fmt: skip
        write_json(self.folder / "state.json", sealed(note))
        for old in self.folder.glob("*.safetensors"):
            if old not in paths and old.name not in self._fixed:
                old.unlink(missing_ok=True)

    def _tensors(self, part: str, done: int) -> Path:
        return self.folder / f"{part}-{done}.safetensors"

    def clear(self) -> None:
        """Deletes it."""
        self._fixed = None
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)


def _say_anew(why: str) -> None:
    warnings.warn(f"the run begins again: what was kept of it {why}", RetainWarning, stacklevel=3)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        place = flat.untyped_storage()
        if place.nbytes() != flat.nbytes or place.data_ptr() in seen:  # safetensors shares nothing
            flat = flat.clone()
        seen.add(flat.untyped_storage().data_ptr())
        whole[name] = flat
    with whole_file(path, "the state of a run") as scratch:
        save_file(whole, scratch)
