"""The shipped probes: common knowledge, and word problems with an exact answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from retain.data.knowledge import knowledge_items
from retain.data.problems import Problem, ask, final_number, recall
from retain.evaluation.generation import generate
from retain.evaluation.ranking import rank_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["KNOWLEDGE", "knowledge_score", "problem_score"]

KNOWLEDGE = "knowledge"
"""The name of the items of common knowledge among the general tasks of a study."""


def knowledge_score(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, progress: bool = False
) -> tuple[int, int]:
    """(items of common knowledge that the model gets right, items)."""
    items = knowledge_items()
    picked = rank_options(
        model,
        tokenizer,
        [recall(tokenizer, item.prompt) for item in items],
        [item.options for item in items],
        progress=progress,
        label="knowledge",
    )
    return sum(p == i.answer for p, i in zip(picked, items, strict=True)), len(items)


def problem_score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 40,
    batch_size: int = 200,
    progress: bool = False,
) -> tuple[int, list[str]]:
    """(problems whose final number is right, the model's answers)."""
    answers = generate(
        model,
        tokenizer,
        [ask(tokenizer, p.question) for p in problems],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        label="word problems",
    )
    right = sum(final_number(a) == p.result for a, p in zip(answers, problems, strict=True))
    return right, answers
