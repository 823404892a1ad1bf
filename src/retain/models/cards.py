"""Model cards: the ``README.md`` beside an adapter, which says what it is of and what held it.

Each part of this package that has something to say has a section of its own, between two comments,
and writes it anew. What else stands in a card is its user's, and stays. No path of this machine is
in what is written: of a file or folder the name alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

from retain.documents import LARGE, Unreadable, read_text
from retain.errors import OutputError, RetainError, RetainWarning
from retain.files import clear_scratch, whole_file
from retain.models.builtin import BUILTIN

__all__ = [
    "CARD", "extend_card", "fresh_card", "hub_name", "is_repo", "or_warned", "plain_name",
    "read_card", "section", "with_base", "with_section", "without_section",
]  # fmt: skip

CARD = "README.md"

_TAG = "base_model:"

_NAMED = ("retain", "peft", "transformers", "torch")


def with_section(card: str, text: str, name: str = "retain") -> str:
    """A model card with a section: in the place of an earlier one, or at the end.

    Args:
        card: its text so far.
        text: of the section, in Markdown.
        name: of what writes it.
    """
    begin, final = _marks(name)
    whole = f"{begin}\n{text}\n{final}"
    if found := _place(card, name):
        return card[: found[0]] + whole + card[found[1] :]
    return f"{card.rstrip()}\n\n{whole}\n" if card.strip() else f"{whole}\n"


def without_section(card: str, name: str) -> str:
    """A model card without the section by `name`, where it has one."""
    if found := _place(card, name):
        return f"{card[: found[0]].rstrip()}\n{card[found[1] :]}"
    return card


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by it anew -->", f"<!-- end of {name} -->"


def _place(card: str, name: str) -> tuple[int, int] | None:
    """Where the section by `name` begins and ends."""
    begin, final = _marks(name)
    start = card.rfind(begin)
    end = card.find(final, start)
    return (start, end + len(final)) if start >= 0 and end >= 0 else None


def section(facts: Mapping[str, str], title: str = "How it was made") -> str:
    """A section: a line for each fact, and the versions of what made it."""
    from retain.provenance import versions

    found = versions()
    made = ", ".join(f"{name} {found[name]}" for name in _NAMED if name in found)
    told = [f"- {what}: {' '.join(value.split())}" for what, value in facts.items()]
    return "\n".join([f"## {title}", "", *told, f"- Versions: {made}"])


def read_card(card: Path) -> str:
    """What a card says, nothing where there is none; raises `OutputError` for what is no text."""
    try:
        return read_text(card, LARGE) if card.exists() else ""
    except (OSError, Unreadable) as error:
        raise _refused(f"{card}: {error}") from error


def extend_card(
    folder: Path, base: str, text: str, library: str = "peft", name: str = "retain",
    without: str = "",
) -> None:  # fmt: skip
    """Writes a section by `name` into the card of a folder; one is begun where there is none.

    `base` is the name of the base model, or where it lies here; `library` loads what is in the
    folder; a section by `without` is left out.

    Raises:
        OutputError: the card is damaged, or cannot be written.
    """
    card = folder / CARD
    old = without_section(read_card(card), without) if without else read_card(card)
    known = with_base(old, base) if old.strip() else fresh_card(base, library)
    clear_scratch(card)  # of a command that was killed here
    with whole_file(card, "the model card") as scratch:
        scratch.write_text(with_section(known, text, name), encoding="utf-8", newline="")


@contextmanager
def or_warned() -> Iterator[None]:
    """A card that cannot be written in the block is a warning: no reason to lose its adapter."""
    try:
        yield
    except RetainError as error:
        warnings.warn(f"the model card is not written: {error}", RetainWarning, stacklevel=4)


def fresh_card(base: str, library: str = "peft", front: str = "") -> str:
    """A card without a section; `front` is a card whose front matter it takes over."""
    from huggingface_hub import ModelCard

    card: Any = ModelCard(front or "---\n{}\n---\n")
    card.data.library_name = library
    card.data.tags = sorted({*(card.data.tags or ()), "retain"})
    card.text = "\n# Trained with retain\n"
    return with_base(str(card), base)


def with_base(card: str, base: str) -> str:
    """A card whose front matter names the base model as the hub knows it, and no path.

    What its user has written there stays, unless it names another model than a base that the hub
    knows. A card without front matter gets none.

    Raises:
        OutputError: the front matter is damaged.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if not card.lstrip().startswith("---"):
        return card
    found: Any
    try:
        found = ModelCard(card)
    except (YAMLError, TypeError, ValueError) as error:
        raise _refused(f"front matter that is none: {error}") from error
    known, named, tags = hub_name(base), found.data.base_model, found.data.tags or []
    of_base = [t for t in tags if str(t).startswith(_TAG)]
    if known is None:
        wanted = named if isinstance(named, str) and hub_name(named) else None
        marks = [t for t in of_base if hub_name(t.rpartition(":")[2])]
    else:
        wanted, marks = known, [f"{_TAG}adapter:{known}"]
    if named == wanted and set(of_base) <= set(marks):
        return card
    found.data.base_model = wanted
    found.data.tags = [t for t in tags if t not in of_base] + marks
    return str(found)


def _refused(got: str) -> OutputError:
    return OutputError(
        "the model card cannot be added to", got=got,
        allowed="text in UTF-8, its front matter in YAML; or no such file",
        fix="repair it, or move it away",
    )  # fmt: skip


def hub_name(name: str) -> str | None:
    """What the hub calls a model or data set; None for a file or folder of this machine."""
    if name in BUILTIN:
        return BUILTIN[name].hub
    return name if is_repo(name) and not Path(name).exists() else None


def is_repo(name: str) -> bool:
    """Whether a repository of the hub may be called so."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def plain_name(name: str) -> str:
    """A name without the path of this machine that leads there."""
    return hub_name(name) or PureWindowsPath(name).name or "a folder"
