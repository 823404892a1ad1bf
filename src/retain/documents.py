"""YAML and JSON that others may have written, read within bounds.

All that is read here is plain data (mappings, lists, texts, finite numbers, true, false, null), of
a bounded size and depth. Anything else is an `Unreadable` with one line that says why, and where:

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from retain.errors import ConfigError, shown

__all__ = [
    "LARGE",
    "SMALL",
    "Unreadable",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_mapping",
    "read_text",
    "sealed",
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

_BITS = 64


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


def read_json(path: Path, limit: int = LARGE, *, nan: bool = False, sealed: bool = False) -> Any:
    """A JSON file.

    Args:
        path: of the file.
        limit: bytes at most.
        nan: see `parse_json`.
        sealed: check the digest, if there is one; it is not in what is returned.

    Raises:
        Unreadable: see `read_text` and `parse_json`; or its digest is of other contents.
        OSError: it cannot be opened.
    """
    found = parse_json(read_text(path, limit), nan=nan)
    return _unsealed(found) if sealed else found


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data with a digest of it; see `read_json`."""
    plain: dict[str, Any] = json.loads(json.dumps(value))  # as it will be read: keys are texts
    return plain | {"digest": _digest(plain)}


def _unsealed(found: Any) -> Any:
    if not isinstance(found, dict) or "digest" not in found:
        return found
    digest = found.pop("digest")
    if digest != _digest(found):
        raise Unreadable("it has changed since it was written: its digest is of other contents")
    return found


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_mapping(path: str | Path, what: str, fix: str) -> dict[str, Any]:
    """A YAML file (or a JSON one, by its suffix) that holds keys with values.

    Args:
        path: of the file.
        what: its kind, for the error, such as "the study".
        fix: for the error.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    path = Path(path)
    try:
        text = read_text(path.expanduser(), SMALL if path.suffix == ".json" else YAML_BYTES)
        found = _unsealed(parse_json(text)) if path.suffix == ".json" else parse_yaml(text)
    except (OSError, RuntimeError, Unreadable) as error:  # RuntimeError: no home for a ~user
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{what} cannot be read",
            got=f"{shown(str(path), plain=True)}: {reason}",
            allowed="a YAML file",
            fix=fix,
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{what} is no mapping",
            got=f"{path}: {'nothing' if found is None else type(found).__name__}",
            allowed="keys with values",
            fix=f"write 'key: value' lines; {fix}",
        )
    return found


def parse_json(text: str, *, nan: bool = False) -> Any:
    """What a JSON text says.

    Args:
        text: the text.
        nan: take NaN and Infinity, which logs of training may hold.

    Raises:
        Unreadable: no JSON, or outside the bounds that the module lists.
    """
    _check_depth(text)
    try:
        found = json.loads(
            text,
            parse_int=_whole,
            parse_float=float if nan else _finite,
            parse_constant=None if nan else _no_constant,
            object_pairs_hook=_once,
        )
    except json.JSONDecodeError as error:
        raise Unreadable(f"line {error.lineno}: no JSON: {error.msg}") from None
    except RecursionError:
        raise Unreadable(f"values more than {DEPTH} deep") from None
    if r"\ud" in text or r"\uD" in text:
        _check_unicode(json.dumps(found, ensure_ascii=False))
    return found


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        Unreadable: no YAML, or outside the bounds that the module lists.
    """
    if len(text) > YAML_BYTES:
        raise Unreadable(f"larger than {YAML_BYTES} bytes")
    _check_unicode(text)
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(f"line {line}: the character #x{error.character:02x}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise Unreadable(where + " ".join(str(error.problem or error.context).split())) from None
    except yaml.YAMLError as error:
        raise Unreadable(" ".join(str(error).split())[:200]) from None
    except RecursionError:
        raise Unreadable(f"values more than {DEPTH} deep") from None


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
    if len(text) <= 20 and abs(number := int(text)) < 2**_BITS:
        return number
    raise Unreadable(f"the number {text[:20]}... has more than {_BITS} bits")


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise Unreadable(f"the number {text[:20]} is not finite")


def _no_constant(text: str) -> NoReturn:
    raise Unreadable(f"{text} is no finite number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unreadable(f"the key {shown(twice)} is there twice")
    return found


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unreadable("half a surrogate pair, which is no character") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema within bounds; every failure is a `yaml.MarkedYAMLError`."""

    # Of the class, as PyYAML has them.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._count = self._depth = 0
        self._sizes: dict[int, int] = {}  # id of a finished node -> its values, aliases spelled out

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) not in (None, "!"):
            self._refuse("tags such as !!float or !name are not read", event.start_mark)
        before = self._count
        self._depth += 1
        if self._depth > DEPTH:
            self._refuse(f"values more than {DEPTH} deep", event.start_mark)
        self._add(1, event.start_mark)
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                self._refuse(f"the alias *{event.anchor} stands inside itself", event.start_mark)
            self._add(self._sizes[id(node)] - 1, event.start_mark)
        else:
            self._sizes[id(node)] = self._count - before
            if isinstance(node, MappingNode):
                self._check_keys(node)
            elif isinstance(node, ScalarNode) and not node.value.isascii():
                self._check_text(node)
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Keys are texts, whatever they look like: ``1: x`` is ``"1": x``."""
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep) for key, value in node.value}

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            self._refuse(" ".join(str(error).split())[:120], node.start_mark)

    def _add(self, values: int, mark: Any) -> None:
        self._count += values
        if self._count > YAML_NODES:
            self._refuse(f"more than {YAML_NODES} values, aliases counted as often as used", mark)

    def _check_keys(self, node: MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                self._refuse("a key that is no text or number", key.start_mark)
            if key.value in seen:
                self._refuse(f"the key {shown(key.value)} is there twice", key.start_mark)
            seen.add(key.value)

    def _check_text(self, node: ScalarNode) -> None:
        try:
            _check_unicode(node.value)
        except Unreadable as error:
            self._refuse(str(error), node.start_mark)

    @staticmethod
    def _refuse(why: str, mark: Any) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, why, mark)


def _scalar(make: Callable[[str], Any]) -> Callable[[_Loader, ScalarNode], Any]:
    return lambda loader, node: make(str(loader.construct_scalar(node)))


def _sequence(loader: _Loader, node: Any) -> Iterator[list[Any]]:
    found: list[Any] = []
    yield found  # first, so that its parts may be built after it
    found.extend(loader.construct_sequence(node))


def _mapping(loader: _Loader, node: Any) -> Iterator[dict[Any, Any]]:
    found: dict[Any, Any] = {}
    yield found
    found.update(loader.construct_mapping(node))


def _integer(text: str) -> int:
    return int(text, 8) if text[:2] == "0o" else int(text, 16) if text[:2] == "0x" else int(text)


def _bounded(text: str) -> int:
    if len(text) > 80 or abs(number := _integer(text)) >= 2**_BITS:
        raise Unreadable(f"the number {text[:20]}... has more than {_BITS} bits")
    return number


_CORE: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text[:1] in "tT"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _bounded),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
        lambda text: _finite(text.replace(".inf", "inf").replace(".nan", "nan")),
    ),
    "str": ("", "", str),
}
"""Tag -> the texts that stand for it, their first characters, and what makes the value."""

for _name, (_pattern, _first, _make) in _CORE.items():
    _tag = f"tag:yaml.org,2002:{_name}"
    if _first:
        _starts = [*_first, ""] if _name == "null" else [*_first]
        _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _starts)
    _Loader.add_constructor(_tag, _scalar(_make))
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
