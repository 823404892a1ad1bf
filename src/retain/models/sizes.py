"""The sizes of a model's tables, and whether what it is to read lies inside them.

A token that the embedding has no row for, or a position that no table holds, ends in an IndexError
on a CPU and in a device that is of no more use on a GPU. So rows are checked once, where they meet
a model.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from retain.data.batches import Example
from retain.errors import ModelError, RetainWarning, SourceError
from retain.models.heads import check_labels, head_kind, text_part, writes
from retain.models.names import inner_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "check_ids",
    "check_length",
    "check_sizes",
    "cut_length",
    "pad_id",
    "pad_multiple",
    "positions",
    "rows_of_embedding",
]

_TABLES = re.compile(r"wpe|(char_)?positions?_embed\w*|embed_positions")
"""Names of tables of absolute positions. Relative ones (``rel_embeddings``) have no end."""

_TENSORS = ("embed_positions", "pos_encoding")
"""The same, kept as a plain tensor: GPT-J, CodeGen, CTRL."""

_RESIZE = (
    "model.resize_token_embeddings(len(tokenizer)) on the base model, before LoRA; for the command "
    "line, save that model to a folder"
)


def rows_of_embedding(model: nn.Module) -> int | None:
    """How many tokens a model has a row for; None for one without such a table."""
    find: Any = getattr(inner_model(model), "get_input_embeddings", None)
    try:
        table = None if find is None else find()
    except NotImplementedError:
        table = None
    parts = table.modules() if isinstance(table, nn.Module) else ()
    return next((m.num_embeddings for m in parts if isinstance(m, nn.Embedding)), None)


def pad_id(model: Any) -> int:
    """The token that pads a model's batches; 0 where it has none, for the mask hides it.

    A token that the model has no row for is none.
    """
    pad, rows = getattr(model.config, "pad_token_id", None), rows_of_embedding(model)
    return pad if pad is not None and 0 <= pad < (rows or math.inf) else 0


def positions(model: nn.Module) -> int | None:
    """How many tokens a row may have; None for a model that has no table of positions.

    Read off the tables themselves. Some leave their first rows free: up to the padding's (RoBERTa),
    or as many as their ``offset`` says (OPT, BART).
    """
    inner = inner_model(model)
    config = getattr(inner, "config", None)
    kind = getattr(config, "model_type", None)
    if kind == "tapas":  # its positions begin again in each cell
        return None
    found = [config.max_seq_len] if config and kind == "mpt" else []  # biases are made in forward
    for module in text_part(model).modules():
        here = vars(module) | module._buffers
        found += [len(t) for key in _TENSORS if isinstance(t := here.get(key), Tensor)]
        tables = [
            child
            for name, child in module.named_children()
            if _TABLES.fullmatch(name) and isinstance(getattr(child, "weight", None), Tensor)
        ]
        for table in tables:
            pad, free = getattr(table, "padding_idx", None), getattr(table, "offset", None)
            if free is None:
                free = 0 if pad is None else pad + 1
            found.append(len(table.weight) - int(free))
        ids = here.get("position_ids")  # which rows are read may be written down beside the table
        if tables and isinstance(ids, Tensor):
            found.append(ids.shape[-1])
    return min(found, default=None)


def cut_length(model: nn.Module, length: int) -> int:
    """A length for text of the model's own: as many tokens as it can read, with a warning."""
    most = positions(model)
    if most is None or length <= most:
        return length
    warnings.warn(
        f"the model has {most} positions: its own text is cut to {most} tokens a row, not {length}",
        RetainWarning,
        stacklevel=3,
    )
    return most


