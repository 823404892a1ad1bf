"""Where a result came from: versions, commit, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

__all__ = ["cores", "hardware", "now", "provenance", "versions"]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def provenance(seed: int) -> dict[str, Any]:
    """Seed, versions, commit (None outside a checkout) and hardware."""
    return {
        "created": now(),
        "seed": seed,
        "versions": {"python": platform.python_version(), **versions()},
        "commit": _commit(),
        "hardware": hardware(),
    }


def versions(*more: str) -> dict[str, str]:
    """Versions of the libraries that a result depends on, and of more, if they are installed."""
    names = ("retain", "torch", "transformers", "peft", "trl", "accelerate", "datasets")
    found = {}
    for name in (*names, *more):
        try:
            found[name] = importlib.metadata.version("retain-lora" if name == "retain" else name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerator; None where the system does not tell."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return {"cpu": _processor(), "cores": cores(), "memory_gib": memory, "accelerator": gpu}


def cores() -> int | None:
    """The cores that this process may use; None where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with + where it was changed.

    Where there is none, as in a copy on another machine, what ``RETAIN_COMMIT`` says.
    """
    here = Path(__file__).resolve().parent
    try:
        run = ["git", "-C", str(here)]
        subprocess.run(  # an installed package may lie inside somebody else's checkout
            [*run, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True
        )
        top = subprocess.run(
            [*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        state = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RETAIN_COMMIT") or None
    return top.stdout.strip()[:12] + ("+" if state.stdout.strip() else "")
