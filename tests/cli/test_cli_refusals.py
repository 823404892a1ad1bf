"""Mistakes on the command line: one line that says what to do, exit code 2, nothing written."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from cli_parts import SHORT, Run, told, write_lines

from retain.cli import main
from retain.cli.train import train as train_command
from retain.config import RunConfig
from retain.errors import unknown

FIT: dict[str, tuple[list[Any], list[str]]] = {
    "structure": (["--structure", "kafc"],
                  ["'kafc'", "did you mean 'kfac'?", "activation, diagonal, ekfac"]),
    "space": (["--space", "wieght"], ["'wieght'", "did you mean 'weight'?"]),
    "fisher": (["--fisher", "exakt"], ["'exakt'", "did you mean 'exact'?"]),
    "dtype": (["--dtype", "bfloat"], ["'bfloat'", "did you mean 'bfloat16'?"]),
    "a short dtype": (["--dtype", "bf16"], ["'bf16'", "did you mean 'bfloat16'?"]),
    "a dtype that is none": (["--dtype", "fp16"], ["'fp16'", "use one of the allowed dtype names"]),
    "option": (["--structur", "x"], ["'--structur'", "did you mean '--structure'?"]),
    "target": (["--targets", "k_proj,q_prj"], ["q_prj", "q_proj"]),
    "no number": (["--rows", "many"], ["--rows", "'many'", "retain fit --help"]),
    "below its range": (["--samples", 0], ["--samples", "'0'"]),
    "the library's range": (["--alpha", -1], ["alpha", "-1.0"]),
}  # fmt: skip

TRAIN: dict[str, tuple[list[Any], list[str]]] = {
    "method": (["--method", "laplase"], ["'laplase'", "did you mean 'laplace'?", "none"]),
    "initials": (["--lr", "1"], ["did you mean '--learning-rate'?"]),
    "a key of set": (["--set", "training.warmupp=3"], ["'warmupp'", "did you mean 'warmup'?"]),
    "a deeper key": (["--set", "model.size=3"], ["model", "{'size': 3}"]),
    "no value": (["--set", "warmup"], ["'warmup'", "key=value"]),
    "below 0": (["--strength", -1], ["strength", "-1.0", "leave strength out, for 10"]),
    "not finite": (["--strength", "inf"], ["strength", "inf"]),
    "too large": (["--strength", 1e300], ["strength", "1e+300"]),
    "no steps": (["--max-steps", 0], ["max_steps is not accepted", "1 or more", "leave max_steps"]),
    "a comma": (["--learning-rate", "0,02"], ["fix: --learning-rate 0.02"]),
    "problems": (["--data", "word-problems:none"], ["'none'", "word-problems:100"]),
    "a comma for a point": (["--budget", "0,02"], ["got: 0,02;", "fix: --budget 0.02"]),
    "a budget in per cent": (["--budget", "5%"], ["got: 5%;", "nats", "fix: --budget 0.05"]),
    "a budget without its part": (["--budget", 0.05, "--parts", "rows,filter", "-q"],
                                  ["nothing would keep the budget", "parts rows, filter"]),
    "seed": (["--seed", -1], ["training.seed", "-1"]),
    "tracker": (["--set", "training.report_to=nowhere"], ["'nowhere'", "none"]),
    "both": (["--resume", "--overwrite"], ["do not go together"]),
    "file": (["--config", "none.yaml"], ["none.yaml", "a YAML file"]),
    "model": (["--model", "nobody/nothing", "-q"], ["'nobody/nothing'"]),
    "a batch": (["--batch-size", 100, "-q"], ["smaller than one batch", "24 examples"]),
    **{f"set {setting}": (["--set", setting], [said]) for setting, said in {
        "limit=true": "limit is not accepted; got: True; allowed: a number;",
        "training.seed=true": "training.seed is not accepted; got: True; allowed: a number;",
        "adapter.rank=true": "adapter.rank is not accepted; got: True; allowed: a number;",
        "num_labels=true": "num_labels is not accepted; got: True; allowed: a number;",
        "num_labels=two": "num_labels is not accepted; got: 'two'; allowed: a whole number",
        "adapter.targets=3": "adapter.targets is not accepted; got: 3; allowed: text or a",
        "training=3": "training is not accepted; got: 3; allowed: keys with values;",
        "training.warmup=soon": "training.warmup is not accepted; got: 'soon'; allowed:",
        "out=' '": "out is not accepted; got: ' '; allowed: text that is not empty;",
        'out="a\\0b"': "out is not accepted; got: 'a\\x00b'; allowed: text",
        "training.lr=1": "did you mean 'learning_rate'?",
    }.items()},
    **{f"an unset variable of the shell for {name}": (
        [f"--{name}", ""], [f"the value of {name} is not accepted; got: ''"]
    ) for name in ("out", "model", "data", "curvature", "source")},
    **{f"{name} is no hub id": (["--model", name], [f"{name!r}: no such folder"])
       for name in ("/no/such/folder", "./gone", "~/gone", "a/b/c")},
}  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("name", FIT)
def test_fit(name: str, retain: Run, model: Path, source: Path, out: Path) -> None:
    retain("fit", model, source, "-o", out / "c", *FIT[name][0]).refused(*FIT[name][1])
    assert not out.exists()


@pytest.mark.parametrize("name", TRAIN)
def test_train(name: str, train: Run, out: Path) -> None:
    train(out, *TRAIN[name][0]).refused(*TRAIN[name][1])
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: laplase\n", ["did you mean 'laplace'?"]),
        ("training:\n  learning_rat: 0.1\n", ["'learning_rat'", "did you mean 'learning_rate'?"]),
    ],
)
def test_a_file_of_settings(
    text: str, said: list[str], train: Run, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    train(out, "--config", tmp_path / "run.yaml").refused(*said)
    assert not out.exists()


def test_a_heading_with_nothing_below_it(train: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training:\nadapter:\nmethod: none\n", encoding="utf-8")
    train(tmp_path / "out", "-c", tmp_path / "run.yaml").done()


class TestNames:
    def test_of_commands_and_tasks(self, retain: Run, trained: Path) -> None:
        every = (
            "certify, compact, demo, eval, explain, fit, plan, report, soften, study, tasks, train"
        )
        retain("trian").refused("'trian'", "did you mean 'train'?", every)
        many = unknown("task", "arc_esay", ["arc_easy", *(f"a{i}" for i in range(9999))])
        assert many.allowed.startswith("10000 names, such as arc_easy") and len(str(many)) < 200
        argv = ("eval", "--adapter", trained / "adapter", "--task", "word-problem")
        retain(*argv).refused("did you mean 'word-problems'?")

    def test_what_is_missing(self, retain: Run, out: Path) -> None:
        outcome = retain("fit")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "retain fit [OPTIONS] MODEL [SOURCE]" in outcome.err.replace("{MODEL}", "MODEL")
        retain("train", "--out", out).refused("data is missing", "--data")
        retain("train", "--data", "word-problems").refused("out is missing", "--out")
        retain("eval", "--model", "m").refused("no --adapter", "--adapter runs/held/adapter")

    def test_of_models(self, retain: Run, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "c.safetensors"
        retain("fit", "smollm2-134m", "-o", out, "-q").refused(
            "'smollm2-134m'", "the hub is switched off", "did you mean 'smollm2-135m'?"
        )
        retain("plan", "./gone").refused("'./gone': no such folder")
        retain("fit", tmp_path, "-q").refused("config.json")
        broken = Path(shutil.copytree(model, tmp_path / "broken"))
        os.truncate(broken / "model.safetensors", 5000)
        retain("fit", broken, "-o", out, "-q").refused("broken", "not fully covered")
        assert not out.exists()


class TestSources:
    def test_files(self, retain: Run, train: Run, model: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").touch()
        (tmp_path / "bad.jsonl").write_text('{"text": "so"}\n{"text": \n')
        out = tmp_path / "out"
        for name, said in {
            "empty.jsonl": ("the source is empty", "0 rows"),
            "none.txt": ("no such source", "none.txt", ".parquet"),
            "bad.jsonl": ("cannot be read", "bad.jsonl"),
        }.items():
            retain("fit", model, tmp_path / name, "-o", out / "c").refused(*said)
            train(out, "--data", tmp_path / name).refused(*said)
        several = ",".join([str(tmp_path / "empty.jsonl")] * 2)
        train(out, "--data", several, "-q").refused("give one folder or a pattern")
        other = write_lines(tmp_path / "rows.jsonl", [{"body": "text"}])
        train(out, "--data", other, "-q").refused("columns are not known", "got: body")
        assert not out.exists()

    @pytest.mark.usefixtures("unloaded")
    def test_of_what_is_held(
        self, retain: Run, train: Run, model: Path, data: Path, out: Path, tmp_path: Path
    ) -> None:
        source = ("--source", tmp_path / "none.jsonl")
        own = ("train", "--model", model, "--data", data, "--out", out, *source)
        for given in ((), ("--budget", 0.05), ("--kl", 1)):
            retain(*own, *given).refused("no such source", "none.jsonl")
        for given in (("--budget", 0.05), ("--kl", 1)):
            train(out, *source, *given).refused("no such source", "none.jsonl")

    def test_that_is_not_needed(
        self, train: Run, retain: Run, model: Path, data: Path, source: Path, out: Path,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        gone = tmp_path / "gone.jsonl"
        for given in ((), ("--method", "none")):
            train(out, "--source", gone, *given, "--max-steps", 1).done()
        shutil.copy(source, gone)
        own = ("train", "--model", model, "--data", data, "--source", gone, "--out", out, *SHORT)
        retain(*own, "--max-steps", 2, "--save-steps", 1, "-q").done()
        gone.unlink()
        (out / "train.json").unlink()
        shutil.rmtree(out / "checkpoints" / "checkpoint-2")
        found = retain("train", "--resume", "--out", out, "--json").json  # its curvature is there
        assert found["resumed_from"] == "checkpoint-1"
        shutil.rmtree(out / "checkpoints")
        assert "has ended" in retain("train", "--resume", "--out", out).done().out

    @pytest.mark.parametrize(
        ("row", "why"),
        [
            ({"prompt": 3, "completion": "x"}, "prompt is no string"),
            ({"input_ids": "abc"}, "input_ids is no list of whole numbers"),
            ({"messages": [{"role": "user", "content": "hello"}]}, "a chat needs a chat template"),
        ],
    )
    def test_a_row_of_another_kind(
        self, row: Any, why: str, retain: Run, model: Path, tmp_path: Path
    ) -> None:
        path = write_lines(tmp_path / "rows.jsonl", [{"text": "sound"}, row])
        argv = ("fit", model, path, "-o", tmp_path / "c", "-q")
        retain(*argv).refused("(line 2 of rows.jsonl)", why)


class TestPlaces:
    def test_an_output_that_is_a_link_to_nowhere(self, train: Run, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        train(tmp_path / "link").refused("a link to a place that is not there")

    @pytest.mark.parametrize("command", ["eval", "soften", "compact"])
    def test_the_base_of_an_adapter_has_moved(
        self, command: str, retain: Run, trained: Path, curvature: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(trained / "adapter", tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        write_lines(file, [told(file) | {"base_model_name_or_path": str(tmp_path / "gone")}])
        argv: list[Any] = ["--adapter", tmp_path / "adapter"]
        if command == "soften":
            argv = [argv[1], "--curvature", curvature, "--budget", 0.1, "-o", tmp_path / "soft"]
        if command == "compact":
            argv = [argv[1], "--measure", "-o", tmp_path / "cut"]
        retain(command, *argv).refused(
            "the base model of the adapter cannot be loaded", "say with --model where it lies now"
        )

    def test_the_folder_around_an_adapter(self, retain: Run, trained: Path) -> None:
        retain("eval", "--adapter", trained).refused(f"did you mean {trained / 'adapter'}?")

    def test_the_adapter_of_a_run_in_place_of_the_run(
        self, retain: Run, train: Run, trained: Path, out: Path
    ) -> None:
        inside, said = trained / "adapter", f"did you mean {trained}?"
        retain("explain", inside).refused(f"{inside} without train.json", said)
        argv = ("--data", "word-problems", "--out", out)
        retain("train", "--continue-from", inside, *argv).refused(said)
        train(out, "--model", inside).refused("it holds an adapter: give its base model")


class TestResults:
    def test_that_are_none(self, retain: Run, model: Path, tmp_path: Path) -> None:
        retain("report", tmp_path / "none.json").refused("none.json")
        retain("report", model / "config.json").refused("retain.result/1")
        assert not (tmp_path / "report.html").exists()

    def test_two_pages_in_one_folder(
        self, retain: Run, trained: Path, source: Path, tmp_path: Path
    ) -> None:
        result = tmp_path / "result.json"
        argv = ("eval", "--adapter", trained / "adapter", "--source", source, "--rows", 4)
        retain(*argv, "-o", result).done()
        for page in ("a.html", "b.html"):
            retain("report", result, "--out", tmp_path / page).done()


class TestErrors:
    """What becomes of errors from below."""

    @pytest.fixture
    def fails(self, retain: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
        def failing(error: BaseException) -> Any:
            def fail(*_: object) -> None:
                raise error

            monkeypatch.setattr("retain.cli.report.check_file", fail)
            return retain("report", "result.json")

        return failing

    def test_a_bug_keeps_its_traceback(self, fails: Any) -> None:
        with pytest.raises(ZeroDivisionError):
            fails(ZeroDivisionError("a bug"))

    def test_of_the_machine(self, fails: Any) -> None:
        fails(MemoryError()).refused("the memory is full", "--batch-size")
        fails(EOFError("Ran out of input")).refused("ends too early", "Ran out of input")
        denied = PermissionError(13, "Permission denied", "result.json")
        fails(denied).refused("result.json: Permission denied")
        closed = fails(BrokenPipeError())
        assert (closed.code, closed.err) == (1, "")

    def test_a_full_disk_under_stdout(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full")
        with monkeypatch.context() as patch, open("/dev/full", "w") as full:
            patch.setattr(sys, "stdout", full)
            assert main(["--version"]) == 2
        assert "No space left" in capsys.readouterr().err


def test_defaults_in_the_help_of_train_are_the_real_ones() -> None:
    real = RunConfig(data="rows", out="run").model_dump()
    flat = real | real["adapter"] | real["training"]
    said = {}
    for name, hint in get_type_hints(train_command, include_extras=True).items():
        text = getattr((*getattr(hint, "__metadata__", ()), None)[0], "help", "") or ""
        found = re.search(r"\(([\w.-]+)\)\.$", text)
        if found and name in flat:
            said[name] = found[1]
    assert {"strength", "learning_rate", "rank"} <= set(said)
    assert said == {name: f"{flat[name]:g}" if isinstance(flat[name], float) else str(flat[name])
                    for name in said}  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method", "none", "--budget", "0.1"], "not used: curvature, budget"),
        (["--method", "none"], "not used: curvature"),
        (["--budget", "0.1"], "strength 12 is not used"),
        (["--strength", "0"], "strength 0 holds nothing: this is plain training"),
        (["--source", "self"], "a curvature is given: source self is not used"),
        (["--factor-rank", "3"], "factor_rank 3 is not used"),
    ],
)
def test_what_is_not_used_is_said(argv: list[str], said: str, train: Run, out: Path) -> None:
    short = ["12" if value == "10" else value for value in SHORT]
    done = train(out, "--max-steps", 1, *short, *argv).done()
    assert said in done.out
    assert any(said in note for note in told(out / "train.json")["notes"])


def test_a_model_without_a_tokenizer(
    retain: Run, model: Path, source: Path, tmp_path: Path
) -> None:
    bare, out = tmp_path / "bare", tmp_path / "c.safetensors"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("token*"))
    said = ("has no tokenizer", f"got: '{bare}'", "tokenizer.json", "save_pretrained")
    retain("fit", bare, source, "-o", out).refused(*said)
