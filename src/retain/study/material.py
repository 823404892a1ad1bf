"""What a run is made of: the base model, the rows of its tasks, and the source text."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from retain.data.batches import Example
from retain.data.loading import ALL, Split, encode_items, load_items
from retain.data.readers.paths import kind_of
from retain.data.sources import Row, encode, read_rows
from retain.data.specs import Item, TaskSpec
from retain.documents import sealed
from retain.errors import ConfigError, ModelError, SourceError
from retain.files import first_rank
from retain.models.heads import is_causal
from retain.models.load import is_encoder, load_model
from retain.records import RunSource, RunSpec
from retain.study.grid import task_at
from retain.study.work import Work, model_digest, read_shared, source_file, write_shared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Base", "TaskData", "load_base", "load_source", "load_tasks", "seed_of"]

HELDOUT_SEED = 0
"""Text to measure forgetting on is the same for all seeds, so that differences are paired."""


@dataclass
class Base:
    """A base model as a run wants it.

    Attributes:
        model: plain, fresh.
        tokenizer: its own.
        causal: a decoder; else an encoder with a head for all tasks.
        columns: the outputs of each task, in the order's order; None for a decoder.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    causal: bool
    columns: list[slice] | None

    def columns_of(self, index: int) -> slice | None:
        """The outputs of a task, by its place in the order; None of a decoder."""
        return None if self.columns is None else self.columns[index]


@dataclass
class TaskData:
    """The rows of a task.

    Attributes:
        spec: the task.
        train: tokenised.
        test: items to score.
        max_length: tokens of a row.
    """

    spec: TaskSpec
    train: list[Example]
    test: list[Item]
    max_length: int


