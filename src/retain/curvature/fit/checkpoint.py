"""A fit that was stopped goes on from a file: all sums, and how far it had come.

The file belongs to one fit exactly: its key covers the model, the adapter, the source's tokens and
every setting that the sums depend on. It is written whole or not at all, so a process that is
killed while writing leaves the one before.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from retain.curvature.artifact import digest_of, save_tensors
from retain.curvature.fit.accumulator import Accumulator
from retain.data.batches import Example
from retain.data.tensors import read_tensors
from retain.documents import read_json, sealed
from retain.errors import RetainWarning
from retain.files import clear_scratch, write_json

__all__ = ["FitCheckpoint", "fit_key", "forget", "kept_rows"]


class FitCheckpoint:
    """Saves a `Accumulator` from time to time, and puts it back.

    Args:
        path: of the file, or None for none.
        key: of the fit.
        seconds: least time between two saves.
    """

    def __init__(self, path: str | Path | None, key: str, seconds: float) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.key, self.seconds = key, seconds
        self._last = time.monotonic()

    def load(self, run: Accumulator, device: torch.device) -> int:
        """Puts what was gathered into `run`; returns how many batches of its pass are done.

        A file of another fit, or one that cannot be read, counts as none, with a warning.
        """
        if self.path is None or not self.path.is_file():
            return 0
        try:
            kept, metadata = read_tensors(self.path)
        except (SafetensorError, OSError):
            return self._anew("cannot be read")
        if metadata.get("retain") != self.key:
            return self._anew("is of other text, settings or weights")
        if metadata.get("digest") != digest_of(self.key, kept):
            return self._anew("is damaged")
        done = int(kept.pop("done"))
        run.load(kept, device)
        return done

    def _anew(self, why: str) -> int:
        warnings.warn(
            f"the fit begins anew: what was kept in {self.path} {why}", RetainWarning, stacklevel=3
        )
        return 0

    def save(self, run: Accumulator, done: int, *, force: bool = False) -> None:
        """Writes the file if it is time.

        Raises:
            OutputError: the place cannot be written, or the disk is full.
        """
        if self.path is None or not (force or time.monotonic() - self._last >= self.seconds):
            return
        kept: dict[str, Tensor] = {k: t.cpu().contiguous() for k, t in run.state().items()}
        kept["done"] = torch.tensor(done)
        metadata = {"retain": self.key, "digest": digest_of(self.key, kept)}
        save_tensors(self.path, kept, metadata, "the unfinished curvature")
        self._last = time.monotonic()


def kept_rows(
    partial: str | Path | None, what: Sequence[Any], make: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Sampled text, kept beside an unfinished fit (``<partial>.text``), which needs it again.

    Args:
        partial: the fit's file, or None to keep nothing.
        what: all that the text depends on.
        make: makes it.
    """
    if partial is None:
        return make()
    path = Path(f"{partial}.text").expanduser()
    try:
        known = read_json(path, sealed=True)
        if known["of"] == list(what):
            return list(known["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rows = make()
    write_json(path, sealed({"of": list(what), "rows": rows}))
    return rows


def forget(partial: str | Path) -> None:
    """Deletes what an unfinished fit has left."""
    for path in (Path(partial).expanduser(), Path(f"{partial}.text").expanduser()):
        path.unlink(missing_ok=True)
        clear_scratch(path)


def fit_key(
    settings: Mapping[str, Any], examples: Sequence[Example], weights: Sequence[Tensor]
) -> str:
    """A digest of everything that a fit's sums depend on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for e in examples:
        digest.update(e.content)
    for weight in weights:
        data = weight.detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
