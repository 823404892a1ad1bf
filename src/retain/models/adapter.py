"""The old place of what is now in `sites`, `lora`, `off` and `names`; it goes with a release."""

from __future__ import annotations

import warnings
from typing import Any

from retain.models import lora, names, off, sites

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    for home in (sites, lora, off, names):
        if name in home.__all__:
            new = home.__name__
            warnings.warn(f"{name} is now in {new}", DeprecationWarning, stacklevel=2)
            return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
