"""Inputs of the commands, and a way to run the command line in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_parts import SHORT, WORDS, Outcome, Run, save_model, write_lines

from retain.cli import main


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": " ".join(WORDS[(i * k) % 19] for k in range(1, 9))} for i in range(1, 17)]
    return write_lines(tmp_path_factory.mktemp("source") / "source.jsonl", rows)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": f"{WORDS[i % 19]} {i}:", "completion": f" {WORDS[(3 * i) % 19]}"}
        for i in range(24)
    ]
    return write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


def _quiet(*argv: object) -> None:
    assert main([str(arg) for arg in (*argv, "--quiet")]) == 0


@pytest.fixture(scope="session")
def curvature(model: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A curvature in weight space."""
    path = tmp_path_factory.mktemp("fit") / "curvature.safetensors"
    _quiet("fit", model, source, "-o", path)
    return path


@pytest.fixture(scope="session")
def trained(
    model: Path, data: Path, curvature: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished run of 12 steps without a filter, with checkpoints at 9 and 12."""
    out = tmp_path_factory.mktemp("run") / "run"
    argv = ["train", *SHORT, "--model", model, "--data", data, "--curvature", curvature]
    _quiet(*argv, "--out", out, "--epochs", 2, "--save-steps", 3, "--method", "laplace")
    return out


@pytest.fixture
def retain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def train(retain: Run, model: Path, data: Path, curvature: Path) -> Run:
    """``retain train`` into a folder, with the curvature; later options come before these."""
    given = ("train", "--model", model, "--data", data, "--curvature", curvature, *SHORT)
    return lambda out, *argv: retain(*given, "--out", out, *argv)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a model is loaded."""

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("retain.models.load.load_model", loads)
    monkeypatch.setattr("retain.study.demo.run_demo", loads)
