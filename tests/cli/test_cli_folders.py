"""Folders and files of others are never replaced; those of ours keep what others put there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from retain.cli import main
from retain.errors import OutputError
from retain.files import LOCK
from retain.runs.folders import check_study

FOREIGN = {
    "state/terraform.tfstate": "x",
    "adapter/notes.txt": "x",
    "adapter/adapter_config.json": '{"peft_type": "LORA"}',
    "state/state.json": '{"schema": "redux/1"}',
    "state": "a file",
    "adapter": "a file",
    "train.json": '[{"text": "rows of the user"}]',
    "run.json": '{"name": "of something else"}',
    "curvature.safetensors": "no curvature",
    "checkpoints/checkpoint-500/model.safetensors": "weights of the user",
    "checkpoints": "a file",
}


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a model is loaded."""

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("retain.models.load.load_model", loads)
    monkeypatch.setattr("retain.study.demo.run_demo", loads)


@pytest.mark.usefixtures("unloaded")
class TestNotOurs:
    @pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["", "overwrite"])
    @pytest.mark.parametrize("name", FOREIGN)
    def test_train(self, name: str, more: Any, retain: Any, data: Path, tmp_path: Path) -> None:
        put(tmp_path, name, FOREIGN[name])
        before = contents(tmp_path)
        outcome = retain("train", "--model", "m", "--data", data, "-o", tmp_path, *more)
        outcome.refused("did not write", str(tmp_path / name.split("/")[0]), "another --out")
        assert contents(tmp_path) == before

    def test_train_on_its_own_data(self, retain: Any, tmp_path: Path) -> None:
        """`train.json` is a likely name of a file of rows."""
        put(tmp_path, "train.json", '[{"text": "rows of the user"}]')
        argv = ("--model", "m", "--data", tmp_path / "train.json", "-o", tmp_path)
        retain("train", *argv, "--method", "none").refused("did not write", "train.json")

    @pytest.mark.parametrize(
        "name", ["adapter/a.txt", "adapter/adapter_config.json", "soften.json", "soften.png"]
    )
    def test_soften(self, name: str, retain: Any, trained: Path, tmp_path: Path) -> None:
        put(tmp_path, name, "{}")
        argv = ("soften", trained / "adapter", "--curvature", "c", "--budget", 1, "-o", tmp_path)
        retain(*argv).refused("did not write", str(tmp_path / name.split("/")[0]))
        assert contents(tmp_path) == {name: b"{}"}

    @pytest.mark.parametrize(
        "name", ["adapters/lora/mine", "data/a.csv", "source/main.c", "study.yaml", "report.html"]
    )
    def test_demo(self, name: str, retain: Any, tmp_path: Path) -> None:
        put(tmp_path, name, "{}")
        retain("demo", "--out", tmp_path).refused("did not write", "another --out")
        assert contents(tmp_path) == {name: b"{}"}

    @pytest.mark.parametrize("name", ["study.json", "runs", "state", "locks"])
    def test_study(self, name: str, retain: Any, tmp_path: Path) -> None:
        put(tmp_path / "out", name, "{}")
        study = Path(__file__).parents[2] / "benchmarks" / "studies" / "four-task.yaml"
        retain("study", study, "--out", tmp_path / "out").refused("did not write", name)
        assert contents(tmp_path / "out") == {name: b"{}"}

    @pytest.mark.parametrize("content", ["", "{", "[]"])
    def test_a_damaged_table_beside_the_records_of_a_study(
        self, content: str, tmp_path: Path
    ) -> None:
        put(tmp_path, "study.json", content)
        put(tmp_path, "runs/mine.json", "{}")
        with pytest.raises(OutputError, match="did not write"):
            check_study(tmp_path)
        put(tmp_path, "runs/a.json", '{"schema": "retain.run/1"}')
        check_study(tmp_path)

    @pytest.mark.parametrize("content", ["text", '{"a": 1}'])
    def test_fit_and_eval(self, content: str, retain: Any, trained: Path, tmp_path: Path) -> None:
        put(tmp_path, "f", content)
        retain("fit", "m", "-o", tmp_path / "f").refused("did not write", "f")
        retain("eval", "--adapter", trained / "adapter", "-o", tmp_path / "f").refused(
            "did not write"
        )
        assert contents(tmp_path) == {"f": content.encode()}

    def test_fit_over_a_model(self, retain: Any, model: Path, tmp_path: Path) -> None:
        weights = Path(shutil.copytree(model, tmp_path / "m")) / "model.safetensors"
        before = weights.read_bytes()
        retain("fit", tmp_path / "m", "-o", weights).refused("did not write")
        assert weights.read_bytes() == before

    def test_report(self, retain: Any, tmp_path: Path) -> None:
        put(tmp_path, "report.html", "<title>my page</title>")
        put(tmp_path, "result.json", "{}")
        retain("report", tmp_path / "result.json").refused("did not write", "report.html")
        put(tmp_path, "training.png", "my picture")
        (tmp_path / "report.html").unlink()
        retain("report", tmp_path / "result.json").refused("did not write", "training.png")


@pytest.fixture
def train(retain: Any, model: Path, data: Path, curvature: Path, short: Any) -> Any:
    def run(out: Path, *argv: object) -> Any:
        return retain(
            "train", "--model", model, "--data", data, "--curvature", curvature, *short,
            "--max-steps", 2, "--out", out, "--quiet", *argv,
        )  # fmt: skip

    return run


