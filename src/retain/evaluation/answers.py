"""What people see of a tuned chat model: its own answers to general prompts, beside its base's.

A KL on source text tells how far the predictions moved where the *base* writes. An answer of the
tuned model goes where the tuned model does: once its first words are others, every later word
stands on them. So both models answer the same prompts, greedily, and the answers are compared.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from retain.data.batches import Example, batches
from retain.data.general_prompts import GENERAL, Prompts, check_distinct, read_prompts
from retain.data.patterns import PatternError, compile_pattern, first_match
from retain.data.problems import MARK
from retain.data.tokens import tokenize
from retain.errors import ConfigError, not_finite
from retain.evaluation.compare import measured
from retain.evaluation.generation import generate_ids
from retain.evaluation.prompts import check_counts, put, writer
from retain.models.forward import log_probabilities
from retain.models.off import adapter_off
from retain.models.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Answer", "Answers", "TaskForm", "answered", "measure_answers", "repeats",
    "row_log_probabilities", "task_form",
]  # fmt: skip

TaskForm = str | Callable[[str], bool] | None
"""A regular expression, or a function of an answer; None for `task_form`."""

DIGITS = 0.3
"""Of an answer's characters but spaces, the share of digits above which it looks like sums."""

WITH_DIGITS = frozenset({"arithmetic", "lists", "code"})
"""Skills in whose answers digits are natural: numbers, numbered lists, numbers in code."""

WORDS, DISTINCT = 8, 0.4
"""An answer of more words than this repeats itself if fewer than this share are distinct."""

PERCENTILE = 1.0
"""Of the base's own answers' mean log-probability, below which an answer is unlikely."""

_PASS = 8  # answers a pass at most where each token's probability is read: logits are wide


@dataclass(frozen=True)
class Answer:
    """Both answers to a prompt, and what is measured of them.

    Attributes:
        id, skill, prompt: of the prompt.
        base, tuned: the answers, without special tokens.
        tokens: of the tuned model's answer, with its end token where that was written.
        log_ratio: ``log(tuned / base)`` of that answer in nats, the sum over its tokens.
        base_log_probability: of that answer under the base, nats per token.
        own_log_probability: of the base's own answer under the base, nats per token.
        first_word: whether both begin with the same word, whatever its case and punctuation.
        first_token: whether both begin with the same token.
        unlikely: whether `base_log_probability` is below the threshold.
        repeats, repeats_base: whether an answer repeats itself.
        task_form, task_form_base: whether an answer has the form of the tuned task's.
        right_before, right_after: whether the base's and the tuned model's answer are right; None
            where no script can tell.
    """

    id: str
    skill: str
    prompt: str
    base: str
    tuned: str
    tokens: int
    log_ratio: float
    base_log_probability: float
    own_log_probability: float
    first_word: bool
    first_token: bool
    unlikely: bool
    repeats: bool
    repeats_base: bool
    task_form: bool
    task_form_base: bool
    right_before: bool | None
    right_after: bool | None


