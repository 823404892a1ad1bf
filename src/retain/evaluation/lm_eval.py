"""General abilities, measured by lm-evaluation-harness (the extra ``eval``).

Any of its tasks can be named. Those of `LOCAL` are read from local files where a data directory
is given, without a connection: the task's YAML stays what it is, only its data set is replaced.
Prompts, scoring and aggregation are lm-eval's own, so the numbers are too.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from retain.data.draws import same_random
from retain.documents import parse_json
from retain.errors import ConfigError, SourceError, unknown
from retain.models.forward import evaluating
from retain.models.generating import plain_generation
from retain.models.heads import is_causal
from retain.models.names import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "LOCAL", "GeneralItems", "check_tasks", "evaluate_general", "general_items", "headline",
    "local_rows",
]  # fmt: skip

LOCAL: dict[str, tuple[str, str]] = {
    "arc_easy": ("arc", "test"),
    "arc_challenge": ("arc", "test"),
    "hellaswag": ("hellaswag", "validation"),
    "winogrande": ("winogrande", "validation"),
}
"""Tasks with local data: lm-eval's folder of the task, and the split that is scored."""

_SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
_TAIL = re.compile(r"(?P<a>.*[.!?]['\")\]]*)\s+(?P<b>[a-z][^.!?]*)", re.DOTALL)


class GeneralItems(NamedTuple):
    """A task's score, None where it has none.

    Attributes:
        score: a number of lm-eval.
        rows: the rows' own, whose mean it is; none of a group of tasks, or where it is no mean.
        better: 1 where more is better, -1 where less is, 0 where lm-eval does not say.
    """

    score: float | None
    rows: list[float]
    better: int


def evaluate_general(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """What a model in memory scores on tasks of lm-evaluation-harness.

    Neither the model's modes nor the global random states are changed by it.

    Args:
        model: a causal model, as it is (an adapter stays on).
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks or groups.
        data_dir: folder that holds ``reasoning/<task>/{validation,test}.jsonl.gz`` with the hub's
            field names, for the tasks of `LOCAL`. Other tasks are read as lm-eval reads them,
            from the hub or its cache.
        limit: the first so many rows of each task; None for all.
        batch_size: rows a pass.

    Returns:
        For each task (and each group) its metrics by lm-eval's names, such as ``acc,none`` and
        ``acc_norm,none``; see `headline`. A group stands for its members: they are beside it only
        where they are asked for too, or where lm-eval has no number for the group.

    Raises:
        ConfigError: lm-eval is not installed, a task is not known to it, or the model is not
            causal.
        SourceError: the data of a task cannot be read.
    """
    found = _evaluated(model, tokenizer, tasks, data_dir, limit, batch_size)
    results: dict[str, dict[str, Any]] = found["results"]
    counted = _counted(results, found.get("group_subtasks") or {}) - set(tasks)
    return {name: result for name, result in results.items() if name not in counted}


def _counted(results: Mapping[str, Any], members: Mapping[str, Sequence[str]]) -> set[str]:
    """The members of groups that have a number, and of the groups among these."""
    found: set[str] = set()
    groups = [name for name in members if name in headline(results)]
    while groups:
        inside = members.get(groups.pop(), [])
        found.update(inside)
        groups += inside
    return found


def general_items(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> GeneralItems:
    """`headline` of one task, and what each of its rows counts in it; see `evaluate_general`."""
    found = _evaluated(model, tokenizer, [task], data_dir, limit, batch_size, rows=True)
    result = found["results"].get(task, {})
    best = _best(result)
    if best is None:
        return GeneralItems(None, [], 0)
    metric, _, kind = best.partition(",")
    score, more = float(result[best]), (found.get("higher_is_better") or {}).get(task, {})
    better = {True: 1, False: -1}.get(more.get(metric), 0)
    samples = [s for s in (found.get("samples") or {}).get(task, []) if s.get("filter") == kind]
    rows = [s.get(metric) for s in samples]
    known = [float(value) for value in rows if isinstance(value, int | float)]
    whole = len(known) == len(rows) > 0 and abs(sum(known) / len(known) - score) < 1e-9
    return GeneralItems(score, known if whole else [], better)


def _evaluated(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    data_dir: str | Path | None,
    limit: int | None,
    batch_size: int,
    rows: bool = False,
) -> dict[str, Any]:
    """What lm-eval says; with `rows` the single ones too."""
    _need()
    if not is_causal(model):
        raise ConfigError(
            "lm-eval asks causal models",
            got="a classifier",
            allowed="a model with a language-model head",
            fix="load it without num_labels",
        )
    with _quiet(), same_random(), evaluating(model), plain_generation(model):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=unwrap(model), tokenizer=tokenizer, batch_size=batch_size),
            tasks=_load(tasks, None if data_dir is None else Path(data_dir)),
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=0,
            log_samples=rows,
            task_manager=_manager(""),  # the tasks are loaded; without one it indexes them all
        )
    return dict(found or {})


