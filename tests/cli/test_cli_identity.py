"""A run is told by contents: of checkpoints, rows, base and curvature; not by where they lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_parts import Run, adapter, told, write_lines
from safetensors.torch import load_file, save_file

from retain.cli import main
from retain.documents import read_json, sealed

FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "trainer_state.json", "training_args.bin", "digests.json",
)  # fmt: skip


def edit(path: Path, before: str, after: str) -> None:
    """Another path in settings that are sealed with a digest, and the seal made anew."""
    text = json.dumps(read_json(path, sealed=True)).replace(before, after)
    path.write_text(json.dumps(sealed(json.loads(text))))


def gone(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HOW: tuple[Callable[[Path], None], ...] = (gone, emptied, cut, flipped, grown, a_folder)


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path, curvature: Path
) -> Callable[..., Path]:
    """Copies a run into a folder of its own, with all that it reads."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(model, folder / "base")
    shutil.copy(data, folder / "rows.jsonl")
    shutil.copy(curvature, folder / "c.safetensors")
    argv = ["train", "--model", folder / "base", "--data", folder / "rows.jsonl", "--rank", 4]
    argv += ["--curvature", folder / "c.safetensors", "--out", folder / "run", "--max-steps", 4]
    argv += ["--save-steps", 2, "--batch-size", 4, "--dtype", "float32", "--max-length", 24]
    argv += ["--learning-rate", 0.02, "--budget", 0.01, "--quiet"]
    assert main([str(a) for a in argv]) == 0

    def run(target: Path) -> Path:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        edit(target / "run" / "run.json", str(folder), str(target))
        return target

    return run


@pytest.fixture
def whole(start: Any, tmp_path: Path) -> Path:
    """Of a finished run, with the checkpoints 2 and 4."""
    return start(tmp_path / "w")


@pytest.fixture
def half(whole: Path) -> Path:
    """The same, stopped after step 2."""
    shutil.rmtree(whole / "run" / "checkpoints" / "checkpoint-4")
    return whole


def same(run: Path, want: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, want[name]) for name, tensor in adapter(run).items())


class TestCheckpoint:
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("how", HOW)
    def test_one_that_changed_is_passed_over(
        self, how: Any, name: str, retain: Run, whole: Path
    ) -> None:
        if (how, name) == (grown, "digests.json"):
            name = "scheduler.pt"  # a blank at the end of JSON says nothing else
        run = whole / "run"
        want = adapter(run)
        how(run / "checkpoints" / "checkpoint-4" / name)
        shutil.rmtree(run / "adapter")
        found = retain("train", "--resume", "--out", run, "--json").json
        same(run, want)
        assert found["resumed_from"] == "checkpoint-2"
        assert [n for n in found["notes"] if "checkpoint-4 is passed over" in n and name in n]
        assert told(run / "train.json")["notes"] == found["notes"]

    def test_it_is_said(self, retain: Run, whole: Path) -> None:
        flipped(whole / "run" / "checkpoints" / "checkpoint-4" / "scheduler.pt")
        outcome = retain("train", "--resume", "--out", whole / "run")
        assert "checkpoint-4 is passed over: scheduler.pt has changed" in outcome.out
        assert "going on from" in outcome.out and "checkpoint-2" in outcome.out

    def test_none_is_whole(self, retain: Run, whole: Path) -> None:
        want = adapter(whole / "run")
        for number in (2, 4):
            flipped(whole / "run" / "checkpoints" / f"checkpoint-{number}" / "optimizer.pt")
        shutil.rmtree(whole / "run" / "adapter")
        found = retain("train", "--resume", "--out", whole / "run", "--json").json
        same(whole / "run", want)
        assert found["resumed_from"] is None
        assert len(found["notes"]) == 4  # one is of the budget, whose text is not given
        assert "no checkpoint is whole: the run begins anew" in found["notes"]

    def test_others_files_in_it_do_not_matter(self, retain: Run, half: Path) -> None:
        note = half / "run" / "checkpoints" / "checkpoint-2" / "note.txt"
        note.write_text("mine")
        found = retain("train", "--resume", "--out", half / "run", "--json").json
        assert found["resumed_from"] == "checkpoint-2"
        assert note.read_text() == "mine"


def reordered(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))


def one_letter(path: Path) -> None:
    path.write_text(path.read_text().replace("cat", "bat", 1))


