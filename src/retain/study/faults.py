"""What goes wrong in a run: told in one line, and whether it was the machine's fault."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from retain.errors import OutputError, RetainError, memory_full
from retain.files import why_unwritable

__all__ = ["lacks_disk", "lacks_something", "one_line"]

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
_MACHINE = _DISK | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE}
_LINES = {"requests", "urllib3", "httpx", "httpcore", "aiohttp"}


def one_line(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    if isinstance(error, RetainError):
        return text
    name = type(error).__name__
    if memory_full(error):
        return f"the memory is full; got: {text[:160] or name}; fix: smaller batches"
    return f"{name}: {text[:240]}" if text else name


def lacks_disk(error: BaseException) -> bool:
    """Whether something could not be written: the next run could not be kept either."""
    return any(
        isinstance(e, OutputError)
        or (isinstance(e, OSError) and e.errno in _DISK)
        or (isinstance(e, RuntimeError) and why_unwritable(e) is not None)
        or (type(e).__name__ == "SafetensorError" and _number(e) in _DISK)
        for e in _causes(error)
    )


def lacks_something(error: BaseException) -> bool:
    """Whether it was memory, the disk, a connection or the like: no word on the run itself."""
    return lacks_disk(error) or any(
        memory_full(e)
        or (isinstance(e, OSError) and e.errno in _MACHINE)
        or isinstance(e, ConnectionError | TimeoutError)
        or type(e).__module__.partition(".")[0] in _LINES
        for e in _causes(error)
    )


def _number(error: BaseException) -> int | None:
    """The system's error inside one of safetensors: "... (os error 28)"."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found.group(1)) if found else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    now: BaseException | None = error
    for _ in range(32):
        if now is None:
            return
        yield now
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)
