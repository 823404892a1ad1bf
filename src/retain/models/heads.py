"""Run a model and get logits only where something is predicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from retain.data.batches import Batch
from retain.errors import ModelError
from retain.models.adapter import unwrap

__all__ = ["compact_head", "forward_body", "forward_logits", "is_causal", "pad_id"]


def is_causal(model: nn.Module) -> bool:
    """True for a causal language model, false for a sequence classifier.

    Raises:
        ModelError: a model without either head, or with one whose labels are not exclusive.
    """
    inner: Any = unwrap(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    name = type(base).__name__
    if "SequenceClassification" in name:
        config: Any = getattr(base, "config", None)
        if getattr(config, "problem_type", None) == "multi_label_classification":
            raise ModelError(
                "the head's labels do not exclude each other",
                got="problem_type='multi_label_classification'",
                allowed="single-label classification: predictions are read as a softmax",
                fix="train one label at a time, or plain LoRA with your own trainer",
            )
        return False
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return True
    raise ModelError(
        "the model has no head that predicts",
        got=name,
        allowed="a ...ForCausalLM or ...ForSequenceClassification model",
        fix="load an encoder with num_labels=...",
    )


def pad_id(model: Any) -> int:
    """The token that pads a model's batches; 0 where it has none, for the mask hides it."""
    return getattr(model.config, "pad_token_id", None) or 0


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
