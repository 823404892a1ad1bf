"""Makes `tiny` and `oracles` importable, keeps the hub out, and keeps the tests quick."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish() -> None:
    """Takes the imported libraries out of garbage collection, which else is a third of the time."""
    gc.collect()
    gc.freeze()
