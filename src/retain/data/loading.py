"""Rows of a task as items, and items as tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from retain.data.batches import Example
from retain.data.rows import Row
from retain.data.sources import load_hub, read_rows
from retain.data.specs import Item, TaskSpec
from retain.data.tokens import fit_prompt, plain, tokenize
from retain.errors import ConfigError, SourceError, unknown, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ALL", "Split", "encode_items", "inside", "load_items", "local_file"]

Split = Literal["train", "eval", "validation"]

Answer = int | str | float

ALL = 1 << 62
"""As a limit, or as held: as many as there are."""

_SUFFIXES = (".jsonl.gz", ".jsonl")


def load_items(
    spec: TaskSpec,
    split: Split,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    held: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> list[Item]:
    """The rows of a split, rendered, in the order of the file.

    Rows without a gold label are left out, and a warning says how many.

    With a `limit` it is a random subset, which depends on `seed`, the task's name and the split
    alone; a smaller limit gives a subset of a larger one's rows.

    - train, a task with fixed label words: each class gets an equal share; what a class is too
      small for goes to the others.
    - eval, a task with groups: whole groups, at most `limit` rows in all.
    - else: any rows alike.
    - validation: rows of the training file, chosen as for eval whatever the seed, but a quarter of
      the file at most; those that `held` leaves out of the training rows, with all of their text.

    Args:
        spec: the task.
        split: "train", "eval" or "validation".
        data_dir: folder that holds ``<spec.local>/<file>.jsonl.gz`` (or ``.jsonl``); without it
            the data set is read from the hub. A path that leads out of it, by ``..``, as an
            absolute one or through a link, is refused.
        limit: at most so many rows; None for all.
        seed: of the subset.
        held: of "train": the validation rows of this limit are not among them.
        tokenizer: with one, prompts too long are cut here (`retain.data.tokens.fit_prompt`), so
            that training and scoring read the same text.
        max_length: tokens of prompt and answer together, for that; the task's own by default.

    Raises:
        SourceError: the data is not there, cannot be read, or does not fit the task.
        ConfigError: an unknown split.

    Warns:
        RetainWarning: rows have no gold label.
    """
    if split not in get_args(Split):
        raise unknown("split", str(split), get_args(Split))
    if limit is not None and limit < 1:
        raise ConfigError("the limit is too small", got=limit, allowed="1 or more", fix="100")
    file: Split = "train" if split == "validation" else split
    rows = _hub(spec, file) if data_dir is None else _local(spec, file, Path(data_dir))
    answers = {i: a for i, row in enumerate(rows) if (a := spec.solution(row, i)) is not None}
    if not answers:
        raise SourceError(
            f"task {spec.name} has no row with a gold label in its {split} split",
            got=f"{len(rows)} rows without one in the field {spec.gold!r}",
            allowed="at least one labelled row",
            fix="name a split with labels in the task's file",
        )
    if len(answers) < len(rows):
        warn(
            f"task {spec.name}: {len(rows) - len(answers)} of {len(rows)} {file} rows have no gold "
            f"label in {spec.gold!r}; they are left out"
            + (' (-1 and "-" are none, where they are no option)' if spec.kind == "choice" else "")
        )
    if split == "train" and held:
        answers = _without(spec, rows, answers, _validation(spec, rows, answers, held))
    chosen = sorted(answers)
    if split == "validation":
        chosen = _validation(spec, rows, answers, limit or ALL)
    elif limit is not None and limit < len(chosen):
        chosen = _subset(spec, split, rows, answers, limit, seed)
    items = [spec.item(rows[i], i, answers[i]) for i in chosen]
    if tokenizer is None:
        return items
    length = max_length or spec.max_length
    return [_fitted(item, tokenizer, length, spec, split)[0] for item in items]


def _validation(
    spec: TaskSpec, rows: Sequence[Row], answers: Mapping[int, Answer], limit: int
) -> list[int]:
    """The numbers of the training rows that are held out: a quarter at most."""
    return _subset(spec, "eval", rows, answers, min(limit, max(1, len(answers) // 4)), 0)


def _without(
    spec: TaskSpec, rows: Sequence[Row], answers: Mapping[int, Answer], held: Sequence[int]
) -> dict[int, Answer]:
    """The answers of the other rows, but for those with the text of one that is held out."""

    def text(number: int) -> str:
        return spec.item(rows[number], number, answers[number]).prompt

    taken, out = {text(i) for i in held}, {*held}
    return {i: a for i, a in answers.items() if i not in out and text(i) not in taken}


def _subset(
    spec: TaskSpec,
    split: Split,
    rows: Sequence[Row],
    answers: Mapping[int, Answer],
    limit: int,
    seed: int,
) -> list[int]:
    """The numbers of at most `limit` rows, sorted."""
    shuffled = sorted(answers)
    random.Random(f"{spec.name}:{split}:{seed}").shuffle(shuffled)
    if split == "train" and spec.labels:
        turns: dict[int, tuple[int, int]] = {}
        seen: dict[Answer, int] = {}
        for place, i in enumerate(shuffled):  # the k-th row of each class comes in round k
            turns[i] = (seen.get(answers[i], 0), place)
            seen[answers[i]] = turns[i][0] + 1
        shuffled.sort(key=turns.__getitem__)
    elif split == "eval" and spec.group:
        groups: dict[str, list[int]] = {}
        for i in shuffled:
            groups.setdefault(spec.item(rows[i], i, answers[i]).group, []).append(i)
        taken: list[int] = []
        for group in groups.values():
            if len(taken) + len(group) <= limit:
                taken += group
        smallest: list[int] = min(groups.values(), key=len)
        return sorted(taken or smallest)
    return sorted(shuffled[:limit])


def inside(folder: Path, below: str | Path, what: str) -> Path:
    """A path below a folder, as a file that somebody else may have written names it.

    Args:
        folder: what the user has named.
        below: relative to it.
        what: names the path, for the error.

    Raises:
        SourceError: it leads out of the folder: by "..", as an absolute path or by a link.
    """
    path = folder / below
    try:
        if "\x00" in str(below):
            raise ValueError("a NUL byte")
        home, real = folder.resolve(), path.resolve()
        path.is_file()  # raises if no file can have such a name
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(
            f"{what} is no path",
            got=f"{str(below)[:80]!r}: {reason}",
            allowed=f"a path below {folder}",
            fix="correct it",
        ) from error
    if real.is_relative_to(home) and not Path(below).is_absolute():
        return path
    raise SourceError(
        f"{what} leads out of the data folder",
        got=f"{str(below)!r}, which is {real}",
        allowed=f"a path below {home}, without links that lead out of it",
        fix=f"name the folder that holds both with --data-dir, or copy the files into {home}",
    )


def local_file(spec: TaskSpec, split: Split, data_dir: Path) -> Path | None:
    """The file of a task's rows in a data folder; None where there is none.

    Raises:
        ConfigError: the task names a place outside that folder.
    """
    home, name = data_dir.expanduser(), getattr(spec.files, split)
    what = f"local: or files: of task {spec.name}"
    paths = [inside(home, Path(spec.local, f"{name}{s}"), what) for s in _SUFFIXES if spec.local]
    return next((p for p in paths if p.is_file()), None)


def _local(spec: TaskSpec, split: Split, data_dir: Path) -> list[Row]:
    path = local_file(spec, split, data_dir)
    if path is None:
        raise SourceError(
            f"the {split} rows of task {spec.name} are not here",
            got=f"no {data_dir.expanduser() / spec.local / getattr(spec.files, split)}.jsonl.gz"
            if spec.local
            else "no local: in the task's file",
            allowed="a file .jsonl.gz or .jsonl with one row a line",
            fix="put the file there, or name another folder with --data-dir"
            + (f", or leave it out to read {spec.hub.path} from the hub" if spec.hub.path else ""),
        )
    return read_rows(path)


def _hub(spec: TaskSpec, split: Split) -> list[Row]:
    hub, name = spec.hub, getattr(spec.hub.splits, split)
    if not hub.path:
        raise SourceError(
            f"task {spec.name} is not on the hub",
            got="no hub: path: in the task's file",
            allowed="local files",
            fix=f"give --data-dir, a folder that holds {spec.local or 'the files'}",
        )
    try:
        found = load_hub(hub.path, hub.name, name)
    except SourceError as error:
        raise SourceError(
            f"the {split} rows of task {spec.name} cannot be read from the hub",
            got=f"{hub.path} {hub.name or ''} {name}: {error.got}",
            allowed="a data set that is cached, or a connection to the hub",
            fix=f"give --data-dir, a folder that holds {spec.local or 'the files'}/"
            f"{getattr(spec.files, split)}.jsonl.gz",
        ) from error
    return [spec.from_hub(row, number) for number, row in enumerate(found)]


def _fitted(
    item: Item,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    spec: TaskSpec,
    split: Split,
) -> tuple[Item, list[int]]:
    """An item whose prompt leaves room for its answer, and the tokens of the completion."""
    completion = plain(tokenizer, item.completion)
    if spec.kind == "choice":
        answer = max(len(plain(tokenizer, option)) for option in item.options)
    else:
        completion += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answer = len(completion) if split == "train" else spec.max_new_tokens
    prompt = fit_prompt(item.prompt, tokenizer, max_length - answer, spec.truncate)
    if not prompt:
        raise SourceError(
            f"row {item.row + 1} of task {spec.name} leaves no room for a prompt",
            got=f"an answer of {answer} tokens, max_length {max_length}",
            allowed="at least one token of the prompt and the whole answer",
            fix=f"a max_length of {answer + 64} or more",
        )
    return replace(item, prompt=prompt), completion


def encode_items(
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    causal: bool,
    spec: TaskSpec,
) -> list[Example]:
    """Items as tokenised training rows, in their order.

    Causal: prompt and completion, tokenised apart as `retain.evaluation.ranking` does; only the
    completion is predicted. A prompt too long is cut (`retain.data.tokens.fit_prompt`), the
    completion never. What is generated ends with the end-of-text token, so that the model learns
    to stop.
    An encoder's row is its one or two texts, cut on the right, and one target: the index of the
    class, or the number.

    Args:
        items: of `load_items`.
        tokenizer: of the model.
        max_length: tokens of a row at most.
        causal: for a decoder, else for an encoder with a classification head.
        spec: their task.

    Raises:
        ConfigError: the task cannot be asked of an encoder.
        SourceError: a completion alone is longer than a row may be.
    """
    if causal:
        return [_causal(item, tokenizer, max_length, spec) for item in items]
    if not spec.texts or (spec.kind != "regression" and not spec.labels):
        raise ConfigError(
            f"task {spec.name} cannot be asked of an encoder",
            got=f"kind {spec.kind}, {'no texts' if not spec.texts else 'options of each row'}",
            allowed="a task with texts and fixed label words, or a regression",
            fix="use a decoder, or give texts: and a list of options: in the task's file",
        )
    return [_classify(item, tokenizer, max_length, spec) for item in items]


def _causal(
    item: Item, tokenizer: PreTrainedTokenizerBase, max_length: int, spec: TaskSpec
) -> Example:
    fitted, completion = _fitted(item, tokenizer, max_length, spec, "train")
    head = tokenize(tokenizer, fitted.prompt)
    ids = head + completion
    predict = tuple(place + 1 >= len(head) for place in range(len(ids) - 1))
    return Example(tuple(ids[:-1]), tuple(ids[1:]), predict)


def _classify(
    item: Item, tokenizer: PreTrainedTokenizerBase, max_length: int, spec: TaskSpec
) -> Example:
    out = tokenizer(*item.texts, truncation=True, max_length=max_length)
    target = float(item.answer) if spec.kind == "regression" else int(item.answer)
    segments = tuple(out.get("token_type_ids", ()))
    return Example(tuple(out["input_ids"]), (cast(int, target),), (), segments)
