"""Several processes on this machine that talk through gloo."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing

Work = Callable[[Path], None]


def run(work: Work, out: Path, processes: int = 2) -> None:
    """Calls a function of some module in each, with a folder for what they find.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them failed.
    """
    multiprocessing.spawn(_start, (work, str(out), processes), nprocs=processes)


def _start(rank: int, work: Work, out: str, processes: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{out}/meet", rank=rank, world_size=processes, timeout=timedelta(seconds=60)
    )
    try:
        work(Path(out))
    finally:
        distributed.destroy_process_group()
