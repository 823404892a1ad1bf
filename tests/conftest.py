"""Makes `tiny` and `oracles` importable, keeps the hub out, and keeps the tests quick."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


LONG = (
    "smollm2", "two_lines", "demo", "kill", "torchrun", "memory", "process", "trl", "lm_eval",
    "snippets",
)  # fmt: skip
"""Parts of the names of files with few tests that each take long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with those, so that at the end no process is left alone with them."""
    items.sort(key=lambda item: not any(part in item.path.stem for part in LONG))  # stable


def pytest_collection_finish() -> None:
    """Takes the imported libraries out of garbage collection, which else is a third of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tiny byte-level tokenizer, saved as a folder."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))
