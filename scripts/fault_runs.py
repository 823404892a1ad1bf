"""Commands of retain as child processes, and what they leave, in a form to compare."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fault_inputs import Job

__all__ = [
    "Ended", "alone", "copy", "fork", "lines_of", "listing", "load_libraries", "named_inputs",
    "record_of", "results", "run",
]  # fmt: skip

VOLATILE = frozenset([
    "seconds", "created", "peak_memory_gib", "memory", "commit", "digest", "resumed_from", "notes",
    "train_runtime", "train_samples_per_second", "train_steps_per_second",
])  # fmt: skip
"""Keys of records that differ between two runs of a command: times, what was said, a seal."""

INPUTS = ("config", "digests", "data", "inputs", "model", "examples", "start", "source")
"""Keys of records that say what a result was made from."""

LEFT_OUT = (".png", ".svg", ".md", ".pdf", ".lock")
"""Pictures and locks are no results; nor are logs and checkpoints, whose state holds times."""

MEMORY = 6 << 30
"""Bytes of data that a command may take beyond what the parent has; addresses are free."""


class Ended(NamedTuple):
    """How a command ended: its exit code (None where it was killed), what it said, how long."""

    code: int | None
    said: str
    seconds: float


def load_libraries() -> None:
    """Imports once what each command would import; no model runs here, so forks start clean."""
    for name in (
        "datasets", "peft", "scipy.stats", "sklearn.metrics", "transformers.trainer", "pyarrow.csv",
        "transformers.models.llama.modeling_llama", "altair", "retain.runs.training",
        "retain.runs.soften", "retain.curvature.fit.fit", "retain.models.load",
        "retain.models.generating", "retain.study.sequence", "retain.study.studies",
    ):  # fmt: skip
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def fork(act: Callable[[], int | None]) -> int:
    """A child process that does something, and ends with what that returns, 0 for None."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = act() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(argv: list[str], folder: Path, said: Path) -> int:
    """A command in a process of its own, with a group of its own."""

    def command() -> int:
        os.setsid()
        os.chdir(folder)
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(handle, stream)
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
        faulthandler.register(signal.SIGUSR1)
        from retain.cli import main

        return main(argv)

    return fork(command)


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


def listing(folder: Path, names: Iterable[str]) -> set[str]:
    """All files below some names of a folder."""
    return {
        str(path.relative_to(folder))
        for name in names
        for path in [folder / name, *(folder / name).rglob("*")]
        if path.is_file() or path.is_symlink()
    }


def results(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digest of each file that counts as a result: bytes, or of JSON what does not vary."""
    return {
        name: _digest(folder / name, folder)
        for name in sorted(listing(folder, names))
        if (folder / name).is_file()
        and not (name.endswith(LEFT_OUT) or "checkpoint-" in name or name.startswith("out/traces/"))
    }


def _digest(path: Path, folder: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".json":
        tree = record_of(path)
        if tree is None:
            return "no JSON"
        data = _written(tree, folder).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def _written(tree: Any, folder: Path) -> str:
    """A record without what varies, and without the name of its folder."""

    def steady(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: steady(part) for key, part in value.items() if key not in VOLATILE}
        return [steady(part) for part in value] if isinstance(value, list) else value

    return json.dumps(steady(tree), sort_keys=True).replace(str(folder), "@")


def record_of(path: Path) -> Any:
    """What a file of JSON holds; None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def named_inputs(folder: Path, names: Iterable[str]) -> str:
    """What the records of a result say that it was made from."""
    found = []
    for name in sorted(listing(folder, names)):
        if name.endswith(".json") and "/checkpoint-" not in name:
            tree = record_of(folder / name)
            if isinstance(tree, dict):
                found.append([name, {k: tree[k] for k in INPUTS if k in tree}])
    return _written(found, folder)


def lines_of(path: Path) -> list[Any] | None:
    """The rows of a file of JSON lines; None where it cannot be read."""
    if not path.is_file():  # /dev/zero has no end
        return None
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError):
        return None
