"""Run a model and get its outputs only where something is predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from retain.data.batches import Batch
from retain.models.adapter import unwrap
from retain.models.kinds import inner_model, is_causal, writes

__all__ = [
    "compact_head",
    "divergence",
    "finds_end_by_pad",
    "forward_body",
    "forward_logits",
    "is_causal",
    "pad_id",
    "rows_of_embedding",
]


def divergence(base: Tensor, tuned: Tensor, regression: bool) -> Tensor:
    """``KL(base || tuned)`` of each prediction in nats, [predictions].

    Args:
        base: log-probabilities, or the outputs of a regression, [predictions, outputs].
        tuned: the same of the tuned model.
        regression: see `retain.models.kinds`.
    """
    if regression:
        return 0.5 * (base - tuned).square().sum(-1)
    return (base.exp() * (base - tuned)).sum(-1)


def rows_of_embedding(model: nn.Module) -> int | None:
    """How many tokens a model has a row for; None for one without such a table."""
    find: Any = getattr(inner_model(model), "get_input_embeddings", None)
    try:
        table = None if find is None else find()
    except NotImplementedError:
        return None
    if not isinstance(table, nn.Module):
        return None
    inner = next((m for m in table.modules() if isinstance(m, nn.Embedding)), None)
    return None if inner is None else int(inner.num_embeddings)


def pad_id(model: Any) -> int:
    """The token that pads a model's batches; 0 where it has none, for the mask hides it.

    A token that the model has no row for is none.
    """
    pad, rows = getattr(model.config, "pad_token_id", None), rows_of_embedding(model)
    return pad if pad is not None and 0 <= pad < (rows or math.inf) else 0


def finds_end_by_pad(model: nn.Module) -> bool:
    """Whether a classifier reads the last token that is no padding, as decoders with a head do."""
    return not is_causal(model) and writes(inner_model(model).config)


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch's predictions, [predictions, classes], row after row.

    A causal model's head is the widest layer by far, so it is run at the predicted positions
    alone: they are picked out of the hidden states as these enter the head, as one matrix.
    """
    if batch.predict is None:
        logits: Tensor = model(**batch.inputs).logits
        return logits
    inner: Any = unwrap(model)
    head, predict = inner.get_output_embeddings(), batch.predict
    handle = head.register_forward_pre_hook(lambda _m, args: (args[0][predict][None],))
    try:
        logits = model(**batch.inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits[0]


def forward_body(model: nn.Module, batch: Batch) -> None:
    """Runs a model for its hooks' sake: a causal head sees one position alone."""
    if batch.predict is None:
        model(**batch.inputs)
        return
    inner: Any = unwrap(model)
    head = inner.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _m, args: (args[0][:1, :1],))
    try:
        model(**batch.inputs, use_cache=False)
    finally:
        handle.remove()


@contextmanager
def compact_head(model: nn.Module) -> Iterator[None]:
    """Lets the head see contiguous input, as generation wants it.

    transformers hands the head a strided view of the last position of each row. A CPU product
    with such a view copies the head's weights once for each row.
    """
    inner: Any = unwrap(model)
    head = inner.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _m, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()
