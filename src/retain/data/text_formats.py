"""Formats of texts: how each is told by its columns, and read."""

from __future__ import annotations

from collections.abc import Mapping

from retain.data.contents import Answer, Found, Pair, Row, Text
from retain.errors import SourceError

__all__ = ["SINGLE", "alpaca", "pair", "question", "question_pair", "single", "string_of", "text"]

SINGLE = ("content", "sentence")
_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)

_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"


def text(cells: Row, row: Row, template: str | None) -> Found | None:
    """``text``, the column that TRL reads by default."""
    if not isinstance(cells.get("text"), str) or "text_pair" in cells:
        return None
    pack = {"pack"} if cells.get("pack") is True else set()
    return Text(cells["text"], cells.get("pack") is True), {"text"} | pack


def alpaca(cells: Row, row: Row, template: str | None) -> Found | None:
    """``instruction``, ``input`` (or ``context``) and ``output``, in the wording of Alpaca."""
    output = next((k for k in ("output", "response") if k in cells), None)
    if "instruction" not in cells or output is None:
        return None
    given = next((k for k in ("input", "context") if cells.get(k)), None)
    prompt = _ALPACA.format(
        paired=_PAIRED if given else "",
        instruction=string_of(cells, "instruction"),
        given=f"### Input:\n{string_of(cells, given)}\n\n" if given else "",
    )
    return Answer(prompt, string_of(cells, output)), {"instruction", output, given or "input"}


def question(cells: Row, row: Row, template: str | None) -> Found | None:
    """``question`` and ``answer``, behind a ``context`` or ``passage`` where there is one."""
    asked = next((k for k in ("question", "query") if k in cells), None)
    told = next((k for k in ("answer", "response", "answers") if k in cells), None)
    if asked is None or told is None:
        return None
    given = next((k for k in ("context", "passage") if cells.get(k)), None)
    answer = cells[told]
    if isinstance(answer, Mapping) and "text" in answer:  # SQuAD's answers
        answer = answer["text"]
    others = False
    if isinstance(answer, list | tuple) and answer:
        others = any(other != answer[0] for other in answer)
        answer = answer[0]
    if not isinstance(answer, str):
        raise SourceError(
            "an answer is no text",
            got=f"{told}: {cells[told]!r:.60}",
            allowed="a string, or SQuAD's answers with one text or more",
            fix="write the answer as a string (true as 'yes'), or leave the row out",
        )
    head = f"{string_of(cells, given)}\n" if given else ""
    used = {asked, told} | ({given, "title"} if given else set())
    return Answer(f"{head}{string_of(cells, asked)}\n", answer, others=others), used


def pair(cells: Row, row: Row, template: str | None) -> Found | None:
    """Two texts of a classifier, under one of the names that data sets have."""
    for a, b in _PAIRS:
        if a in cells and b in cells:
            return Pair(string_of(cells, a), string_of(cells, b)), {a, b}
    return None


def question_pair(cells: Row, row: Row, template: str | None) -> Found | None:
    """``question`` and ``answer`` as two texts of a classifier."""
    if not {"question", "answer"} <= cells.keys() or not isinstance(cells["answer"], str):
        return None
    return Pair(string_of(cells, "question"), string_of(cells, "answer")), {"question", "answer"}


def single(cells: Row, row: Row, template: str | None) -> Found | None:
    """``content`` or ``sentence``."""
    for name in SINGLE:
        if isinstance(cells.get(name), str):
            return Text(cells[name]), {name}
    return None


def string_of(cells: Row, name: str) -> str:
    """A column's text.

    Raises:
        SourceError: it is no string.
    """
    value = cells[name]
    if not isinstance(value, str):
        raise SourceError(
            f"a row's {name} is no string",
            got=f"{type(value).__name__}: {value!r:.60}",
            allowed="text",
            fix=f"write {name} as a string",
        )
    return value