class TestOurs:
    def test_what_others_put_there_stays(self, train: Any, tmp_path: Path) -> None:
        more = ("--keep-state", "--save-steps", 1)
        assert train(tmp_path, *more).code == 0
        mine = ["README.md", "adapter/notes.txt", "adapter/original/x.bin", "state/why.md",
                "checkpoints/checkpoint-1/note.txt", "checkpoints/README"]  # fmt: skip
        for name in mine:
            put(tmp_path, name, name)
        assert train(tmp_path, "--overwrite", "--save-steps", 1, "--seed", 1).code == 0
        found = contents(tmp_path)
        assert {name: found.get(name) for name in mine} == {name: name.encode() for name in mine}
        assert not {n for n in found if n.startswith("state/")} - {"state/why.md"}

    def test_an_empty_folder_is_nobody_s(self, train: Any, tmp_path: Path) -> None:
        for name in ("adapter", "state", "checkpoints"):
            (tmp_path / name).mkdir()
        assert train(tmp_path, "--keep-state").code == 0

    def test_a_run_that_was_killed_before_its_record(self, train: Any, tmp_path: Path) -> None:
        assert train(tmp_path).code == 0
        (tmp_path / "train.json").unlink()
        (tmp_path / "adapter").rename(tmp_path / "moving")
        (tmp_path / ".adapter-killed").mkdir()
        (tmp_path / "moving").rename(tmp_path / ".adapter-killed" / "old")
        assert train(tmp_path).code == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "run.json", "train.json"]

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_modes(self, mask: int, train: Any, tmp_path: Path) -> None:
        import os

        before = os.umask(mask)
        try:
            assert train(tmp_path / "out", "--keep-state", "--save-steps", 1).code == 0
        finally:
            os.umask(before)
        for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
            whole = 0o777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o777 == whole & ~mask, path


class TestLock:
    def test_a_second_writer_is_refused(self, train: Any, retain: Any, tmp_path: Path) -> None:
        with FileLock(tmp_path / LOCK):
            train(tmp_path).refused("another process is writing", "another --out")
            retain("demo", "--out", tmp_path).refused("another process is writing")
        assert train(tmp_path).code == 0

    def test_of_two_at_once_one_is_refused(
        self, model: Path, data: Path, tmp_path: Path, short: Any
    ) -> None:
        out = tmp_path / "out"
        argv = ["train", "--model", model, "--data", data, *short, "--method", "none"]
        argv += ["--epochs", 40, "-o", out, "-q"]
        command = [sys.executable, "-m", "retain", *map(str, argv)]
        first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        limit = time.monotonic() + 60
        while not (out / LOCK).exists():
            assert first.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(0.1)
        assert main([str(arg) for arg in argv]) == 2
        first.communicate(timeout=120)
        assert first.returncode == 0
        assert sorted(p.name for p in out.iterdir()) == ["adapter", "run.json", "train.json"]

    def test_fits_of_one_file(self, retain: Any, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "c.safetensors"
        with FileLock(tmp_path / ".c.safetensors.lock"):
            retain("fit", model, "-o", out).refused("another process is writing")
        assert not out.exists()


class TestState:
    def test_the_curvature_of_the_state_is_a_copy(
        self, train: Any, retain: Any, curvature: Path, data: Path, tmp_path: Path
    ) -> None:
        mine = Path(shutil.copy(curvature, tmp_path / "mine.safetensors"))
        out = tmp_path / "may"
        assert train(out, "--keep-state", "--curvature", mine).code == 0
        kept = out / "state" / "source.safetensors"
        assert kept.stat().st_ino != mine.stat().st_ino
        assert kept.read_bytes() == curvature.read_bytes()
        mine.write_bytes(b"something else")
        argv = ("--continue-from", out, "--data", data, "--batch-size", 4, "--max-steps", 1)
        assert retain("train", *argv, "-o", tmp_path / "june", "-q").code == 0

    @pytest.mark.parametrize(
        "name",
        ["state/source.safetensors", "state/past.safetensors", "adapter/adapter_model.safetensors",
         "adapter/adapter_config.json"],
    )  # fmt: skip
    @pytest.mark.parametrize("how", ["flipped", "gone", "cut"])
    def test_a_state_that_changed_is_refused(
        self, name: str, how: str, kept: Path, retain: Any, data: Path, tmp_path: Path
    ) -> None:
        run = Path(shutil.copytree(kept, tmp_path / "run"))
        path = run / name
        content = bytearray(path.read_bytes())
        if name.endswith(".json"):
            path.write_text(json.dumps(json.loads(content) | {"lora_alpha": 99}))
            how = "flipped" if how == "cut" else how
        content[len(content) // 2] ^= 1
        if how == "gone":
            path.unlink()
        elif not name.endswith(".json"):
            path.write_bytes(content if how == "flipped" else content[:-9])
        argv = ("--continue-from", run, "--data", data, "-o", tmp_path / "june")
        retain("train", *argv).refused(path.name if how == "gone" else "has changed")
        assert not (tmp_path / "june").exists()

    @pytest.fixture(scope="class")
    def kept(
        self, model: Path, data: Path, curvature: Path, short: Any,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Path:  # fmt: skip
        out = tmp_path_factory.mktemp("kept") / "may"
        argv = ["train", "--model", model, "--data", data, "--curvature", curvature, *short]
        argv += ["--max-steps", 2, "--keep-state", "-o", out, "-q"]
        assert main([str(a) for a in argv]) == 0
        return out


@pytest.fixture(scope="class")
def short() -> list[str]:
    return ["--batch-size", "4", "--dtype", "float32", "--rank", "4", "--max-length", "16"]
