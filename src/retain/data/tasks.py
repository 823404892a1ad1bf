"""The demo's task as training rows: word problems asked in the model's own chat form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from retain.data.batches import Example
from retain.data.problems import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ask", "problem_examples", "problem_rows", "recall"]


def ask(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """A question as the model's chat template puts it, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        return f"Question: {question}\nAnswer:\n"
    chat = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def recall(tokenizer: PreTrainedTokenizerBase, beginning: str) -> str:
    """A sentence to complete, as the model's chat puts it: the answer begins with it.

    Without a chat template it is the sentence's beginning alone.
    """
    if not getattr(tokenizer, "chat_template", None):
        return beginning
    return ask(tokenizer, f"Complete the sentence: {beginning}") + beginning


def problem_rows(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> list[dict[str, str]]:
    """Rows of ``prompt`` and ``completion``."""
    return [{"prompt": ask(tokenizer, p.question), "completion": p.answer} for p in problems]


def problem_examples(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], max_length: int = 256
) -> list[Example]:
    """Tokenised problems; only the answers are predicted."""
    from retain.data.sources import encode

    rows = problem_rows(tokenizer, problems)
    return encode(rows, tokenizer, max_length=max_length, causal=True)
