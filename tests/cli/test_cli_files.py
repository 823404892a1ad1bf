"""Files that do not fit, are damaged, or cannot be written."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets no file grow beyond a size: what a full disk does, after a part was written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def train(retain: Any, model: Path, data: Path, short: Any, tmp_path: Path) -> Any:
    def run(curvature: Path, *argv: object) -> Any:
        return retain(
            "train", "--model", model, "--data", data, "--curvature", curvature, *short,
            "--out", tmp_path / "out", "--quiet", *argv,
        )  # fmt: skip

    return run


class TestCurvature:
    def test_of_another_base(
        self, train: Any, curvature: Path, other_model: Path, tmp_path: Path
    ) -> None:
        train(curvature, "--model", other_model).refused("another base model", "fingerprint")
        assert not (tmp_path / "out").exists()

    def test_of_another_rank(
        self, retain: Any, train: Any, model: Path, source: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "adapter-space.safetensors"
        space = ("--space", "adapter", "--rank", 2, "-q", "-o", path)
        assert retain("fit", model, source, *space).code == 0
        train(path).refused("one rank", "r=4", "r=2")
        assert not (tmp_path / "out").exists()
        assert train(path, "--rank", 2, "--adapter-seed", 5).code == 0  # starts at the anchor

    def test_around_another_adapter(
        self, retain: Any, train: Any, model: Path, source: Path, trained: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "around.safetensors"
        around = ("--adapter", trained / "adapter", "-q", "-o", path)
        assert retain("fit", model, source, *around).code == 0
        train(path).refused("around another adapter", "without --adapter")

    def test_truncated(self, train: Any, curvature: Path, tmp_path: Path) -> None:
        path = tmp_path / "short.safetensors"
        path.write_bytes(curvature.read_bytes()[:-1000])
        train(path).refused("damaged", "short.safetensors", "fit it again")
        assert not (tmp_path / "out").exists()

    def test_with_a_flipped_bit(self, train: Any, curvature: Path, tmp_path: Path) -> None:
        path = tmp_path / "flipped.safetensors"
        content = bytearray(curvature.read_bytes())
        content[-500] ^= 4
        path.write_bytes(content)
        train(path).refused("damaged", "digest", "fit it again")
        assert not (tmp_path / "out").exists()

    def test_missing(self, train: Any, tmp_path: Path) -> None:
        train(tmp_path / "none.safetensors").refused("no such curvature", "retain fit")


class TestNotFinite:
    def test_training_that_blows_up(self, train: Any, curvature: Path, tmp_path: Path) -> None:
        train(curvature, "--learning-rate", 1e30).refused("not finite", "learning rate")
        assert not (tmp_path / "out").exists()

    def test_a_model_of_nan(
        self, train: Any, curvature: Path, make_model: Any, tmp_path: Path
    ) -> None:
        spoilt = make_model(tmp_path / "nan", spoil=True)
        train(curvature, "--model", spoilt, "--method", "none").refused("not finite", "nan")
        assert not (tmp_path / "out").exists()

    def test_a_model_of_nan_to_sample_from(
        self, retain: Any, make_model: Any, tmp_path: Path
    ) -> None:
        spoilt = make_model(tmp_path / "nan", spoil=True)
        out = tmp_path / "c.safetensors"
        retain("fit", spoilt, "-o", out, "--rows", 8, "-q").refused("not finite")
        assert not out.exists()

    def test_the_older_checkpoints_stay(
        self, train: Any, curvature: Path, model: Path, tmp_path: Path
    ) -> None:
        argv = ("--save-steps", 1, "--learning-rate", 1e30)
        train(curvature, *argv).refused("not finite")
        kept = sorted((tmp_path / "out" / "checkpoints").iterdir())
        assert [p.name for p in kept] == ["checkpoint-1", "checkpoint-2"]
        assert load_file(kept[0] / "adapter_model.safetensors")
        assert not (tmp_path / "out" / "adapter").exists()


class TestOutput:
    @pytest.fixture(params=["under a file", "/proc"])
    def nowhere(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        if request.param == "/proc":
            return Path("/proc/retain")
        (tmp_path / "file").touch()
        return tmp_path / "file" / "folder"

    def test_that_cannot_be_written(
        self, retain: Any, train: Any, curvature: Path, trained: Path, nowhere: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def loads(*_: object, **__: object) -> None:
            raise AssertionError("the model was loaded first")

        monkeypatch.setattr("retain.models.load.load_model", loads)
        monkeypatch.setattr("retain.study.demo.run_demo", loads)
        adapter = trained / "adapter"
        for outcome in (
            retain("fit", "m", "-o", nowhere / "c.safetensors"),
            train(curvature, "--out", nowhere),
            retain("eval", "--adapter", adapter, "--out", nowhere / "e.json"),
            retain("report", "result.json", "--out", nowhere / "r.html"),
            retain("demo", "--out", nowhere),
        ):
            outcome.refused("cannot be written", str(nowhere))

    def test_that_is_a_device_or_a_folder(self, retain: Any, tmp_path: Path) -> None:
        retain("fit", "m", "-o", tmp_path).refused("no plain file")
        retain("fit", "m", "-o", "/dev/null").refused("no plain file", "/dev/null")
        assert Path("/dev/null").is_char_device()

    def test_full_disk_under_a_curvature(
        self, retain: Any, model: Path, source: Path, curvature: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "c.safetensors"
        shutil.copy(curvature, out)
        with largest_file(20_000):
            outcome = retain("fit", model, source, "-o", out, "-q")
        outcome.refused("cannot be written", "File too large")
        assert out.read_bytes() == curvature.read_bytes()
        assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]

    def test_full_disk_under_an_adapter(self, train: Any, curvature: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert train(curvature, "--max-steps", 1).code == 0
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix != ".json"}
        with largest_file(5_000):
            train(curvature).refused("the adapter cannot be written", "File too large")
        assert sorted(p.name for p in out.iterdir()) == ["adapter", "run.json", "train.json"]
        assert {p: p.read_bytes() for p in before} == before

    @pytest.mark.parametrize("size", [2_000, 15_000])
    def test_full_disk_under_a_checkpoint(
        self, train: Any, curvature: Path, tmp_path: Path, size: int
    ) -> None:
        with largest_file(size):
            train(curvature, "--save-steps", 2).refused("a checkpoint cannot be written")
        assert not (tmp_path / "out").exists()

    def test_another_system_error(
        self, retain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied", "result.json")

        monkeypatch.setattr("retain.report.page.write_report", refuse)
        retain("report", "r.json", "-o", tmp_path / "r.html").refused(
            "result.json: Permission denied"
        )


class TestAdapter:
    @pytest.fixture
    def adapter(self, trained: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))

    @pytest.fixture
    def measure(self, retain: Any, model: Path, source: Path) -> Any:
        def run(adapter: Path, *argv: object) -> Any:
            return retain(
                "eval", "--model", model, "--adapter", adapter, "--source", source, "-q", *argv
            )

        return run

    def test_missing(self, measure: Any, tmp_path: Path) -> None:
        measure(tmp_path / "none").refused("no such adapter folder")
        measure(tmp_path).refused("holds no adapter", "adapter_config.json")

    @pytest.mark.parametrize("change", [{"megatron_config": {}}, {"target_modules": 7}, {"r": "x"}])
    def test_settings_of_another_kind(
        self, measure: Any, adapter: Path, change: dict[str, Any]
    ) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        measure(adapter).refused("the adapter")

    def test_pickle(self, measure: Any, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        measure(adapter).refused("pickle", "adapter_model.bin", "adapter_model.safetensors")

    def test_truncated(self, measure: Any, adapter: Path) -> None:
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        measure(adapter).refused("the adapter is damaged")

    def test_damaged_configuration(self, measure: Any, adapter: Path) -> None:
        (adapter / "adapter_config.json").write_text("{")
        measure(adapter).refused("the adapter is damaged", "adapter_config.json")

    def test_of_another_shape(self, measure: Any, adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3}))
        measure(adapter).refused("does not fit the model")

    def test_of_another_layer(self, measure: Any, adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["lm_head"]}))
        measure(adapter).refused("does not fit the model", "without")

    def test_of_another_base(self, measure: Any, trained: Path, other_model: Path) -> None:
        measure(trained / "adapter", "--model", other_model).refused("another base model")

    def test_that_predicts_nan(self, measure: Any, adapter: Path) -> None:
        from safetensors.torch import save_file

        weights = adapter / "adapter_model.safetensors"
        save_file({k: v * float("nan") for k, v in load_file(weights).items()}, weights)
        measure(adapter).refused("not finite")
