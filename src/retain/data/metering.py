"""What a render of a template has left, and what it may call: see `retain.data.templates`.

What could grow in one go (a product, a power, a width) is measured before it is done.
"""

from __future__ import annotations

import datetime
import re
import time
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.sandbox import safe_range
from jinja2.utils import Namespace

from retain.data.patterns import LONGER

__all__ = ["METER", "Meter", "check_call", "check_number", "check_widths"]

BUDGET, SHARE = 2_000_000, 20
"""Characters that one render may make: so many, and so many times those of its row."""

STEP, ITEM = 20, 8
"""Characters that a step (a turn of a loop, a call, a filter) and a value in a list count as."""

SECONDS = 2.0
"""Of one render; of a long row `retain.data.patterns.LONGER` more for each character."""

BITS = 4_096
"""Of a whole number."""

_GROWS, _EACH = {"format", "format_map", "wordwrap", "batch"}, {"indent", "tojson", "expandtabs"}
"""What repeats a text that it is given; what makes so many characters for each part of a value."""


class Meter:
    """What one render has left."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.left = 1 << 40
        size = self.size(fields)
        self.left = BUDGET + SHARE * size
        self.end = time.monotonic() + SECONDS + LONGER * size

    def check(self, count: float) -> None:
        """Raises if so many characters, about to be made, are more than are left."""
        if count > self.left:
            raise TemplateRuntimeError("the template makes too much text, or takes too many steps")

    def charge(self, count: int) -> None:
        """Takes so many characters off, and looks at the time."""
        self.check(count)
        self.left -= count
        if time.monotonic() > self.end:
            raise TemplateRuntimeError("the template takes too long for a row")

    def check_call(self, name: str, first: Any, given: Sequence[Any]) -> None:
        """Raises if a call of `name` on a value, with others given, could make too much."""
        numbers = sum(abs(v) for v in given if isinstance(v, int | float))
        given = [v for v in given if not isinstance(v, int | float)]
        own, more = self.size(first), sum(self.size(v) for v in given)
        longest = max((len(v) for v in given if hasattr(v, "__len__")), default=0)
        if name == "join" and hasattr(first, "__len__"):
            more += len(first) * longest
        elif name == "replace":
            more *= 1 + max((str(first).count(v) for v in given if isinstance(v, str)), default=0)
        elif name in _GROWS:
            own *= 1 + more
        elif name in _EACH:
            own *= 1 + more + int(numbers)
        self.check(own + more + numbers)

    def size(self, value: Any) -> int:
        """Characters and items of a value, shared ones each time, hardly beyond what is left."""
        total, waiting = 0, [value]
        while waiting and total <= self.left:
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

    def made(self, value: Any) -> Any:
        """A value that a step has made, charged; those of a generator when they are asked for."""
        if isinstance(value, Iterator):
            return map(self.made, self.each(value))
        self.charge(STEP + self.size(value))
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """Values that are there, each charged as a step."""
        for value in values:
            self.charge(STEP)
            yield value


METER: ContextVar[Meter] = ContextVar("meter")

_METHODS: dict[type, frozenset[str]] = {
    str: frozenset([
        "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "index",
        "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace",
        "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix",
        "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip",
        "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill",
    ]),
    list: frozenset(["count", "index"]),
    tuple: frozenset(["count", "index"]),
    dict: frozenset(["get", "items", "keys", "values"]),
    float: frozenset(["is_integer"]),
    datetime.date: frozenset(["isoformat", "strftime"]),
}  # fmt: skip
"""Methods that a template may call."""


def check_call(meter: Meter, called: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """Raises for a call that is not taken, or that would make too much."""
    owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
    if called is safe_range or called is dict or called is Namespace:
        return
    if isinstance(owner, LoopContext) and name in ("cycle", "changed"):
        return
    if isinstance(called, types.FunctionType) and name == "format":  # the sandbox's own
        owner = getattr(getattr(called, "__wrapped__", None), "__self__", "")
        check_widths(owner)
    else:
        kind: type = next((k for k in type(owner).__mro__ if k in _METHODS), object)
        if not isinstance(called, types.BuiltinMethodType) or name not in _METHODS.get(kind, ()):
            raise SecurityError(f"a call of {name or type(called).__name__} is not taken")
        if name == "strftime":
            check_widths(*args)
    meter.check_call(name, owner, [*args, *kwargs.values()])


def check_number(operator: str, left: float, right: float) -> None:
    """Raises for arithmetic with too large a result."""
    if isinstance(left, int) and isinstance(right, int):
        a, b = left.bit_length(), right.bit_length()
        if (a + b if operator == "*" else a * right if operator == "**" else 0) > BITS:
            raise TemplateRuntimeError("the template makes too large a number")


def check_widths(text: object = "", *_: object) -> None:
    """Raises for a format with a width that is too large, or that another value gives."""
    if re.search(r"%[^%a-zA-Z]*?(?:\*|\d{4})|\{[^{}]*(?:\{|\d{4})", str(text)):
        raise TemplateRuntimeError("the template has a format with a width above 999")
