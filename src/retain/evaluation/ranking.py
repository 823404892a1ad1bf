"""Multiple choice by likelihood: the option with the highest log-probability wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from retain.data.batches import Example, batches
from retain.data.tokens import tokenize
from retain.models.heads import forward_logits
from retain.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["rank_options"]


def rank_options(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
    progress: bool = False,
    label: str = "ranking",
) -> list[int]:
    """The index of the most likely continuation of each prompt.

    Options of one token share one pass of their prompt, as do options that differ in the last.

    Args:
        model: a causal model; it is put into evaluation mode for the while.
        tokenizer: its tokenizer.
        prompts: texts.
        options: continuations of each prompt, with their leading spaces. The score of one is the
            sum of its tokens' log-probabilities.
        batch_size: continuations a pass.
        progress: show a bar.
        label: of the bar.
    """
    device = next(model.parameters()).device
    # (first predicted position, tokens of a pass) -> the options that are scored by that pass
    rows: dict[tuple[int, tuple[int, ...]], list[tuple[int, int, list[int]]]] = {}
    for i, (prompt, choices) in enumerate(zip(prompts, options, strict=True)):
        head = tokenize(tokenizer, prompt)
        for j, choice in enumerate(choices):
            ids = list(tokenizer(choice, add_special_tokens=False)["input_ids"])
            tokens = tuple(head + ids[:-1])  # the last token is only predicted
            rows.setdefault((len(head) - 1, tokens), []).append((i, j, ids))
    examples = [
        Example(tokens, (0,) * len(tokens), tuple(k >= first for k in range(len(tokens))))
        for first, tokens in rows
    ]
    owners = list(rows.values())
    scores = [[0.0] * len(choices) for choices in options]
    pad = getattr(model.config, "pad_token_id", None) or 0
    every = list(batches(examples, min(batch_size, len(examples)), pad, multiple=8))
    with evaluating(model), torch.no_grad():
        for batch in tqdm(every, desc=label, unit="batch", disable=not progress):
            batch = batch.to(device)
            logp = forward_logits(model, batch).float().log_softmax(-1)
            for row, part in zip(batch.rows, logp.split(batch.lengths), strict=True):
                for i, j, ids in owners[row]:
                    scores[i][j] = float(part[torch.arange(len(ids)), ids].sum())
    return [max(range(len(s)), key=s.__getitem__) for s in scores]
