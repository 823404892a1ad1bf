"""Read source text and training rows from a data set, a file, or the model itself.

Rows are dictionaries. What they may hold:

    input_ids                  tokens, ready made (and optionally ``label``)
    prompt, completion         strings; only the completion counts as prediction
    messages                   a chat, rendered by the tokenizer's template
    text (or content, sentence)        plain text
    text + text_pair, sentence1 + sentence2, premise + hypothesis, question + answer ...
                               pairs for a classifier; ``label`` is its class
"""

from __future__ import annotations

import csv
import gzip
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from retain.data.batches import Example
from retain.data.counts import RowCounts
from retain.data.tokens import tokenize
from retain.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Row", "encode", "read_rows"]

Row = Mapping[str, Any]

UNLABELLED = -1
"""The target of a classifier's row without a label."""

_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
_UTF8 = "utf-8-sig"  # Excel and PowerShell begin a file with a byte order mark
_SINGLE = ("text", "content", "sentence")
_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "answer"),
)


def read_rows(source: str | Path | Iterable[Row], limit: int | None = None) -> list[Row]:
    """The rows of a `datasets.Dataset`, a list of dictionaries or strings, or a file.

    Args:
        source: what to read; files by suffix: %s.
        limit: read at most so many rows.

    Raises:
        SourceError: the file is missing, damaged, empty or of another kind.
    """
    if isinstance(source, str | Path):
        rows = _read_file(Path(source).expanduser(), limit)
    else:
        rows = []
        for row in source:
            rows.append({"text": row} if isinstance(row, str) else row)
            if limit is not None and len(rows) >= limit:
                break
    if not rows:
        raise SourceError(
            "the source is empty",
            got=f"0 rows in {_short(source)}",
            allowed="at least 1 row",
            fix="give a data set or a file with text",
        )
    return rows


def _read_file(path: Path, limit: int | None) -> list[Row]:
    kind = next(
        (s for s in sorted(_SUFFIXES, key=len, reverse=True) if path.name.endswith(s)), None
    )
    if str(path) == "self" and not path.exists():
        raise SourceError(
            "text of the model's own is no file",
            got="self",
            allowed=f"a file ending in {', '.join(_SUFFIXES)}",
            fix="leave the source out where the model's own text is the default; see --help",
        )
    if not path.is_file() or kind is None:
        raise SourceError(
            "no such source" if not path.is_file() else "a source of an unknown kind",
            got=str(path),
            allowed=f"a file ending in {', '.join(_SUFFIXES)}; 'self' where text may be sampled",
            fix="check the path and the suffix",
        )
    try:
        rows = _parse(path, kind, limit)
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise SourceError(
            "the source cannot be read",
            got=f"{path} ({type(error).__name__}: {str(error)[:120]})",
            allowed=f"a sound {kind} file",
            fix="repair or replace the file",
        ) from error
    return rows if limit is None else rows[:limit]


def _parse(path: Path, kind: str, limit: int | None) -> list[Row]:
    if kind in {".txt", ".md"}:
        text = path.read_text(encoding=_UTF8)
        return [{"text": text, "pack": True}] if text.strip() else []
    if kind in {".jsonl", ".jsonl.gz"}:
        rows: list[Row] = []
        opener = gzip.open if kind.endswith(".gz") else open
        with opener(path, "rt", encoding=_UTF8) as file:
            for line in file:
                if limit is not None and len(rows) >= limit:
                    break
                if line.strip():
                    rows.append(_row(json.loads(line)))
        return rows
    if kind == ".json":
        found = json.loads(path.read_text(encoding=_UTF8))
        return [_row(r) for r in (found if isinstance(found, list) else [found])]
    if kind == ".csv":
        with path.open(encoding=_UTF8, newline="") as file:
            return list(csv.DictReader(file))
    import pyarrow.parquet as parquet

    return list(parquet.read_table(path).to_pylist())


