"""Items of skills that a model has or has not: how they are read, and when an answer is right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from retain.data.columns import check_asked
from retain.data.counts import RowCounts
from retain.data.general_prompts import GENERAL, GeneralPrompt, general_prompts
from retain.data.problems import MARK
from retain.data.readers.paths import kind_of
from retain.data.rows import PlacedRow
from retain.data.sources import read_rows
from retain.errors import SourceError, shown, warn
from retain.evaluation.metrics import normalize, plain_minus, same_text

__all__ = ["SkillItem", "Skills", "read_skills"]

Skills = str | Path | Iterable["Mapping[str, Any] | SkillItem"]
"""``general``, a file of rows, rows, or items that were read."""

_COLUMNS = {"skill", "prompt", "answer", "choices", "accepted"}
_UNTYPED = {".csv", ".tsv"}
"""Files whose cells are all texts."""

_CELL = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?")  # a number as JSON has it
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class SkillItem:
    """A prompt of a skill, and what is right: a choice, or one of several answers.

    Attributes:
        id: the number of its row, or of a general prompt its name.
        skill, prompt: texts.
        choices: that are ranked by likelihood; none where the model writes its answer.
        choice: the index of the right one.
        answers: any of them is right.
        scripted: tells whether an answer is right, in place of `answers`.
    """

    id: str
    skill: str
    prompt: str
    choices: tuple[str, ...] = ()
    choice: int = -1
    answers: tuple[str | float, ...] = ()
    scripted: GeneralPrompt | None = None

    @property
    def chance(self) -> float:
        """How often a guess is right: one in the number of choices, never where there are none."""
        return 1 / len(self.choices) if self.choices else 0.0

    def right(self, said: str) -> bool:
        """Whether a text that a model wrote is right.

        Of an answer that is a number, the number behind ``####`` counts, or else the last in the
        first line. Any other is to be the whole first line, see
        `retain.evaluation.metrics.same_text`.
        """
        if self.scripted is not None:
            return bool(self.scripted.right(said))
        said = plain_minus(said)
        line = next((part for part in said.splitlines() if part.strip()), "")
        behind = _NUMBER.findall(said.partition(MARK)[2])[:1] or _NUMBER.findall(line)[-1:]
        number = behind[0].replace(",", "") if behind else None
        return any(
            same_text(line, answer) if isinstance(answer, str) else _equals(number, answer)
            for answer in self.answers
        )


def _equals(said: str | None, number: float) -> bool:
    """Whether a number that is written out is this one; a whole one is not rounded to a float."""
    if said is None:
        return False
    return Decimal(said) == number if isinstance(number, int) else float(said) == number


def read_skills(given: Skills) -> list[SkillItem]:
    """Items that are named, in a file, or given as rows.

    A row has ``skill`` and ``prompt``, and one of: ``answer``, a text, a number or a list of them;
    ``choices`` with ``answer``, one of them or its index from 0 (a number that is one choice and
    the index of another is refused); or ``accepted``, a text or a list of which one has to stand
    among the answer's first 24 words. In CSV, whose cells are texts, an answer that is written as a
    number is one.

    Args:
        given: ``general`` for the held-out half of `retain.data.general_prompts` that a script can
            score; a file of rows; or rows.

    Raises:
        SourceError: a file that is missing or damaged, a row that cannot be used, a column such as
            ``system``, with which the prompt would have to be asked, or an item that is there
            twice: the bounds count items as independent.
    """
    if isinstance(given, str) and given == GENERAL:
        return [SkillItem(p.id, p.skill, p.prompt, scripted=p) for p in general_prompts()
                if p.scored]  # fmt: skip
    listed = list(given) if isinstance(given, list | tuple | Iterator) else []
    if listed and all(isinstance(item, SkillItem) for item in listed):
        items: list[SkillItem] = listed
    else:
        rows, counts = read_rows(listed or given), RowCounts()  # type: ignore[arg-type]
        items = [_item(row, number, counts) for number, row in enumerate(rows, start=1)]
        for line in counts.lines():
            warn(line)
    seen: dict[tuple[str, str], int] = {}
    for number, item in enumerate(items, start=1):
        first = seen.setdefault((item.skill, item.prompt), number)
        if first != number:
            raise SourceError(
                "an item is there twice, and would count twice",
                got=f"{shown(item.prompt)} of {item.skill} as rows {first} and {number}",
                allowed="each prompt once in a skill", fix="leave one out",
            )  # fmt: skip
    return items


def _item(row: Any, number: int, counts: RowCounts) -> SkillItem:
    """A row that was checked."""
    found = row if isinstance(row, Mapping) else {}
    skill, prompt, answer = (found.get(key) for key in ("skill", "prompt", "answer"))
    choices, accepted = found.get("choices"), found.get("accepted")
    if isinstance(row, PlacedRow) and row.path is not None and kind_of(row.path) in _UNTYPED:
        answer = _of_cell(answer)
    if not (_text(skill) and _text(prompt)):
        raise _bad("an item has no skill or no prompt", row, number, "texts as skill and prompt")
    check_asked(found, _COLUMNS, str(prompt), number, counts)
    known = (str(number), str(skill).strip(), str(prompt).strip())
    if (answer is None) == (accepted is None) or (choices is not None and answer is None):
        raise _bad(
            "nothing clear says when an answer is right", row, number,
            "answer; choices with answer; or accepted",
        )  # fmt: skip
    if choices is not None:
        return SkillItem(*known, *_choices(choices, answer, number))
    every = answer if accepted is None else accepted
    answers = tuple(every) if isinstance(every, list | tuple) else (every,)
    numbers = () if accepted is not None else (int, float)
    for one in answers:
        plain = isinstance(one, numbers) and not isinstance(one, bool)
        if not plain and not (_text(one) and normalize(one)):
            raise _bad("an answer cannot be compared", one, number, "text with a word, or a number")
    if not answers:
        raise _bad("an item has no answer", every, number, "one at least")
    if accepted is None:
        return SkillItem(*known, answers=answers)
    asked = GeneralPrompt(known[0], known[1], "held-out", known[2], accepted=answers)
    return SkillItem(*known, scripted=asked)


def _choices(choices: Any, answer: Any, number: int) -> tuple[tuple[str, ...], int]:
    """The choices of an item, and the index of the right one."""
    texts = [str(c).strip() for c in choices] if isinstance(choices, list | tuple) else []
    if len(texts) < 2 or not all(texts) or len(set(texts)) < len(texts):
        raise _bad("choices cannot be told apart", choices, number, "a list of 2 or more texts")
    meant = {k for k, choice in enumerate(choices) if _same(answer, choice)}
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        meant.add(answer)
    if len(meant) == 1:
        return tuple(texts), meant.pop()
    if meant:
        one, other = sorted(meant)[:2]
        raise SourceError(
            "the answer is one of the choices, and the index of another",
            got=f"answer {shown(answer)} of {shown(choices)} in row {number}",
            allowed="an answer that means one choice",
            fix=f'write the right one as a text: "{texts[one]}" or "{texts[other]}"',
        )
    raise _bad(
        "the answer is none of the choices", answer, number,
        f"one of them, or its index from 0 to {len(texts) - 1}",
    )  # fmt: skip


def _same(answer: Any, choice: Any) -> bool:
    """Whether an answer names a choice: as a value, or as it is written."""
    alike = isinstance(answer, bool) == isinstance(choice, bool)  # true is no 1
    return (alike and bool(answer == choice)) or str(answer).strip() == str(choice).strip()


def _of_cell(text: Any) -> Any:
    """What a cell of a file without types says: a number where it is written as one."""
    number = _CELL.fullmatch(text.strip()) if isinstance(text, str) else None
    if number is None:
        return text
    return float(number[0]) if number[1] else int(number[0])


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _bad(what: str, got: Any, number: int, allowed: str) -> SourceError:
    return SourceError(
        what, got=f"{shown(got)} in row {number}", allowed=allowed, fix="change or drop the row"
    )
