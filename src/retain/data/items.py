"""One row of a task, as every way of training and scoring wants it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Item", "missing"]


@dataclass(frozen=True)
class Item:
    """One rendered row.

    Attributes:
        prompt: what a decoder reads, up to where the answer begins (no trailing space).
        options: the continuations among which a decoder chooses, each with its leading space, so
            that ``prompt + option`` is the whole text; empty for generation and regression.
        answer: the index of the true option; the reference text (generation); the number
            (regression).
        texts: the one or two texts that an encoder reads.
        group: rows of one group are scored together (MultiRC's questions, ReCoRD's); else "".
        row: the place of the row in its split, from 0; people are told it from 1.
        references: all texts that count as right, where there are several (ReCoRD); without a
            leading space.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int | str | float
    texts: tuple[str, ...] = ()
    group: str = ""
    row: int = 0
    references: tuple[str, ...] = ()

    @property
    def completion(self) -> str:
        """What a decoder is to learn to say after the prompt, with its leading space."""
        if self.options and isinstance(self.answer, int):
            return self.options[self.answer]
        return f" {self.answer}"


def missing(gold: object) -> bool:
    """True for what data sets write where a row has no gold label: -1, "-", "" or nothing."""
    return gold is None or gold in (-1, "-1", "-", "") or (isinstance(gold, list) and not gold)
