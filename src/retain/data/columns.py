"""Columns beside those that a format reads: which may be passed over, and which never.

A column that changes what a row means is refused by name, unless what it says stands in the text
that is read. Others are passed over and counted; names that many data sets have for things that
are no text (ids, sources, scores) are not even told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from retain.data.counts import RowCounts
from retain.data.messages import without_none
from retain.data.rows import Content, Row
from retain.errors import SourceError

__all__ = ["check_asked", "check_columns"]

_WITH_IDS = {
    "attention_mask", "labels", "token_type_ids", "position_ids", "completion_mask",
    "assistant_masks", "seq_lengths", "loss_mask",
}  # fmt: skip
"""What goes with input_ids, and says nothing beside text."""

_NO_TEXT = {
    "images", "image", "audio", "audios", "video", "videos", "pixel_values", "input_values",
    "input_features", "inputs_embeds", "decoder_input_ids", "decoder_attention_mask",
}  # fmt: skip
"""What a model of text alone cannot read."""

_CHANGES = _WITH_IDS | _NO_TEXT | {
    # what a chat template is given
    "tools", "functions", "function_call", "chat_template_kwargs", "documents", "system",
    "system_prompt", "system_message", "messages", "conversations", "conversation", "history",
    "prompt", "completion", "chosen", "rejected", "role",
    # what an answer rests on
    "context", "passage", "passages", "document", "reasoning", "reasoning_content", "thinking",
    "thought", "instruction", "input", "output", "text", "text_pair",
    # how much a row counts
    "weight", "weights", "sample_weight", "loss_weight",
}  # fmt: skip

_BEFORE_PROMPT = _NO_TEXT | {
    "tools", "functions", "chat_template_kwargs", "documents", "system", "system_prompt",
    "system_message", "messages", "conversations", "conversation", "history", "context", "passage",
    "passages", "document", "instruction", "input",
}  # fmt: skip
"""What a prompt would be asked with, were it read."""

_PASSED = {
    "id", "ids", "idx", "index", "uid", "uuid", "guid", "qid", "pid", "source", "src", "origin",
    "dataset", "subset", "config", "split", "fold", "url", "uri", "link", "domain", "lang",
    "language", "locale", "license", "category", "categories", "topic", "topics", "subject", "tag",
    "tags", "type", "kind", "level", "difficulty", "score", "scores", "rating", "stars", "quality",
    "votes", "likes", "date", "time", "timestamp", "created", "created_at", "updated_at", "year",
    "author", "user", "username", "model", "generator", "engine", "meta", "metadata", "info",
    "extra", "hash", "md5", "sha", "sha256", "file", "filename", "path", "row", "length", "len",
    "ext", "extension",
    "num_tokens", "n_tokens", "token_count", "dump", "label_text", "label_name", "annotator",
    "worker", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "word_ids",
}  # fmt: skip
_ENDS = ("_id", "_ids", "_idx", "_url", "_score", "_type", "_name", "_date", "_time", "_count",
         "_hash", "_lang", "_path", "_source", "_model")  # fmt: skip

_COPIES = {"text", "messages", "conversations", "conversation"}
"""What data sets keep beside a row's parts as the whole of it, with a template around them."""

_CODE = re.compile(r"(?=.*[\d/_:@])[!-~]+")
"""A hash, a path, a date or a number: no blanks, and something that is no letter."""


def check_columns(
    cells: Row,
    used: set[str],
    content: Content,
    name: str,
    *,
    strict: bool,
    causal: bool,
    counts: RowCounts,
) -> None:
    """Refuses a column that would be lost, and counts one that is passed over.

    Args:
        cells: the row's columns that hold something.
        used: those that are read.
        content: what was read.
        name: of the format.
        strict: any other column of text is refused, but for hashes, paths and numbers.
        causal: for a decoder, which reads no ``label``.
        counts: where the others are counted.

    Raises:
        SourceError: a column changes what the row means.
    """
    for key in (k for k in cells if k not in used):
        value = cells[key]
        if _is_empty(value):
            continue
        if name == "input_ids" and key != "label":
            _check_beside_ids(key, value, cells["input_ids"], counts)
            continue
        if key in {"label", "labels"} and causal and not isinstance(value, list | tuple):
            counts.unread(str(key))
            continue
        if key not in _CHANGES:
            if _passed(key):
                continue
            prose = any(not _CODE.fullmatch(s) for s in _strings(value))
            if not (strict and prose) or str(key).startswith("original"):
                counts.unread(str(key))
                continue
        if key == "rejected" and _said("chosen", cells.get("chosen"), content):
            counts.rejected_unread += 1  # the chosen answer stands in the messages
        elif _said(str(key), value, content):
            counts.unread(str(key))
        else:
            raise _lost(str(key), name)


