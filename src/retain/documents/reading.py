"""Files of text, JSON and YAML."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retain.documents.bounds import LARGE, SMALL, YAML_BYTES, Unreadable
from retain.documents.json_text import parse_json
from retain.documents.yaml_text import parse_yaml
from retain.errors import ConfigError, shown

__all__ = ["read_json", "read_mapping", "read_text", "sealed"]


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
