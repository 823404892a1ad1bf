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
        here = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a circle of links
        raise ConfigError(
            "a task file cannot be read",
            got=f"{shown(str(path), plain=True)}: {error}",
            allowed="a YAML file",
            fix=_FIX,
        ) from error
    folders = (here.parent, library.resolve())
    seen: list[Path] = []
    layers: list[dict[str, Any]] = []
    while True:
        seen.append(here)
        if here in seen[:-1] or len(seen) > MOST:
            raise ConfigError(
                "a file includes itself",
                got=" -> ".join(p.name for p in seen),
                allowed=f"includes that come to an end, after {MOST} files at most",
                fix="take one include: out",
            )
        layers.append(read_mapping(here, "a task file", _FIX))
        if (base := layers[-1].pop("include", None)) is None:
            break
        here = _included(here, base, folders)
    found: dict[str, Any] = {}
    for layer in layers[::-1]:
        found.pop("name", None)
        found = _overlay(found, layer)
    return found


def _included(path: Path, base: object, folders: tuple[Path, Path]) -> Path:
    """The included file, with all links followed."""
    why = "no name of a file"
    if isinstance(base, str) and base:
        try:
            near = path.parent / base
            below = (near if near.exists() else folders[1] / base).resolve()
            if any(below.is_relative_to(folder) for folder in folders):
                return below
            why = f"{below} is outside {folders[0]}"
        except (OSError, ValueError, RuntimeError) as error:
            why = str(error)
    raise ConfigError(
        "an include is not read",
        got=f"{shown(str(path), plain=True)}: {shown(base)}: {why}",
        allowed="a file in the folder of the task's file or below it, or a task of the package",
        fix="put the included file there, or copy its lines",
    )


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _overlay(base[key], value)
        for key, value in top.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | top | both
