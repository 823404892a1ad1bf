"""Regular expressions of files that others wrote: matched within a time, compiled within a size.

What `re` compiles is accepted, but for what would take its time or memory; the matching is done by
`regex` (a dependency of transformers), which can stop.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from functools import lru_cache
from typing import Any

import regex

__all__ = ["SECONDS", "PatternError", "compile_pattern", "first_match", "replace_all"]

SECONDS, LONGER = 1.0, 4e-6
"""Of one search, or of all replacements in one text; and more of them for each character."""

LENGTH = 2_000
"""Characters of a pattern, and of what it is replaced by, at most."""

_REPEATS = 100_000
"""Characters times all counts such as ``{5}``, at most: how large the compiled pattern may be."""

_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_FUZZY = re.compile(r"(?<!\\)\{[\d<=+,\s]*[eisd][\deisd<=+,\s]*\}")


class PatternError(ValueError):
    """A pattern that is not taken, or one that takes too long; the message is one line."""


@lru_cache(maxsize=256)
def compile_pattern(pattern: str) -> Any:
    """A compiled pattern; raises `PatternError` for one that is none, or too large."""
    if len(pattern) > LENGTH:
        raise PatternError(f"a pattern of {len(pattern)} characters; at most {LENGTH}")
    counts = [max(int(n[:9] or 0) for n in found) for found in _COUNT.findall(pattern)]
    if len(pattern) * math.prod(max(n, 1) for n in counts) > _REPEATS:
        raise PatternError("a pattern with larger counts, such as {9}, than are taken")
    if _FUZZY.search(pattern):
        raise PatternError(r"a pattern with a brace that is no count: write \{ for a brace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # sets in sets, which others may read so
            re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, FutureWarning, RecursionError, OverflowError) as error:
        raise PatternError(f"a regular expression that does not compile: {error}") from error


def first_match(pattern: str, text: str) -> Any:
    """What `re.search` returns; raises `PatternError` as `compile_pattern`, or out of time."""
    try:
        return compile_pattern(pattern).search(text, timeout=_seconds(text))
    except (TimeoutError, MemoryError) as error:
        raise _endless() from error


def replace_all(pattern: str, by: str, text: str, room: int) -> str:
    """What `re.sub` returns.

    Raises:
        PatternError: see `compile_pattern`; no end within its time; a bad `by`; or more than
            `room` characters.
    """
    compiled, seconds = compile_pattern(pattern), _seconds(text)
    end = time.monotonic() + seconds
    if len(by) > LENGTH:
        raise PatternError(f"a replacement of {len(by)} characters; at most {LENGTH}")
    groups = by.count("\\")
    parts: list[str] = []
    at = 0
    try:
        for match in compiled.finditer(text, timeout=seconds):
            begin, stop = match.span()
            room -= begin - at + len(by) + groups * (stop - begin)
            if room < 0 or time.monotonic() > end:
                raise _endless() if room >= 0 else PatternError("a replacement that grows too long")
            parts += (text[at:begin], match.expand(by) if groups else by)
            at = stop
    except (TimeoutError, MemoryError) as error:
        raise _endless() from error
    except (regex.error, IndexError) as error:
        raise PatternError(f"a replacement that does not fit its pattern: {error}") from error
    return "".join((*parts, text[at:]))


def _seconds(text: str) -> float:
    return SECONDS + LONGER * len(text)


def _endless() -> PatternError:
    return PatternError("a pattern that takes too long: make its repetitions unambiguous")
