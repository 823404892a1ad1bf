"""Errors of the disk, which each library words in its own way, in ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retain.errors import OutputError

__all__ = ["why_unwritable", "writing"]

_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error", "basic_ios")
_SIGNS = (  # of torch's and safetensors' writers, which raise no OSError
    "No space left",
    "File too large",
    "Disk quota",
    "Read-only file system",
    "Input/output error",
    "os error",
    "cannot be opened",
)


def why_unwritable(error: BaseException) -> str | None:
    """What the system said of a file that could not be written or read; None for other errors."""
    text = str(error).strip().partition("\n")[0][:160]
    if isinstance(error, OSError):
        return error.strerror or text or type(error).__name__
    if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        if any(sign in text for sign in _TORCH) and "Reader" not in text:
            return "not all of it could be written, as on a full disk"  # torch tells of its code
        return text if any(sign in str(error) for sign in (*_SIGNS, *_TORCH)) else None
    return None


@contextmanager
def writing(
    what: str, path: Path, *, fix: str = "free some disk, or choose another path"
) -> Iterator[None]:
    """Turns whatever a full or broken disk makes of its block into one `OutputError`.

    Args:
        what: what is written.
        path: where.
        fix: for the error.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        yield
    except Exception as error:
        reason = why_unwritable(error)
        if reason is None:
            raise
        raise OutputError(
            f"{what} cannot be written",
            got=f"{path}: {reason}",
            allowed="a folder that can be written, with room on the disk",
            fix=fix,
        ) from error
