"""A study's grid: every run with all that its result depends on."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from pydantic_core import PydanticSerializationError, to_jsonable_python

from retain.config import TrainConfig, validate
from retain.data.specs import TaskSpec, load_orders, load_task
from retain.errors import ConfigError, RetainError, shown, unknown
from retain.files import file_digest
from retain.models.adapters.registry import adapter_kind
from retain.models.load import is_decoder
from retain.records import RunSpec
from retain.retention.method import Method
from retain.retention.registry import make_method, method_options
from retain.study.spec import RUNNERS_OWN, AdapterSpec, CellSpec, DrawnOrder, MethodSpec, StudySpec

__all__ = ["Grid", "expand", "refusal", "task_at"]

_PUBLISHED = "published/"


@dataclass
class Grid:
    """All runs of a study, the first seed of all before the second of any.

    Attributes:
        runs: without repetition.
        skipped: what a method refuses: names, and the reason.
        others: runs of the study that are not asked for now; those that were done before stay in
            its tables.
    """

    runs: list[RunSpec] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    others: list[RunSpec] = field(default_factory=list)

    def matching(self, pattern: str | None) -> list[RunSpec]:
        """The runs whose title holds a pattern (``*`` and ``?`` stand for anything).

        Raises:
            ConfigError: there is none.
        """
        if pattern is None:
            return self.runs
        held = f"*{pattern.replace('[', '[[]')}*"
        found = [r for r in self.runs if fnmatch.fnmatchcase(r.title, held)]
        if not found:
            some = "; ".join(run.title for run in self.runs[:3])
            raise ConfigError(
                "no run matches",
                got=repr(pattern),
                allowed=f"a part of a title such as: {some}",
                fix="use * for anything, or leave --only out",
            )
        return found


def expand(spec: StudySpec, base: Path) -> Grid:
    """The grid of a study, whose file lies in the folder `base`.

    Raises:
        ConfigError: a name or option is not known, two unlike runs, of one seed or of two, would be
            one cell, or two tasks would have one name.
        SourceError: a file that the study names is missing.
    """
    return _Expansion(spec, base).grid()


def task_at(task: str, base: Path) -> TaskSpec:
    """A task by its name, or by the path of its file, which starts at the study's folder.

    Raises:
        ConfigError: there is no such task.
    """
    return load_task(base / task if task.endswith((".yaml", ".yml")) else task)


def refusal(method: Method, adapter: str, decoder: bool | None) -> str | None:
    """Why a method does not compose with a kind of adapter, or of model; None where it does.

    `decoder` is None where that is not known before the model is loaded.
    """
    try:
        method.check(adapter, decoder is not False)
    except ConfigError as error:
        return error.what
    return None


class _Expansion:
    def __init__(self, spec: StudySpec, base: Path) -> None:
        self.spec, self.base = spec, base
        self.orders = {name: _tasks(order) for name, order in spec.orders.items()}
        every = {task: None for tasks in self.orders.values() for task in tasks}
        tasks = {task: task_at(task, base) for task in every}
        _check_names(tasks)
        self.definitions = {task: _definition(task, found) for task, found in tasks.items()}
        for training in spec.trainings:
            for task in training.get("tasks") or {}:
                if task not in every:
                    raise unknown("task", task, every)
        self.adapters = {
            name: adapter_kind(adapter.kind).check(adapter.options).model_dump(mode="json")
            for name, adapter in spec.adapters.items()
        }
        models = {m for cell in spec.runs for m in cell.models or spec.models}
        self.decoders = {model: is_decoder(model) for model in models}
        self.methods = {
            (label, strength): make_method(method.kind, strength, **method.options)
            for label, method in spec.methods.items()
            for strength in method.strengths
        }
        for (label, _), made in self.methods.items():
            _check_head(label, spec.methods[label], made)
        self.source = spec.source.model_dump(mode="json", exclude_none=True)
        if spec.source.kind == "none":
            self.source = {"kind": "none"}
        if spec.source.kind == "file":
            self.source["digest"] = _source_digest(base / str(spec.source.path))

    def grid(self) -> Grid:
        made = Grid()
        found: dict[str, tuple[int, RunSpec]] = {}
        cells: dict[str, tuple[dict[str, Any], int | None]] = {}
        for cell in self.spec.runs:
            for place, run in self._cell(cell, made.skipped):
                key = run.key
                shared, seed = cells.setdefault(run.cell, (run.shared, run.seed))
                if run.shared != shared:
                    raise ConfigError(
                        "two unlike runs of the study have one name",
                        got=f"{run.title}, and with other settings seed {seed}",
                        allowed="the same settings for a model, adapter, method and order",
                        fix="give one a name of its own, such as methods: {slow: {kind: none, "
                        "training: {learning_rate: 1.0e-4}}}",
                    )
                found.setdefault(key, (place, run))
        in_order = sorted(found.values(), key=lambda pair: pair[0])  # stable
        made.runs = [run for _, run in in_order]
        return made

    def _cell(self, cell: CellSpec, skipped: list[dict[str, str]]) -> Iterator[tuple[int, RunSpec]]:
        spec = self.spec
        orders = {name: self.orders[name] for name in cell.orders or self.orders}
        if cell.independent:
            orders = {task: [task] for tasks in orders.values() for task in tasks}
        seeds = cell.seeds if cell.seeds is not None else spec.seeds
        for (place, seed), model, (order, tasks), name, label in product(
            enumerate(seeds), cell.models or spec.models, orders.items(),
            cell.adapters or spec.adapters, cell.methods or spec.methods,
        ):  # fmt: skip
            adapter, method = spec.adapters[name], spec.methods[label]
            asked = spec.orders.get(order)
            if isinstance(asked, DrawnOrder):
                tasks = asked.of(seed)
            for strength in method.strengths:
                made = self.methods[label, strength]
                reason = refusal(made, adapter.kind, self.decoders[model])
                if reason is not None:
                    if refusal(made, adapter.kind, None) is None:
                        reason = f"{reason}; {model} is an encoder"
                    note = {"adapter": name, "method": label, "reason": reason}
                    if note not in skipped:
                        skipped.append(note)
                    continue
                # What is set here is what the key depends on: a name or default that changes
                # makes other runs of those that are done.
                run: dict[str, Any] = {
                    "model": model,
                    "dtype": adapter.dtype or spec.dtype,
                    "attention": spec.attention,
                    "adapter": {"name": name, "kind": adapter.kind, **self.adapters[name]},
                    "method": _method(label, method, made),
                    "order": {"name": order, "tasks": tasks},
                    "definitions": [self.definitions[task] for task in tasks],
                    "seed": seed,
                    "training": self._training(tasks, adapter, method, cell),
                    "data": spec.data.model_dump(mode="json"),
                    "source": self.source,
                    "general": spec.general and spec.general.model_dump(mode="json"),
                    "evaluation": spec.evaluation.for_key(),
                }
                if self.decoders[model] is not True and (method.head or made.head) == "fitted":
                    run["head"] = "fitted"
                yield place, RunSpec.model_validate(run)

    def _training(
        self, tasks: list[str], adapter: AdapterSpec, method: MethodSpec, cell: CellSpec
    ) -> dict[str, Any]:
        """Settings of the run, and those of single tasks.

        Later ones win: study, a task of the study, adapter, method, cell; the tasks of each
        block are the exceptions to that block.
        """
        common: dict[str, Any] = {}
        own: dict[str, dict[str, Any]] = {task: {} for task in tasks}
        for training in (self.spec.training, adapter.training, method.training, cell.training):
            settings = {k: v for k, v in training.items() if k != "tasks"}
            common |= settings
            for task in tasks:
                own[task] = {k: v for k, v in own[task].items() if k not in settings}
                own[task] |= (training.get("tasks") or {}).get(task, {})
        for task in tasks:
            try:
                validate(common | own[task], TrainConfig)
            except RetainError as error:
                raise ConfigError(
                    f"the training settings of {task} do not go together",
                    got=error.got, allowed=error.allowed, fix=error.fix,
                ) from error  # fmt: skip
        whole = validate(common, TrainConfig).model_dump(mode="json", exclude=set(RUNNERS_OWN))
        return whole | {"tasks": {task: part for task, part in own.items() if part}}


def _check_head(label: str, spec: MethodSpec, method: Method) -> None:
    """Refuses ``head: fitted`` of a method that fits none."""
    if spec.head == "fitted" and not method.fits_head:
        raise ConfigError(
            f"the method {label} fits no head",
            got=f"head: fitted, and kind: {spec.kind}"
            + (f" with parts: {shown(spec.options['parts'])}" if "parts" in spec.options else ""),
            allowed="a head as it is drawn, or a method that fits it before each task",
            fix="leave head out" + (", or put head into parts" if "parts" in spec.options else ""),
        )


def _method(label: str, spec: MethodSpec, method: Method) -> dict[str, Any]:
    strength, later = float(method.strength), type(method).later
    options = {**method_options(spec.kind), **spec.options}
    for option, value in options.items():
        try:
            to_jsonable_python(value)
        except PydanticSerializationError as error:
            raise ConfigError(
                "an option of a method cannot be written into a record",
                got=f"{option}={shown(value)} of the method {spec.kind}",
                allowed="numbers, texts, true or false, and lists of them",
                fix="another default, such as a name, which the method reads; or a value in the "
                "study",
            ) from error
    return {
        "name": label,
        "label": f"{label} {strength:g}" if len(spec.strengths) > 1 else label,
        "kind": spec.kind,
        "strength": strength,
        "stores_data": method.stores_data,
        **{k: v for k, v in options.items() if k not in later or v != later[k]},
    }


def _tasks(order: list[str] | str | DrawnOrder) -> list[str]:
    if isinstance(order, DrawnOrder):
        return order.drawn
    return order if isinstance(order, list) else _published(order)


def _published(reference: str) -> list[str]:
    """The tasks of ``published/NAME``, such as ``published/order4-14``."""
    orders = {f"{_PUBLISHED}{name}": tasks for name, tasks in load_orders().items()}
    if reference not in orders:
        raise unknown("order", reference, orders)
    return list(orders[reference])


def _check_names(tasks: Mapping[str, TaskSpec]) -> None:
    """Refuses two tasks of one name, by which records and tables tell them apart."""
    first: dict[str, str] = {}
    for task, spec in tasks.items():
        other = first.setdefault(spec.name, task)
        if other != task:
            raise ConfigError(
                "two tasks of the study have one name",
                got=f"{spec.name}, the name of {other} and of {task}",
                allowed="a name for each task",
                fix="write another name: into one of the files (by default it is the file's own)",
            )


def _definition(task: str, spec: TaskSpec) -> str:
    """Name and version of a task of the package; a digest of one in a file."""
    if not task.endswith((".yaml", ".yml")):
        return f"{spec.name}@{spec.version}"
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:16]


def _source_digest(path: Path) -> str:
    """16 hexadecimal digits of the SHA-256 of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return file_digest(path.expanduser())[:16]
    except OSError as error:
        raise ConfigError(
            "a file that the study names cannot be read",
            got=f"{path}: {error.strerror}",
            allowed="a path that starts at the study's folder",
            fix="check the path",
        ) from error
