"""General prompts that people might type to a chat model: to measure its answers, or to learn from.

There are eight skills (``general_prompts.jsonl``). 19 prompts of each are held out for measuring,
the others are for use as source text: 19 too, of ``facts`` 38, half of which ask for a number or a
year. No prompt of one half is near another of the other. Only those of ``arithmetic`` are sums.
Where a script can tell whether an answer is right, the item says how: by words that are accepted,
by what the answer has to contain, or by its form.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from retain.data.columns import check_asked
from retain.data.counts import RowCounts
from retain.data.readers.paths import kind_of
from retain.data.sources import read_rows
from retain.documents import LARGE, Unreadable, read_text
from retain.errors import SourceError, shown, unknown, warn

__all__ = [
    "GENERAL", "HALVES", "SKILLS", "GeneralPrompt", "GivenPrompts", "Half", "Prompts",
    "check_distinct", "general_prompts", "mixed_prompts", "prompt_texts", "read_prompts",
    "spread_prompts",
]  # fmt: skip

Half = Literal["source", "held-out"]
HALVES: tuple[Half, ...] = get_args(Half)

SKILLS = (
    "facts", "how-to", "writing", "lists", "translation", "arithmetic", "code", "declining",
)  # fmt: skip

GENERAL = "general"
"""What stands for the prompts of this module where prompts are asked for."""

READ = 24
"""Words of an answer in which an accepted one must stand."""

_PIECE = 4  # words of one part of a list with commas, at most: a sentence is no such list
_LINES = {"bullets": r"\s*[-*•–]\s+(\S.*)", "numbered": r"\s*(\d+)[.):]\s+\S.*"}
_FORM = re.compile(r"(bullets|numbered|commas):([1-9]\d?)")


@dataclass(frozen=True)
class GeneralPrompt:
    """A prompt, and how to tell whether an answer to it is right, if a script can.

    Attributes:
        id: such as ``facts-01``.
        skill: one of `SKILLS`; of prompts that are given, what their file says, or ``given``.
        half: ``source`` or ``held-out``.
        prompt: what the user says.
        accepted: any of them makes an answer right, as whole words among its first 24.
        contains: all of them have to be there, anywhere.
        form: ``bullets:3``, ``numbered:3`` or ``commas:5``: so many parts, no more and no fewer.
    """

    id: str
    skill: str
    half: Half
    prompt: str
    accepted: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    form: str = ""

    @property
    def scored(self) -> bool:
        """Whether a script can tell if an answer is right."""
        return bool(self.accepted or self.contains or self.form)

    def right(self, answer: str) -> bool | None:
        """Whether an answer is right, whatever its case; None where no script can tell."""
        if not self.scored:
            return None
        text = _plain(answer)
        begun = " ".join(text.split()[:READ])
        return (
            (not self.accepted or any(_stands(_plain(word), begun) for word in self.accepted))
            and all(_plain(part) in text for part in self.contains)
            and (not self.form or _has_form(self.form, answer))
        )


GivenPrompts = str | Path | Iterable[str | GeneralPrompt | Mapping[str, Any]]
"""What `read_prompts` reads."""

Prompts = GivenPrompts | None


def general_prompts(skill: str | None = None, half: Half = "held-out") -> list[GeneralPrompt]:
    """The prompts of a half, in the order of the file.

    Args:
        skill: one of `SKILLS`; None for all.
        half: ``held-out``, to measure with, or ``source``.

    Raises:
        ConfigError: an unknown skill or half.
    """
    if half not in HALVES:
        raise unknown("half", str(half), HALVES)
    if skill is not None and skill not in SKILLS:
        raise unknown("skill", str(skill), SKILLS)
    return [p for p in _items() if p.half == half and skill in (None, p.skill)]


def spread_prompts(count: int) -> list[GeneralPrompt]:
    """The first `count` prompts of the held-out half where the skills take turns; all there are."""
    each = [general_prompts(skill) for skill in SKILLS]
    turns = [prompt for turn in zip_longest(*each) for prompt in turn if prompt is not None]
    return turns[:count]


def mixed_prompts(half: Half, seed: int) -> list[str]:
    """What users say in a half's prompts, in an order by the seed that keeps the skills' shares.

    Whatever number of them is taken from its beginning has as much of each skill as the whole has,
    but for one prompt or so.
    """
    random, found = Random(seed), list[tuple[float, str]]()
    for skill in SKILLS:
        texts = [p.prompt for p in general_prompts(skill, half)]
        turns = enumerate(random.sample(texts, len(texts)))
        found += [((i + random.random()) / len(texts), text) for i, text in turns]
    return [text for _, text in sorted(found)]


@cache
def _items() -> tuple[GeneralPrompt, ...]:
    text = resources.files(__package__).joinpath("general_prompts.jsonl").read_text("utf-8")
    rows = map(json.loads, text.splitlines())
    several = ("accepted", "contains")
    return tuple(
        GeneralPrompt(**row | {key: tuple(row.get(key, ())) for key in several}) for row in rows
    )


def read_prompts(
    prompts: GivenPrompts,
    half: Half = "held-out",
) -> list[GeneralPrompt]:
    """Prompts that are named, in a file, or given.

    Args:
        prompts: ``general`` for those of this module; a file of one prompt a line (``.txt``, or no
            name that `retain.data.sources.read_rows` knows); a file of rows with ``prompt``, maybe
            with ``skill`` and ``accepted`` (a text or a list); or texts, items or such rows.
        half: of the general prompts; what is given counts as of that half too.

    Raises:
        SourceError: a file that is missing or damaged, no prompt, one that is no text, or a column
            such as ``system``, with which it would have to be asked.
    """
    if isinstance(prompts, str) and prompts == GENERAL:
        return general_prompts(half=half)
    if isinstance(prompts, str | Path):
        given: Iterable[Any] = _of_file(Path(prompts).expanduser())
    elif isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise SourceError(
            "no prompts", got=shown(prompts), allowed="'general', a file, or a list of texts",
            fix="give a list",
        )  # fmt: skip
    else:
        given = prompts
    counts = RowCounts()
    found = [_item(value, number, half, counts) for number, value in enumerate(given, start=1)]
    for line in counts.lines():
        warn(line)
    if not found:
        raise SourceError(
            "there are no prompts", got=f"0 prompts in {shown(prompts, plain=True)}",
            allowed="at least 1", fix="give some, or 'general' for those of retain",
        )  # fmt: skip
    return found


def check_distinct(prompts: Sequence[GeneralPrompt]) -> None:
    """Raises `SourceError` where a prompt is there twice: what is measured counts it once."""
    seen: dict[str, str] = {}
    for item in prompts:
        if item.prompt in seen:
            raise SourceError(
                "a prompt is there twice, and would count twice",
                got=f"{shown(item.prompt)} as {seen[item.prompt]} and {item.id}",
                allowed="each prompt once", fix="leave one out",
            )  # fmt: skip
        seen[item.prompt] = item.id


def prompt_texts(prompts: GivenPrompts, half: Half = "source") -> list[str]:
    """What the user says in each of `read_prompts`."""
    return [item.prompt for item in read_prompts(prompts, half)]


def _of_file(path: Path) -> Sequence[Any]:
    """The prompts of a file, or its rows."""
    if kind_of(path) not in {None, ".txt"}:
        return read_rows(path)
    try:
        return [line for line in read_text(path, LARGE).splitlines() if line.strip()]
    except (OSError, Unreadable) as error:
        raise SourceError(
            "the prompts cannot be read",
            got=f"{path}: {getattr(error, 'strerror', None) or error}",
            allowed="a file of one prompt a line, or rows with a prompt; or 'general'",
            fix="check the path and the file",
        ) from error


def _item(value: Any, number: int, half: Half, counts: RowCounts) -> GeneralPrompt:
    if isinstance(value, GeneralPrompt):
        return value
    row = value if isinstance(value, Mapping) else {"prompt": value}
    prompt, skill = row.get("prompt"), row.get("skill") or "given"
    accepted = row.get("accepted") or ()
    accepted = (accepted,) if not isinstance(accepted, list | tuple) else tuple(accepted)
    if not isinstance(prompt, str) or not prompt.strip():
        raise SourceError(
            "a prompt is no text", got=f"{shown(value)} as number {number}",
            allowed="text that is not empty, or a row with it as 'prompt'", fix="leave it out",
        )  # fmt: skip
    told = isinstance(skill, str) and all(isinstance(w, str) and w.strip() for w in accepted)
    if not told:
        raise SourceError(
            "what is told of a prompt is no text", got=f"{shown(value)} as number {number}",
            allowed="text as 'skill', a text or a list of texts that are not empty as 'accepted'",
            fix="change it",
        )  # fmt: skip
    check_asked(row, {"prompt", "skill", "accepted"}, prompt, number, counts)
    return GeneralPrompt(f"given-{number:02d}", skill, half, prompt.strip(), accepted)


# --- whether an answer is right


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold().replace("’", "'")


def _stands(words: str, text: str) -> bool:
    """Whether words stand in a text as whole ones."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _has_form(form: str, answer: str) -> bool:
    """Whether an answer has as many parts as its form says, and these are of its kind."""
    match = _FORM.fullmatch(form)
    assert match is not None, form
    kind, count = match[1], int(match[2])
    lines = [line for line in answer.splitlines() if line.strip()]
    if kind == "commas":
        line = max(lines, key=lambda text: text.count(","), default="")
        parts = [part.strip(" .") for part in line.rpartition(":")[2].split(",")]
        return len(parts) == count and all(0 < len(part.split()) <= _PIECE for part in parts)
    found = [match[1] for line in lines if (match := re.fullmatch(_LINES[kind], line))]
    if kind == "numbered" and found != [str(n + 1) for n in range(len(found))]:
        return False
    return len(found) == count
