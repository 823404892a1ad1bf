"""A probe of common knowledge: short sentences to complete, with four options each.

A model answers an item by the option to which it gives the highest likelihood as the
continuation of the prompt. The options of an item are alike in kind and length, and the right
one stands equally often at each place. None of the items is arithmetic.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import resources

from retain.errors import SourceError

__all__ = ["Item", "general_questions", "knowledge_items"]

_FILE = "knowledge.jsonl"
_OPTIONS = 4

_QUESTIONS = (
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "Give me three tips for sleeping well.",
    "Write a short poem about the sea.",
    "What is the difference between a cat and a dog?",
    "How do I make a cup of tea?",
)


@dataclass(frozen=True)
class Item:
    """A sentence to complete.

    Attributes:
        id: unique name, such as "capitals-01".
        category: the field of knowledge.
        prompt: the beginning of the sentence, without a trailing space.
        options: the continuations, each with its leading space.
        answer: index of the right option.
    """

    id: str
    category: str
    prompt: str
    options: tuple[str, ...]
    answer: int


@cache
def knowledge_items() -> tuple[Item, ...]:
    """All items of the probe, in the order of the file.

    Raises:
        SourceError: if the file has a malformed or repeated item.
    """
    text = resources.files(__package__).joinpath(_FILE).read_text("utf-8")
    items = tuple(_item(line, number) for number, line in enumerate(text.splitlines(), start=1))
    for field in ("id", "prompt"):
        value, times = Counter(getattr(item, field) for item in items).most_common(1)[0]
        if times > 1:
            raise SourceError(f"repeated {field} in {_FILE}", got=repr(value))
    return items


def general_questions() -> tuple[str, ...]:
    """Six open questions for comparing what models write, side by side."""
    return _QUESTIONS


def _item(line: str, number: int) -> Item:
    """The item on a line of the file, checked."""
    try:
        fields = json.loads(line)
        item = Item(**{**fields, "options": tuple(fields["options"])})
        sound = (
            all(isinstance(text, str) and text for text in (item.id, item.category, item.prompt))
            and item.prompt == item.prompt.strip()
            and len(set(item.options)) == len(item.options) == _OPTIONS
            and all(option[0] == " " and option[1:] == option.strip() for option in item.options)
            and item.answer in range(_OPTIONS)
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        sound = False
    if not sound:
        raise SourceError(
            f"malformed item in {_FILE}, line {number}",
            got=repr(line[:80]),
            allowed=f"id, category, prompt, {_OPTIONS} different options with a leading space, "
            f"and the answer's index",
        )
    return item
