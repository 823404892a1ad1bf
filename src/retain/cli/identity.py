"""What a run is of, told by contents; and where that lies, told by absolute paths."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retain.config import RunConfig

__all__ = ["placed", "rows_digest"]


def placed(config: RunConfig) -> RunConfig:
    """The settings with absolute paths, so that they hold wherever a later command is started.

    A name that is no path here stays: of a built-in model, of the hub, or ``word-problems``.
    """
    from retain.models.builtin import BUILTIN

    found: dict[str, Any] = {}
    for key in ("model", "data", "curvature", "continue_from"):
        name = getattr(config, key)
        if name is None or (key == "model" and name in BUILTIN):
            continue
        if (path := Path(name).expanduser()).exists():
            found[key] = str(path.absolute())
    return config.model_copy(update=found)


def rows_digest(examples: Sequence[Any]) -> str:
    """What tells tokenised rows, and their order, from others."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(repr((e.tokens, e.targets, e.predict, e.segments)).encode())
    return digest.hexdigest()
