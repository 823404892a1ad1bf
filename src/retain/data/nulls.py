"""Empty fields in templates: what is null cannot be written, so no text ever reads "None"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from jinja2 import Undefined

__all__ = ["Null", "is_none", "present"]


class Null(Undefined):
    """What stands for None in a template: false, equal to None, and an error where it is written.

    ``is none``, ``or`` and the filter ``default`` work as with None.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return is_none(other)

    __hash__ = Undefined.__hash__

    def __str__(self) -> NoReturn:
        self._fail_with_undefined_error()

    def __repr__(self) -> NoReturn:  # what a list that is written asks of its parts
        self._fail_with_undefined_error()

    def __iter__(self) -> NoReturn:
        self._fail_with_undefined_error()

    def __len__(self) -> NoReturn:
        self._fail_with_undefined_error()


def is_none(value: object) -> bool:
    """Whether a value is None, or stands for it."""
    return value is None or isinstance(value, Null)


def present(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a row with a `Null` for each None in them, however deep; a copy if need be."""
    return {
        name: _filled(value, name) if _has_none(value) else value for name, value in fields.items()
    }


def _has_none(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_none, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_none, value))
    return value is None


def _filled(value: Any, name: str) -> Any:
    if value is None:
        return Null(hint=f"the field {name!r} is null")
    if isinstance(value, dict):
        return {key: _filled(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(inner, f"{name}[{i}]") for i, inner in enumerate(value))
    return value
