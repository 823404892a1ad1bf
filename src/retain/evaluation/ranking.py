"""Multiple choice by likelihood: the option with the highest log-probability wins.

The options of a prompt form a tree of tokens. The last token of an option is only predicted,
never fed, and an option that is the beginning of another rides along with it. Where one branch is
left (label words of one token, or options that differ in the last), one plain pass of the prompt
scores them all; where several are left, the prompt is run once and its keys and values are used
for every branch, with a model that allows it, else each branch runs the prompt again. What all
prompts begin with, a system's words or examples, is run once a batch in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from retain.data.batches import Example
from retain.data.tokens import tokenize
from retain.errors import ConfigError, not_finite
from retain.models.reuse import branch_logits, can_reuse, shared_tokens
from retain.models.sizes import check_length, pad_multiple
from retain.models.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Ranking", "score_options"]

_CHUNK = 512  # positions whose logits are held in float32 at once

HELD = 16384
"""Tokens whose keys and values a pass holds at most: 2 GiB of an 8B model with grouped queries."""


class Ranking(NamedTuple):
    """The log-probability of each option after its prompt, in nats, summed over its tokens."""

    logp: list[list[float]]

    def best(self) -> list[int]:
        """The index of the best option of each prompt; of equals the first."""
        return [max(range(len(s)), key=s.__getitem__) for s in self.logp]

    def nll(self, answers: Sequence[int]) -> float:
        """Mean negative log-probability of the right options, in nats per option."""
        return -sum(row[a] for row, a in zip(self.logp, answers, strict=True)) / len(answers)


def score_options(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    reuse: bool = True,
    progress: bool = False,
    label: str = "ranking",
) -> Ranking:
    """The full log-likelihood of each option of each prompt; equal questions are run once.

    Args:
        model: a causal model; it is put into evaluation mode for the while.
        tokenizer: its tokenizer.
        prompts: texts.
        options: continuations of each prompt, with their leading spaces.
        max_length: tokens of a prompt with its longest option; the prompt alone is cut, from the
            left (a first token that begins every text is kept). None cuts nothing.
        batch_size: continuations a pass. With reuse, a pass holds the keys and values of so many.
        reuse: run a prompt once for all its branches, and the beginning of all prompts once a
            batch, where the model allows it.
        progress: show a bar.
        label: of the bar.

    Raises:
        ConfigError: a prompt or an option without tokens, or a prompt without options.
        ModelError: predictions that are not finite, of which the first option would be the best.
    """
    view = ModelView.of(model, tokenizer)
    asked = _questions(tokenizer, prompts, options, max_length)
    unique = list({id(q): q for q in asked}.values())
    longest = max((len(q.head) + len(leaf) for q in unique for leaf in q.leaves), default=0)
    check_length(
        model, [longest], "the longest prompt with its option",
        fix="shorter prompts, or a model of more positions",
    )  # fmt: skip
    again = not (reuse and can_reuse(model))
    branched = [] if again else [q for q in unique if len(q.leaves) > 1]
    plain = unique if again else [q for q in unique if len(q.leaves) == 1]
    shared = 0 if again else shared_tokens([q.head for q in plain])
    bar = tqdm(total=len(unique), desc=label, unit="question", disable=not progress)
    with view.evaluating(), torch.no_grad(), bar:
        for chunk in _chunks(plain, batch_size) if shared else ():
            last = [1 + len(q.leaves[0]) for q in chunk]
            ends = [[*q.head[shared:], *q.leaves[0]] for q in chunk]
            logits = branch_logits(view, [chunk[0].head[:shared]], [ends], last)[1]
            _collect([(q, 0) for q in chunk], last, logits)
            bar.update(len(chunk))
        owners = [] if shared else [(q, k) for q in plain for k in range(len(q.leaves))]
        if owners:
            examples = [_example(q, k) for q, k in owners]
            multiple = pad_multiple(model, examples, 8)
            for batch in view.batches(examples, batch_size, multiple=multiple):
                some = [owners[row] for row in batch.rows]
                _collect(some, batch.lengths, view.logits(batch))
                bar.update(sum(k == 0 for _, k in some))
        for chunk in _chunks(branched, batch_size):
            first, rest = branch_logits(view, [q.head for q in chunk], [q.leaves for q in chunk])
            picks, start = _Picks(), len(chunk)
            for i, q in enumerate(chunk):
                for k, leaf in enumerate(q.leaves):
                    for j in q.under[k]:
                        picks.add(q, j, [i, *range(start, start + len(leaf))])
                    start += len(leaf)
            picks.collect(torch.cat([first, rest]))
            bar.update(len(chunk))
    if not all(math.isfinite(score) for q in unique for score in q.scores):
        raise not_finite()
    return Ranking([list(q.scores) for q in asked])


@dataclass
class _Question:
    """A prompt's tokens, its options' tokens, and the branches that have to be run."""

    head: list[int]
    ids: list[tuple[int, ...]]
    leaves: list[tuple[int, ...]] = field(default_factory=list)
    under: list[list[int]] = field(default_factory=list)  # of each branch, the options on it
    scores: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        paths = [ids[:-1] for ids in self.ids]
        for path in sorted(dict.fromkeys(paths), key=len, reverse=True):
            if not any(leaf[: len(path)] == path for leaf in self.leaves):
                self.leaves.append(path)
        self.under = [[] for _ in self.leaves]
        for j, path in enumerate(paths):
            k = next(k for k, leaf in enumerate(self.leaves) if leaf[: len(path)] == path)
            self.under[k].append(j)
        self.scores = [0.0] * len(self.ids)


class _Picks:
    """Which log-probabilities of a pass belong to which option."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.owners: list[tuple[_Question, int]] = []

    def add(self, question: _Question, option: int, rows: Sequence[int]) -> None:
        """An option's tokens are predicted at the first of these rows of the logits."""
        ids = question.ids[option]
        self.rows += rows[: len(ids)]
        self.tokens += ids
        self.owners += [(question, option)] * len(ids)

    def collect(self, logits: Tensor) -> None:
        """Adds ``log softmax(logits)`` [rows, vocabulary] at the wanted places to the scores."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.cat([part.to(wide).logsumexp(-1) for part in logits.split(_CHUNK)])
        rows = torch.tensor(self.rows, device=logits.device)
        tokens = torch.tensor(self.tokens, device=logits.device)
        found = (logits[rows, tokens].to(wide) - total[rows]).tolist()
        for (question, option), value in zip(self.owners, found, strict=True):
            question.scores[option] += value


def _collect(
    owners: Sequence[tuple[_Question, int]], lengths: Sequence[int], logits: Tensor
) -> None:
    """Of questions with a branch each, so many rows of the logits each."""
    picks, start = _Picks(), 0
    for (q, k), n in zip(owners, lengths, strict=True):
        for j in q.under[k]:
            picks.add(q, j, range(start, start + n))
        start += n
    picks.collect(logits)


def _questions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    max_length: int | None,
) -> list[_Question]:
    """One question a prompt; equal ones are the same object."""
    seen: dict[tuple[tuple[int, ...], ...], _Question] = {}
    words: dict[str, tuple[int, ...]] = {}
    asked = []
    for prompt, choices in zip(prompts, options, strict=True):
        for choice in choices:
            if choice not in words:
                words[choice] = tuple(tokenizer(choice, add_special_tokens=False)["input_ids"])
        ids = [words[choice] for choice in choices]
        head = tokenize(tokenizer, prompt)
        if not head or not ids or not all(ids):
            raise ConfigError(
                "a question that cannot be ranked",
                got=f"prompt {prompt[-60:]!r} with options {tuple(choices)!r}",
                allowed="a prompt and options that hold a token at least",
                fix="repair the task's prompt or label words",
            )
        if max_length is not None:
            head = _cut(head, max_length - max(map(len, ids)), tokenizer)
        key = (tuple(head), *ids)
        if key not in seen:
            seen[key] = _Question(head, ids)
        asked.append(seen[key])
    return asked


def _cut(head: list[int], room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of a prompt, with the token that begins every text where it had it."""
    if len(head) <= max(room, 1):
        return head
    begin = head[:1] if head[0] == getattr(tokenizer, "bos_token_id", None) and room > 1 else []
    return begin + head[len(head) - max(1, room - len(begin)) :]


def _example(question: _Question, branch: int) -> Example:
    tokens = (*question.head, *question.leaves[branch])
    first = len(question.head) - 1
    return Example(tokens, (0,) * len(tokens), tuple(k >= first for k in range(len(tokens))))


def _chunks(questions: Sequence[_Question], size: int) -> Iterator[list[_Question]]:
    """Questions of like length, so many together that their branches fill a batch, or `HELD`."""
    chunk: list[_Question] = []
    rows = 0
    for q in sorted(questions, key=lambda q: (len(q.head), max(map(len, q.leaves)))):
        all_of, width = rows + len(q.leaves), len(q.head) + max(map(len, q.leaves))
        if chunk and (all_of > size or all_of * width > HELD):
            yield chunk
            chunk, rows = [], 0
        chunk.append(q)
        rows += len(q.leaves)
    if chunk:
        yield chunk
