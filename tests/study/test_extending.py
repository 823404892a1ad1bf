"""The pages on extending and on studies: their examples run, and their tables are complete."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.main import get_command

from retain.cli.study import app
from retain.config import TrainConfig
from retain.evaluation.continual import METRICS
from retain.models.adapters.registry import ADAPTERS
from retain.retention.registry import METHODS
from retain.study.grid import expand
from retain.study.spec import RUNNERS_OWN, StudySpec, parse_study

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?:`([\w./-]+)`[^`\n]*:\n\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(file, language, text) of each block of a page; the file is named in the line above it."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert len(found) == text.count("\n```") / 2
    return found


def apply_diff(path: Path, diff: str) -> None:
    """Puts each added line before the context line that follows it, which must be there once."""
    text, added = path.read_text(encoding="utf-8"), ""
    for line in diff.splitlines(keepends=True):
        if line.startswith("+"):
            added += line[1:]
        elif added:
            assert text.count(f"\n{line[1:]}") == 1, line
            text = text.replace(f"\n{line[1:]}", f"\n{added}{line[1:]}")
            added = ""
        else:
            assert f"\n{line[1:]}" in text, line
    assert not added
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def walk(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which every file and line of the page has been written, as the page has them."""
    root = tmp_path_factory.mktemp("clone")
    skip = shutil.ignore_patterns("__pycache__")
    for folder in ("src/retain", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", root)
    diffs = iter(
        [
            "src/retain/retention/registry.py",
            "tests/retention/sequences.py",
            "src/retain/curvature/blocks/registry.py",
        ]
    )
    for name, language, text in blocks("extending.md"):
        if language == "diff":
            apply_diff(root / next(diffs), text)
        elif name:
            path = root / name
            assert not path.exists(), name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("smollm2-135m", str(tiny_folder)), encoding="utf-8")
        else:
            assert language == "bash", text
    assert next(diffs, None) is None
    return root


def commands() -> list[list[str]]:
    """The commands of the page, in its order."""
    lines = "".join(text for _, language, text in blocks("extending.md") if language == "bash")
    return [shlex.split(line) for line in lines.splitlines()]


DRIVER = """
import contextlib, io, json, sys
import pytest
from retain.cli import main
told = []
for program, *argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = int({"pytest": pytest.main, "retain": main}[program](argv))
    told.append((code, out.getvalue()))
json.dump(told, sys.stdout)
"""


@pytest.fixture(scope="module")
def told(walk: Path) -> list[str]:
    """What the page's commands print in the clone, all but the last, which needs no change there.

    One process runs them: most of a command's time is the loading of torch.
    """
    environment = os.environ | {"PYTHONPATH": str(walk / "src"), "OMP_NUM_THREADS": "1"}
    shutil.copy(walk / "tickets.yaml", walk / "src/retain/tasks")
    asked = [[*c, "-p", "no:cacheprovider"] if c[0] == "pytest" else c for c in commands()[:-1]]
    asked.append(["retain", "tasks", "--json"])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(asked)],
        cwd=walk, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    for command, (code, out) in zip(asked, found, strict=True):
        assert code == 0, f"{command}: {out}{done.stderr}"
    return [out for _, out in found]


def test_every_command_of_the_page_is_run() -> None:
    assert [c[0] for c in commands()] == ["retain"] * 2 + ["pytest"] + ["retain"] * 2 + ["python"]


def test_the_prompts_of_the_tasks(told: list[str]) -> None:
    assert told[0].count("  | Question: Who answers this: billing, technical or sales?") == 2
    assert told[0].count("  >  ") == 2
    assert "urgency, version 1" in told[1] and "accuracy, f1_macro" in told[1]
    assert re.findall(r"  >  (\w+)", told[1]) == ["no", "yes", "no"]
    assert "tickets" in [task["name"] for task in json.loads(told[-1])["tasks"]]


def test_the_conformance_suite_takes_the_method(told: list[str]) -> None:
    found = re.search(r"(\d+) passed", told[2])
    assert found and int(found[1]) >= 25
    assert "skipped" not in told[2].splitlines()[-1]


def test_both_in_a_study(told: list[str], walk: Path) -> None:
    study = json.loads((walk / "runs/tickets/study.json").read_text(encoding="utf-8"))
    found = {cell["method"]: cell for cell in study["tables"]["cells"]}
    assert list(found) == ["none", "decay 20", "decay 200"]
    for cell in found.values():
        assert (cell["n"], cell["failed"]) == (2, 0)
        assert {"score:tickets", "score:urgency"} <= set(cell["metrics"])
    forgotten = [cell["metrics"]["kl"]["mean"] for cell in found.values()]
    assert forgotten[0] > forgotten[1] > forgotten[2] > 0  # it holds, and the more the stronger
    for name in ("tickets.html", "tickets.md"):
        assert "decay 200" in (walk / name).read_text(encoding="utf-8")


