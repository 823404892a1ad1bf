"""``retain.train_run`` and ``continue_run``: what the commands do, from Python."""

from __future__ import annotations

import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

import retain
from retain.config import RunConfig, TrainConfig
from retain.errors import ConfigError, RetainWarning
from retain.runs.records import StateRecord, TrainRecord, read_record
from retain.runs.training import rose

VOLATILE = {"seconds", "created"}


def plain(path: Path, out: Path) -> Any:
    """A record without what differs between two runs of one command."""

    def steady(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: steady(v) for k, v in value.items() if k not in VOLATILE | {"digest"}}
        return [steady(v) for v in value] if isinstance(value, list) else value

    return json.loads(json.dumps(steady(json.loads(path.read_text()))).replace(str(out), "@"))


@pytest.fixture
def settings(model: Path, data: Path, curvature: Path) -> dict[str, Any]:
    return {
        "model": model, "data": data, "curvature": curvature, "rank": 4, "batch_size": 4,
        "max_steps": 2, "max_length": 16, "learning_rate": 0.02, "dtype": "float32",
        "keep_state": True, "save_steps": 1,
    }  # fmt: skip


def same_files(one: Path, two: Path) -> None:
    names = [
        sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) for out in (one, two)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors") and "state/" not in name:
            assert (one / name).read_bytes() == (two / name).read_bytes()
        if name in ("run.json", "train.json", "state/state.json"):
            told = plain(one / name, one.parent), plain(two / name, two.parent)
            for record in told:
                record.pop("digests", None)  # of curvatures with times in them
            assert told[0] == told[1]
            assert list(told[0]) == list(told[1])  # in one order


