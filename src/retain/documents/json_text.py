"""A JSON text as plain data."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from retain.documents.bounds import BITS, DEPTH, Unreadable, check_unicode, finite
from retain.errors import shown

__all__ = ["parse_json"]


def parse_json(text: str, *, nan: bool = False) -> Any:
    """What a JSON text says.

    Args:
        text: the text.
        nan: take NaN and Infinity, which logs of training may hold.

    Raises:
        Unreadable: no JSON, or outside the bounds that the package lists.
    """
    _check_depth(text)
    try:
        found = json.loads(
            text,
            parse_int=_whole,
            parse_float=float if nan else finite,
            parse_constant=None if nan else _no_constant,
            object_pairs_hook=_once,
        )
    except json.JSONDecodeError as error:
        raise Unreadable(f"line {error.lineno}: no JSON: {error.msg}") from None
    except RecursionError:
        raise Unreadable(f"values more than {DEPTH} deep") from None
    if r"\ud" in text or r"\uD" in text:
        check_unicode(json.dumps(found, ensure_ascii=False))
    return found


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|([\[{])|([\]}])', re.DOTALL)


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= DEPTH:
        return
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += match.lastindex == 1
        depth -= match.lastindex == 2
        if depth > DEPTH:
            line = text.count("\n", 0, match.start()) + 1
            raise Unreadable(f"line {line}: values more than {DEPTH} deep")


def _whole(text: str) -> int:
    if len(text) <= 20 and abs(number := int(text)) < 2**BITS:
        return number
    raise Unreadable(f"the number {text[:20]}... has more than {BITS} bits")


def _no_constant(text: str) -> NoReturn:
    raise Unreadable(f"{text} is no finite number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unreadable(f"the key {shown(twice)} is there twice")
    return found
