"""What a render of a template has left, and what it may call: see `retain.data.templates`."""

from __future__ import annotations

import datetime
import re
import time
import types
from collections.abc import Iterable, Iterator, Mapping, Set, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.sandbox import safe_range
from jinja2.utils import Namespace

from retain.data.patterns import LONGER

__all__ = [
    "BITS",
    "METER",
    "STEP",
    "Meter",
    "check_call",
    "check_numbers",
    "check_widths",
    "joined",
    "replaced",
]

BUDGET, SHARE = 2_000_000, 20
"""Characters that one render may make: so many, and so many times those of its row."""

STEP, ITEM = 20, 8
"""Characters that a step (a turn of a loop, a call, a filter) and a value in a list count as."""

SECONDS = 2.0
"""Of one render; of a long row `retain.data.patterns.LONGER` more for each character."""

WIDTH, BITS = 10_000, 4_096
"""Of a padded text; of a whole number."""


class Meter:
    """What one render has left."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        size = _size(fields, 1 << 40)
        self.left = BUDGET + SHARE * size
        self.end = time.monotonic() + SECONDS + LONGER * size

    def check(self, count: int) -> None:
        """Raises if so many characters, about to be made, are more than are left."""
        if count > self.left:
            raise TemplateRuntimeError("the template makes too much text, or takes too many steps")

    def charge(self, count: int) -> None:
        """Takes so many characters off, and looks at the time."""
        self.check(count)
        self.left -= count
        if time.monotonic() > self.end:
            raise TemplateRuntimeError("the template takes too long for a row")

    def size(self, value: Any) -> int:
        """The size of a value, as far as it matters here."""
        return _size(value, self.left)

    def made(self, value: Any) -> Any:
        """A value that has been made, charged; those of a generator when they are asked for."""
        if isinstance(value, Iterator):
            return map(self.made, self.each(value))
        self.charge(self.size(value))
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """Values that are there, each charged as a step."""
        for value in values:
            self.charge(STEP)
            yield value


METER: ContextVar[Meter] = ContextVar("meter")


def _size(value: Any, most: int) -> int:
    """Characters and items of a value, those that are shared counted each time, up to `most`."""
    total, waiting = 0, [value]
    while waiting and total <= most:
        each = waiting.pop()
        total += 1
        if isinstance(each, str | bytes):
            total += len(each)
        elif isinstance(each, Mapping):
            total += ITEM * len(each)
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | Set | ValuesView):
            total += ITEM * len(each)
            waiting += each
        elif isinstance(each, range):
            total += ITEM * len(each)
        elif isinstance(each, int) and not isinstance(each, bool):
            total += each.bit_length() // 8
    return total


_PLAIN = frozenset([
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha",
    "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
    "title", "upper",
])  # fmt: skip
_METHODS: dict[type, frozenset[str]] = {
    str: _PLAIN | {"center", "expandtabs", "join", "ljust", "replace", "rjust", "zfill"},
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"get", "items", "keys", "values"}),
    float: frozenset({"is_integer"}),
    datetime.date: frozenset({"isoformat", "strftime"}),
    datetime.datetime: frozenset({"isoformat", "strftime"}),
}
"""Methods that a template may call; those of `_PLAIN` return no more than they were given."""


def check_call(meter: Meter, called: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """Raises for a call that is not taken, or that would make too much."""
    owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
    if called is safe_range or called is dict or called is Namespace:
        return
    if isinstance(owner, LoopContext) and name in ("cycle", "changed"):
        return
    if isinstance(called, types.FunctionType) and name == "format":  # the sandbox's own
        text = getattr(getattr(called, "__wrapped__", None), "__self__", "")
        check_widths(text)
        meter.check((meter.size(args) + meter.size(kwargs)) * (text.count("{") + 1))
        return
    kind: type = next((k for k in type(owner).__mro__ if k in _METHODS), object)
    if not isinstance(called, types.BuiltinMethodType) or name not in _METHODS.get(kind, ()):
        raise SecurityError(f"a call of {name or type(called).__name__} is not taken")
    if name == "replace":
        meter.check(replaced(owner, *args[:2]))
    elif name == "join":
        meter.check(joined(meter, owner, *args))
    elif name == "strftime":
        check_widths(*args)
    elif kind is str and name not in _PLAIN:
        check_numbers(args, kwargs)
        meter.check(str(owner).count("\t") * WIDTH if name == "expandtabs" else WIDTH)


def check_numbers(args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises for a width that is too large."""
    if any(isinstance(n, int | float) and abs(n) > WIDTH for n in (*args, *kwargs.values())):
        raise TemplateRuntimeError(f"the template has a width above {WIDTH}")


def check_widths(text: object = "", *_: object) -> None:
    """Raises for a format with a width that is too large, or that another value gives."""
    if re.search(r"%[^%a-zA-Z]*?(?:\*|\d{4})|\{[^{}]*(?:\{|\d{4})", str(text)):
        raise TemplateRuntimeError("the template has a format with a width above 999")


def replaced(text: object, old: object = "", new: object = "", *_: object) -> int:
    """Characters of a text with `old` replaced, at most."""
    text = str(text)
    return len(text) + (text.count(str(old)) + 1) * len(str(new))


def joined(meter: Meter, between: object, values: object = (), *_: object) -> int:
    """Characters of values put together, at most."""
    size = meter.size(values)
    return size + size // ITEM * len(str(between))