def seed_of(seed: int, index: int) -> int:
    """The seed of everything random in a part of a run.

    That is the place of a task in the order; -1 for what comes before the first.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4], "big")


def load_base(run: RunSpec, specs: Sequence[TaskSpec]) -> Base:
    """The base model; a new head's weights depend on the seed of the run alone.

    Raises:
        ModelError: it cannot be loaded, or is an encoder-decoder.
        ConfigError: a task cannot be asked of an encoder.
    """
    from transformers import set_seed

    name = run.model
    kind: dict[str, Any] = {"dtype": run.dtype}
    if run.attention is not None:
        kind["attn_implementation"] = run.attention
    if not is_encoder(name):
        found = load_model(name, **kind)
        try:
            causal = is_causal(found.model)
        except ModelError:  # an encoder whose configuration does not say so
            if getattr(found.model.config, "is_encoder_decoder", False):
                raise
            causal = False
        if causal:
            return Base(found.model, found.tokenizer, True, None)
    columns, start = [], 0
    for spec in specs:
        width = 1 if spec.kind == "regression" else spec.classes
        if width is None or not spec.texts:
            raise ConfigError(
                f"task {spec.name} cannot be asked of an encoder",
                got=f"{name}, a task of kind {spec.kind} without fixed classes or texts",
                allowed="tasks with texts and fixed label words, or regressions",
                fix="use a decoder for it",
            )
        columns.append(slice(start, start + width))
        start += width
    set_seed(seed_of(run.seed or 0, -1))
    found = load_model(name, num_labels=start, ignore_mismatched_sizes=True, **kind)
    return Base(found.model, found.tokenizer, False, columns)


def load_tasks(run: RunSpec, base: Base, work: Work) -> list[TaskData]:
    """The rows of all tasks: training rows by the seed of the run, test rows the same for all.

    Of a run that is scored on validation rows, the test rows are not read: see `load_items`.

    Raises:
        SourceError: rows are missing or do not fit their task.
    """
    out = []
    for index, task in enumerate(run.order.tasks):
        spec = task_at(task, work.base)
        length = min(run.settings(index).max_length, spec.max_length)
        cut: dict[str, Any] = {"tokenizer": base.tokenizer, "max_length": length}
        where: dict[str, Any] = {"data_dir": work.data_dir} | (cut if base.causal else {})
        seed = seed_of(run.seed or 0, index)
        part: Split = "validation" if run.evaluation.split == "validation" else "eval"
        held = run.data.test or ALL if part == "validation" else 0
        rows = load_items(spec, "train", limit=run.data.train, seed=seed, held=held, **where)
        test = load_items(spec, part, limit=run.data.test, **where)
        train = encode_items(rows, base.tokenizer, max_length=length, causal=base.causal, spec=spec)
        out.append(TaskData(spec, train, test, length))
    return out


def load_source(run: RunSpec, base: Base, work: Work) -> tuple[list[Example], list[Example]]:
    """Source text to measure what is to be kept on, and held-out text to measure forgetting on.

    Both are empty for an encoder: its head is new, so the base model has no answers to keep.

    Raises:
        SourceError: the text is missing or too short.
    """
    source = run.source
    if source.kind == "none" or not base.causal:
        return [], []
    seed = seed_of(run.seed or 0, -1)
    if source.kind == "self":
        pair: list[list[Row]] = [
            _samples(run, base, work, count, s)
            for count, s in ((source.rows, seed), (source.heldout, HELDOUT_SEED))
        ]
    else:
        pair = _texts(source, work, seed, base.tokenizer)
    size: dict[str, Any] = {"max_length": source.max_length, "causal": True, "loss": "source"}
    fit, held = (encode(rows, base.tokenizer, **size) for rows in pair)
    return fit[: source.rows], held[: source.heldout]


def _samples(run: RunSpec, base: Base, work: Work, count: int, seed: int) -> list[Row]:
    """Text that the base model writes, kept in a file: other runs want the same."""
    from retain.models.generating import sample_rows, sampled_form

    length = run.source.max_length
    wanted = [run.model, run.dtype, count, length, seed, sampled_form()]
    digest = model_digest(run.model)  # of a local model, which may change at its place
    wanted += [] if digest is None else [digest]
    name = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    path = work.out / "source" / f"{name}.json"
    kept = read_shared(path)
    if kept is not None and isinstance(kept.get("rows"), list):
        return list(kept["rows"])
    options: dict[str, Any] = {"count": count, "max_length": length, "progress": work.progress}
    options["half"] = "held-out" if seed == HELDOUT_SEED else "source"
    rows: list[Row] = [*sample_rows(base.model, base.tokenizer, seed=seed, **options)]
    if first_rank():
        write_shared(work, path, sealed({"made_with": wanted, "rows": rows}))
    return rows


def _texts(
    source: RunSource, work: Work, seed: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[Row]]:
    """Rows to fit on and held-out rows, which share none."""
    paths = [
        work.base / str(source.path) if source.kind == "file" else _data_file(source, split, work)
        for split in (source.split, source.heldout_split)
    ]
    rows, held = (_long_enough(source, path, tokenizer) for path in paths)
    taken = _choose(len(held), source.heldout, HELDOUT_SEED)
    free = [r for i, r in enumerate(rows) if paths[0] != paths[1] or i not in taken]
    chosen = _choose(len(free), source.rows, seed)
    if not chosen or not taken:
        raise SourceError(
            "the source has too few rows",
            got=f"{len(rows)} rows to measure on, {len(held)} held out",
            allowed=f"more than {source.heldout} where both come from one file",
            fix="give more text, or lower source.heldout or source.min_words",
        )
    return [[free[i] for i in sorted(chosen)], [held[i] for i in sorted(taken)]]


def _long_enough(source: RunSource, path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows of a file that have enough words; a text that is one row is cut into rows first."""
    # A study's rows are drawn from all rows of its file; of a long text passages are enough.
    most = 4 * (source.rows + source.heldout) if kind_of(path) == ".txt" else None
    rows = read_rows(path, most, seed=HELDOUT_SEED, max_length=source.max_length)
    if any(row.get("pack") for row in rows):
        pieces = encode(rows, tokenizer, max_length=source.max_length, causal=True, loss="source")
        return [{"input_ids": [*piece.tokens, piece.targets[-1]]} for piece in pieces]
    least = source.min_words
    return [r for r in rows if not least or len(str(r.get("text", "")).split()) >= least]


def _choose(size: int, count: int, seed: int) -> set[int]:
    numbers = list(range(size))
    random.Random(seed).shuffle(numbers)
    return set(numbers[:count])


def _data_file(source: RunSource, split: str, work: Work) -> Path:
    path = source_file(source, split, work.data_dir)
    if path is None:
        raise SourceError(
            "no such source",
            got=(work.data_dir or Path()) / str(source.name) / f"{split}.jsonl.gz",
            allowed="a file .jsonl.gz, .jsonl or .txt",
            fix="give --data-dir, the folder that holds the local data",
        )
    return path
