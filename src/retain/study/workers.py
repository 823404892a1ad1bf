"""How the process of a study's worker begins.

A worker imports this module first, and with it nothing that is large: what is set here is set
before any library is there to read it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection

__all__ = ["begin", "quiet_libraries"]

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """The workers that start meanwhile have libraries that do not talk."""
    added = [name for name in _QUIET if name not in os.environ]
    os.environ.update({name: _QUIET[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def begin() -> None:
    """In a worker: Ctrl-C is the parent's to handle, nothing is warned of, no parent no work."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _end_with_parent() -> None:
    """Ends this worker once its parent is gone: what a run keeps is whole at any moment."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