def check_tasks(names: Sequence[str], data_dir: Path | None = None) -> None:
    """Refuses tasks that lm-eval does not know, and `LOCAL` ones whose rows are not in the folder.

    Raises:
        ConfigError: lm-eval is not installed, or a task is not known to it.
        SourceError: rows that are not in the folder.
    """
    _need()
    for name in names:
        if name not in LOCAL:
            _check_known(name)
        elif data_dir is not None and not _local_path(name, LOCAL[name][1], data_dir).is_file():
            raise _not_here(name, data_dir)


def headline(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """One number a task: ``acc_norm`` where it has one, else ``acc``, else its first metric."""
    found = {}
    for name, result in results.items():
        best = _best(result)
        if best is not None:
            found[name] = float(result[best])
    return found


def _best(result: Mapping[str, Any]) -> str | None:
    """The metric that `headline` takes, by its name and filter."""
    metrics = [
        key
        for key, value in result.items()  # the alias and sizes have no filter in their names
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    ]
    return next((m for m in ("acc_norm,none", "acc,none", *metrics) if m in metrics), None)


def local_rows(task: str, split: str, data_dir: str | Path) -> list[dict[str, Any]]:
    """A split of a local task with the fields that lm-eval wants; [] where there is none.

    HellaSwag's ``ctx_a`` and ``ctx_b`` (the whole sentences, and the begun one) are split out of
    ``ctx`` where a copy has that alone.

    Raises:
        SourceError: the file is damaged.
    """
    path = _local_path(task, split, data_dir)
    if not path.is_file():
        return []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [parse_json(line) for line in file if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise SourceError(
            "the data of a general task cannot be read",
            got=f"{path} ({type(error).__name__}: {str(error)[:120]})",
            allowed="a sound .jsonl.gz file",
            fix="replace the file",
        ) from error
    return [_begun(row) for row in rows] if task == "hellaswag" else rows


def _local_path(task: str, split: str, data_dir: str | Path) -> Path:
    return Path(data_dir).expanduser() / "reasoning" / task / f"{split}.jsonl.gz"


def _not_here(name: str, data_dir: Path) -> SourceError:
    return SourceError(
        f"the rows of {name} are not here",
        got=f"no rows in {data_dir / 'reasoning' / name / LOCAL[name][1]}.jsonl.gz",
        allowed="a file with one row a line and the hub's field names",
        fix="put the file there, or leave the data directory out to read from the hub",
    )


def _begun(row: dict[str, Any]) -> dict[str, Any]:
    if "ctx_a" in row:
        return row
    match = _TAIL.fullmatch(row["ctx"])
    a, b = (match["a"], match["b"]) if match else (row["ctx"], "")
    return {**row, "ctx_a": a, "ctx_b": b}


def _need() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "general tasks need lm-evaluation-harness",
            got="no module lm_eval",
            allowed="lm-eval 0.4.13 or later",
            fix="pip install 'retain-lora[eval]'",
        )


def _check_known(name: str) -> None:
    known = _manager().all_tasks
    if name not in known:
        raise unknown("general task", name, [*known, "knowledge"])


def _load(names: Sequence[str], data_dir: Path | None) -> list[Any]:
    """lm-eval's tasks and groups of these names."""
    loaded: list[Any] = []
    for name in names:
        if data_dir is not None and name in LOCAL:
            loaded.append(_local(name, data_dir))
            continue
        _check_known(name)
        try:
            found = _manager().load([name])
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SourceError(
                f"the data of lm-eval's task {name} cannot be read",
                got=reason[:160],
                allowed="a data set that is cached, or a connection to the hub",
                fix=f"give a data directory, for one of {', '.join(LOCAL)}; or go online",
            ) from error
        loaded += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
    return loaded


def _local(name: str, data_dir: Path) -> Any:
    """lm-eval's task of this name, reading local files."""
    import datasets

    folder, scored = LOCAL[name]
    rows = local_rows(name, scored, data_dir)
    if not rows:
        raise _not_here(name, data_dir)
    found = datasets.DatasetDict({scored: datasets.Dataset.from_list(rows)})
    absent = {key: None for split, key in _SPLITS.items() if split != scored}
    own = {"task": name, "custom_dataset": lambda **_: found, **absent}
    return _manager(folder).load([{"group": "local", "task": [own]}])["tasks"][name]


@cache
def _manager(folder: str | None = None) -> Any:
    """lm-eval's index of tasks: all of them (many seconds), those of one folder, or none ("")."""
    import lm_eval.tasks

    if folder is None:
        return lm_eval.tasks.TaskManager()
    where = Path(lm_eval.tasks.__file__).parent / folder if folder else None
    return lm_eval.tasks.TaskManager(include_path=where, include_defaults=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's bars, and its warnings about what is done here on purpose, to itself.

    It also asks git for a commit, which complains on the process's own stderr outside a checkout.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)
        logger.setLevel(level)
