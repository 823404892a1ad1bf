"""Text to tokens, in one way everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokenize"]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text's beginning: with the tokenizer's special tokens, unless they are in it.

    A chat template writes the first token itself; tokenizers that add one would write it twice.
    """
    first = getattr(tokenizer, "bos_token", None)
    rendered = bool(first) and str(text).startswith(str(first))
    return list(tokenizer(text, add_special_tokens=not rendered)["input_ids"])
