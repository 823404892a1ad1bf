"""Generate answers, and score them by exact match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from retain.data.tokens import tokenize
from retain.models.heads import compact_head
from retain.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["generate"]


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

    Args:
        model: a causal model in any mode; it is put into evaluation mode for the while.
        tokenizer: its tokenizer. Prompts are padded on the left.
        prompts: full texts, a chat's special tokens included.
        max_new_tokens: where an answer is cut.
        batch_size: prompts at once.
        progress: show a bar.
        label: of the bar.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    ids = [tokenize(tokenizer, p) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    bar = tqdm(total=len(ids), desc=label, unit="answer", disable=not progress)
    with evaluating(model), torch.no_grad(), compact_head(model), bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(len(ids[i]) for i in rows)
            tokens = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in rows])
            mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in rows])
            out = model.generate(  # type: ignore[operator]
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
            )
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text
            bar.update(len(rows))
    return answers
