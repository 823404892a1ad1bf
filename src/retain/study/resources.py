"""How much time and memory a run took."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

__all__ = ["Clock", "peak_memory", "reset_peak_memory", "trim_memory"]


class Clock:
    """Wall time by what it was spent on, in seconds; goes on from an earlier process's."""

    def __init__(self) -> None:
        self.seconds = {"train": 0.0, "method": 0.0, "evaluate": 0.0, "total": 0.0}
        self._start = time.perf_counter()

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts the time of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    def state(self) -> dict[str, float]:
        """The times until now."""
        now = time.perf_counter()
        self.seconds["total"] += now - self._start
        self._start = now
        return dict(self.seconds)

    def restore(self, state: Mapping[str, float]) -> None:
        """Adds what an earlier process has spent."""
        for name, value in state.items():
            self.seconds[name] += value


def trim_memory() -> None:
    """Gives freed memory back to the system, where glibc is what keeps it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> None:
    """Begins to measure anew, where the system lets one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    trim_memory()  # what glibc keeps of the run before is not this one's
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again


def peak_memory() -> float | None:
    """GiB: of the accelerator where there is one, else the resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    try:
        import resource
        import sys
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