def pad_multiple(model: nn.Module, examples: Sequence[Example], multiple: int) -> int:
    """The multiple that rows are padded to; 1 where that would be beyond the model's positions."""
    most, longest = positions(model), max(len(e.tokens) for e in examples)
    return multiple if most is None or -(-longest // multiple) * multiple <= most else 1


def check_length(
    model: nn.Module, lengths: Iterable[int], what: str = "row", *, fix: str | None = None
) -> None:
    """Refuses rows that are longer than a model can read.

    `what` the rows are and a `fix` other than a smaller ``max_length`` are for the error.

    Raises:
        SourceError: one is longer than the model's table of positions.
    """
    most = positions(model)
    if most is None:
        return
    for number, length in enumerate(lengths, start=1):
        if length > most:
            raise SourceError(
                "a row is longer than the model can read",
                got=f"{length} tokens in {what}" + ("" if fix else f" {number}"),
                allowed=f"{most}, the positions of {type(inner_model(model)).__name__}",
                fix=fix or f"max_length={most} (--max-length {most})",
            )


def check_sizes(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    labels: bool = True,
    lengths: bool = True,
) -> None:
    """Refuses rows that lie outside of a model's tables: tokens, token types, positions, labels.

    Args:
        model: with a head that is known, see `retain.models.heads`.
        examples: tokenised rows.
        tokenizer: by which they were made, if it is known; the errors say more then.
        labels: are those of the whole head; else they are left alone.
        lengths: are those of the rows; else they are left alone.

    Raises:
        SourceError: a token, a token type, a length or a label that the model has no place for.
        ModelError: a head that is not known; or a classifier that finds the end of a row by the
            padding, and has no padding that it could tell.
    """
    kind, inner = head_kind(model), inner_model(model)
    causal, rows = kind == "causal", rows_of_embedding(model)
    head = inner.get_output_embeddings() if causal else None
    predicted = int(getattr(head, "out_features", 0) or rows or 0)
    types = [
        m.num_embeddings
        for n, m in inner.named_modules()
        if n.endswith("token_type_embeddings") and isinstance(m, nn.Embedding)
    ]
    # The head of an encoder-decoder finds its place by the token that ends a row.
    both = not causal and getattr(inner.config, "is_encoder_decoder", False)
    for number, example in enumerate(examples, start=1):
        check_ids(example.tokens, rows, number, tokenizer)
        if causal:
            check_ids(example.targets, predicted or None, number, tokenizer)
        if types and example.segments and max(example.segments) >= min(types):
            raise SourceError(
                "a token type has no row in the model's table",
                got=f"token type {max(example.segments)} in tokenised row {number}",
                allowed=f"0 to {min(types) - 1}",
                fix="use the model's own tokenizer, or leave token_type_ids out",
            )
        if both and inner.config.eos_token_id not in example.tokens:
            raise SourceError(
                "the head reads a row's end token, and there is none",
                got=f"no token {inner.config.eos_token_id} in tokenised row {number}",
                allowed="rows that end with it",
                fix="tokenise with the model's own tokenizer, or a smaller row",
            )
    if lengths:
        check_length(model, (len(e.tokens) for e in examples), "tokenised row")
    if labels and not causal:
        found = (e.targets if len(e.targets) > 1 else e.targets[0] for e in examples)
        check_labels(model, found, "tokenised row")
    if causal or len(examples) < 2 or not writes(inner.config):
        return
    pad = getattr(inner.config.get_text_config(), "pad_token_id", None)
    if pad is None or pad < 0 or (rows is not None and pad >= rows):
        raise ModelError(
            "the classifier finds the end of a row by its padding, and has none",
            got=f"pad_token_id={pad}" + (f", an embedding of {rows} rows" if rows else ""),
            allowed="a token that the embedding has a row for",
            fix="model.config.pad_token_id = tokenizer.pad_token_id, or its eos_token_id",
        )


def check_ids(
    ids: Sequence[float],
    rows: int | None,
    number: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raises `SourceError` for a token of row `number` (from 1) that a table of `rows` lacks."""
    least, most = min(ids, default=0), max(ids, default=0)
    if least >= 0 and (rows is None or most < rows):
        return
    fix = _RESIZE
    if least < 0:
        fix = "tokenise the text anew; padding is left out of input_ids, not written as -100"
    elif tokenizer is not None and most >= len(tokenizer):
        fix = "tokenise the text with the model's own tokenizer"
    raise SourceError(
        "a token has no row in the model's embedding",
        got=f"token {least if least < 0 else most} in tokenised row {number}",
        allowed=f"0 to {rows - 1}" if rows else "0 or more",
        fix=fix,
    )
