"""One row of a task, as every way of training and scoring wants it, and the templates behind it.

Templates are Jinja's, in its sandbox: they see the row's fields and can run no code. Beyond
Jinja's own filters there is ``sub(pattern, by)``, Python's `re.sub`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from retain.data.nulls import is_none, present

__all__ = ["Item", "expression", "missing", "template"]


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


def _sub(text: object, pattern: str, by: str) -> str:
    return re.sub(pattern, by, str(text))


_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_JINJA.filters["sub"] = _sub
_JINJA.tests["none"] = is_none


@cache
def template(text: str) -> Callable[[Mapping[str, Any]], str]:
    """A template as a function from a row to a text.

    Raises:
        jinja2.TemplateError: it does not compile; from the function, a field is missing
            or null.
    """
    compiled = _JINJA.from_string(text)
    return lambda fields: compiled.render(present(fields))


@cache
def expression(text: str) -> Callable[[Mapping[str, Any]], Any]:
    """A Jinja expression, such as ``choices.label.index(answerKey)``, as a function of a row.

    Raises:
        jinja2.TemplateError: it does not compile; from the function, a field is missing.
    """
    compiled = _JINJA.compile_expression(text, undefined_to_none=False)

    def value(fields: Mapping[str, Any]) -> Any:
        found = compiled(present(fields))
        if isinstance(found, Undefined):
            str(found)  # raises, and says which field is missing
        return found

    return value


def missing(gold: object) -> bool:
    """True for what data sets write where a row has no gold label: -1, "-", "" or nothing."""
    return gold is None or gold in (-1, "-1", "-", "") or (isinstance(gold, list) and not gold)