def one_less(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def another_base(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    save_file(
        {n: w + 0.01 for n, w in weights.items()}, path / "model.safetensors", {"format": "pt"}
    )


class TestInputs:
    @pytest.mark.parametrize("how", [reordered, one_letter, one_less])
    def test_rows_that_changed_are_refused(self, how: Any, retain: Run, half: Path) -> None:
        how(half / "rows.jsonl")
        retain("train", "--resume", "--out", half / "run").refused(
            "the rows to learn from changed", "--data", "--overwrite"
        )
        assert (half / "run" / "adapter").exists()

    def test_another_base_is_refused(self, retain: Run, half: Path, tmp_path: Path) -> None:
        plain = ("--model", half / "base", "--data", half / "rows.jsonl", "--method", "none", "-q")
        plain = (*plain, "--max-steps", 2, "--save-steps", 1, "--batch-size", 4)
        retain("train", *plain, "-o", tmp_path / "plain").done()
        another_base(half / "base")
        outcome = retain("train", "--resume", "--out", half / "run")
        outcome.refused("another base model")  # the curvature's word
        outcome = retain("train", "--resume", "-o", tmp_path / "plain")
        outcome.refused("the base model changed", "--model")

    def test_another_curvature_is_refused(self, retain: Run, source: Path, half: Path) -> None:
        other = half / "c.safetensors"
        retain("fit", half / "base", source, "-o", other, "--seed", 5, "-q").done()
        retain("train", "--resume", "--out", half / "run").refused("curvature changed")

    def test_all_may_have_moved(self, retain: Run, half: Path, tmp_path: Path) -> None:
        want = adapter(half / "run")
        there = Path(half.rename(tmp_path / "elsewhere"))
        (there / "run").rename(there / "walk")
        argv = ("--model", there / "base", "--data", there / "rows.jsonl")
        argv = (*argv, "--curvature", there / "c.safetensors")
        found = retain("train", "--resume", "--out", there / "walk", "--json", *argv).json
        assert found["resumed_from"] == "checkpoint-2"
        same(there / "walk", want)

    def test_paths_hold_from_another_folder(
        self, retain: Run, half: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(half)
        argv = ("--model", "base", "--data", "rows.jsonl", "--curvature", "c.safetensors")
        argv = (*argv, "--max-steps", 2, "--save-steps", 1, "--batch-size", 4, "-q", "--rank", 4)
        retain("train", *argv, "--out", "new", "--keep-state").done()
        monkeypatch.chdir(tmp_path)
        retain("train", "--resume", "--out", half / "new", "-q").done()
        more = ("--data", half / "rows.jsonl", "--batch-size", 4, "--max-steps", 1, "-q")
        retain("train", "--continue-from", half / "new", *more, "-o", "next").done()


class TestEnded:
    """``--resume`` where the run has ended, and has left no checkpoint."""

    @pytest.fixture
    def may(self, start: Any, retain: Run, tmp_path: Path) -> Path:
        folder = Path(start(tmp_path / "w"))
        argv = ("--model", folder / "base", "--data", folder / "rows.jsonl", "--rank", 4)
        argv = (*argv, "--curvature", folder / "c.safetensors", "--max-steps", 2)
        retain("train", *argv, "--keep-state", "-q", "--out", folder / "may").done()
        return folder

    @staticmethod
    def files(run: Path) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def test_there_is_nothing_to_resume(self, retain: Run, may: Path) -> None:
        before = self.files(may / "may")
        outcome = retain("train", "--resume", "--out", may / "may").done()
        assert "the run has ended: there is nothing to resume" in outcome.out
        assert self.files(may / "may") == before

    @pytest.mark.parametrize("where", ["in place", "elsewhere"])
    def test_other_rows_do_not_take_its_place(self, retain: Run, may: Path, where: str) -> None:
        before, rows = self.files(may / "may"), may / "rows.jsonl"
        june = rows if where == "in place" else Path(shutil.copy(rows, may / "june.jsonl"))
        one_letter(june)
        argv = () if where == "in place" else ("--data", june)
        retain("train", "--resume", "--out", may / "may", *argv).refused(
            "has ended, and the rows to learn from changed", "another --out", "--overwrite"
        )
        assert self.files(may / "may") == before

    @pytest.mark.parametrize("lost", ["adapter", "state", "train.json"])
    def test_one_that_has_not_left_all_begins_anew(self, retain: Run, may: Path, lost: str) -> None:
        want, path = adapter(may / "may"), may / "may" / lost
        path.unlink() if path.is_file() else shutil.rmtree(path)
        found = retain("train", "--resume", "--out", may / "may", "--json").json
        assert "no checkpoint is whole: the run begins anew" in found["notes"]
        same(may / "may", want)
        assert path.exists()


class TestContinue:
    @pytest.fixture(scope="class")
    def may(self, start: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = start(tmp_path_factory.mktemp("may") / "w")
        argv = ["train", "--model", folder / "base", "--data", folder / "rows.jsonl", "--rank", 4]
        argv += ["--curvature", folder / "c.safetensors", "--out", folder / "may", "--max-steps", 2]
        argv += ["--batch-size", 4, "--dtype", "float32", "--keep-state", "-q"]
        assert main([str(a) for a in argv]) == 0
        return folder

    @pytest.fixture
    def moved(self, may: Path, tmp_path: Path) -> Path:
        """The base lies under another name now, and so does the run."""
        shutil.copytree(may / "base", tmp_path / "moved")
        shutil.copytree(may / "may", tmp_path / "mai")
        for name in ("run.json", "train.json"):
            edit(tmp_path / "mai" / name, str(may / "base"), str(tmp_path / "base"))
        return tmp_path

    @pytest.fixture
    def june(self, retain: Run, moved: Path, data: Path) -> Run:
        argv = ("--continue-from", moved / "mai", "--batch-size", 4, "--max-steps", 1, "-q")
        return lambda *more: retain("train", *argv, "--data", data, "--out", moved / "june", *more)

    def test_a_base_that_moved(self, june: Run, moved: Path) -> None:
        june().refused("cannot be loaded", "--model")
        june("--model", moved / "moved").done()
        assert told(moved / "june" / "run.json")["model"] == str(moved / "moved")

    def test_another_model(self, june: Run, moved: Path, other_model: Path) -> None:
        said = ("not the base of the run", "fingerprint", "--model")
        june("--model", other_model).refused(*said)
        shutil.copytree(other_model, moved / "base")
        june().refused(*said)
        assert not (moved / "june").exists()


class TestSaid:
    """What is done in a lesser way is said once, and kept in the record."""

    CASES = (
        ([{"prompt": "long " * 20, "completion": "x"}] * 6, "6 of 14 rows", "left_out_no_room"),
        ([{"prompt": "a", "completion": "long " * 20}] * 5, "5 of 13 rows", "completions_cut"),
        ([{"text": "long " * 20}] * 4, "4 of 12 rows", "texts_cut"),
        ([{"text": ""}] * 3, "3 of 11 rows", "left_out_empty"),
    )

    @pytest.mark.parametrize(("rows", "said", "counted"), CASES)
    @pytest.mark.parametrize("more", [[], ["--json"]])
    def test_rows(
        self, rows: Any, said: str, counted: str, more: list[str], train: Run, tmp_path: Path
    ) -> None:
        every = rows + [{"prompt": "a", "completion": "b"}] * 8
        path, out = write_lines(tmp_path / "rows.jsonl", every), tmp_path / "out"
        argv = ("--data", path, "--max-length", 16, "--max-steps", 1, "--method", "none")
        assert train(out, *argv, *more).done().out.count(said) == 1
        record = told(out / "train.json")
        assert len([n for n in record["notes"] if said in n]) == 1
        assert record["rows"]["rows"] == len(every)
        assert record["rows"][counted] == len(rows)

    def test_no_filter(
        self, retain: Run, train: Run, model: Path, source: Path, tmp_path: Path
    ) -> None:
        held = tmp_path / "d.safetensors"
        retain("fit", model, source, "-o", held, "--structure", "diagonal", "-q").done()
        argv = ("--curvature", held, "--max-steps", 1, "--json")
        found = train(tmp_path / "out", *argv).json
        assert "structure diagonal" in found["why_no_filter"]
        assert [n for n in found["notes"] if found["why_no_filter"] in n]

    @pytest.mark.parametrize(
        ("fit", "said"),
        [
            (["--structure", "diagonal"], "structure diagonal"),
            (["--space", "adapter", "--rank", 4], "not of the base model's weights"),
        ],
    )
    def test_no_filter_in_later_months(
        self, retain: Run, train: Run, data: Path, source: Path, model: Path, tmp_path: Path,
        fit: list[object], said: str,
    ) -> None:  # fmt: skip
        held, out = tmp_path / "d.safetensors", tmp_path / "may"
        retain("fit", model, source, "-o", held, *fit, "-q").done()
        train(out, "--curvature", held, "--max-steps", 1, "--keep-state", "-q").done()
        argv = ("--continue-from", out, "--data", data, "--out", tmp_path / "june")
        found = retain("train", *argv, "--batch-size", 4, "--max-steps", 1, "--json").json
        assert said in found["why_no_filter"]

    def test_our_own_warnings_alone_reach_the_screen(
        self, retain: Run, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
    ) -> None:
        import warnings

        from retain.errors import RetainWarning
        from retain.models.load import load_model

        def loads(*args: Any, **options: Any) -> Any:
            for _ in range(3):
                warnings.warn("of ours", RetainWarning, stacklevel=1)
                warnings.warn_explicit("of others", UserWarning, "/x/torch/a.py", 1, "torch.a")
                warnings.warn_explicit("of ours too", UserWarning, "a.py", 1, "retain.data.a")
            return load_model(*args, **options)

        monkeypatch.setattr("retain.models.load.load_model", loads)
        argv = ("-o", tmp_path / "c.safetensors", "--rows", 8, "--max-length", 12)
        outcome = retain("fit", model, *argv).done()
        assert outcome.err == ""
        assert outcome.out.splitlines().count("of ours") == 1
        assert outcome.out.splitlines().count("of ours too") == 1
        assert "of others" not in outcome.out
        assert "of ours" in retain("fit", model, *argv, "--json").json["notes"]
