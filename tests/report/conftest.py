"""Fixtures of the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_result

Put = Callable[..., Path]


@pytest.fixture
def result() -> dict[str, Any]:
    """A made-up result as the data of a `result.json`."""
    return make_result()


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes data as JSON into a folder of its own and gives the path."""

    def write(data: Any, name: str = "study", file: str = "study.json") -> Path:
        path = tmp_path / name / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    return write
