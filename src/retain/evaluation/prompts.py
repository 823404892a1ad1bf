"""What every measure of a model's own answers asks first: does it write text, and in which form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from retain.data.problems import ask
from retain.data.tokens import need
from retain.errors import ModelError, check_number
from retain.models.off import check_on
from retain.models.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_counts", "put", "writer"]


def check_counts(**counts: int) -> None:
    """Raises `ConfigError` unless each, given by its name, is a whole number from 1 on."""
    for name, value in counts.items():
        check_number(f"{name} is no count", value, f"{name}=32", least=1, whole=True)


def writer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[ModelView, PreTrainedTokenizerBase]:
    """A causal model, whose adapter is on, and its tokenizer.

    Raises:
        ModelError: it writes no text, or its adapter is off.
        SourceError: there is no tokenizer.
    """
    check_on(model)
    view = ModelView.of(model, tokenizer)
    if not view.causal:
        raise ModelError(
            "only a causal model answers prompts", got=type(view.inner).__name__,
            allowed="a model that writes text", fix="measure a classifier by its task's rows",
        )  # fmt: skip
    return view, need(view.tokenizer)


def put(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt in the model's chat form; as it is, where the tokenizer has no template."""
    return ask(tokenizer, prompt) if getattr(tokenizer, "chat_template", None) else prompt
