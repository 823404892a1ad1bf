"""Reading studies, records of runs and results, and refusing what is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import METHODS, TASKS, group_of, make_run, make_study

from retain.errors import RetainWarning, SourceError
from retain.records import Claim
from retain.report.cells import groups
from retain.report.names import names
from retain.report.read import read_studies
from retain.report.tables import score_table

Put = Callable[..., Path]


def test_folders_files_and_single_runs_agree(tmp_path: Path) -> None:
    data = make_study()
    (tmp_path / "a" / "runs").mkdir(parents=True)
    (tmp_path / "b" / "runs").mkdir(parents=True)
    (tmp_path / "a" / "study.json").write_text(json.dumps(data), encoding="utf-8")
    for where in "ab":
        for run in data["runs"]:
            path = tmp_path / where / "runs" / f"{run['key']}.json"
            path.write_text(json.dumps(run), encoding="utf-8")
    (tmp_path / "b" / "other.json").write_text("[1]", encoding="utf-8")
    whole = read_studies([tmp_path / "a"])
    assert [len(study.runs) for study in whole] == [28]
    alone = read_studies([tmp_path / "b"])
    assert [study.name for study in alone] == ["made-up"]
    assert {run.key for run in alone[0].runs} == {run.key for run in whole[0].runs}
    both = read_studies([tmp_path / "a" / "study.json", tmp_path / "b"])
    assert [len(study.runs) for study in both] == [28]
    assert both[0].skipped[0].method == "O-LoRA"


def test_scratch_of_killed_commands_is_not_read(tmp_path: Path) -> None:
    text = json.dumps(make_study())
    (tmp_path / "study.json").write_text(text, encoding="utf-8")
    for name, content in ((".study.json.retain-a_killed", text[:4096]), (".earlier", text)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.json").write_text(content, encoding="utf-8")
    assert [len(study.runs) for study in read_studies([tmp_path])] == [28]


def test_unlike_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    """A first try with few rows beside the whole study: both were one cell."""
    few, whole = (make_run(TASKS, METHODS[0], 0, study="s") for _ in range(2))
    few["key"] = "a-limit"
    for name, runs in (("try", [few]), ("whole", [whole]), ("copied", [whole])):
        data = {"schema": "retain.study/1", "name": "s", "runs": runs}
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SourceError, match="two unlike runs of the study s") as caught:
        read_studies([tmp_path])
    assert "try/study.json" in str(caught.value) and "copied/study.json" in str(caught.value)
    (study,) = read_studies([tmp_path / "whole", tmp_path / "copied"])
    assert [run.key for run in study.runs] == [whole["key"]]
    record = tmp_path / "run.json"
    record.write_text(json.dumps(few), encoding="utf-8")
    with pytest.raises(SourceError, match="of one of them alone"):
        read_studies([record, tmp_path / "whole"])


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ({"training": {"epochs": 2}}, "s0.json"),
        ({"data": {"train": 8, "test": 8}}, "s0.json"),
        ({"order": {"name": "A", "tasks": TASKS[:3]}}, "s0.json"),
        ({"order": {"name": "A", "tasks": TASKS[::-1]}}, None),  # as a seed may draw it
        ({"evaluation": {"unseen": "all"}}, None),  # older records leave it out
    ],
)
def test_unlike_runs_of_two_seeds_are_refused(
    tmp_path: Path, part: dict[str, Any], other: str | None
) -> None:
    """They were averaged into one cell, with an interval over both settings."""
    for seed in range(2):
        tasks = part["order"]["tasks"] if seed and "order" in part else TASKS
        run = make_run(tasks, METHODS[0], seed, study="s")
        run["config"] |= part if seed else {}
        (tmp_path / f"s{seed}.json").write_text(json.dumps(run), encoding="utf-8")
    if other is None:
        (group,) = groups(read_studies([tmp_path]))
        assert group.cells[0].seeds == 2
        return
    with pytest.raises(SourceError, match=r"none A seed 1 in .*, with other settings, seed 0") as c:
        read_studies([tmp_path])
    assert other in str(c.value) and "\n" not in str(c.value)


def test_joined_claims_are_of_all_runs(tmp_path: Path) -> None:
    """They were those of the first file that was given, and so was the number of runs planned."""
    runs = [make_run(TASKS, METHODS[0], seed, study="s") for seed in range(3)]
    claim = {"claim": "c", "bound": 1.0, "relation": "<="}

    def file(name: str, seeds: list[int], value: float, planned: int, done: int) -> Path:
        path = tmp_path / name
        data = {"schema": "retain.study/1", "name": "s", "planned": planned,
                "spec": {"seeds": seeds}, "claims": [claim | {"value": value}],
                "runs": [runs[seed] for seed in seeds[:done]]}  # fmt: skip
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    one, two = file("one.json", [0], 0.3, 1, 1), file("two.json", [1, 2], 1.2, 4, 2)
    for paths in ([one, two], [two, one]):
        with pytest.warns(RetainWarning, match="the claims of the study s are left out"):
            (study,) = read_studies(paths)
        assert not study.claims and (len(study.runs), study.planned) == (3, 5)
    whole = file("whole.json", [0, 1, 2], 0.8, 3, 3)
    for paths in ([one, whole, two], [whole, one]):
        (study,) = read_studies(paths)
        assert [c.value for c in study.claims] == [0.8]
    half = file("half.json", [0, 1, 2], 0.7, 3, 1)  # another machine's part of the same grid
    (study,) = read_studies([half, whole])
    assert study.planned == 3


def _put(key: str, value: Any, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def spoil(data: dict[str, Any]) -> None:
        for step in path:
            data = data[step]  # type: ignore[index]
        data[key] = value

    return spoil


STUDY = {"schema": "retain.study/1", "name": "s", "runs": []}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "schema None"),
        (b'{"schema": "retain.study/9"}', "retain.study/9"),
        (json.dumps(STUDY).encode(), "no runs yet"),
        (json.dumps(STUDY | {"runs": [{"status": "odd"}]}).encode(), "runs.0"),
        (b'{"schema": "retain.run/1", "config": {}}', "config.model"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "study.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read_studies([path])
    assert said in str(caught.value)
    assert "fix:" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data.pop("schema"), "schema None"),
        (_put("schema", "retain.result/9"), "retain.result/9"),
        (_put("exact_match", 31.5, "rows", 1, "target"), "rows.1.target.exact_match"),
        (_put("rows", []), "at rows"),
        (_put("kl", float("nan"), "rows", 1, "forgetting"), "rows.1.forgetting.kl"),
    ],
)
def test_bad_results(result: dict[str, Any], put: Put, spoil: Any, said: str) -> None:
    spoil(result)
    with pytest.raises(SourceError) as caught:
        read_studies([put(result)])
    message = str(caught.value)
    assert said in message and "\n" not in message
    assert all(part in message for part in ("got:", "allowed:", "fix:"))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no results of a study"):
        read_studies([tmp_path])
    (tmp_path / "train.json").touch()  # of a training, which is measured first
    with pytest.raises(SourceError, match="fix: measure its adapter first: retain eval"):
        read_studies([tmp_path])


def test_a_result_is_a_study_of_one_task(result: dict[str, Any], put: Put) -> None:
    result["later"] = result["rows"][0]["target"]["later"] = {"a": 1}  # of a newer version
    (study,) = read_studies([put(result)])
    (group,) = groups([study])
    assert names(group) == ["plain LoRA", *(f"retention {s}" for s in (10, 100, 1000))]
    assert group.plain is group.cells[0] and group.chosen is group.cells[2]
    for cell, row in zip(group.cells, result["rows"][1:], strict=True):
        score, kl = cell.mean("average"), cell.mean("kl")
        assert score and kl
        assert [score.mean, score.low, score.high] == [
            row["target"]["exact_match"], *row["target"]["interval"]
        ]  # fmt: skip
        assert kl.mean == row["forgetting"]["kl"]
        assert [kl.low, kl.high] == row["forgetting"]["kl_interval"]
        general = cell.mean("general")
        assert general and general.mean == pytest.approx(row["probe"]["accuracy"] - 0.8)
    share = group.cells[0].mean("share")
    assert share and share.mean == pytest.approx(0.0363, abs=1e-4)
    table = score_table(group)
    assert table and [column.name for column in table.head[1:]] == ["word-problems", "knowledge"]
    told = {row.name: [entry.text for entry in row.entries] for row in table.rows}
    assert told["before learning"] == ["2.0", "80.0"] and told["plain LoRA"] == ["31.5", "61.7"]
    (said,) = {g.before for run in study.runs for g in run.generations if "France" in g.prompt}
    assert said == "Paris."
    result["rows"][3]["chosen"] = False
    assert groups(read_studies([put(result)]))[0].chosen is None
    result["rows"] = result["rows"][:3]
    assert groups(read_studies([put(result)]))[0].chosen is not None, "the only one is the choice"


def test_two_results_of_one_model_and_task_stay_two(result: dict[str, Any], put: Put) -> None:
    found = read_studies([put(result, "a"), put(result, "b")])
    assert [len(study.runs) for study in found] == [4, 4]
    assert len({study.name for study in found}) == 2


def test_stored_data_is_told_or_guessed() -> None:
    def stores(**fields: Any) -> bool:
        run = make_run(TASKS, METHODS[0], 0)
        run["config"]["method"] = {"name": "m", "kind": "m", "strength": None} | fields
        return group_of({"name": "s", "runs": [run]}).cells[0].stores

    assert stores(kind="replay") and not stores(kind="self_replay") and not stores()
    assert stores(stores_data=True) and not stores(kind="replay", stores_data=False)


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"value": 1.0, "bound": 2.0, "relation": "<="}, "holds"),
        ({"value": 3.0, "bound": 2.0, "relation": "<="}, "does not hold"),
        ({"value": 3.0, "bound": 2.0, "relation": "<=", "holds": True}, "does not hold"),
        ({"value": 1.0, "bound": 2.0, "relation": "<=", "holds": False}, "does not hold"),
        ({"bound": 2.0, "relation": "<="}, "not measured"),
    ],
)
def test_verdicts(fields: dict[str, Any], verdict: str) -> None:
    assert Claim(claim="c", **fields).verdict == verdict