@pytest.fixture
def script(walk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files beside each other and the package as it is."""
    for name in ("tickets.yaml", "urgency.yaml", "tickets-study.yaml", "my_retain.py"):
        shutil.copy(walk / name, tmp_path)
    shutil.copy(walk / "src/retain/retention/methods/decay.py", tmp_path)
    shutil.copytree(walk / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHODS, "decay", METHODS["none"])  # so that it is taken out again
    del METHODS["decay"]
    return tmp_path


def run_script(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(argv[0], run_name="__main__")
    sys.modules.pop("decay", None)
    assert end.value.code == 0


def test_the_method_without_touching_the_package(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *argv = commands()[-1]
    assert program == "python"
    study = yaml.safe_load(Path("tickets-study.yaml").read_text(encoding="utf-8"))
    study |= {"methods": {"none": {}, "decay": {"strength": [0, 1e9]}}, "seeds": [0]}
    Path("tickets-study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    run_script(monkeypatch, argv)
    found = json.loads((script / "runs/again/study.json").read_text(encoding="utf-8"))
    plain, off, held = found["runs"]
    for key in ("matrix", "losses", "retention"):
        assert off[key] == plain[key]  # strength 0 is plain training
    assert plain["retention"][-1]["kl"] > 1e-5
    assert held["matrix"] == [held["before"]] * 2  # pulled back all the way after each step
    assert [row["kl"] for row in held["retention"]] == [0.0, 0.0]
    assert "decay" in METHODS


def keys(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """The keys of a study, with dots, and their defaults."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kinds = [*get_args(field.annotation), field.annotation]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        several = get_origin(field.annotation) in (dict, list)
        if several or not inner:
            found[prefix + name] = field.get_default(call_default_factory=True)
        for part in inner:
            star = ".*" if get_origin(field.annotation) is dict else ""
            found |= keys(part, f"{prefix}{name}{star}.")
    return found


def studies_page() -> str:
    return (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")


def test_the_keys_of_a_study_are_all_on_its_page_with_their_defaults() -> None:
    section = studies_page().split("\n## ")[1]
    assert section.startswith("Every key\n")
    rows = re.findall(r"^\| (`[\w.*`, ]+`) \| ([^|]*) \|", section, re.MULTILINE)
    told: dict[str, str] = {}
    for names, defaults in rows:
        one = [d for d in defaults.split(", ") if d]
        for place, name in enumerate(names.split(", ")):
            told[name.strip("`")] = one[place] if len(one) > 1 else defaults
    want = keys(StudySpec)
    assert set(want) == set(told)
    for name, default in want.items():
        if told[name] == "required":
            assert default is PydanticUndefined, name
        elif told[name].startswith("`"):
            assert yaml.safe_load(told[name].strip("`")) == default, name
        else:
            assert default in (None, "") or name == "runs", name


def test_names_options_and_metrics_are_all_on_the_page() -> None:
    page = studies_page()
    training = set(TrainConfig.model_fields) - {*RUNNERS_OWN}
    options = {name for kind in ADAPTERS.values() for name in kind.schema.model_fields}
    for name in (*METHODS, *ADAPTERS, *METRICS, *training, *options):
        assert f"`{name}`" in page, name
    command: Any = get_command(app)
    every = [o for part in command.commands.values() for p in part.params for o in p.opts]
    for option in every:
        if option.startswith("--") and option not in ("--json", "--quiet", "--help"):
            assert option in page, option


def test_the_example_of_the_page_is_a_study() -> None:
    (text,) = [text for _, language, text in blocks("studies.md") if language == "yaml"]
    found = expand(parse_study(yaml.safe_load(text)), ROOT)
    titles = [run.title.removeprefix("smollm2-135m ") for run in found.runs]
    assert len(titles) == 3 * (4 + 2 * 2 + 4)
    assert titles[:4] == [
        f"lora {m} four seed 0" for m in ("none", "kfac 1", "kfac 10", "replay")
    ]  # fmt: skip
    assert "lora none cl15/sst2 seed 2" in titles


def test_the_files_are_described(told: list[str], walk: Path) -> None:
    page = studies_page()
    study = json.loads((walk / "runs/tickets/study.json").read_text(encoding="utf-8"))
    record = study["runs"][0]
    for name in (*study, *record, *record["retention"][0]):
        assert f"`{name}`" in page, name
