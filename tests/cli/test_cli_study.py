"""``retain study``: its three shapes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from retain.documents import read_json
from study_parts import SETTINGS, setting_run, tiny_study

SMALL: dict[str, Any] = {
    "methods": {"none": {}}, "source": {"kind": "none"}, "seeds": [0],
    "orders": {"two": ["tasks/one.yaml", "tasks/two.yaml"]},
    "adapters": {"lora": {"rank": 2}, "prefix": {"num_virtual_tokens": 2}},
}  # fmt: skip


def test_run_status_and_run_again(retain: Any, model: Path, tmp_path: Path) -> None:
    methods = {"none": {}, "l2": {"strength": 1.0}}
    path = tiny_study(tmp_path / "s", model, **(SMALL | {"methods": methods}))
    out = tmp_path / "out"
    where = [path, "--out", out]
    data = ["--data-dir", path.parent / "data"]
    found = retain("study", "status", *where, "--json").json
    assert (found["total"], found["done"], len(found["left"])) == (3, 0, 3)
    assert found["skipped"][0]["adapter"] == "prefix"
    done = retain("study", *where, *data, "--only", "lora none")
    assert done.code == 0, done.err
    assert "done: " in done.out and "skipped: prefix with l2" in done.out
    found = retain("study", "run", *where, *data, "--limit", 6, "--json").json
    assert (found["done"], found["before"]) == (3, 0)  # other sizes are other runs
    found = retain("study", "run", *where, *data, "--json").json
    assert (found["done"], found["failed"], found["before"]) == (3, 0, 1)
    assert Path(found["results"]) == out / "study.json"
    study = json.loads((out / "study.json").read_text())
    assert [c["adapter"] for c in study["tables"]["cells"]] == ["lora", "lora", "prefix"]
    told = retain("study", "status", *where)
    assert "3 of 3" in told.out
    asked = ["study", "compare", out, "--method", "l2", "--draws", 100]
    retain(*asked, "--reference", "none").refused("several cells of the study have this name")
    file = out / "study.json"
    file.write_text(file.read_text().replace('"accuracy"', '"matthews"'))
    told = retain(*asked, "--reference", "lora none").out
    assert "shares of right rows; means and the study's tables have matthews of one" in told
    made = retain(*asked, "--reference", "lora none", "--json").json
    assert made["other_metrics"] == {"one": "matthews", "two": "matthews"}
    assert [c["rows"] for c in made["methods"]["l2"]["comparisons"]] == [16] * 3
    assert json.loads((out / "compare.json").read_text()) == made
    assert made["means"]["l2"]["seeds"] == [0] and made["means"]["l2"]["update_size"] < 0


def test_what_is_not_asked_for_stays_in_the_table(retain: Any, model: Path, tmp_path: Path) -> None:
    path = tiny_study(tmp_path / "s", model, **(SMALL | {"adapters": {"lora": {}}}))
    path.write_text(path.read_text().replace("seeds:\n- 0\n", "seeds: [0, 1]\n"))
    out = tmp_path / "out"
    argv = ("study", path, "--out", out, "--data-dir", path.parent / "data")
    retain(*argv).done()
    again = retain(*argv, "--seeds", "1,2")
    assert again.code == 0 and "leave study.json" not in again.out
    study = json.loads((out / "study.json").read_text())
    assert [run["seed"] for run in study["runs"]] == [1, 2, 0] and study["planned"] == 3
    assert study["tables"]["cells"][0]["seeds"] == [0, 1, 2]
    again = retain(*argv)
    assert "finished runs of other settings, which leave study.json: 1;" in again.out
    assert len(list((out / "runs").glob("*.json"))) == 3
    path.write_text(path.read_text().replace("name: tiny", "name: another"))
    before = (out / "study.json").read_bytes()
    retain(*argv).refused("that of another study than another; got: tiny in", "another --out")
    assert (out / "study.json").read_bytes() == before


def test_matched_readings_and_the_best_settings(
    retain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def write(runs: list[dict[str, Any]]) -> None:
        text = json.dumps({"schema": "retain.study/1", "name": "s", "runs": runs})
        (tmp_path / "study.json").write_text(text)

    write(SETTINGS)
    made = retain("study", "compare", tmp_path, "--matched", "--choose", "--json").json
    assert json.loads((tmp_path / "compare.json").read_text()) == made
    assert [c["setting"] for c in made["chosen"]] == ["lora-1e-3 none", "lora-1e-3 auto-100"]
    readings = made["matched"]["readings"]
    assert [r["method"] for r in readings] == ["lora auto"] * 3 + ["lora-1e-3 auto-100"] * 2
    assert readings[0]["difference"] == pytest.approx(-0.101)
    assert made["matched"]["settings"]["lora-3e-4 none"]["update_size"] == -2
    told = retain("study", "compare", tmp_path, "--matched", "--choose", "--method", "auto").out
    assert "-10.1" in told and "3 of 4" in told and "highest strength" in told
    assert " KL " in told  # a column without a value is left out
    unmeasured = retain("study", "compare", tmp_path, "--choose", "--method", "none").out
    assert "55.0" in unmeasured and " KL " not in unmeasured
    told = retain("study", "compare", tmp_path, "--matched", "--method", "auto-100").out
    said = "not comparable at the same size: -5.00 to -5.00 against -2.00 to -1.00 of lora none"
    assert said in told
    retain("study", "compare", tmp_path).refused("no method is named")
    before = (tmp_path / "compare.json").read_bytes()
    write([*SETTINGS, setting_run("decay", "1e-3", 0, ".5 .6 .1 -2", split="test")])
    retain("study", "compare", tmp_path, "--choose").refused("validation rows alone")
    write([setting_run("none", "1e-3", 0, ".5 .6 .1 -2") | {"status": "failed"}])
    retain("study", "compare", tmp_path, "--choose").refused("there is nothing to choose from")
    assert (tmp_path / "compare.json").read_bytes() == before


def test_a_failure_is_told(retain: Any, model: Path, tmp_path: Path) -> None:
    path = tiny_study(tmp_path / "s", model, **SMALL)
    out = tmp_path / "out"
    done = retain("study", path, "--out", out, "--data-dir", tmp_path, "--only", "lora")
    assert (done.code, done.err) == (1, "")
    assert "the train rows of task one are not here" in done.out
    told = retain("study", "status", path, "--out", out)
    assert "failed: " in told.out and "are not here" in told.out
    again = ["study", path, "--out", out, "--data-dir", path.parent / "data", "--only", "lora"]
    found = retain(*again, "--json").json  # its data are there now: another run than the failed one
    assert (found["done"], found["failed"], found["before"]) == (1, 0, 0)


def one_label(folder: Path) -> None:
    path = folder / "data" / "one" / "train.jsonl"
    path.write_text(path.read_text().replace('"label": 0', '"label": 1', 1))


def another_order(folder: Path) -> None:
    path = folder / "data" / "two" / "validation.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def another_model(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    weights = load_file(path)
    save_file({n: w + 0.01 for n, w in weights.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("change", [one_label, another_order, another_model])
def test_a_record_of_other_data_is_not_used_again(
    change: Any, retain: Any, model: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "s", tmp_path / "out"
    small = SMALL | {"adapters": {"lora": {"rank": 2}}}
    path = tiny_study(folder, folder / "base", **small)
    shutil.copytree(model, folder / "base")
    argv = ("study", path, "--out", out, "--data-dir", folder / "data")
    assert retain(*argv, "--json").json["done"] == 1
    record = next((out / "runs").glob("*.json"))
    first = record.read_bytes()
    assert retain(*argv, "--json").json["before"] == 1
    change(folder)
    again = retain(*argv)
    assert again.code == 0 and "done again, since" in again.out
    assert again.out.count(" changed; the earlier record: ") == 1
    kept = out / "earlier" / f"{record.stem}-1.json"
    assert kept.read_bytes() == first and record.read_bytes() != first
    assert retain(*argv, "--json").json["before"] == 1
    study = json.loads((out / "study.json").read_text())
    assert study["runs"] == [read_json(record, sealed=True)]


def test_rows_of_a_general_task_are_missed_before_the_first_run(
    retain: Any, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    path = tiny_study(tmp_path / "s", model, **SMALL, general={"tasks": ["arc_easy"]})
    argv = ("study", path, "--out", tmp_path / "o", "--data-dir", path.parent / "data")
    retain(*argv).refused("the rows of arc_easy are not here", "arc_easy/test.jsonl.gz")
    assert not (tmp_path / "o" / "study.json").exists()


def test_refusals(
    retain: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_study(tmp_path / "s", model, **SMALL)
    retain("study", "statsu", path).refused("did you mean 'status'?")
    retain("study", tmp_path / "no.yaml").refused("the study cannot be read")
    retain("study", path, "--data-dir", tmp_path / "no").refused("no such data folder")
    retain("study", path, "--seeds", "0;1").refused("the seeds are not accepted")
    retain("study", path, "--engine", "rya", "--out", tmp_path / "o").refused("did you mean 'ray'")
    retain("study", path, "--only", "nothing").refused("no run matches")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    retain("study", path, "--engine", "ray").refused("Ray is not installed", "retain-lora[ray]")
    text = path.read_text()
    path.write_text(text.replace("rank: 2", "rnak: 2"))
    retain("study", path).refused("did you mean 'rank'?")
    path.write_text(text.replace("prefix:", "prefixx:"))
    retain("study", path).refused("unknown adapter kind", "did you mean 'prefix'?")
    path.write_text(text.replace("none: {}", "ewc: {}"))
    retain("study", path).refused("unknown method")
    path.write_text(text.replace("tasks/two.yaml", "glue/sst3"))
    retain("study", path).refused("did you mean 'glue/sst2'?")


def test_ctrl_c_says_how_to_go_on(
    retain: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_study(tmp_path / "s", model, **SMALL)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retain.study.sequence.train", stop)
    found = retain("study", path, "--out", tmp_path / "o", "--data-dir", path.parent / "data")
    assert found.code == 130
    assert "the same command goes on after the last finished task" in found.err
    assert found.err.count("\n") == 1


@pytest.mark.parametrize("argv", [["study"], ["study", "--help"], ["study", "run", "--help"]])
def test_help(retain: Any, argv: list[str]) -> None:
    found = retain(*argv)
    assert found.code == 0
    assert "STUDY" in found.out.upper()
    assert found.err == ""


def test_every_study_of_the_package_expands() -> None:
    from retain.study.grid import expand
    from retain.study.spec import read_study

    folder = Path(__file__).parents[2] / "benchmarks" / "studies"
    paths = sorted(folder.glob("*.yaml"))
    assert len(paths) >= 5
    for path in paths:
        spec = read_study(path)
        grid = expand(spec, folder)
        assert grid.runs, path
        assert spec.name == path.stem
        for label, method in spec.methods.items():  # another default would be another study
            assert method.kind != "auto" or method.strength is not None, (path, label)
