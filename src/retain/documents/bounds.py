"""What is too much, and how it is refused."""

from __future__ import annotations

import math

__all__ = [
    "BITS",
    "DEPTH",
    "LARGE",
    "SMALL",
    "YAML_BYTES",
    "YAML_NODES",
    "Unreadable",
    "check_unicode",
    "finite",
]

SMALL = 1 << 20
"""Bytes of a file of settings, at most."""

LARGE = 1 << 28
"""Bytes of a record or a log, at most."""

YAML_BYTES = 1 << 18
YAML_NODES = 20_000
"""Values of a YAML file, at most; an alias counts as all that it stands for."""

DEPTH = 100
"""How deep values may lie in one another."""

BITS = 64
"""Of a whole number."""


class Unreadable(ValueError):
    """A file or a text that is not read; the message is one line."""


def finite(text: str) -> float:
    """A number that is finite."""
    if math.isfinite(number := float(text)):
        return number
    raise Unreadable(f"the number {text[:20]} is not finite")


def check_unicode(text: str) -> None:
    """Raises for half a surrogate pair, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unreadable("half a surrogate pair, which is no character") from None
