"""General abilities: common knowledge and word problems that come with the package, and lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from retain.data.draws import sample
from retain.data.knowledge import knowledge_items
from retain.data.problems import Problem, ask, final_number, recall
from retain.evaluation.generation import generate
from retain.evaluation.ranking import score_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "KNOWLEDGE", "check_general", "general_scores", "knowledge_right", "problems_right",
]  # fmt: skip

KNOWLEDGE = "knowledge"
"""The name of the items of common knowledge; any other is a task of lm-eval."""


def check_general(tasks: Sequence[str], data_dir: Path | None = None) -> None:
    """Refuses unknown tasks, and those whose rows are not in the folder, before any work is done.

    Raises:
        ConfigError: lm-eval is needed and not installed, or a task is not known to it.
        SourceError: rows that are not in the folder.
    """
    others = [task for task in tasks if task != KNOWLEDGE]
    if others:
        from retain.evaluation.lm_eval import check_tasks

        check_tasks(others, data_dir)


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
        right = knowledge_right(model, tokenizer, limit, progress=progress)
        found[KNOWLEDGE] = sum(right) / len(right)
    others = [task for task in tasks if task != KNOWLEDGE]
    if others:
        from retain.evaluation.lm_eval import evaluate_general, headline

        found |= headline(
            evaluate_general(
                model, tokenizer, others, limit=limit, data_dir=data_dir, batch_size=batch_size
            )
        )
    return found


def knowledge_right(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    *,
    progress: bool = False,
) -> list[bool]:
    """Whether the model gets each item of common knowledge right; at most `limit`, drawn once."""
    items = sample(knowledge_items(), limit, 0)
    prompts = [recall(tokenizer, item.prompt) for item in items]
    options = [item.options for item in items]
    picked = score_options(
        model, tokenizer, prompts, options, progress=progress, label="knowledge"
    ).best()
    return [p == i.answer for p, i in zip(picked, items, strict=True)]


def problems_right(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    progress: bool = False,
) -> list[bool]:
    """Whether the final number of the model's answer to each problem is right."""
    answers = generate(
        model,
        tokenizer,
        [ask(tokenizer, p.question) for p in problems],
        max_new_tokens=40,
        batch_size=200,
        progress=progress,
        label="word problems",
    )
    return [final_number(a) == p.result for a, p in zip(answers, problems, strict=True)]
