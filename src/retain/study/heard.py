"""What this package warns of while a run is done, for its record."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retain.errors import RetainWarning

__all__ = ["heard"]


@contextmanager
def heard(notes: list[str]) -> Iterator[None]:
    """Keeps what this package warns of, each once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=RetainWarning)
        warnings.filterwarnings("always", category=UserWarning, module=r"retain(\.|$)")
        before = warnings.showwarning

        def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
            where = str(args[0]) if args else ""
            ours = issubclass(category, RetainWarning) or "retain" in Path(where).parts
            text = " ".join(str(message).split())
            if not ours:
                before(message, category, *args, **kwargs)
            elif text not in notes:
                notes.append(text)

        warnings.showwarning = show
        yield
