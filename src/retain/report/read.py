"""Reads what a report is made of: studies, records of runs, and results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from retain.documents import read_json
from retain.errors import SourceError, shown, warn
from retain.records import (
    RESULT_SCHEMA,
    RUN_SCHEMA,
    STUDY_SCHEMA,
    EvalRecord,
    Part,
    RunRecord,
    StudyRecord,
)
from retain.report.evaluation import study_of_eval
from retain.report.results import RESULT, Result, study_of

__all__ = ["check", "load", "read_studies", "results_in", "schema_of"]

P = TypeVar("P", bound=Part)
_SCHEMAS = (STUDY_SCHEMA, RUN_SCHEMA, RESULT_SCHEMA, RESULT)
_AGAIN = "make it again; a study keeps the runs that are done"


def load(path: Path) -> Any:
    """The JSON of a file.

    Raises:
        SourceError: it cannot be read, or is not JSON.
    """
    try:
        return read_json(path, nan=True)
    except OSError as error:
        raise SourceError(
            "the result cannot be read",
            got=f"{path} ({error.strerror or type(error).__name__})",
            allowed="a study.json, result.json, soften.json, record of a run, or a folder of such",
            fix="give the path of a result",
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise SourceError(
            f"{path} is not JSON", got=error, allowed=" or ".join(_SCHEMAS), fix=_AGAIN
        ) from error


def schema_of(path: Path) -> str | None:
    """The schema that a file names; None where it cannot be read or names none."""
    try:
        data = read_json(path, nan=True)
    except (OSError, ValueError):
        return None
    name = data.get("schema") if isinstance(data, dict) else None
    return name if isinstance(name, str) else None


def check(path: Path, model: type[P], data: Any) -> P:
    """The data as a record.

    Raises:
        SourceError: it does not fit, with the place of the first fault.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        more = f" and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise SourceError(
            f"{path} does not follow its schema at {'.'.join(map(str, first['loc']))}{more}",
            got=shown(first["input"], 60),
            allowed=first["msg"],
            fix=_AGAIN,
        ) from error


def results_in(folder: Path) -> list[Path]:
    """The files in a folder that `read_studies` reads: whole studies before single runs.

    Hidden ones, and those in hidden folders, are what killed commands left half written.
    """
    found = sorted(p for p in folder.rglob("*.json") if not _hidden(p.relative_to(folder)))
    whole = [p for p in found if p.name == "study.json" and p.is_file()]
    return whole or [p for p in found if schema_of(p) in _SCHEMAS]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _files(path: Path) -> list[Path]:
    """The files under a path that are to be read."""
    if not path.is_dir():
        return [path]
    found = results_in(path)
    if not found:
        raise SourceError(
            "the folder holds no results of a study",
            got=path,
            allowed=f"{', '.join(_SCHEMAS)} files, or a soften.json",
            fix="measure its adapter first: retain eval --model MODEL "
            f"--adapter {path / 'adapter'} --out may.json; retain report reads that"
            if (path / "train.json").is_file()
            else "give the output folder of retain study",
        )
    return found


def _read(path: Path) -> StudyRecord:
    data = load(path)
    name = data.get("schema") if isinstance(data, dict) else None
    if name == STUDY_SCHEMA:
        return check(path, StudyRecord, data)
    if name == RUN_SCHEMA:
        run = check(path, RunRecord, data)
        return StudyRecord(name=run.study or path.parent.name, runs=[run])
    if name == RESULT_SCHEMA:
        return study_of_eval(check(path, EvalRecord, data))
    if name == RESULT:
        return study_of(check(path, Result, data))
    raise SourceError(
        f"{path} is not a result this version reads",
        got=f"schema {shown(name)}",
        allowed=", ".join(map(repr, _SCHEMAS)),
        fix="give results of retain study, eval, soften or demo",
    )


