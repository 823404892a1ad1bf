"""Every trainer test runs once more with bf16=True, and TRL's with nothing said about precision."""

from __future__ import annotations

from typing import Any

import pytest

SAID: dict[str, dict[str, dict[str, Any]]] = {
    "test_callback": {"float": {}, "bf16": {"bf16": True}},
    "test_trl": {"float": {"bf16": False}, "bf16": {"bf16": True}, "nothing said": {}},
}
"""By module: what the trainer's arguments say of precision. Autocast leaves float64 as it is, so
what is exact there stays so, with all hooks running inside it."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    said = SAID.get(metafunc.module.__name__)
    if said is not None:
        metafunc.fixturenames.append("precision")
        metafunc.parametrize("precision", list(said.values()), ids=list(said), indirect=True)


@pytest.fixture
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    import test_callback

    monkeypatch.setattr(test_callback, "PRECISION", request.param)
    if request.module.__name__ == "test_trl":
        monkeypatch.setattr(request.module, "PRECISION", request.param)


@pytest.fixture(autouse=True)
def own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers before transformers 5 leave what they say of precision to the next, in this name."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # so that it is put back at the end
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
