"""What the files of a study hold, as pydantic models, and the reader of them.

A study is a `study.json` (schema ``retain.study/1``), or the records of its runs alone
(``retain.run/1``). Unknown fields are ignored; what was not measured is null.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from retain.documents import read_json
from retain.errors import SourceError, shown
from retain.report.schema import Hardware, Interval

__all__ = ["RUN", "STUDY", "Run", "Study", "read_studies", "schema_of"]

STUDY, RUN = "retain.study/1", "retain.run/1"


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


def _known_list(value: Any) -> Any:
    return [] if value is None else value


def _known_dict(value: Any) -> Any:
    return {} if value is None else value


Score = float | None
Scores = Annotated[list[Score], BeforeValidator(_known_list)]
Names = Annotated[list[str], BeforeValidator(_known_list)]
Values = Annotated[dict[str, float | None], BeforeValidator(_known_dict)]


class AdapterConfig(_Part):
    """What was trained: `name` in the study, `kind` of adapter."""

    name: str
    kind: str = ""


class MethodConfig(_Part):
    """How the model was held.

    Attributes:
        name: in the study; the marks of one name and several strengths form a series.
        label: for people; the name where there is none.
        kind: the method.
        strength: its multiplier; null where it has none.
        stores_data: whether rows of earlier tasks are kept; null where the file does not say.
    """

    name: str
    label: str | None = None
    kind: str = ""
    strength: float | None = None
    stores_data: bool | None = None

    @property
    def stores(self) -> bool:
        """Whether rows of earlier tasks are kept; replay of own samples keeps none."""
        if self.stores_data is not None:
            return self.stores_data
        words = f"{self.kind} {self.name}".lower()
        return "replay" in words and not any(w in words for w in ("self", "own", "sample", "gen"))


class Order(_Part):
    """The tasks in the order they are learned."""

    name: str
    tasks: list[str]


class Config(_Part):
    """What was run."""

    model: str
    dtype: str | None = None
    adapter: AdapterConfig
    method: MethodConfig
    order: Order
    seed: int | None = None


class Retention(_Part):
    """How far the model has moved from the base after task `after` (from 0)."""

    after: int
    kl: float | None = None
    kl_interval: Interval = None
    ppl_base: float | None = None
    ppl: float | None = None
    flips: float | None = None
    tokens: int | None = None


class General(_Part):
    """Scores on general tasks, by name."""

    before: Values = {}
    after: Values = {}

    @property
    def change(self) -> float | None:
        """The mean of after less before over the tasks that have both."""
        pairs = [(self.before.get(name), score) for name, score in self.after.items()]
        known = [b - a for a, b in pairs if a is not None and b is not None]
        return sum(known) / len(known) if known else None


class Parameters(_Part):
    """How many parameters were trained."""

    trainable: int | None = None
    base: int | None = None
    share: float | None = None


class Seconds(_Part):
    """Where the time went."""

    train: float | None = None
    method: float | None = None
    evaluate: float | None = None
    total: float | None = None


class Run(_Part):
    """The record of one run."""

    schema_name: Literal["retain.run/1"] = Field(alias="schema", default="retain.run/1")
    study: str = ""
    key: str = ""
    status: Literal["done", "failed"] = "done"
    error: str | None = None
    config: Config
    created: str | None = None
    versions: Annotated[dict[str, str | None], BeforeValidator(_known_dict)] = {}
    commit: str | None = None
    hardware: Hardware | None = None
    tasks: Names = []
    metrics: Names = []
    before: Scores = []
    matrix: Annotated[list[list[Score]], BeforeValidator(_known_list)] = []
    retention: Annotated[list[Retention], BeforeValidator(_known_list)] = []
    general: General | None = None
    metrics_summary: Values = {}
    parameters: Parameters | None = None
    seconds: Seconds | None = None
    peak_memory_gib: float | None = None
    losses: Scores = []

    @property
    def done(self) -> bool:
        """Whether the run came to its end."""
        return self.status == "done"


class Skipped(_Part):
    """A combination that a method refuses, and why."""

    adapter: str
    method: str
    reason: str | None = None


class Study(_Part):
    """A study with the runs that it has; `planned` says how many there are to be."""

    name: str
    description: str | None = None
    planned: int | None = None
    runs: list[Run]
    skipped: Annotated[list[Skipped], BeforeValidator(_known_list)] = []


def _load(path: Path) -> Any:
    try:
        return read_json(path)
    except OSError as error:
        raise SourceError(
            "the result cannot be read",
            got=f"{path} ({error.strerror or type(error).__name__})",
            allowed="a study.json, the record of a run, or a folder that holds such",
            fix="give the path of a study's results",
        ) from error
    except ValueError as error:
        raise SourceError(
            f"{path} is not JSON",
            got=error,
            allowed=f"a {STUDY} or {RUN} file",
            fix="run the study again; it keeps the runs that are done",
        ) from error


def schema_of(path: Path) -> str | None:
    """The schema that a file names; None where it cannot be read or names none."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return None
    name = data.get("schema") if isinstance(data, dict) else None
    return name if isinstance(name, str) else None


def _files(path: Path) -> list[Path]:
    """The files under a path that a study reader wants: whole studies before single runs."""
    if not path.is_dir():
        return [path]
    whole = sorted(p for p in path.rglob("study.json") if p.is_file())
    if whole:
        return whole
    found = [p for p in sorted(path.rglob("*.json")) if schema_of(p) in (STUDY, RUN)]
    if not found:
        raise SourceError(
            "the folder holds no results of a study",
            got=path,
            allowed=f"{STUDY} or {RUN} files",
            fix="give the output folder of retain study",
        )
    return found


def _check(path: Path, model: type[_Part], data: Any) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise SourceError(
            f"{path} does not follow its schema at {'.'.join(map(str, first['loc']))}",
            got=shown(first["input"], 60),
            allowed=first["msg"],
            fix="run the study again; it keeps the runs that are done",
        ) from error


def read_studies(paths: Iterable[Path]) -> list[Study]:
    """Read studies from files and folders; runs of one study that lie apart are joined.

    Raises:
        SourceError: a file is missing, is not JSON, is no study, or none holds a run.
    """
    found: dict[str, Study] = {}
    for path in (file for given in paths for file in _files(given)):
        data = _load(path)
        name = data.get("schema") if isinstance(data, dict) else None
        if name == STUDY:
            study = _check(path, Study, data)
        elif name == RUN:
            run = _check(path, Run, data)
            study = Study(name=run.study or path.parent.name, runs=[run])
        else:
            raise SourceError(
                f"{path} is not a result this version reads",
                got=f"schema {shown(name)}",
                allowed=f"{STUDY!r}, {RUN!r}, or one 'retain.result/1' alone",
                fix="give the results of retain study, or those of a demo alone",
            )
        old = found.get(study.name)
        if old is not None:
            done = {run.key: run for run in study.runs if run.key and run.done}
            mine = [run if run.done else done.get(run.key, run) for run in old.runs]
            known = {run.key for run in mine if run.key}
            more = [run for run in study.runs if run.key not in known]
            told = old.description or study.description
            refused = [*old.skipped, *(s for s in study.skipped if s not in old.skipped)]
            runs = [*mine, *more]
            study = Study(name=study.name, description=told, runs=runs, skipped=refused)
        found[study.name] = study
    if not any(study.runs for study in found.values()):
        raise SourceError(
            "the study has no runs yet",
            got=", ".join(found) or "nothing",
            allowed="at least one run that is done or has failed",
            fix="start it with retain study, then report again",
        )
    return list(found.values())