def test_files_are_those_of_the_command(
    retain: Any, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from retain import continue_run, train_run

    argv = [
        a for k, v in settings.items() for a in (f"--{k.replace('_', '-')}", v) if v is not True
    ]
    argv.append("--keep-state")
    assert retain("train", *argv, "--out", tmp_path / "command" / "may", "-q").code == 0
    done = train_run(**settings, out=tmp_path / "python" / "may", quiet=True)
    assert capsys.readouterr().out == ""
    same_files(tmp_path / "command" / "may", tmp_path / "python" / "may")
    assert done.adapter == tmp_path / "python" / "may" / "adapter" and done.adapter.is_dir()
    assert done.record == read_record(tmp_path / "python" / "may" / "train.json", TrainRecord)
    more = ["--data", settings["data"], "--batch-size", 4, "--max-steps", 1, "--max-length", 16]
    more += [
        "--continue-from",
        tmp_path / "command" / "may",
        "--out",
        tmp_path / "command" / "june",
    ]
    assert retain("train", *more, "-q").code == 0
    size = {"batch_size": 4, "max_steps": 1, "max_length": 16}
    continue_run(
        tmp_path / "python" / "may",
        data=settings["data"],
        out=tmp_path / "python" / "june",
        quiet=True,
        **size,
    )
    same_files(tmp_path / "command" / "june", tmp_path / "python" / "june")


@pytest.mark.parametrize("kind", ["options", "fields", "mapping", "file", "object"])
def test_settings_may_come_in_any_form(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    nested = {
        "model": str(settings["model"]), "data": str(settings["data"]), "method": "none",
        "dtype": "float32", "adapter": {"rank": 4},
        "training": {"batch_size": 4, "max_steps": 9, "max_length": 16},
    }  # fmt: skip
    given: dict[str, Any] = {"out": tmp_path / "run", "max_steps": 1, "quiet": True}
    if kind == "options":
        given |= {**settings, "method": "none", "keep_state": None, "curvature": None}
        given |= {"max_steps": 1, "save_steps": None, "learning_rate": None}
    config: Any = None
    if kind == "fields":
        given |= nested | {"training": nested["training"] | {"max_steps": 1}}
        del given["max_steps"]
    if kind == "mapping":
        config = nested
    if kind == "file":
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(nested))
    if kind == "object":
        config = RunConfig(**nested, out="elsewhere")
    found = retain.train_run(config, **given).record
    assert (found.steps, found.config.adapter.rank, found.config.training.batch_size) == (1, 4, 4)
    assert (found.config.training.max_length, found.curvature) == (16, None)


def test_resuming_and_starting_again(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    retain.train_run(**settings, out=out, quiet=True)
    with pytest.raises(ConfigError, match="checkpoints of an earlier run"):
        retain.train_run(**settings, out=out, quiet=True)
    assert retain.train_run(resume=True, out=out, quiet=True).record.resumed_from == "checkpoint-2"
    assert retain.train_run(**settings, out=out, overwrite=True, quiet=True).record.steps == 2
    with pytest.raises(ConfigError, match="do not go together"):
        retain.train_run(**settings, out=out, overwrite=True, resume=True)


def test_a_kept_state_is_replaced_when_asked_alone(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = settings | {"save_steps": 0, "keep_state": False}
    retain.train_run(**once, out=tmp_path / "a", quiet=True)
    capsys.readouterr()
    retain.train_run(**once | {"keep_state": True}, out=tmp_path / "a", progress=False)
    assert "holds a finished run, whose place this one takes" in capsys.readouterr().out
    before = (tmp_path / "a" / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="the state of an earlier run"):
        retain.train_run(**once, out=tmp_path / "a", quiet=True)
    assert (tmp_path / "a" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    retain.train_run(**once, out=tmp_path / "a", overwrite=True, quiet=True)
    assert not (tmp_path / "a" / "state").exists()


def test_a_strength_beside_a_budget_is_said_to_be_unused_once(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = retain.train_run(**settings, budget=0.05, strength=3, out=tmp_path, progress=False)
    said = "the budget finds the strength: strength 3 is not used"
    assert found.record.notes.count(said) == 1
    assert capsys.readouterr().out.count(said) == 1


def test_what_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting; .*did you mean 'learning_rate'"):
        retain.train_run(**settings, out=tmp_path / "o", learning_rat=1)
    with pytest.raises(ConfigError, match="rank is not accepted; got: 0"):
        retain.train_run(**settings | {"rank": 0}, out=tmp_path / "o")
    with pytest.raises(ConfigError, match="nothing to continue from"):
        retain.continue_run(tmp_path, data=settings["data"], out=tmp_path / "o")
    with pytest.raises(ConfigError, match="out is missing"):
        retain.train_run(**settings)
    assert not (tmp_path / "o").exists()


def test_what_is_said_and_noted(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from retain.models.load import load_model

    def loads(*args: Any, **options: Any) -> Any:
        warnings.warn("of ours", RetainWarning, stacklevel=1)
        warnings.warn_explicit("of others", UserWarning, "/x/torch/a.py", 1, "torch.a")
        return load_model(*args, **options)

    monkeypatch.setattr("retain.models.load.load_model", loads)
    with pytest.warns(UserWarning, match="of others"):
        done = retain.train_run(**settings, out=tmp_path / "o", progress=False)
    assert done.record.notes == ["of ours"]
    assert "training on 24 rows" in capsys.readouterr().out


def test_ctrl_c_says_what_stays(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retain.models.load.load_model", stop)
    with pytest.raises(KeyboardInterrupt, match="stopped; no checkpoint yet"):
        retain.train_run(**settings, out=tmp_path / "o", quiet=True)
    assert not (tmp_path / "o").exists()


def test_the_command_that_goes_on_can_be_pasted(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "my run"
    monkeypatch.setattr("retain.runs.training.Training._leave", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        retain.train_run(**settings, out=out, quiet=True)
    command = str(stopped.value).partition("go on with: ")[2]
    assert shlex.split(command) == ["retain", "train", "--resume", "--out", str(out)]


@pytest.mark.parametrize("over", [False, True])
def test_ctrl_c_while_the_state_is_measured(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out, given = tmp_path / "may", settings | {"save_steps": 0, "quiet": True}
    if over:
        retain.train_run(**given, out=out)
    before = {path: path.read_bytes() for path in out.rglob("*")
              if path.is_file() and path.name != "run.json"}  # fmt: skip
    said = "an older adapter in .* is unchanged" if over else "the adapter in .* is this run's, but"
    with monkeypatch.context() as patch:
        patch.setattr("retain.retention.recipe.Recipe.consolidate", stop)
        with pytest.raises(KeyboardInterrupt, match=said):
            retain.train_run(**given | {"max_steps": 3}, out=out, overwrite=over)
    if over:
        assert all(path.read_bytes() == content for path, content in before.items())
        more = {key: settings[key] for key in ("data", "batch_size", "max_steps", "max_length")}
        retain.continue_run(out, **more, out=tmp_path / "june", quiet=True)
    else:
        assert (out / "adapter").is_dir() and not (out / "state").exists()
    assert retain.train_run(resume=True, out=out, quiet=True).record.steps == 3
    assert (out / "state" / "state.json").is_file()


def test_records_of_earlier_versions_are_read(trained: Path, tmp_path: Path) -> None:
    """Without what later versions have added; and with what a newer one may add."""
    found = json.loads((trained / "train.json").read_text())
    for name in ("digest", "digests", "labels", "rows", "notes", "why_no_filter", "resumed_from"):
        del found[name]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(found | {"new": 1}))
    record = read_record(path, TrainRecord)
    assert (record.steps, record.held, record.strength) == (12, True, 10.0)
    state = {"schema": "retain.state/1", "runs": [{"data": "a", "examples": 3, "seed": 0}]}
    path.write_text(json.dumps(state))
    assert read_record(path, StateRecord).digests == {}
    path.write_text(json.dumps(state | {"schema": "retain.state/2"}))
    with pytest.raises(ValueError, match=r"retain\.state/1"):
        read_record(path, StateRecord)


def test_a_loss_that_rises_is_told(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(learning_rate=3e-3)
    said = "the loss rose, from 1 to 2.5: try --learning-rate 0.001"
    assert rose([1.0, 2.0, 3.0, 2.5], config) == said
    assert rose([1.0] * 8 + [1.2] * 8, config) == "the loss rose, from 1 to 1.2: try " + said[-21:]
    for losses in (
        [2.0, 3.0, 1.0], [1.0, 1.9], [1.9, 3, 2, 2.2, 2.5], [1.0] * 8 + [1.05] * 8, [1e-6, 2e-3],
        [1.0], [], [None, 2.0, 1.0], [1.0, 9.0] * 8,
    ):  # fmt: skip
        assert rose(losses, config) is None
    given = settings | {"method": "none", "curvature": None, "keep_state": None, "max_steps": 4}
    monkeypatch.setattr("retain.runs.training.FELT", -1)
    for share, said in ((2.0, False), (0.5, True)):  # a tiny model's loss hardly moves
        monkeypatch.setattr("retain.runs.training.SURELY", share)
        found = retain.train_run(**given, out=tmp_path / f"{share}", quiet=True)
        assert any(note.startswith("the loss rose") for note in found.record.notes) is said
