"""General abilities: common knowledge and word problems that come with the package, and lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from retain.data.knowledge import knowledge_items
from retain.data.problems import Problem, ask, final_number, recall
from retain.evaluation.generation import generate
from retain.evaluation.ranking import score_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_general", "general_scores", "knowledge_score", "problem_score"]

KNOWLEDGE = "knowledge"
"""The name of the items of common knowledge; any other is a task of lm-eval."""


def check_general(tasks: Sequence[str]) -> None:
    """Refuses unknown tasks before any work is done.

    Raises:
        ConfigError: lm-eval is needed and not installed, or a task is not known to it.
    """
    others = [task for task in tasks if task != KNOWLEDGE]
    if others:
        from retain.evaluation.lm_eval import check_tasks

        check_tasks(others)


def general_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    data_dir: Path | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, float]:
    """One number for each task; see `retain.evaluation.lm_eval.evaluate_general`."""
    found: dict[str, float] = {}
    if KNOWLEDGE in tasks:
        right, items = knowledge_score(model, tokenizer, progress=progress)
        found[KNOWLEDGE] = right / items
    others = [task for task in tasks if task != KNOWLEDGE]
    if others:
        from retain.evaluation.lm_eval import evaluate_general, headline

        found |= headline(
            evaluate_general(
                model, tokenizer, others, limit=limit, data_dir=data_dir, batch_size=batch_size
            )
        )
    return found


def knowledge_score(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, progress: bool = False
) -> tuple[int, int]:
    """(items of common knowledge that the model gets right, items)."""
    items = knowledge_items()
    prompts = [recall(tokenizer, item.prompt) for item in items]
    options = [item.options for item in items]
    picked = score_options(
        model, tokenizer, prompts, options, progress=progress, label="knowledge"
    ).best()
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
