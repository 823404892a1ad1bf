"""YAML files that are laid over one another: ``include: FILE`` names the one below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retain.documents import read_mapping
from retain.errors import ConfigError, shown

__all__ = ["read_layers"]

_FIX = "check the path and the file; retain tasks --template prints one to start from"

MOST = 16
"""Files that lie over one another, at most."""


def read_layers(path: Path, library: Path) -> dict[str, Any]:
    """A YAML file laid over the file that it includes, and so on downward.

    Mappings are merged key by key; anything else is replaced whole. A ``name`` is not inherited.
    An included file lies in the folder of `path`, or below it, or in `library`: a file that
    somebody else wrote reads nothing beside the folder that it was put into.

    Args:
        path: the file.
        library: where an included file is looked for when it is not beside the file that names it.

    Raises:
        ConfigError: a file is missing, damaged or no mapping, includes itself, or lies elsewhere.
    """
    try:
        top = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a circle of links
        raise _elsewhere(path, str(path), str(error)) from error
    return _read(top, (top.parent, library.resolve()), ())


def _read(path: Path, folders: tuple[Path, Path], seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen or len(seen) == MOST:
        raise ConfigError(
            "a file includes itself",
            got=" -> ".join(p.name for p in (*seen, path)),
            allowed=f"includes that come to an end, after {MOST} files at most",
            fix="take one include: out",
        )
    found = read_mapping(path, "a task file", _FIX)
    base = found.pop("include", None)
    if base is None:
        return found
    inner = _read(_below(path, base, folders), folders, (*seen, path))
    inner.pop("name", None)
    return _overlay(inner, found)


def _below(path: Path, base: object, folders: tuple[Path, Path]) -> Path:
    """The included file, with all links followed."""
    if not isinstance(base, str) or not base:
        raise _elsewhere(path, base, "no name of a file")
    try:
        near = path.parent / base
        below = (near if near.exists() else folders[1] / base).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise _elsewhere(path, base, str(error)) from error
    if not any(below.is_relative_to(folder) for folder in folders):
        raise _elsewhere(path, base, f"{below} is outside {folders[0]}")
    return below


def _elsewhere(path: Path, base: object, why: str) -> ConfigError:
    return ConfigError(
        "a task file cannot be read" if base == str(path) else "an include is not read",
        got=f"{shown(str(path), plain=True)}: {shown(base)}: {why}",
        allowed="a file in the folder of the task's file or below it, or a task of the package",
        fix="put the included file there, or copy its lines",
    )


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        under = merged.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            merged[key] = _overlay(under, value)
        else:
            merged[key] = value
    return merged