@dataclass(frozen=True)
class Answers:
    """The answers of a tuned model and of its base.

    Attributes:
        rows: one a prompt, in the prompts' order.
        threshold: nats per token, the 1st percentile of the base's own answers.
        new_tokens: where an answer was cut.
        seed: of the intervals.
    """

    rows: tuple[Answer, ...]
    threshold: float
    new_tokens: int
    seed: int = 0

    def summary(self) -> dict[str, Any]:
        """All measures, ``overall`` and by ``skills``, each ``{"value", "interval", "n"}``.

        The intervals are 95 % bootstrap intervals over prompts, None where fewer than two count or
        all are alike. `n` is what a value is of: tokens
        of ``log_ratio``, prompts right before of ``kept``, else prompts.
        """
        skills: dict[str, list[Answer]] = {}
        for row in self.rows:
            skills.setdefault(row.skill, []).append(row)
        return {
            "new_tokens": self.new_tokens,
            "threshold": self.threshold,
            "overall": _measures(self.rows, self.seed),
            "skills": {skill: _measures(rows, self.seed) for skill, rows in skills.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """`summary` and the ``rows``, as plain data for JSON."""
        return self.summary() | {"rows": [asdict(row) for row in self.rows]}


def measure_answers(
    model: nn.Module,
    prompts: Prompts = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: int = 32,
    batch_size: int = 32,
    seed: int = 0,
    task_form: TaskForm = None,
    progress: bool = False,
) -> Answers:
    """Greedy answers of a tuned model and of its base to the same prompts, and how they differ.

    A prompt is asked in the model's chat form, where the tokenizer has a template; else it is text
    to go on with.

    Args:
        model: a causal PEFT model; its base is itself with the adapter off.
        prompts: None or ``general`` for the held-out half of
            `retain.data.general_prompts`; else a file of prompts, or texts, items or rows of them,
            as `retain.data.general_prompts.read_prompts` says.
        tokenizer: the model's; one that was loaded from a name finds its own.
        new_tokens: where an answer is cut.
        batch_size: prompts at once. Memory and speed only.
        seed: of the intervals.
        task_form: what an answer in the tuned task's form looks like: a regular expression that is
            found in it, or a function of it. By default see `task_form`.
        progress: show bars.

    Raises:
        SourceError: prompts that are missing or damaged, there twice, or longer than the model can
            read, or no tokenizer.
        ModelError: the model writes no text, or has no adapter that can be switched off so that
            the base is what it was.
        ConfigError: a number out of range, or a pattern that does not compile.
    """
    check_counts(new_tokens=new_tokens, batch_size=batch_size)
    looks = _form_of(task_form)
    asked = read_prompts(GENERAL if prompts is None else prompts)
    check_distinct(asked)
    view, words = writer(model, tokenizer)
    ids = [tokenize(words, put(words, p.prompt)) for p in asked]
    with adapter_off(model):  # a model without an adapter is refused before anything is written
        view.check([Example(tuple(p), tuple(p), (True,) * len(p)) for p in ids])

    def written(label: str) -> list[list[int]]:
        return generate_ids(
            view.model, words, ids, new_tokens=new_tokens, batch_size=batch_size,
            progress=progress, label=label,
        )  # fmt: skip

    def likely(answers: list[list[int]], label: str) -> list[float]:
        rows = [answered(p, a) for p, a in zip(ids, answers, strict=True)]
        return row_log_probabilities(view, rows, batch_size, progress, label)

    ours = written("tuned answers")
    tuned = likely(ours, "tuned answers, by themselves")
    with adapter_off(model):
        theirs = written("base answers")
        base, own = likely(ours, "tuned answers, by the base"), likely(theirs, "base answers")
    if not all(map(math.isfinite, (*tuned, *base, *own))):
        raise not_finite()
    own = [total / len(a) for total, a in zip(own, theirs, strict=True)]
    threshold = float(np.percentile(own, PERCENTILE))
    texts = [words.batch_decode(rows, skip_special_tokens=True) for rows in (theirs, ours)]
    rows = []
    for i, prompt in enumerate(asked):
        before, after, size = texts[0][i], texts[1][i], len(ours[i])
        rows.append(
            Answer(
                id=prompt.id, skill=prompt.skill, prompt=prompt.prompt, base=before, tuned=after,
                tokens=size, log_ratio=tuned[i] - base[i], base_log_probability=base[i] / size,
                own_log_probability=own[i], first_word=_first(before) == _first(after),
                first_token=theirs[i][0] == ours[i][0], unlikely=base[i] / size < threshold,
                repeats=repeats(after), repeats_base=repeats(before),
                task_form=looks(after, prompt.skill), task_form_base=looks(before, prompt.skill),
                right_before=prompt.right(before), right_after=prompt.right(after),
            )
        )  # fmt: skip
    return Answers(tuple(rows), threshold, new_tokens, seed)


def repeats(answer: str) -> bool:
    """Whether an answer repeats itself: more than 8 words, fewer than 40 % of them distinct."""
    words = answer.casefold().split()
    return len(words) > WORDS and len(set(words)) < DISTINCT * len(words)


def task_form(answer: str, skill: str = "") -> bool:
    """Whether an answer looks like that of a word problem: ``####`` in it, or mostly digits.

    Mostly is more than 30 % of the characters that are no spaces. Digits do not count in skills
    where they are natural: `WITH_DIGITS`.
    """
    if MARK in answer:
        return True
    marks = [c for c in answer if not c.isspace()]
    return skill not in WITH_DIGITS and sum(c.isdigit() for c in marks) > DIGITS * len(marks)


def _form_of(given: TaskForm) -> Callable[[str, str], bool]:
    """Whether an answer (of a skill) has the task's form."""
    if given is None:
        return task_form
    if isinstance(given, str):
        pattern = given

        def found(answer: str, _skill: str) -> bool:
            try:
                return first_match(pattern, answer) is not None
            except PatternError as error:
                raise _bad_pattern(pattern, error) from error

        try:
            compile_pattern(pattern)
        except PatternError as error:
            raise _bad_pattern(pattern, error) from error
        return found
    function = given
    return lambda answer, _skill: bool(function(answer))


def _bad_pattern(pattern: str, error: PatternError) -> ConfigError:
    return ConfigError(
        "the pattern of the task's form is not taken", got=f"{pattern}: {error}",
        allowed="a regular expression", fix="give a simpler one, or a function of the answer",
    )  # fmt: skip


def answered(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """A prompt with its answer, of which the answer alone is predicted."""
    ids = (*prompt, *answer)
    predict = (False,) * (len(prompt) - 1) + (True,) * len(answer)
    return Example(ids[:-1], ids[1:], predict)


def row_log_probabilities(
    view: ModelView, rows: Sequence[Example], size: int, progress: bool, label: str
) -> list[float]:
    """The log-probability of each row's targets in nats, summed over the row."""
    found = [0.0] * len(rows)
    passes = list(batches(rows, min(size, _PASS, len(rows)), view.pad))
    with view.evaluating(), torch.no_grad():
        for batch in tqdm(passes, desc=label, unit="batch", disable=not progress):
            here = batch.to(view.device)
            each = log_probabilities(view.logits(here)).gather(1, here.targets[:, None])[:, 0]
            for row, part in zip(batch.rows, each.double().split(batch.lengths), strict=True):
                found[row] = float(part.sum())
    return found


def _first(answer: str) -> str:
    """An answer's first word, without its case and the punctuation around it."""
    word = next(iter(answer.split()), "")
    return word.casefold().strip(string.punctuation) or word


# --- in sum


def _measures(rows: Sequence[Answer], seed: int) -> dict[str, Any]:
    scored = [row for row in rows if row.right_before is not None]
    before = [bool(row.right_before) for row in scored]
    after = [bool(row.right_after) for row in scored]
    both = [a and b for a, b in zip(before, after, strict=True)]
    ones = [1] * len(scored)
    shares = (
        "first_word", "first_token", "unlikely", "repeats", "repeats_base", "task_form",
        "task_form_base",
    )  # fmt: skip
    parts: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "log_ratio": ([row.log_ratio for row in rows], [row.tokens for row in rows]),
        **{name: ([getattr(row, name) for row in rows], [1] * len(rows)) for name in shares},
        "right_before": (before, ones),
        "right_after": (after, ones),
        "kept": (both, before),
    }
    return {
        "prompts": len(rows),
        **{name: measured(*part, seed=seed) for name, part in parts.items()},
    }
