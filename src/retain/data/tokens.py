"""Text to tokens, in one way everywhere: one token that begins a text, one that ends it.

A tokenizer has one switch for both, ``add_special_tokens``, and its post-processor may write the
begin token, the end token, both or neither. So texts are tokenised without special tokens, and
what the post-processor would write is put around them here, each once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from retain.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Ends", "beginning", "ends_of", "fit_prompt", "need", "plain", "room_for", "tokenize"]

_GAP = " ... "
_SMALL = 32  # below so many tokens the gap would cost too much


@dataclass(frozen=True)
class Ends:
    """What belongs around a text.

    Attributes:
        first: what the post-processor writes in front, such as the begin token.
        last: what it writes behind, but for the end token.
        end: the end token; None where the tokenizer has none.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    end: int | None

    def begun(self, ids: list[int]) -> list[int]:
        """Tokens with what belongs in front, unless it is there."""
        first = list(self.first)
        return ids if ids[: len(first)] == first else first + ids

    def ended(self, ids: list[int]) -> list[int]:
        """Tokens with the end token behind, unless they end in it."""
        end = [] if self.end is None or ids[-1:] == [self.end] else [self.end]
        return [*ids, *end, *self.last]


def ends_of(tokenizer: PreTrainedTokenizerBase) -> Ends:
    """What a tokenizer's post-processor writes around a text, told from a letter."""
    bare, whole = plain(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    eos: Any = getattr(tokenizer, "eos_token_id", None)
    size = len(bare)
    if not size:  # a tokenizer without letters: what it writes is all there is
        return Ends(tuple(i for i in whole if i != eos), (), eos)
    for start in range(len(whole) - size + 1):
        if whole[start : start + size] == bare:
            last = tuple(i for i in whole[start + size :] if i != eos)
            return Ends(tuple(whole[:start]), last, eos)
    return Ends((), (), eos)


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's tokens, and nothing around them."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def room_for(count: int) -> int:
    """Characters that are read at first for so many tokens: several times what it takes."""
    return max(4096, 16 * count)


def beginning(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int | None
) -> tuple[list[int], int]:
    """The first tokens of a text, at least `count` of them; all where it is not far longer.

    A text of megabytes is read as far as needed. A cut may change the tokens next to it, so twice
    the tokens needed are read.

    Returns:
        The tokens, without special tokens, and how many more there are about.
    """
    if count is not None:
        size = room_for(count)
        while size < len(text):
            ids = plain(tokenizer, text[:size])
            if len(ids) >= 2 * count:
                return ids, round((len(text) - size) * len(ids) / size)
            size *= 8
    return plain(tokenizer, text), 0


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text's beginning: with what the tokenizer writes in front, unless it is there.

    A chat template writes the first token itself; tokenizers that add one would write it twice.
    What a tokenizer writes behind is left out: the text goes on.
    """
    return ends_of(tokenizer).begun(plain(tokenizer, str(text)))


def need(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer that text needs; raises `SourceError` where there is none."""
    if tokenizer is None:
        raise SourceError(
            "text needs a tokenizer",
            got="tokenizer=None",
            allowed="the model's tokenizer, or rows with input_ids",
            fix="pass tokenizer=..., or load the model by a name that has one",
        )
    return tokenizer


def fit_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    truncate: Literal["left", "middle"] = "left",
) -> str:
    """A prompt of at most `room` tokens, cut as text so that training and scoring read the same.

    Args:
        prompt: the text.
        tokenizer: its special tokens count and are never cut.
        room: tokens; where not one of the prompt's fits, nothing is left of it.
        truncate: where to cut: the beginning or the middle. There " ... " stands for what is left
            out; a room of less than 32 tokens is filled from the end all the same.
    """
    whole = len(tokenize(tokenizer, prompt))
    if whole <= room:
        return prompt
    if tokenizer.is_fast:
        found = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        ends = [int(end) for _, end in found["offset_mapping"]]
    else:
        count = len(plain(tokenizer, prompt))
        ends = [round(len(prompt) * (i + 1) / count) for i in range(count)]
    for keep in range(room - (whole - len(ends)), 0, -1):
        head = keep // 2 if truncate == "middle" and room >= _SMALL else 0
        tail = prompt[ends[len(ends) - (keep - head) - 1] :]
        text = (prompt[: ends[head - 1]] + _GAP if head else "") + tail.lstrip()
        if len(tokenize(tokenizer, text)) <= room:
            return text
    return ""
