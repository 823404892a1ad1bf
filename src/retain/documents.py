"""YAML and JSON that others may have written, read within bounds.

All that is read is plain data (mappings, lists, texts, finite numbers, true, false, null), of a
bounded size and depth. Anything else is an `Unreadable` with one line that says why, and where:

- only regular files are read: no device, pipe or folder;
- YAML is YAML 1.2's core schema (``true`` and ``false`` alone are truth values, so ``on`` and
  ``no`` are words), without tags, and an alias counts as often as it is used;
- a key that is there twice is refused, not overwritten;
- a whole number has 64 bits at most, and any other number is finite.

JSON of ours may be **sealed**: its key ``digest`` is a digest of all the others, so that what a
disk or a hand has changed is not taken for what was written. Earlier versions wrote none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from retain.errors import ConfigError, shown
from retain.extras import load

if TYPE_CHECKING:
    import yaml

__all__ = [
    "LARGE", "SMALL", "Unreadable", "once", "parse_json", "parse_yaml", "read_json",
    "read_mapping", "read_text", "sealed",
]  # fmt: skip

SMALL, LARGE = 1 << 20, 1 << 28
"""Bytes of a file of settings, and of a record or a log, at most."""

YAML_BYTES, YAML_VALUES = 1 << 18, 20_000
"""Bytes, and values, of a YAML file at most; an alias counts as all that it stands for."""

DEPTH, BITS = 100, 64
"""How deep values may lie in one another; how large a whole number may be."""


class Unreadable(ValueError):
    """A file or a text that is not read; the message is one line."""


def read_text(path: Path, limit: int = SMALL) -> str:
    """A regular file as text.

    Raises:
        Unreadable: it is larger than `limit` bytes, no regular file, or not in UTF-8.
        OSError: it cannot be opened.
    """
    try:
        # Without waiting for somebody to write into a pipe.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a NUL in the name
        raise Unreadable(f"{error} in the path") from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Unreadable("no regular file")
        with open(handle, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(handle)
    if len(data) > limit:
        raise Unreadable(f"larger than {limit} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"line {line}: no UTF-8 text ({error.reason})") from None


def read_json(path: Path, *, nan: bool = False, sealed: bool = False) -> Any:
    """A JSON file.

    Where it is `sealed`, its digest is checked if there is one, and is not in what is returned.
    For `nan` see `parse_json`.

    Raises:
        Unreadable: see `read_text` and `parse_json`; or its digest is of other contents.
        OSError: it cannot be opened.
    """
    found = parse_json(read_text(path, LARGE), nan=nan)
    return _unsealed(found) if sealed else found


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data with a digest of it; see `read_json`."""
    plain: dict[str, Any] = json.loads(json.dumps(value))  # as it will be read: keys are texts
    return plain | {"digest": _digest(plain)}


def read_mapping(path: str | Path, what: str, fix: str) -> dict[str, Any]:
    """A YAML file (or a JSON one, by its suffix) that holds keys with values.

    `what` it is, such as "the study", and the `fix` are for the error.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    path = Path(path)
    try:
        text = read_text(path.expanduser(), SMALL if path.suffix == ".json" else YAML_BYTES)
        found = _unsealed(parse_json(text)) if path.suffix == ".json" else parse_yaml(text)
    except (OSError, RuntimeError, Unreadable) as error:  # RuntimeError: no home for a ~user
        got = f"{shown(str(path), plain=True)}: {getattr(error, 'strerror', None) or error}"
        allowed = "a YAML file"
        raise ConfigError(f"{what} cannot be read", got=got, allowed=allowed, fix=fix) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{what} is no mapping",
            got=f"{path}: {'nothing' if found is None else type(found).__name__}",
            allowed="keys with values",
            fix=f"write 'key: value' lines; {fix}",
        )
    return found


def _unsealed(found: Any) -> Any:
    if not isinstance(found, dict) or "digest" not in found:
        return found
    digest = found.pop("digest")
    if digest != _digest(found):
        raise Unreadable("it has changed since it was written: its digest is of other contents")
    return found


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- JSON


def parse_json(text: str, *, nan: bool = False) -> Any:
    """What a JSON text says; `nan` takes NaN and Infinity, which logs of training may hold.

    Raises:
        Unreadable: no JSON, or outside the bounds above.
    """
    _check_depth(text)
    try:
        found = json.loads(
            text,
            parse_int=_integer,
            parse_float=float if nan else _finite,
            parse_constant=None if nan else _finite,
            object_pairs_hook=once,
        )
    except json.JSONDecodeError as error:
        raise Unreadable(f"line {error.lineno}: no JSON: {error.msg}") from None
    except RecursionError:
        raise Unreadable(f"values more than {DEPTH} deep") from None
    if r"\ud" in text or r"\uD" in text:
        _check_unicode(json.dumps(found, ensure_ascii=False))
    return found


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|([\[{])|([\]}])', re.DOTALL)


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= DEPTH:
        return
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += (match.lastindex == 1) - (match.lastindex == 2)
        if depth > DEPTH:
            line = text.count("\n", 0, match.start()) + 1
            raise Unreadable(f"line {line}: values more than {DEPTH} deep")


def _integer(text: str, base: int = 10) -> int:
    if len(text) <= 80 and abs(number := int(text, base)) < 2**BITS:
        return number
    raise Unreadable(f"the number {text[:20]}... has more than {BITS} bits")


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise Unreadable(f"{text[:20]} is no finite number")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The keys of a JSON object with their values; `Unreadable` if one is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, int] = Counter(key for key, _ in pairs)
        twice = next(key for key, times in seen.items() if times > 1)
        raise Unreadable(f"the key {shown(twice)} is there twice")
    return found


def _check_unicode(text: str) -> None:
    """Raises for half a surrogate pair, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unreadable("half a surrogate pair, which is no character") from None


