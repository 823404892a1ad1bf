"""The old place of `retain.data.tokens.fit_prompt`; it goes with a release."""

from __future__ import annotations

import warnings
from typing import Any

from retain.data import tokens

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    if name != "fit_prompt":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is now in retain.data.tokens", DeprecationWarning, stacklevel=2)
    return tokens.fit_prompt