def _row(value: Any) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"a row is a {type(value).__name__}, not an object")
    return value


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    causal: bool,
    loss: str = "assistant",
    counts: RowCounts | None = None,
) -> list[Example]:
    """Tokenises rows, cut to `max_length` tokens; rows that predict nothing are left out.

    Raises:
        SourceError: the rows' columns are not known, a row is damaged, or nothing is left.

    Warns:
        UserWarning: some prompts leave no room for their completions.
    """
    if max_length < 2:
        raise SourceError("max_length is too small", got=max_length, allowed="2 or more", fix="128")
    examples: list[Example] = []
    long = 0
    quiet = counts is not None
    counts = counts or RowCounts()
    counts.rows += len(rows)
    for number, row in enumerate(rows, start=1):
        before = len(examples)
        try:
            examples += (
                _causal(row, tokenizer, max_length, counts)
                if causal
                else [_classify(row, tokenizer, max_length)]
            )
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            TemplateError,
        ) as error:
            raise SourceError(
                f"row {number} of the source cannot be used",
                got=f"{type(error).__name__}: {str(error)[:160]}",
                allowed="strings as text, whole numbers as input_ids and label, chats only with a "
                "chat template",
                fix="repair the row",
            ) from error
        except SourceError as error:
            raise SourceError(
                error.what, got=f"{error.got} (row {number})", allowed=error.allowed, fix=error.fix
            ) from error
        full = len(examples) == before and "prompt" in row and "completion" in row
        long += full
        counts.left_out_no_room += full
        counts.left_out_empty += len(examples) == before and not full
    if long and not (quiet and examples):
        _say_long(long, len(rows), max_length, bool(examples))
    if not examples:
        raise SourceError(
            "the source holds no text to predict",
            got=f"{len(rows)} rows, all shorter than 2 tokens",
            allowed="at least one row of 2 tokens",
            fix="give more text",
        )
    return examples


def _say_long(long: int, rows: int, max_length: int, some: bool) -> None:
    """Warns of prompts that fill a row by themselves; refuses where all of them do."""
    what = f"{long} of {rows} rows have a prompt that fills max_length={max_length}"
    if some:
        warnings.warn(f"{what}; they are left out", UserWarning, stacklevel=3)
        return
    raise SourceError(
        "no completion is left to predict",
        got=what,
        allowed="prompts shorter than max_length",
        fix="raise max_length",
    )


def _causal(
    row: Row, tokenizer: PreTrainedTokenizerBase | None, max_length: int, counts: RowCounts
) -> list[Example]:
    start = 0
    if "input_ids" in row:
        ids = [int(i) for i in row["input_ids"]]
    else:
        tok = _need(tokenizer)
        if "prompt" in row and "completion" in row:
            prompt = tokenize(tok, row["prompt"])
            full = prompt + tok(row["completion"], add_special_tokens=False)["input_ids"]
            end = [] if tok.eos_token_id is None else [tok.eos_token_id]
            ids, start = [*full, *end], len(prompt)
        elif "messages" in row:
            text = tok.apply_chat_template(row["messages"], tokenize=False)
            ids = tok(str(text), add_special_tokens=False)["input_ids"]
        else:
            pair = _pair(row)
            ids = tokenize(tok, "\n".join(pair) if pair else row[_single(row)])
    if row.get("pack"):
        pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    else:
        pieces = [ids[:max_length]]
        if len(ids) > max_length > start:
            counts.completions_cut += start > 0
            counts.texts_cut += start == 0
            counts.tokens_cut += len(ids) - max_length
    return [
        Example(
            tuple(piece[:-1]),
            tuple(piece[1:]),
            tuple(position + 1 >= start for position in range(len(piece) - 1)),
        )
        for piece in pieces
        if len(piece) >= 2 and len(piece) > start
    ]


def _classify(row: Row, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> Example:
    label = row.get("label")
    target = int(label) if label not in (None, "") else UNLABELLED
    if "input_ids" in row:
        return Example(tuple(int(i) for i in row["input_ids"][:max_length]), (target,))
    pair = _pair(row)
    texts = pair if pair else (row[_single(row)],)
    out = _need(tokenizer)(*texts, truncation=True, max_length=max_length)
    return Example(tuple(out["input_ids"]), (target,), (), tuple(out.get("token_type_ids", ())))


def _pair(row: Row) -> tuple[str, str] | None:
    return next(((row[a], row[b]) for a, b in _PAIRS if a in row and b in row), None)


def _single(row: Row) -> str:
    for name in _SINGLE:
        if isinstance(row.get(name), str):
            return name
    empty = next((f"{name} that holds {row[name]!r:.40}" for name in _SINGLE if name in row), None)
    raise SourceError(
        "the source's columns are not known" if empty is None else "a row's text is no string",
        got=empty or ", ".join(map(str, row)) or "none",
        allowed="text, prompt + completion, messages, input_ids, or a known pair of columns",
        fix="rename the column that holds the text to 'text'" if empty is None else "fill the row",
    )


def _need(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise SourceError(
            "text needs a tokenizer",
            got="tokenizer=None",
            allowed="the model's tokenizer, or rows with input_ids",
            fix="pass tokenizer=..., or load the model by a name that has one",
        )
    return tokenizer


def _short(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__


read_rows.__doc__ = (read_rows.__doc__ or "") % ", ".join(_SUFFIXES)
