"""Data sets of the hub: ``owner/name``, ``owner/name:split`` or ``owner/name/config:split``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from retain.data.filetypes.found import kind_of
from retain.errors import SourceError

__all__ = ["hub_name", "load_hub"]

_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"({_PART}/{_PART})(?:/([\w.-]+))?(?::([\w.\[\]:%+-]+))?")


def hub_name(source: str | Path) -> tuple[str, str | None, str | None] | None:
    """The repository, configuration and split that a name stands for; None if it is a path.

    A name whose first part is a folder here is a path, and so is every `Path`.
    """
    found = _NAME.fullmatch(source) if isinstance(source, str) else None
    if found is None or kind_of(Path(source)) or Path(str(source).partition("/")[0]).exists():
        return None
    return found[1], found[2], found[3]


def load_hub(repository: str, config: str | None, split: str | None) -> Any:
    """A `datasets.Dataset` of the hub, or of the cache if it is there.

    Raises:
        SourceError: it cannot be reached, does not exist, or has several splits or configurations.
    """
    import datasets

    name = f"{repository}/{config}" if config else repository
    try:
        found = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        several = "Config name is missing" in reason
        raise SourceError(
            f"there is no file or folder {repository}, and no data set of that name can be read"
            if not several
            else f"the data set {repository} has several configurations",
            got=f"{type(error).__name__}: {reason[:200]}",
            allowed="a path, or a data set of the hub as owner/name, owner/name:split or "
            "owner/name/config:split",
            fix=f"name one: {repository}/CONFIG:train"
            if several
            else "check the path; for the hub, the name and the connection (HF_HUB_OFFLINE=1 "
            "reads only what is cached)",
        ) from error
    if not isinstance(found, dict):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    first = "train" if "train" in found else next(iter(found))
    raise SourceError(
        f"the data set {name} has several splits",
        got=", ".join(found),
        allowed="one of them",
        fix=f"{name}:{first}",
    )
