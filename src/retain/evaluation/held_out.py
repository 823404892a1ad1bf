"""Held-out rows of a task: the loss on their answers, and whether the model writes these answers.

A row is asked as it would be learned (`retain.data.encoding.encode`): what is learned of it is the
answer, what stands before that is the prompt. Of a chat the last turn is asked. A text that is
learned from its first token on has no prompt, so its loss alone is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retain.data.batches import Example
from retain.data.counts import RowCounts
from retain.data.draws import sample
from retain.data.encoding import encode
from retain.data.problems import MARK
from retain.data.rows import Row
from retain.data.tokens import need
from retain.errors import SourceError, not_finite
from retain.evaluation.answers import row_log_probabilities
from retain.evaluation.generation import generate_ids
from retain.evaluation.metrics import same_text
from retain.models.heads import row_label
from retain.models.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["HeldOut", "RowValues", "held_out", "measure_rows", "same_answer"]


LEAST = 16
"""Tokens that an answer may have however short the right ones are."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that a model is asked.

    Attributes:
        examples: tokenised.
        prompts: of each row the tokens before its last answer; None where it is not asked.
        answers: of each row the answer's tokens.
        new_tokens: where an answer is cut; sooner where the model's positions end.
        counts: what was left out or cut of the rows.
    """

    examples: tuple[Example, ...]
    prompts: tuple[tuple[int, ...] | None, ...]
    answers: tuple[tuple[int, ...], ...]
    new_tokens: int
    counts: RowCounts

    @property
    def tokens(self) -> list[int]:
        """How many tokens each row's loss is of."""
        return [example.predictions for example in self.examples]

    @property
    def asked(self) -> list[int]:
        """The numbers of the rows that are asked."""
        return [i for i, prompt in enumerate(self.prompts) if prompt is not None]


@dataclass(frozen=True)
class RowValues:
    """What was measured of a model, a row each.

    Attributes:
        nats: the negative log-probability of the row's answer, summed over its tokens.
        said: what the model wrote; None where it was not asked.
        right: whether that is the row's answer.
        cut: answers that were cut before their end, see `HeldOut.new_tokens`.
    """

    nats: tuple[float, ...]
    said: tuple[str | None, ...]
    right: tuple[bool | None, ...]
    cut: int


def held_out(
    view: ModelView,
    rows: Sequence[Row],
    *,
    max_length: int,
    limit: int | None = None,
    new_tokens: int | None = None,
    seed: int = 0,
) -> HeldOut:
    """Rows as a decoder is asked them.

    Args:
        view: of the model, with its tokenizer.
        rows: dictionaries; see docs/data.md.
        max_length: tokens of a row at most; no more than the model has positions.
        limit: examples at most, drawn by `seed`: one text may give many.
        new_tokens: where an answer is cut; by default at one and a half times the longest of the
            rows, `LEAST` at least. Never beyond the model's positions, behind each row's prompt.
        seed: of the draw.

    Raises:
        SourceError: rows of no known format, damaged ones, of which nothing is to be answered, or
            a classifier's.
    """
    most, counts = view.positions, RowCounts()
    size = max_length if most is None else min(max_length, most)
    every = encode(rows, view.tokenizer, max_length=size, causal=True, counts=counts)
    examples = sample(every, limit, seed)
    view.check(examples)
    begins = set(need(view.tokenizer).all_special_ids)
    parts = [_last(example, begins) for example in examples]
    labelled = next((r for r in rows if "input_ids" not in r and row_label(r) is not None), None)
    if labelled is not None and not any(prompt for prompt, _ in parts):
        raise SourceError(
            "the rows are a classifier's, and the adapter's model writes text",
            got=f"label {row_label(labelled)!r} beside {', '.join(map(str, labelled))}",
            allowed="prompt + completion, chats, or text without labels",
            fix="write the label as the completion of the text; a classifier is scored in Python: "
            "docs/classifiers.md",
        )
    # A row that fills the length may have lost the end of its answer: it cannot be right.
    lost = bool(counts.completions_cut)
    prompts = [None if lost and len(e.tokens) + 1 >= size else prompt
               for e, (prompt, _) in zip(examples, parts, strict=True)]  # fmt: skip
    whole = [len(a) for p, (_, a) in zip(prompts, parts, strict=True) if p is not None]
    room = new_tokens or max(LEAST, math.ceil(1.5 * max(whole, default=1)))
    if most is not None:
        room = max(1, min(room, most - min((len(p) for p in prompts if p is not None), default=0)))
    return HeldOut(
        tuple(examples), tuple(prompts), tuple(answer for _, answer in parts), room, counts
    )


def _last(example: Example, begins: Set[int]) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """What stands before the last answer, and that answer.

    A token that begins every text, one of `begins`, is no prompt by itself.
    """
    stop = len(example.predict) - example.predict[::-1].index(True)
    start = stop
    while start and example.predict[start - 1]:
        start -= 1
    targets: Any = example.targets
    asked = start or (example.prompted and example.tokens[0] not in begins)
    return (example.tokens[: start + 1] if asked else None), targets[start:stop]


def measure_rows(
    view: ModelView, rows: HeldOut, *, batch_size: int = 8, progress: bool = False
) -> RowValues:
    """Asks the model as it is: with its adapter on, or off within `adapter_off`.

    A pass has `batch_size` rows, or four times as many answers.

    Raises:
        ModelError: predictions that are not finite.
    """
    words: PreTrainedTokenizerBase | None = view.tokenizer
    label = "held-out rows"
    found = row_log_probabilities(view, rows.examples, batch_size, progress, label)
    if not all(map(math.isfinite, found)):
        raise not_finite()
    said: list[str | None] = [None] * len(found)
    right: list[bool | None] = [None] * len(found)
    cut, most = 0, view.positions
    rooms: dict[int, list[int]] = {}  # a long prompt has less room, and takes none from the others
    for i in rows.asked:
        left = rows.new_tokens if most is None else most - len(rows.prompts[i] or ())
        rooms.setdefault(min(rows.new_tokens, left), []).append(i)
    for room, asked in rooms.items():
        ends = set(need(words).all_special_ids)
        written = generate_ids(
            view.model, need(words), [rows.prompts[i] or () for i in asked],
            new_tokens=room, batch_size=4 * batch_size, progress=progress, label=label,
        )  # fmt: skip
        for i, ids in zip(asked, written, strict=True):
            text, answer = (
                str(need(words).decode(part, skip_special_tokens=True)).strip()
                for part in (ids, list(rows.answers[i]))
            )
            said[i], right[i] = text, same_answer(text, answer)
            cut += len(ids) == room and ids[-1] not in ends
    return RowValues(tuple(-nats for nats in found), tuple(said), tuple(right), cut)


def same_answer(said: str, answer: str) -> bool:
    """Whether an answer is the right one; see `retain.evaluation.metrics.same_text`.

    Where the right one has a ``####``, as GSM8K's and the word problems' do, what stands behind it
    counts alone; else the whole text.
    """
    if MARK in answer:
        said, answer = (_behind(text) for text in (said, answer))
    return same_text(said, answer)


def _behind(text: str) -> str:
    return next(iter(text.partition(MARK)[2].strip().splitlines()), "")
