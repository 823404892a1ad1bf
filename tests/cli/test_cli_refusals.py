"""Mistakes on the command line: one line that says what to do, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fit(retain: Any, model: Path, source: Path, tmp_path: Path) -> Any:
    def run(*argv: object, what: object = None) -> Any:
        outcome = retain(
            "fit", model, what or source, "-o", tmp_path / "out" / "c.safetensors", *argv
        )
        assert not (tmp_path / "out").exists()
        return outcome

    return run


@pytest.fixture
def train(retain: Any, model: Path, data: Path, curvature: Path, short: Any, tmp_path: Path) -> Any:
    def run(*argv: object) -> Any:
        outcome = retain(
            "train", "--model", model, "--data", data, "--curvature", curvature, *short,
            "--out", tmp_path / "out", *argv,
        )  # fmt: skip
        assert not (tmp_path / "out").exists()
        return outcome

    return run


class TestNames:
    def test_unknown_command(self, retain: Any) -> None:
        retain("trian").refused(
            "'trian'",
            "did you mean 'train'?",
            "demo, eval, fit, plan, report, soften, study, tasks, train",
        )

    def test_unknown_option(self, retain: Any) -> None:
        retain("fit", "m", "--structur", "x").refused("'--structur'", "did you mean '--structure'?")

    def test_unknown_structure(self, fit: Any) -> None:
        fit("--structure", "kafc").refused(
            "'kafc'", "did you mean 'kfac'?", "activation, diagonal, ekfac"
        )

    @pytest.mark.parametrize(
        ("option", "got", "meant"),
        [
            ("--space", "wieght", "weight"),
            ("--fisher", "exakt", "exact"),
            ("--dtype", "bfloat", "bfloat16"),
        ],
    )
    def test_unknown_choice(self, fit: Any, option: str, got: str, meant: str) -> None:
        fit(option, got).refused(repr(got), f"did you mean {meant!r}?")

    def test_unknown_method(self, train: Any) -> None:
        train("--method", "laplase").refused("'laplase'", "did you mean 'laplace'?", "none")

    def test_unknown_method_in_the_file(self, train: Any, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text("method: laplase\n")
        train("--config", tmp_path / "run.yaml").refused("did you mean 'laplace'?")

    def test_unknown_key_in_the_file(self, train: Any, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text("training:\n  learning_rat: 0.1\n")
        train("--config", tmp_path / "run.yaml").refused(
            "'learning_rat'", "did you mean 'learning_rate'?"
        )

    def test_unknown_key_of_set(self, train: Any) -> None:
        train("--set", "training.warmupp=3").refused("'warmupp'", "did you mean 'warmup'?")
        train("--set", "model.size=3").refused("model", "{'size': 3}")
        train("--set", "warmup").refused("'warmup'", "key=value")

    def test_unknown_task(self, retain: Any, trained: Path) -> None:
        retain("eval", "--adapter", trained / "adapter", "--task", "word-problem").refused(
            "did you mean 'word-problems'?"
        )

    def test_unknown_target(self, fit: Any) -> None:
        fit("--targets", "k_proj,q_prj").refused("q_prj", "q_proj")


class TestValues:
    def test_a_number_that_is_none(self, fit: Any) -> None:
        fit("--rows", "many").refused("--rows", "'many'", "retain fit --help")

    def test_a_number_out_of_range(self, fit: Any, train: Any) -> None:
        fit("--samples", 0).refused("--samples", "'0'")
        train("--strength", -1).refused("strength", "-1.0")
        train("--strength", "inf").refused("strength", "inf")
        train("--strength", 1e300).refused("strength", "1e+300")
        train("--data", "word-problems:none").refused("'none'", "word-problems:100")

    def test_values_that_the_library_checks(self, fit: Any, train: Any) -> None:
        fit("--alpha", -1).refused("alpha", "-1.0")
        train("--seed", -1).refused("training.seed", "-1")
        train("--set", "training.report_to=nowhere").refused("'nowhere'", "none")
        train("--resume", "--overwrite").refused("do not go together")

    def test_a_missing_argument(self, retain: Any) -> None:
        outcome = retain("fit")
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert "retain fit [OPTIONS] MODEL [SOURCE]" in outcome.err

    def test_missing_settings(self, retain: Any, tmp_path: Path) -> None:
        retain("train", "--out", tmp_path / "out").refused("data is missing", "--data")
        retain("train", "--data", "word-problems").refused("out is missing", "--out")
        retain("eval", "--model", "m").refused("no --adapter", "--adapter runs/held/adapter")

    def test_no_configuration_file(self, train: Any, tmp_path: Path) -> None:
        train("--config", tmp_path / "none.yaml").refused("none.yaml", "a YAML file")


class TestModels:
    def test_unknown_model(self, retain: Any, tmp_path: Path) -> None:
        out = tmp_path / "c.safetensors"
        retain("fit", "smollm2-134m", "-o", out, "-q").refused(
            "'smollm2-134m'", "the hub is switched off", "did you mean 'smollm2-135m'?"
        )
        assert not out.exists()

    def test_unknown_model_to_train(self, train: Any) -> None:
        train("--model", "nobody/nothing", "-q").refused("'nobody/nothing'")

    def test_truncated_weights(self, retain: Any, model: Path, tmp_path: Path) -> None:
        broken = Path(shutil.copytree(model, tmp_path / "broken"))
        os.truncate(broken / "model.safetensors", 5000)
        retain("fit", broken, "-o", tmp_path / "c.safetensors", "-q").refused(
            "broken", "not fully covered"
        )

    def test_a_folder_without_a_model(self, retain: Any, tmp_path: Path) -> None:
        retain("fit", tmp_path, "-q").refused("config.json")


class TestSources:
    def test_empty(self, fit: Any, train: Any, tmp_path: Path) -> None:
        empty = tmp_path / "empty.jsonl"
        empty.touch()
        fit(what=empty).refused("the source is empty", "0 rows")
        train("--data", empty).refused("the source is empty", "0 rows")

    def test_missing(self, fit: Any, train: Any, tmp_path: Path) -> None:
        fit(what=tmp_path / "none.txt").refused("no such source", "none.txt", ".parquet")
        train("--data", tmp_path / "none.jsonl").refused("no such source", "none.jsonl")

    def test_shorter_than_a_batch(self, fit: Any, train: Any) -> None:
        fit("--batch-size", 64, "-q").refused("smaller than one batch", "16 sequences")
        train("--batch-size", 100, "-q").refused("smaller than one batch", "24 examples")

    def test_damaged(self, fit: Any, tmp_path: Path) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text('{"text": "so"}\n{"text": \n')
        fit(what=path).refused("cannot be read", "bad.jsonl")

    @pytest.mark.parametrize(
        ("row", "why"),
        [
            ({"prompt": 3, "completion": "x"}, "prompt is no string"),
            ({"input_ids": "abc"}, "input_ids is no list of whole numbers"),
            ({"messages": [{"role": "user", "content": "hello"}]}, "a chat needs a chat template"),
        ],
    )
    def test_a_row_of_another_kind(self, fit: Any, tmp_path: Path, row: Any, why: str) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"text": "sound"}) + "\n" + json.dumps(row))
        fit("-q", what=path).refused("(line 2 of rows.jsonl)", why)

    def test_other_columns(self, train: Any, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"body": "text"}\n')
        train("--data", path, "-q").refused("columns are not known", "got: body")


class TestResults:
    def test_no_result(self, retain: Any, tmp_path: Path) -> None:
        retain("report", tmp_path / "none.json").refused("none.json")
        assert not (tmp_path / "report.html").exists()

    def test_another_file(self, retain: Any, model: Path) -> None:
        retain("report", model / "config.json").refused("retain.result/1")


def test_a_bug_keeps_its_traceback(retain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("retain.cli.report.check_file", broken)
    with pytest.raises(ZeroDivisionError):
        retain("report", "result.json")


def test_full_memory(retain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("retain.cli.report.check_file", full)
    retain("report", "result.json").refused("the memory is full", "--batch-size")


def test_a_full_disk_under_stdout(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from retain.cli import main

    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        assert main(["--version"]) == 2
    assert "No space left" in capsys.readouterr().err


def test_defaults_in_the_help_of_train_are_the_real_ones() -> None:
    from typing import get_type_hints

    from retain.cli.train import train
    from retain.config import RunConfig

    real = RunConfig(data="rows", out="run").model_dump()
    flat = real | real["adapter"] | real["training"]
    said = {}
    for name, hint in get_type_hints(train, include_extras=True).items():
        text = getattr((*getattr(hint, "__metadata__", ()), None)[0], "help", "") or ""
        found = re.search(r"\(([\w.-]+)\)\.$", text)
        if found and name in flat:
            said[name] = found[1]
    assert {"strength", "learning_rate", "rank"} <= set(said)
    assert said == {name: f"{flat[name]:g}" if isinstance(flat[name], float) else str(flat[name])
                    for name in said}  # fmt: skip


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ("limit=true", "limit is not accepted; got: True; allowed: a number;"),
            ("training.seed=true", "training.seed is not accepted; got: True; allowed: a number;"),
            ("adapter.rank=true", "adapter.rank is not accepted; got: True; allowed: a number;"),
            ("num_labels=true", "num_labels is not accepted; got: True; allowed: a number;"),
            ("num_labels=two", "num_labels is not accepted; got: 'two'; allowed: a whole number"),
            ("adapter.targets=3", "adapter.targets is not accepted; got: 3; allowed: text or a"),
            ("training=3", "training is not accepted; got: 3; allowed: keys with values;"),
            ("training.warmup=soon", "training.warmup is not accepted; got: 'soon'; allowed:"),
            ("out=' '", "out is not accepted; got: ' '; allowed: text that is not empty;"),
            ('out="a\\0b"', "out is not accepted; got: 'a\\x00b'; allowed: text"),
            ("training.lr=1", "did you mean 'learning_rate'?"),
        ],
        ids=lambda value: value if isinstance(value, str) and "=" in value else "",
    )  # fmt: skip
    def test_a_value_of_another_kind(self, train: Any, setting: str, said: str) -> None:
        train("--set", setting).refused(said)

    @pytest.mark.parametrize("option", ["--out", "--model", "--data", "--curvature", "--source"])
    def test_an_unset_variable_of_the_shell(self, train: Any, option: str) -> None:
        train(option, "").refused(f"the value of {option[2:]} is not accepted; got: ''")

    def test_initials(self, train: Any) -> None:
        train("--lr", "1").refused("did you mean '--learning-rate'?")

    def test_a_heading_with_nothing_below_it(
        self, retain: Any, model: Path, data: Path, short: Any, tmp_path: Path
    ) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("training:\nadapter:\nmethod: none\n", encoding="utf-8")
        done = retain(
            "train", "-c", file, "--model", model, "--data", data, "--out", tmp_path / "out", *short
        )
        assert done.code == 0, done.err


class TestPlaces:
    def test_an_output_that_is_a_link_to_nowhere(self, train: Any, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        train("--out", tmp_path / "link").refused("a link to a place that is not there")

    @pytest.mark.parametrize("name", ["/no/such/folder", "./gone", "~/gone", "a/b/c"])
    def test_a_path_is_no_hub_id(self, retain: Any, train: Any, name: str) -> None:
        train("--model", name).refused(f"{name!r}: no such folder")
        retain("plan", name).refused(f"{name!r}: no such folder")

    @pytest.mark.parametrize("command", ["eval", "soften"])
    def test_the_base_of_an_adapter_has_moved(
        self, retain: Any, trained: Path, curvature: Path, tmp_path: Path, command: str
    ) -> None:
        shutil.copytree(trained / "adapter", tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        named = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
        file.write_text(json.dumps(named))
        argv: dict[str, list[object]] = {
            "eval": ["--adapter", tmp_path / "adapter"],
            "soften": [tmp_path / "adapter", "--curvature", curvature, "--budget", 0.1,
                       "--out", tmp_path / "soft"],
        }  # fmt: skip
        retain(command, *argv[command]).refused(
            "the base model of the adapter cannot be loaded", "say with --model where it lies now"
        )

    def test_the_folder_around_an_adapter(self, retain: Any, trained: Path) -> None:
        retain("eval", "--adapter", trained).refused(f"did you mean {trained / 'adapter'}?")

    def test_two_pages_in_one_folder(
        self, retain: Any, trained: Path, source: Path, tmp_path: Path
    ) -> None:
        result = tmp_path / "result.json"
        done = retain(
            "eval", "--adapter", trained / "adapter", "--source", source, "--rows", 4, "-o", result
        )
        assert done.code == 0, done.err
        for page in ("a.html", "b.html"):
            assert retain("report", result, "--out", tmp_path / page).code == 0
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "tradeoff.png").write_bytes(b"mine")
        retain("report", result, "--out", tmp_path / "other" / "a.html").refused("tradeoff.png")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method", "none", "--budget", "0.1"], "not used: curvature, budget"),
        (["--method", "none"], "not used: curvature"),
        (["--budget", "0.1"], "strength 10 is not used"),
    ],
)
def test_what_is_not_used_is_said(
    retain: Any, model: Path, data: Path, curvature: Path, short: Any, tmp_path: Path,
    argv: list[str], said: str,
) -> None:  # fmt: skip
    short = ["12" if value == "10" else value for value in short]
    done = retain(
        "train", "--model", model, "--data", data, "--curvature", curvature, "--out",
        tmp_path / "out", "--max-steps", 1, *short, *argv,
    )  # fmt: skip
    said = said.replace("10", "12")
    assert done.code == 0, done.err
    assert said in done.out
    notes = json.loads((tmp_path / "out" / "train.json").read_text())["notes"]
    assert any(said in note for note in notes)
