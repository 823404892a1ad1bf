"""A YAML text as plain data: YAML 1.2's core schema, without tags."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from retain.documents.bounds import (
    BITS,
    DEPTH,
    YAML_BYTES,
    YAML_NODES,
    Unreadable,
    check_unicode,
    finite,
)
from retain.errors import shown

__all__ = ["parse_yaml"]


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        Unreadable: no YAML, or outside the bounds that the package lists.
    """
    if len(text) > YAML_BYTES:
        raise Unreadable(f"larger than {YAML_BYTES} bytes")
    check_unicode(text)
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
            check_unicode(node.value)
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
    if len(text) > 80 or abs(number := _integer(text)) >= 2**BITS:
        raise Unreadable(f"the number {text[:20]}... has more than {BITS} bits")
    return number


_CORE: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text[:1] in "tT"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _bounded),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
        lambda text: finite(text.replace(".inf", "inf").replace(".nan", "nan")),
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
