"""YAML files that are laid over one another: ``include: FILE`` names the one below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from retain.errors import ConfigError

__all__ = ["read_layers"]


def read_layers(path: Path, library: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file laid over the file that it includes, and so on downward.

    Mappings are merged key by key; anything else is replaced whole. A ``name`` is not inherited.

    Args:
        path: the file.
        library: where an included file is looked for when it is not beside the file.
        seen: the files above this one.

    Raises:
        ConfigError: a file is missing or damaged, is no mapping, or includes itself.
    """
    path = path.resolve()
    if path in seen:
        raise ConfigError(
            "a file includes itself",
            got=" -> ".join(p.name for p in (*seen, path)),
            allowed="includes that come to an end",
            fix="take one include: out",
        )
    found = _mapping(path)
    base = found.pop("include", None)
    if base is None:
        return found
    near = path.parent / str(base)
    below = near if near.is_file() else library / str(base)
    inner = read_layers(below, library, (*seen, path))
    inner.pop("name", None)
    return _overlay(inner, found)


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        under = merged.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            merged[key] = _overlay(under, value)
        else:
            merged[key] = value
    return merged


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(
            "a task file cannot be read",
            got=f"{path}: {str(reason)[:200]}",
            allowed="a YAML file",
            fix="check the path and the file; retain tasks --template prints one to start from",
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            "a task file is no mapping",
            got=f"{path}: {type(found).__name__}",
            allowed="keys with values",
            fix="write 'key: value' lines; retain tasks --template prints some to start from",
        )
    return found
