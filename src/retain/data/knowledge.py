"""A probe of common knowledge: short sentences to complete, with four options each.

A model answers an item by the option to which it gives the highest likelihood as the
continuation of the prompt. The options of an item are alike in kind and length, and the right
one stands equally often at each place. None of the items is arithmetic.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

__all__ = ["KnowledgeItem", "general_questions", "knowledge_items"]


@dataclass(frozen=True)
class KnowledgeItem:
    """A sentence to complete."""

    id: str  # such as "capitals-01"
    category: str
    prompt: str  # the beginning of the sentence, without a trailing space
    options: tuple[str, ...]  # the continuations, each with its leading space
    answer: int  # index of the right option


@cache
def knowledge_items() -> tuple[KnowledgeItem, ...]:
    """All items of the probe, in the order of the file."""
    text = resources.files(__package__).joinpath("knowledge.jsonl").read_text("utf-8")
    rows = map(json.loads, text.splitlines())
    return tuple(KnowledgeItem(**{**row, "options": tuple(row["options"])}) for row in rows)


def general_questions() -> tuple[str, ...]:
    """Six open questions for comparing what models write, side by side."""
    return (
        "What is the capital of France?",
        "Explain why the sky is blue.",
        "Give me three tips for sleeping well.",
        "Write a short poem about the sea.",
        "What is the difference between a cat and a dog?",
        "How do I make a cup of tea?",
    )
