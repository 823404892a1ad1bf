"""Commands of retain as child processes: forked, limited, killed."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from fault_inputs import Job

__all__ = ["Ended", "alone", "copy", "fork", "load_libraries", "run"]

MEMORY = 6 << 30
"""Bytes that a command may take beyond what the parent has."""


class Ended(NamedTuple):
    """How a command ended: its exit code (None where it was killed), what it said, how long."""

    code: int | None
    said: str
    seconds: float


def load_libraries() -> None:
    """Imports once what each command would import; no model runs here, so forks start clean."""
    for name in (
        "datasets", "peft", "scipy.stats", "sklearn.metrics", "transformers.trainer", "pyarrow.csv",
        "transformers.models.llama.modeling_llama", "matplotlib.pyplot", "retain.runs.training",
        "retain.runs.soften", "retain.curvature.fit.fit", "retain.models.load",
        "retain.models.generating", "retain.study.sequence", "retain.study.studies",
    ):  # fmt: skip
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def fork(act: Any) -> int:
    """A child process that does something and ends."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        act()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def start(argv: list[str], folder: Path, said: Path) -> int:
    """A command in a process of its own, with a group of its own."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(handle, stream)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        import faulthandler

        faulthandler.register(signal.SIGUSR1)
        from retain.cli import main as command

        code = command(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(
    argv: list[str], folder: Path, limit: float, kill_at: float | None = None, sign: str = ""
) -> Ended:
    """Runs a command to its end, to a limit, or until it is killed.

    Args:
        argv: the command.
        folder: where it runs.
        limit: seconds after which it counts as hanging.
        kill_at: seconds until it is killed; or, with a `sign`, after that.
        sign: a pattern of files in the folder; it is killed when one is there.
    """
    said = folder.with_name(f"{folder.name}.said")
    begin, child = time.monotonic(), start(argv, folder, said)
    status = 0
    while True:
        passed = time.monotonic() - begin
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if sign and next(folder.glob(sign), None) is not None:
            begin, sign = time.monotonic(), ""
        if passed > (limit if kill_at is None or sign else kill_at):
            if kill_at is None:
                os.kill(child, signal.SIGUSR1)  # says where it is
                time.sleep(0.2)
            with contextlib.suppress(ProcessLookupError):  # it has no group yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = signal.SIGKILL
            break
        time.sleep(0.002)
    code = None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    said.unlink(missing_ok=True)
    return Ended(code, text, time.monotonic() - begin)


def alone(job: Job, folder: Path) -> float:
    """Runs a job that must succeed; returns how long it took."""
    ended = run(job.argv(folder), folder, 300)
    if ended.code != 0:
        raise SystemExit(f"{job.name} ends with {ended.code} when nothing happens:\n{ended.said}")
    return ended.seconds


def copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
