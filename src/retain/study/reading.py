"""Read a study from YAML: short forms spelled out, and one line for whatever is wrong."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from retain.config import TrainConfig, validate
from retain.documents import read_mapping
from retain.errors import ConfigError, shown, unknown
from retain.study.spec import StudySpec

__all__ = ["RUNNERS_OWN", "parse_study", "read_study"]

RUNNERS_OWN = {
    "seed": "seeds: [0, 1] at the top",
    "update": "methods: {kfac: {update: proximal}}",
    "save_steps": "remove it",
    "report_to": "remove it",
}
"""Keys of the training settings that are not a study's there, and where they are."""

_SHORT = {"model": "models", "adapter": "adapters", "method": "methods", "order": "orders"}


def read_study(
    path: Path, *, limit: int | None = None, seeds: list[int] | None = None
) -> StudySpec:
    """Reads and checks a study.

    Args:
        path: of the YAML file.
        limit: at most so many training and test rows a task.
        seeds: instead of the file's.

    Raises:
        ConfigError: no such file, no YAML, an unknown key or name, or a value out of range.
    """
    fix = "check the path and the file; see benchmarks/studies for examples"
    return parse_study(read_mapping(path, "the study", fix), limit=limit, seeds=seeds)


def parse_study(
    found: dict[str, Any], *, limit: int | None = None, seeds: list[int] | None = None
) -> StudySpec:
    """A study from plain data; see `read_study`."""
    found = _spelled_out(found, "models")
    for key in ("adapters", "methods"):
        if isinstance(found.get(key), dict):
            found[key] = {str(k): v if v is not None else {} for k, v in found[key].items()}
            for label, part in found[key].items():
                if isinstance(part, dict):
                    found[key][label] = {"kind": label} | part
    if isinstance(found.get("runs"), list):
        found["runs"] = [_spelled_out(cell) for cell in found["runs"]]
    if limit is not None:
        found["data"] = _limited(found.get("data") or {}, limit)
    if seeds is not None:
        found["seeds"] = seeds
        if isinstance(found.get("runs"), list):
            found["runs"] = [
                {k: v for k, v in c.items() if k != "seeds"} if isinstance(c, dict) else c
                for c in found["runs"]
            ]
    _refuse_unknown(found, StudySpec)
    spec = validate(found, StudySpec)
    _check_names(spec)
    _check_training(spec)
    return spec


def _limited(data: Any, limit: int) -> Any:
    """At most `limit` rows; what is no number is left for the check to name."""
    if not isinstance(data, dict):
        return data
    counts = {split: data.get(split) or limit for split in ("train", "test")}
    return data | {s: min(limit, n) if isinstance(n, int) else n for s, n in counts.items()}


def _spelled_out(found: Any, *only: str) -> Any:
    """``adapter: lora`` as ``adapters: [lora]``."""
    if not isinstance(found, dict):
        return found
    found = dict(found)
    for one, many in _SHORT.items():
        if one in found and many not in found and (not only or many in only):
            found[many] = found.pop(one)
        if (not only or many in only) and isinstance(found.get(many), str):
            found[many] = None if found[many] == "all" else [found[many]]
    return found


def _refuse_unknown(found: Any, kind: Any) -> None:
    """Raises for a key that no part of the study has, however deep it lies."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not isinstance(found, Mapping):
            return
        fields = kind.model_fields
        for key, value in found.items():
            if key in fields:
                _refuse_unknown(value, fields[key].annotation)
            elif kind.model_config.get("extra") == "forbid":
                raise unknown("key", str(key), fields)
        return
    inner = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for part in inner:
            _refuse_unknown(found, part)
    elif inner and isinstance(found, Mapping):
        for value in found.values():
            _refuse_unknown(value, inner[-1])
    elif inner and isinstance(found, list):
        for value in found:
            _refuse_unknown(value, inner[0])


def _check_names(spec: StudySpec) -> None:
    for cell in spec.runs:
        for kind in ("models", "adapters", "methods", "orders"):
            for name in getattr(cell, kind) or []:
                known = getattr(spec, kind)
                if name not in known:
                    raise unknown(kind.removesuffix("s"), name, known)


def _check_training(spec: StudySpec) -> None:
    for training in spec.trainings:
        tasks = training.get("tasks") or {}
        if not isinstance(tasks, dict) or not all(isinstance(t, dict) for t in tasks.values()):
            raise ConfigError(
                "training.tasks is no mapping",
                got=shown(tasks, 80),
                allowed="names of tasks, each with settings",
                fix="tasks: {cl15/sst2: {epochs: 2}}",
            )
        for part in (training, *tasks.values()):
            settings = {k: v for k, v in part.items() if k != "tasks"}
            for key, fix in RUNNERS_OWN.items():
                if key in settings:
                    raise ConfigError(
                        f"{key} is no setting of a study's training",
                        got=f"{key}: {shown(settings[key], plain=True)}",
                        allowed="the other training settings",
                        fix=fix,
                    )
            for key, value in settings.items():  # one by one: the others may be elsewhere
                whole = {"batch_size": value} if key == "accumulation" else {}
                validate(whole | {key: value}, TrainConfig)
