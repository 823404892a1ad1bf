"""Curvatures of the source text that runs of a study have in common: each is fitted once.

Runs that differ in their method alone measure the same source at the same model. The first of them
keeps what it found in the study's folder, the others read it, and all count the time of the fit as
their own, so that a run's times say what it takes by itself. What a run reads is to the bit what it
would have fitted. The files of a seed are deleted when its last run has ended; another command in
the same folder that is still at that seed fits again what it lacks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from retain.curvature.curvature import Curvature, load_curvature
from retain.documents import sealed
from retain.errors import ArtifactError, OutputError
from retain.files import clear_scratch, write_json
from retain.models.adapters.base import Adapter
from retain.models.processes import several
from retain.provenance import hardware
from retain.records import RunSpec, digest_of
from retain.study.resources import Clock
from retain.study.work import Work, holding, model_digest, read_shared

__all__ = ["SharedFits", "forget_fits", "sharing"]


class SharedFits:
    """Those of one run; see the module. `retain.retention.method.Context` calls it.

    Args:
        run: whose they are.
        work: where they are kept.
        adapter: as attached, fresh.
        stamp: of versions, code and data.
        clock: counts the time of what is read.
    """

    def __init__(
        self, run: RunSpec, work: Work, adapter: Adapter, stamp: Mapping[str, Any], clock: Clock
    ) -> None:
        self.folder, self.work, self.clock = _folder(work, run.seed), work, clock
        self.known = {
            "model": [run.model, model_digest(run.model), run.dtype, run.attention],
            "adapter": [run.adapter.plain(), adapter.options],
            "seed": run.seed,
            "code": dict(stamp),
            "machine": [hardware(), torch.get_num_threads()],
        }

    def __call__(self, about: Mapping[str, Any], fit: Callable[[], Curvature]) -> Curvature:
        """What an earlier run has kept, or else what `fit` gives.

        Args:
            about: its rows and settings, as plain data.
            fit: makes it.

        Raises:
            OutputError: it cannot be written.
        """
        if several():  # all processes fit together
            return fit()
        name = digest_of(self.known | {"fit": dict(about)})
        path = self.folder / f"{name}.safetensors"
        asked = time.perf_counter()
        with holding(self.work.lock(f"fit-{name}")):
            begun = time.perf_counter()
            note = read_shared(path.with_suffix(".json"))
            found = None if note is None else _read(path)
            if note is None or found is None:
                found = fit()
                seconds = time.perf_counter() - begun
                try:
                    _keep(found, seconds, path)
                except OutputError:  # another command may have deleted the folder meanwhile
                    _keep(found, seconds, path)
            else:
                seconds = note["seconds"]
        more = seconds - (time.perf_counter() - asked)
        self.clock.restore({"method": more, "total": more})
        return found


def _keep(fit: Curvature, seconds: float, path: Path) -> None:
    clear_scratch(path)
    fit.save(path)
    write_json(path.with_suffix(".json"), sealed({"seconds": seconds}))


def _read(path: Path) -> Curvature | None:
    try:
        return load_curvature(path)
    except ArtifactError:  # deleted, or damaged: it is fitted again
        return None


def sharing(runs: Iterable[RunSpec]) -> frozenset[str]:
    """The keys of those runs that may have a fit in common with another of them."""
    alike: dict[str, list[str]] = {}
    for run in runs:
        if run.method.kind != "none" and run.source.kind != "none":
            parts = [run.model, run.dtype, run.attention, run.adapter.plain(), run.seed]
            alike.setdefault(digest_of([*parts, run.source.plain()]), []).append(run.key)
    return frozenset(key for keys in alike.values() if len(keys) > 1 for key in keys)


def forget_fits(work: Work, ended: RunSpec, left: Iterable[RunSpec]) -> None:
    """Deletes the fits of a run's seed where none of those `left` to be done has it."""
    if all(run.seed != ended.seed for run in left):
        shutil.rmtree(_folder(work, ended.seed), ignore_errors=True)


def _folder(work: Work, seed: int | None) -> Path:
    return work.out / "fits" / f"seed-{seed}"
