"""A study's grid: every run with its whole configuration, and the key that it hashes to."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from retain.config import TrainConfig, validate
from retain.errors import ConfigError, RetainError, unknown
from retain.files import file_digest
from retain.study.reading import RUNNERS_OWN
from retain.study.spec import AdapterSpec, CellSpec, MethodSpec, StudySpec
from retain.types import HeadStart

__all__ = ["Catalogue", "Grid", "MethodFacts", "Run", "expand", "run_key"]


@dataclass(frozen=True)
class MethodFacts:
    """What a grid wants to know of a method.

    Attributes:
        strength: its own, where the study names none.
        stores_data: whether it keeps rows of earlier tasks.
        options: all of them, its defaults among them, so that a default that changes is another
            run.
        head: how a classifier's outputs begin with it.
        refusal: why it does not compose with a kind of adapter, or of model (a decoder or not;
            None where that is not known); None where it does.
    """

    strength: float
    stores_data: bool
    options: dict[str, Any]
    head: HeadStart
    refusal: Callable[[str, bool | None], str | None]


class Catalogue(Protocol):
    """What a grid asks the rest of the package; `retain.study.known.Known` answers."""

    def order(self, reference: str) -> list[str]:
        """The tasks of a published order."""

    def definition(self, task: str, base: Path) -> str:
        """What tells one definition of a task from another; raises for an unknown task."""

    def decoder(self, model: str) -> bool | None:
        """Whether a model is a decoder; None where that is not known before it is loaded."""

    def adapter(self, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        """The options with the kind's defaults; raises for an unknown kind or option."""

    def method(self, kind: str, strength: float | None, options: dict[str, Any]) -> MethodFacts:
        """Raises for an unknown method or option."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        key: 16 hexadecimal digits, the hash of `config`.
        config: all that its result depends on, data files and versions aside.
    """

    key: str
    config: dict[str, Any]

    @property
    def title(self) -> str:
        """The run in words."""
        c = self.config
        return (
            f"{c['model']} {c['adapter']['name']} {c['method']['label']} {c['order']['name']}"
            f" seed {c['seed']}"
        )


@dataclass
class Grid:
    """All runs of a study, the first seed of all before the second of any.

    Attributes:
        runs: without repetition.
        skipped: what a method refuses: names, and the reason.
    """

    runs: list[Run] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def matching(self, pattern: str | None) -> list[Run]:
        """The runs whose title holds a pattern (``*`` and ``?`` stand for anything).

        Raises:
            ConfigError: there is none.
        """
        if pattern is None:
            return self.runs
        found = [r for r in self.runs if fnmatch.fnmatchcase(r.title, f"*{pattern}*")]
        if not found:
            some = "; ".join(run.title for run in self.runs[:3])
            raise ConfigError(
                "no run matches",
                got=repr(pattern),
                allowed=f"a part of a title such as: {some}",
                fix="use * for anything, or leave --only out",
            )
        return found


def run_key(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of the configuration as canonical JSON."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def expand(spec: StudySpec, base: Path, catalogue: Catalogue) -> Grid:
    """The grid of a study.

    Args:
        spec: the study.
        base: the folder of its file.
        catalogue: of tasks, adapters and methods.

    Raises:
        ConfigError: a name or option is not known, or two unlike runs would have one name.
        SourceError: a file that the study names is missing.
    """
    return _Expansion(spec, base, catalogue).grid()


class _Expansion:
    def __init__(self, spec: StudySpec, base: Path, catalogue: Catalogue) -> None:
        self.spec, self.base, self.catalogue = spec, base, catalogue
        self.orders = {
            name: tasks if isinstance(tasks, list) else catalogue.order(tasks)
            for name, tasks in spec.orders.items()
        }
        every = {task: None for tasks in self.orders.values() for task in tasks}
        self.definitions = {task: catalogue.definition(task, base) for task in every}
        for training in spec.trainings:
            for task in training.get("tasks") or {}:
                if task not in every:
                    raise unknown("task", task, every)
        self.adapters = {
            name: catalogue.adapter(adapter.kind, adapter.options)
            for name, adapter in spec.adapters.items()
        }
        models = {m for cell in spec.runs for m in cell.models or spec.models}
        self.decoders = {model: catalogue.decoder(model) for model in models}
        self.facts = {
            (label, strength): catalogue.method(method.kind, strength, method.options)
            for label, method in spec.methods.items()
            for strength in method.strengths
        }
        self.source = spec.source.model_dump(mode="json", exclude_none=True)
        if spec.source.kind == "none":
            self.source = {"kind": "none"}
        if spec.source.kind == "file":
            self.source["digest"] = _source_digest(base / str(spec.source.path))

    def grid(self) -> Grid:
        made = Grid()
        found: dict[str, tuple[int, Run]] = {}
        titles: dict[str, str] = {}
        for cell in self.spec.runs:
            for place, run in self._cell(cell, made.skipped):
                if titles.setdefault(run.title, run.key) != run.key:
                    raise ConfigError(
                        "two unlike runs of the study have one name",
                        got=f"{run.title}, twice with other settings",
                        allowed="one run for a model, adapter, method, order and seed",
                        fix="give one a name of its own, such as methods: {slow: {kind: none, "
                        "training: {learning_rate: 1.0e-4}}}",
                    )
                found.setdefault(run.key, (place, run))
        in_order = sorted(found.values(), key=lambda pair: pair[0])  # stable
        made.runs = [run for _, run in in_order]
        return made

    def _cell(self, cell: CellSpec, skipped: list[dict[str, str]]) -> Iterator[tuple[int, Run]]:
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
            for strength in method.strengths:
                facts = self.facts[label, strength]
                reason = facts.refusal(adapter.kind, self.decoders[model])
                if reason is not None:
                    if facts.refusal(adapter.kind, None) is None:
                        reason = f"{reason}; {model} is an encoder"
                    note = {"adapter": name, "method": label, "reason": reason}
                    if note not in skipped:
                        skipped.append(note)
                    continue
                config = {
                    "model": model,
                    "dtype": adapter.dtype or spec.dtype,
                    "attention": spec.attention,
                    "adapter": {"name": name, "kind": adapter.kind, **self.adapters[name]},
                    "method": self._method(label, method, facts),
                    "order": {"name": order, "tasks": tasks},
                    "definitions": [self.definitions[task] for task in tasks],
                    "seed": seed,
                    "training": self._training(tasks, adapter, method, cell),
                    "data": spec.data.model_dump(mode="json"),
                    "source": self.source,
                    "general": spec.general and spec.general.model_dump(mode="json"),
                    "evaluation": spec.evaluation.for_key(),
                }
                if self.decoders[model] is not True and (method.head or facts.head) == "fitted":
                    config["head"] = "fitted"
                yield place, Run(run_key(config), config)

    def _method(self, label: str, method: MethodSpec, facts: MethodFacts) -> dict[str, Any]:
        several = len(method.strengths) > 1
        return {
            "name": label,
            "label": f"{label} {facts.strength:g}" if several else label,
            "kind": method.kind,
            "strength": facts.strength,
            "stores_data": facts.stores_data,
            **facts.options,
        }

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
