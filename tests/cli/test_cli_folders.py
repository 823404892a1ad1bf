"""Folders and files of others are never replaced; those of ours keep what others put there."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from cli_parts import SHORT, Run, told, write_lines
from filelock import FileLock

import forked
from retain.cli import main
from retain.errors import OutputError
from retain.files import LOCK
from retain.runs.folders import check_study

TRAIN = {
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
OTHERS = {
    "soften": ("adapter/a.txt", "adapter/adapter_config.json", "soften.json", "soften.png"),
    "compact": ("adapter/a.txt", "compact.json"),
    "demo": ("adapters/lora/mine", "data/a.csv", "source/main.c", "study.yaml", "report.html"),
    "study": ("study.json", "runs", "state", "locks"),
}


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("unloaded")
class TestNotOurs:
    @pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["", "overwrite"])
    @pytest.mark.parametrize("name", TRAIN)
    def test_train(self, name: str, more: Any, retain: Run, data: Path, tmp_path: Path) -> None:
        put(tmp_path, name, TRAIN[name])
        before = contents(tmp_path)
        outcome = retain("train", "--model", "m", "--data", data, "-o", tmp_path, *more)
        outcome.refused("did not write", str(tmp_path / name.split("/")[0]), "another --out")
        assert contents(tmp_path) == before

    def test_train_on_its_own_data(self, retain: Run, tmp_path: Path) -> None:
        """`train.json` is a likely name of a file of rows."""
        rows = write_lines(tmp_path / "train.json", [[{"text": "rows of the user"}]])
        argv = ("--model", "m", "--data", rows, "-o", tmp_path, "--method", "none")
        retain("train", *argv).refused("did not write", "train.json")

    @pytest.mark.parametrize(("command", "name"), [(c, n) for c in OTHERS for n in OTHERS[c]])
    def test_others(
        self, command: str, name: str, retain: Run, trained: Path, tmp_path: Path
    ) -> None:
        put(tmp_path, name, "{}")
        study = Path(__file__).parents[2] / "benchmarks" / "studies" / "four-task.yaml"
        argv = {"soften": [trained / "adapter", "--curvature", "c", "--budget", 1],
                "compact": [trained / "adapter"],
                "demo": [], "study": [study]}[command]  # fmt: skip
        retain(command, *argv, "--out", tmp_path).refused("did not write", name.split("/")[0])
        assert contents(tmp_path) == {name: b"{}"}

    @pytest.mark.parametrize("content", ["", "{", "[]"])
    def test_a_damaged_table_beside_the_records_of_a_study(
        self, content: str, tmp_path: Path
    ) -> None:
        put(tmp_path, "study.json", content)
        put(tmp_path, "runs/mine.json", "{}")
        with pytest.raises(OutputError, match="did not write"):
            check_study(tmp_path, "s")
        put(tmp_path, "runs/a.json", '{"schema": "retain.run/1"}')
        check_study(tmp_path, "s")

    @pytest.mark.parametrize("content", ["text", '{"a": 1}'])
    def test_fit_and_eval(self, content: str, retain: Run, trained: Path, tmp_path: Path) -> None:
        put(tmp_path, "f", content)
        for argv in (["fit", "m"], ["eval", "--adapter", trained / "adapter"]):
            retain(*argv, "-o", tmp_path / "f").refused("did not write", "f")
        assert contents(tmp_path) == {"f": content.encode()}

    def test_fit_over_a_model(self, retain: Run, model: Path, tmp_path: Path) -> None:
        weights = Path(shutil.copytree(model, tmp_path / "m")) / "model.safetensors"
        before = weights.read_bytes()
        retain("fit", tmp_path / "m", "-o", weights).refused("did not write")
        assert weights.read_bytes() == before

    def test_report(self, retain: Run, tmp_path: Path) -> None:
        put(tmp_path, "report.html", "<title>my page</title>")
        put(tmp_path, "result.json", "{}")
        retain("report", tmp_path / "result.json").refused("did not write", "report.html")


@pytest.fixture
def two(train: Run) -> Run:
    """A run of two steps."""
    return lambda out, *argv: train(out, "--max-steps", 2, "--max-length", 16, "-q", *argv)


class TestOurs:
    def test_what_others_put_there_stays(self, two: Run, tmp_path: Path) -> None:
        two(tmp_path, "--keep-state", "--save-steps", 1).done()
        mine = ["README.md", "adapter/notes.txt", "adapter/original/x.bin", "state/why.md",
                "checkpoints/checkpoint-1/note.txt", "checkpoints/README"]  # fmt: skip
        for name in mine:
            put(tmp_path, name, name)
        two(tmp_path, "--overwrite", "--save-steps", 1, "--seed", 1).done()
        found = contents(tmp_path)
        assert {name: found.get(name) for name in mine} == {name: name.encode() for name in mine}
        assert not {n for n in found if n.startswith("state/")} - {"state/why.md"}

    def test_hidden_folders_of_others_stay(self, two: Run, tmp_path: Path) -> None:
        mine = [".adapter-notes/old/x", ".adapter-cautions/old/x", ".state-of-the-art/x",
                ".train.json-settings/x", ".run.json-cautions/run.json"]  # fmt: skip
        for name in mine:
            put(tmp_path, name, name)
        two(tmp_path).done()
        found = contents(tmp_path)
        assert {name: found.get(name) for name in mine} == {name: name.encode() for name in mine}

    def test_an_empty_folder_is_nobody_s(self, two: Run, tmp_path: Path) -> None:
        for name in ("adapter", "state", "checkpoints"):
            (tmp_path / name).mkdir()
        two(tmp_path, "--keep-state").done()

    def test_what_a_kill_left(self, two: Run, retain: Run, trained: Path, tmp_path: Path) -> None:
        """An adapter that was moved aside goes back; files that were being written go."""
        out = tmp_path / "out"
        two(out).done()
        (out / "train.json").unlink()
        (out / ".adapter.retain-a_killed").mkdir()
        (out / "adapter").rename(out / ".adapter.retain-a_killed" / "old")
        put(out, ".train.json.retain-a_killed/train.json", "{")
        left = out / ".adapter.retain-a_killed" / "old"  # by a writer into it
        put(left, ".adapter.retain-a_killed/adapter_config.json", "{}")
        (left / "adapter_config.json").unlink()
        two(out).done()
        assert not [p.name for p in (out / "adapter").iterdir() if p.name.startswith(".")]
        assert sorted(p.name for p in out.iterdir()) == ["adapter", "run.json", "train.json"]
        curvature = told(trained / "run.json")["curvature"]
        argv = ("soften", trained / "adapter", "--curvature", curvature, "--budget", 1)
        soft = tmp_path / "soft"
        for name in ("soften.json", "soften.png", "soften.svg"):
            put(soft, f".{name}.retain-a_killed/{name}", "x")
        retain(*argv, "--points", 2, "-o", soft, "-q").done()
        assert not [p.name for p in soft.iterdir() if p.name.startswith(".")]

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_modes(self, mask: int, two: Run, tmp_path: Path) -> None:
        before = os.umask(mask)
        try:
            two(tmp_path / "out", "--keep-state", "--save-steps", 1).done()
        finally:
            os.umask(before)
        for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
            whole = 0o777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o777 == whole & ~mask, path


class TestLock:
    def test_a_second_writer_is_refused(self, two: Run, retain: Run, tmp_path: Path) -> None:
        with FileLock(tmp_path / LOCK):
            two(tmp_path).refused("another process is writing", "another --out")
            retain("demo", "--out", tmp_path).refused("another process is writing")
        two(tmp_path).done()

    def test_of_two_at_once_one_is_refused(self, model: Path, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        argv = ["train", "--model", model, "--data", data, *SHORT, "--method", "none"]
        argv += ["--epochs", 40, "-o", out, "-q"]
        first = forked.begin(main, [str(arg) for arg in argv], told=tmp_path / "told")
        limit = time.monotonic() + 60
        while not (out / LOCK).exists():
            assert first.is_alive() and time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(0.1)
        assert main([str(arg) for arg in argv]) == 2
        first.join(120)
        assert first.exitcode == 0
        assert sorted(p.name for p in out.iterdir()) == ["adapter", "run.json", "train.json"]

    def test_fits_of_one_file(self, retain: Run, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "c.safetensors"
        with FileLock(tmp_path / ".c.safetensors.lock"):
            retain("fit", model, "-o", out).refused("another process is writing")
        assert not out.exists()


class TestState:
    @pytest.fixture(scope="class")
    def kept(self, model: Path, data: Path, curvature: Path, tmp_path_factory: Any) -> Path:
        """A run with a state; its curvature's file is another one by now."""
        folder = tmp_path_factory.mktemp("kept")
        mine = Path(shutil.copy(curvature, folder / "mine.safetensors"))
        argv = ["train", "--model", model, "--data", data, "--curvature", mine, *SHORT]
        argv += ["--max-steps", 2, "--max-length", 16, "--keep-state", "-o", folder / "may", "-q"]
        assert main([str(a) for a in argv]) == 0
        mine.write_bytes(b"something else")
        return Path(folder / "may")

    def test_the_curvature_of_the_state_is_a_copy(
        self, kept: Path, retain: Run, curvature: Path, data: Path, tmp_path: Path
    ) -> None:
        assert (kept / "state" / "source.safetensors").read_bytes() == curvature.read_bytes()
        argv = ("--continue-from", kept, "--data", data, "--batch-size", 4, "--max-steps", 1)
        retain("train", *argv, "-o", tmp_path / "june", "-q").done()

    @pytest.mark.parametrize(
        ("name", "how"),
        [
            *((f"state/{n}.safetensors", how) for n in ("source", "past")
              for how in ("flipped", "gone", "cut")),
            *(("adapter/adapter_model.safetensors", how) for how in ("flipped", "gone", "cut")),
            *(("adapter/adapter_config.json", how) for how in ("another", "gone")),
        ],
    )  # fmt: skip
    def test_one_that_changed_is_refused(
        self, name: str, how: str, kept: Path, retain: Run, data: Path, tmp_path: Path
    ) -> None:
        run = Path(shutil.copytree(kept, tmp_path / "run"))
        path = run / name
        content = bytearray(path.read_bytes())
        if how == "another":
            write_lines(path, [told(path) | {"lora_alpha": 99}])
        elif how == "gone":
            path.unlink()
        else:
            content[len(content) // 2] ^= how == "flipped"
            path.write_bytes(content if how == "flipped" else content[:-9])
        argv = ("--continue-from", run, "--data", data, "-o", tmp_path / "june")
        retain("train", *argv).refused(path.name if how == "gone" else "has changed")
        assert not (tmp_path / "june").exists()