def _joined(old: StudyRecord, new: StudyRecord) -> StudyRecord:
    """The runs of two files: one that is done stands for the same run that is not."""
    done = {run.key: run for run in new.runs if run.key and run.done}
    mine = [run if run.done else done.get(run.key, run) for run in old.runs]
    known = {run.key for run in mine if run.key}
    return StudyRecord(
        name=old.name,
        description=old.description or new.description,
        chosen=old.chosen or new.chosen,
        skipped=[*old.skipped, *(skip for skip in new.skipped if skip not in old.skipped)],
        runs=[*mine, *(run for run in new.runs if run.key not in known)],
    )


def _whole(study: StudyRecord, parts: list[StudyRecord]) -> StudyRecord:
    """A study with the claims and the planned runs of all its files."""
    if len(parts) == 1:
        return parts[0]
    made: dict[str, Any] = {"planned": _planned(parts)}
    done = _done(study)
    judged = [part for part in parts if part.claims]
    whole = next((part for part in judged if _done(part) == done), None)
    if whole is not None:
        made["claims"] = whole.claims
    elif judged:
        warn(
            f"the claims of the study {study.name} are left out: no file has judged them on all "
            "its runs; retain study --known takes another file's runs into a folder, and judges "
            "again"
        )
    return study.model_copy(update=made)


def _done(study: StudyRecord) -> set[str]:
    return {run.key for run in study.runs if run.done}


def _planned(parts: list[StudyRecord]) -> int | None:
    """How many runs there are to be: of grids without a seed in common all, else the most."""
    counts = [part.planned for part in parts if part.planned]
    seeds = [_seeds(part) for part in parts if part.planned]
    apart = all(seeds) and len(set().union(*seeds)) == sum(map(len, seeds))
    return (sum(counts) if apart else max(counts)) if counts else None


def _seeds(study: StudyRecord) -> set[int]:
    cells = study.spec.get("runs") or []
    return {seed for part in (study.spec, *cells) for seed in part.get("seeds") or []}


def _check_alike(study: StudyRecord, path: Path, seen: dict[str, tuple[RunRecord, Path]]) -> None:
    """Refuses unlike settings of runs in two files that have one title, or one cell and two seeds.

    Runs of one file are those of one grid, or results.
    """
    for run in study.runs:
        same, there = seen.setdefault(run.config.title, (run, path))
        first, place = seen.setdefault(run.config.cell, (run, path))
        other = ""
        if there != path and same.key and run.key and run.key != same.key:
            other = f"in {there}"
        elif place != path and run.config.shared != first.config.shared:
            other = f"seed {first.config.seed} in {place}"
        if other:
            raise SourceError(
                f"two unlike runs of the study {study.name} have one name",
                got=f"{run.config.title} in {path} and, with other settings, {other}",
                allowed="the same settings for a model, adapter, method and order",
                fix="report the study.json of one of them alone",
            )


def read_studies(paths: Iterable[Path]) -> list[StudyRecord]:
    """Read studies from files and folders; runs of one study that lie apart are joined.

    Claims that no file has judged on all runs are left out, with a warning.

    Raises:
        SourceError: a file is missing, is not JSON, is no result, or none holds a run; or two runs
            of one study, of one seed or of two, would be one of its cells with unlike settings.
    """
    found: dict[str, StudyRecord] = {}
    parts: dict[str, list[StudyRecord]] = {}
    seen: dict[str, dict[str, tuple[RunRecord, Path]]] = {}
    for path in (file for given in paths for file in _files(given)):
        study = _read(path)
        if study.name in found and schema_of(path) in (RESULT, RESULT_SCHEMA):
            study = study.model_copy(update={"name": f"{study.name} ({path})"})
        _check_alike(study, path, seen.setdefault(study.name, {}))
        parts.setdefault(study.name, []).append(study)
        old = found.get(study.name)
        found[study.name] = study if old is None else _joined(old, study)
    if not any(study.runs for study in found.values()):
        raise SourceError(
            "the study has no runs yet",
            got=", ".join(found) or "nothing",
            allowed="at least one run that is done or has failed",
            fix="start it with retain study, then report again",
        )
    return [_whole(study, parts[name]) for name, study in found.items()]