# --- YAML


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        Unreadable: no YAML, or outside the bounds above.
        MissingExtra: PyYAML is not installed.
    """
    yaml = load("yaml", "reading YAML")
    if len(text) > YAML_BYTES:
        raise Unreadable(f"larger than {YAML_BYTES} bytes")
    _check_unicode(text)
    try:
        return _Yaml(text).document()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(f"line {line}: the character #x{error.character:02x}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise Unreadable(where + " ".join(str(error.problem or error.context).split())) from None
    except yaml.YAMLError as error:
        raise Unreadable(" ".join(str(error).split())[:200]) from None


class _Yaml:
    """Builds plain data from the events of PyYAML's parser, counting as it goes."""

    def __init__(self, text: str) -> None:
        self.yaml = load("yaml", "reading YAML")
        self.events = self.yaml.parse(text, self.yaml.SafeLoader)
        self.count = 0
        self.anchors: dict[str, tuple[Any, int]] = {}  # a value, and how many values are in it

    def document(self) -> Any:
        next(self.events)
        first = next(self.events)
        if isinstance(first, self.yaml.StreamEndEvent):
            return None
        found = self.value(next(self.events), 1)
        next(self.events)
        if not isinstance(more := next(self.events), self.yaml.StreamEndEvent):
            self.refuse("a second document", more)
        return found

    def value(self, event: Any, depth: int) -> Any:
        """The value that begins with an event."""
        before = self.count
        self.add(1, event)
        if depth > DEPTH:
            self.refuse(f"values more than {DEPTH} deep", event)
        if isinstance(event, self.yaml.AliasEvent):
            if event.anchor not in self.anchors:
                why = f"the alias *{event.anchor} is not known, or stands inside itself"
                self.refuse(why, event)
            found, size = self.anchors[event.anchor]
            self.add(size - 1, event)
            return found
        if event.tag not in (None, "!"):
            self.refuse("tags such as !!float or !name are not read", event)
        if isinstance(event, self.yaml.ScalarEvent):
            found = self.scalar(event)
        elif isinstance(event, self.yaml.SequenceStartEvent):
            found = []
            while not isinstance(inner := next(self.events), self.yaml.SequenceEndEvent):
                found.append(self.value(inner, depth + 1))
        else:
            found = self.mapping(depth)
        if event.anchor:
            self.anchors[event.anchor] = found, self.count - before
        return found

    def mapping(self, depth: int) -> dict[str, Any]:
        """Keys are texts, whatever they look like: ``1: x`` is ``"1": x``."""
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(key := next(self.events), self.yaml.MappingEndEvent):
            if not isinstance(key, self.yaml.ScalarEvent):
                self.refuse("a key that is no text or number", key)
            self.value(key, depth + 1)
            value = self.value(event := next(self.events), depth + 1)
            if key.value in found or (key.value == "<<" and merged):
                self.refuse(f"the key {shown(key.value)} is there twice", key)
            if key.value == "<<" and key.implicit[0]:
                for base in value if isinstance(value, list) else [value]:
                    if not isinstance(base, dict):
                        self.refuse("<< merges mappings alone", event)
                    merged = base | merged
            else:
                found[key.value] = value
        return merged | found

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        """A text, number, truth value or null of YAML 1.2's core schema."""
        text = event.value
        try:
            _check_unicode(text)
            if not event.implicit[0]:  # it is quoted
                return text
            return next((make(text) for fits, make in _CORE if fits.fullmatch(text)), text)
        except Unreadable as error:
            self.refuse(str(error), event)

    def add(self, values: int, event: Any) -> None:
        self.count += values
        if self.count > YAML_VALUES:
            self.refuse(f"more than {YAML_VALUES} values, aliases counted as often as used", event)

    def refuse(self, why: str, event: Any) -> NoReturn:
        raise self.yaml.MarkedYAMLError(None, None, why, event.start_mark)


_CORE: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"~|null|Null|NULL|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text[:1] in "tT"),
    (re.compile(r"[-+]?[0-9]+"), _integer),
    (re.compile(r"0o[0-7]+"), lambda text: _integer(text, 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: _integer(text, 16)),
    (re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"), _finite),
    (
        re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
        lambda text: _finite(text.replace(".", "", 1)),
    ),
)
"""What texts without quotation marks stand for."""
