"""What a run says while it goes on, and what of it belongs into its record."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retain.errors import RetainWarning
from retain.files import first_rank

__all__ = ["Interrupted", "Messages", "interruption"]


_PACKAGE = Path(__file__).resolve().parents[1]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; its text says what stays usable."""

    def __str__(self) -> str:
        return f"stopped; {self.args[0]}"


@contextmanager
def interruption(usable: str) -> Iterator[None]:
    """Lets a Ctrl-C in the block say what stays usable.

    Raises:
        Interrupted: in place of `KeyboardInterrupt`.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(usable) from None


class Messages:
    """Lines for people, on stdout; under ``torchrun`` the first process alone prints.

    Args:
        quiet: print nothing.
        progress: show bars, unless quiet.

    Attributes:
        notes: in what a lesser way than was asked for something was done, each once; they belong
            into the record of what was made.
    """

    def __init__(self, *, quiet: bool = False, progress: bool = True) -> None:
        self.quiet = quiet or not first_rank()
        self.progress = progress and not self.quiet
        self.notes: list[str] = []

    def say(self, text: str) -> None:
        """A line."""
        if not self.quiet:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """A line that is kept for the record too, once."""
        text = " ".join(text.split())
        if text not in self.notes:
            self.notes.append(text)
            self.say(text)

    def note_width(self, rank: int, folder: Path) -> None:
        """A note, where servers do not take an adapter of this rank as it comes."""
        from retain.models.saved import too_wide

        wide = too_wide(rank, folder)
        if wide is not None:
            self.note(wide)

    def libraries(self) -> None:
        """Called before the heavy libraries are imported."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Makes notes of what this package warns of in the block; other warnings go their way."""
        with warnings.catch_warnings():
            warnings.filterwarnings("always", category=RetainWarning)
            warnings.filterwarnings("always", category=UserWarning, module=r"retain(\.|$)")
            before = warnings.showwarning

            def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
                ours = bool(args) and Path(str(args[0])).is_relative_to(_PACKAGE)
                if issubclass(category, RetainWarning) or ours:
                    self.note(str(message))
                else:
                    before(message, category, *args, **kwargs)

            warnings.showwarning = show
            yield