def check_asked(
    row: Mapping[str, Any], used: set[str], prompt: str, number: int, counts: RowCounts
) -> None:
    """`check_columns` of a row whose prompt is asked as it stands.

    Args:
        row: its columns.
        used: those that are read.
        prompt: the one.
        number: of the row, from 1.
        counts: where columns that are passed over are counted.

    Raises:
        SourceError: a column says something that the prompt would have to be asked with.
    """
    asked = " ".join(prompt.split())
    for key, value in without_none(row).items():
        if key in used or _is_empty(value):
            continue
        said = [" ".join(text.split()) for text in _strings(value)]
        if key not in _BEFORE_PROMPT or (said and all(_within(text, asked) for text in said)):
            if not _passed(key):
                counts.unread(str(key))
            continue
        raise SourceError(
            f"the column {key!r} would be lost: a prompt is asked alone",
            got=f"{key} beside prompt in row {number}",
            allowed=f"{', '.join(sorted(used))}; ids, sources and scores",
            fix=f"write what {key!r} says into the prompt, or take it out",
        )


def _is_empty(value: Any) -> bool:
    """Whether a cell is a blank text, or a list or dictionary of nothing."""
    says = value.strip() if isinstance(value, str) else value
    return isinstance(says, str | list | tuple | dict) and not says


def _passed(key: Any) -> bool:
    """Whether a column's name is one of things that are no text."""
    name = str(key).lower()
    return name in _PASSED or name.startswith("_") or name.endswith(_ENDS)


def _lost(key: str, name: str) -> SourceError:
    return SourceError(
        f"the column {key!r} would be lost",
        got=f"{key} beside {name}",
        allowed="columns that the format reads (docs/data.md), ids, sources and scores",
        fix=f"take {key!r} out, or write what it says into "
        + ("the messages" if name == "messages" else "the text or the prompt"),
    )


def _check_beside_ids(key: str, value: Any, ids: Any, counts: RowCounts) -> None:
    """Counts a column beside tokens, and refuses one that is another input of the model.

    The text that the tokens were made of may stand there.
    """
    if key in _WITH_IDS - {"loss_mask"} or (key not in _CHANGES and _passed(key)):
        return
    if not isinstance(ids, list | tuple) or _strings(value):
        if key in _NO_TEXT and isinstance(ids, list | tuple):
            raise _lost(str(key), "input_ids")
        return
    alike = isinstance(value, list | tuple) and len(value) == len(ids)
    if alike or key in _CHANGES:
        raise _lost(str(key), "input_ids")
    counts.unread(str(key))


def _strings(value: Any) -> list[str]:
    """All text in a value, however deep, but for the roles of messages."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Mapping):
        return [s for k, v in value.items() if k != "role" for s in _strings(v)]
    if isinstance(value, list | tuple):
        return [s for v in value for s in _strings(v)]
    return []


def _said(key: str, value: Any, content: Content) -> bool:
    """Whether what a column says is in what is read; or, of a copy of the row, that in it."""
    wanted, read = ([" ".join(s.split()) for s in _strings(v)] for v in (value, vars(content)))
    if not wanted:
        return False
    if all(_within(text, " ".join(read)) for text in wanted):
        return True
    return key in _COPIES and all(_within(text, " ".join(wanted)) for text in read)


def _within(text: str, whole: str) -> bool:
    """Whether a text stands in another one, but not as a part of a word."""
    at = whole.find(text)
    while at >= 0:
        if not (_joined(whole, at) or _joined(whole, at + len(text))):
            return True
        at = whole.find(text, at + 1)
    return False


def _joined(text: str, place: int) -> bool:
    """Whether a word goes on at a place; scripts without blanks between words aside."""
    sides = text[max(place - 1, 0) : place + 1]
    return 0 < place < len(text) and sides.isascii() and sides.isalnum()
