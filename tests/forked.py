"""Processes that start at once: forked from one that has the libraries loaded, which takes seconds.

That one is begun when it is first needed and runs no model, so its children start clean.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
from torch import distributed

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["retain.cli.app", "retain.study.sequence", "retain.runs.train", "retain.evaluation.forgetting",
     "transformers.trainer", "transformers.models.llama.modeling_llama", "peft", "scipy.stats",
     "torch.distributed.fsdp"]
)  # fmt: skip


def begin(
    work: Callable[..., Any], *arguments: Any, told: Path, **environment: object
) -> BaseProcess:
    """Calls a function of some module in a process; what it prints is in `told`/out and /err."""
    told.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=_work, args=(work, arguments, told, environment))
    process.start()
    return process


def _work(
    work: Callable[..., Any], arguments: tuple[Any, ...], told: Path, environment: dict[str, object]
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has it ignored
    torch.set_num_threads(1)
    gc.freeze()  # the libraries: else a third of the time is garbage collection
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(told / name, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(work(*arguments))


def run(
    work: Callable[..., Any], *arguments: Any, processes: int = 1, seconds: float = 300,
    **environment: object,
) -> CompletedProcess[str]:  # fmt: skip
    """The same, to its end; several processes find each other as under ``torchrun``.

    Of several it has ended as the first that failed, with which the others end; what they have
    printed is joined. Where none ends in so many seconds, they are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(rank)) for rank in range(processes)]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                            "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}  # fmt: skip
        left, code = [], 0
        for rank, told in enumerate(places):
            ranks = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            left.append(begin(work, *arguments, told=told, **environment, **ranks))
        while left:
            late = not connection.wait([process.sentinel for process in left], timeout=seconds)
            ended = [process.exitcode for process in left if process.exitcode is not None]
            code = next((found for found in (code, *ended) if found), -signal.SIGKILL * late)
            left = [process for process in left if process.exitcode is None]
            for process in left if code else ():
                process.kill()
        out, err = (
            "".join((told / name).read_text() for told in places) for name in ("out", "err")
        )
        return CompletedProcess([work, *arguments], code, out, err)


def command(*argv: object, **options: Any) -> CompletedProcess[str]:
    """``retain`` with these arguments."""
    from retain.cli import main

    return run(main, [str(argument) for argument in argv], **options)


def script(path: Path, *argv: object, **options: Any) -> CompletedProcess[str]:
    """``python`` with a file and these arguments."""
    return run(_script, [str(path), *map(str, argv)], **options)


def _script(argv: list[str]) -> None:
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def gloo(work: Callable[[Path], None], out: Path, processes: int = 2) -> None:
    """Calls a function in each of several processes that talk through gloo."""
    ended = run(_gloo, work, out, processes=processes)
    assert ended.returncode == 0, ended.stderr


def _gloo(work: Callable[[Path], None], out: Path) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        work(out)
    finally:
        distributed.destroy_process_group()
