"""Files that do not fit, are damaged, or cannot be written."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_parts import Outcome, Run, save_model, told, write_lines
from safetensors.torch import load_file, save_file

from retain import fit_curvature, load_model


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets no file grow beyond a size: what a full disk does, after a part was written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flipped(content: bytes) -> bytes:
    return content[:-500] + bytes([content[-500] ^ 4]) + content[-499:]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class TestCurvature:
    def test_of_another_base(self, train: Run, other_model: Path, out: Path) -> None:
        train(out, "--model", other_model, "-q").refused("another base model", "fingerprint")
        assert not out.exists()

    @pytest.mark.parametrize(
        ("how", "said"),
        [
            (lambda content: content[:-1000], ["damaged", "short.safetensors", "fit it again"]),
            (flipped, ["damaged", "digest", "fit it again"]),
            (None, ["no such curvature", "retain fit"]),
        ],
        ids=["cut", "flipped", "missing"],
    )
    def test_damaged(
        self, how: Any, said: list[str], train: Run, curvature: Path, out: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "short.safetensors"
        if how is not None:
            path.write_bytes(how(curvature.read_bytes()))
        train(out, "--curvature", path).refused(*said)
        assert not out.exists()

    def test_of_another_rank_or_adapter(
        self, retain: Run, train: Run, model: Path, source: Path, trained: Path, tmp_path: Path
    ) -> None:
        path, out = tmp_path / "c.safetensors", tmp_path / "out"
        retain("fit", model, source, "--adapter", trained / "adapter", "-q", "-o", path).done()
        train(out, "--curvature", path).refused("around another adapter", "without --adapter")
        retain("fit", model, source, "--space", "adapter", "--rank", 2, "-q", "-o", path).done()
        train(out, "--curvature", path).refused("one rank", "r=4", "r=2")
        assert not out.exists()
        # and starts at its anchor
        train(out, "--curvature", path, "--rank", 2, "--adapter-seed", 5, "-q").done()

    def test_of_the_plain_model(
        self, retain: Run, train: Run, model: Path, source: Path, out: Path, tmp_path: Path
    ) -> None:
        """What is fitted in Python before there is an adapter holds a run, and explains it."""
        base, path = load_model(str(model)), tmp_path / "plain.safetensors"
        fitted = fit_curvature(
            base.model, str(source), tokenizer=base.tokenizer, batch_size=4, progress=False
        )
        fitted.save(path)
        train(out, "--curvature", path, "--max-steps", 4).done()
        assert told(out / "train.json")["why_no_filter"] is None
        retain("explain", out, "--top", 1).done()


class TestNotFinite:
    def test_training_that_blows_up(self, train: Run, out: Path) -> None:
        train(out, "--learning-rate", 1e30, "-q").refused("not finite", "learning rate")
        assert not out.exists()
        train(out, "--learning-rate", 1e30, "-q", "--save-steps", 1).refused("not finite")
        kept = sorted((out / "checkpoints").iterdir())
        assert [p.name for p in kept] == ["checkpoint-1", "checkpoint-2"]
        assert load_file(kept[0] / "adapter_model.safetensors")
        assert not (out / "adapter").exists()

    def test_a_model_of_nan(self, retain: Run, train: Run, out: Path, tmp_path: Path) -> None:
        spoilt = save_model(tmp_path / "nan", spoil=True)
        train(out, "--model", spoilt, "--method", "none", "-q").refused("not finite", "nan")
        retain("fit", spoilt, "-o", out / "c", "--rows", 8, "-q").refused("not finite")
        assert not out.exists()


class TestOutput:
    @pytest.mark.usefixtures("unloaded")
    @pytest.mark.parametrize("where", ["under a file", "/proc"])
    def test_that_cannot_be_written(
        self, where: str, retain: Run, train: Run, trained: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        place = Path("/proc/retain") if where == "/proc" else tmp_path / "file" / "folder"
        adapter = trained / "adapter"
        for outcome in (
            retain("fit", "m", "-o", place / "c.safetensors"),
            train(place),
            retain("eval", "--adapter", adapter, "--out", place / "e.json"),
            retain("report", "result.json", "--out", place / "r.html"),
            retain("demo", "--out", place),
            retain("soften", "a", "--curvature", "c", "--budget", 1, "--out", place),
        ):
            outcome.refused("cannot be written", str(place))

    def test_that_is_a_device_or_a_folder(self, retain: Run, tmp_path: Path) -> None:
        retain("fit", "m", "-o", tmp_path).refused("no plain file")
        retain("fit", "m", "-o", "/dev/null").refused("no plain file", "/dev/null")
        assert Path("/dev/null").is_char_device()

    def test_full_disk_under_a_curvature(
        self, retain: Run, model: Path, source: Path, curvature: Path, tmp_path: Path
    ) -> None:
        out = Path(shutil.copy(curvature, tmp_path / "c.safetensors"))
        with largest_file(20_000):
            outcome = retain("fit", model, source, "-o", out, "-q")
        outcome.refused("cannot be written", "File too large")
        assert out.read_bytes() == curvature.read_bytes()
        assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]

    def test_full_disk_under_an_adapter(self, train: Run, out: Path) -> None:
        train(out, "--max-steps", 1, "-q").done()
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix != ".json"}
        with largest_file(5_000):
            train(out, "-q").refused("the adapter cannot be written", "File too large")
        assert sorted(p.name for p in out.iterdir()) == ["adapter", "run.json", "train.json"]
        assert {p: p.read_bytes() for p in before} == before

    @pytest.mark.parametrize("size", [2_000, 14_000])
    def test_full_disk_under_a_checkpoint(self, size: int, train: Run, out: Path) -> None:
        with largest_file(size):
            train(out, "--save-steps", 2, "-q").refused("a checkpoint cannot be written")
        assert not out.exists()


def _settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        write_lines(path, [told(path) | changes])

    return change


def _nan(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file({k: v * float("nan") for k, v in load_file(weights).items()}, weights)


ADAPTERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (shutil.rmtree, ["no such adapter folder"]),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(),
                    ["holds no adapter", "adapter_config.json"]),
    "megatron": (_settings(megatron_config={}), ["the adapter"]),
    "targets": (_settings(target_modules=7), ["the adapter"]),
    "rank": (_settings(r="x"), ["the adapter"]),
    "pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
               ["pickle", "adapter_model.bin", "adapter_model.safetensors"]),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-100]), ["the adapter is damaged"]),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"),
                ["the adapter is damaged", "adapter_config.json"]),
    "another shape": (_settings(r=3), ["does not fit the model"]),
    "another layer": (_settings(target_modules=["lm_head"]), ["does not fit the model", "without"]),
    "nan": (_nan, ["not finite"]),
}  # fmt: skip


class TestAdapter:
    @pytest.fixture
    def measure(self, retain: Run, model: Path, source: Path) -> Run:
        argv = ("eval", "--model", model, "--source", source, "-q", "--adapter")
        return lambda adapter, *more: retain(*argv, adapter, *more)

    @pytest.mark.parametrize("name", ADAPTERS)
    def test_damaged(self, name: str, measure: Run, trained: Path, tmp_path: Path) -> None:
        change, said = ADAPTERS[name]
        adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
        change(adapter)
        outcome: Outcome = measure(adapter)
        outcome.refused(*said)

    def test_of_another_base(self, measure: Run, trained: Path, other_model: Path) -> None:
        measure(trained / "adapter", "--model", other_model).refused("another base model")
