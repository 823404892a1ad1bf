"""Generate answers, and score them by exact match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from tqdm.auto import tqdm

from retain.data.tokens import tokenize
from retain.models.generating import write
from retain.models.reuse import can_reuse, shared_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["generate", "generate_ids"]


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: bool = False,
    label: str = "generating",
) -> list[str]:
    """Greedy continuations of prompts, in order, without special tokens.

    Prompts are full texts, a chat's special tokens included. No setting of the model's own
    generation plays a part, see `retain.models.generating`; it is in evaluation mode for the while.
    """
    out = generate_ids(
        model, tokenizer, [tokenize(tokenizer, p) for p in prompts], new_tokens=max_new_tokens,
        batch_size=batch_size, progress=progress, label=label,
    )  # fmt: skip
    return list(tokenizer.batch_decode(out, skip_special_tokens=True)) if out else []


def generate_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch_size: int = 64,
    progress: bool = False,
    label: str = "generating",
) -> list[list[int]]:
    """`generate` of tokens, to tokens: each answer up to and with the token that ends it.

    What all prompts begin with is run once a batch, of a model that can go on from it.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    shared = shared_tokens(prompts) if can_reuse(model, sliding=False) else 0
    bar = tqdm(total=len(prompts), desc=label, unit="answer", disable=not progress)
    with bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            asked = [prompts[i] for i in rows]
            out = write(model, tokenizer, asked, new_tokens=new_tokens, shared=shared)
            for i, found in zip(rows, out, strict=True):
                answers[i] = found
            bar.update(len(rows))
    return answers
