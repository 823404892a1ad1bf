"""Prompts that are too long, cut as text, so that training and scoring read the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from retain.data.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["fit_prompt"]

_GAP = " ... "
_SMALL = 32  # below so many tokens the gap would cost too much


def fit_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    truncate: Literal["left", "middle"] = "left",
) -> str:
    """A prompt of at most `room` tokens: itself, or without its beginning or its middle.

    Args:
        prompt: the text.
        tokenizer: its special tokens count and are never cut.
        room: tokens; where not one of the prompt's fits, nothing is left of it.
        truncate: where to cut. In the middle, " ... " stands for what is left out; a room of less
            than 32 tokens is filled from the end all the same.
    """
    whole = len(tokenize(tokenizer, prompt))
    if whole <= room:
        return prompt
    ends = _ends(prompt, tokenizer)
    keep = room - (whole - len(ends))
    while keep > 0:
        head = keep // 2 if truncate == "middle" and room >= _SMALL else 0
        tail = prompt[ends[len(ends) - (keep - head) - 1] :]
        text = (prompt[: ends[head - 1]] + _GAP if head else "") + tail.lstrip()
        if len(tokenize(tokenizer, text)) <= room:
            return text
        keep -= 1
    return ""


def _ends(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The place in the text where each token ends."""
    if tokenizer.is_fast:
        found = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        return [int(end) for _, end in found["offset_mapping"]]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return [round(len(prompt) * (i + 1) / len(ids)) for i in range(len(ids))]
