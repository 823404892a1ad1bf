"""Runs that are pretended: done once, locked, failures recorded, the same with each engine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from filelock import FileLock

import forked
from retain.errors import ConfigError, OutputError, SourceError
from retain.study import studies
from retain.study.engines import in_processes
from retain.study.faults import lacks_disk, lacks_something
from retain.study.runner import execute
from retain.study.studies import run_study, study_status, take_known
from retain.study.work import read_record
from study_parts import FULL, LACKING, A, B, calls, pretended

ONE = {"orders": {"ab": [A, B]}, "methods": {"none": {}}, "adapters": {"lora": {}}}


def tables_of(out: Path) -> str:
    return json.dumps(json.loads((out / "study.json").read_text())["tables"])


def test_a_study_is_done_once(tmp_path: Path) -> None:
    spec, grid, work = pretended(tmp_path)
    told: list[str] = []
    counts = run_study(spec, grid, work, tell=lambda run, outcome: told.append(run.title))
    assert counts == {"done": 16, "failed": 0, "unfinished": 0, "elsewhere": 0, "before": 0}
    assert told == [run.title for run in grid.runs]
    found = json.loads((work.out / "study.json").read_text())
    assert found["schema"] == "retain.study/1"
    assert [r["key"] for r in found["runs"]] == [r.key for r in grid.runs]
    record = found["runs"][0]
    assert record["config"] == grid.runs[0].plain()
    assert {"created", "versions", "commit", "hardware", "seed"} <= record.keys()
    assert record["retention"][0]["ppl"] is None  # it was infinite
    assert not list(work.out.rglob(".*"))
    before = tables_of(work.out)
    counts = run_study(spec, grid, work)
    assert counts == {"done": 16, "failed": 0, "unfinished": 0, "elsewhere": 0, "before": 16}
    assert len(calls(work)) == 16
    assert tables_of(work.out) == before
    assert study_status(grid, work)["left"] == []


def test_a_worker_is_told_to_be_quiet_before_it_imports_what_talks() -> None:
    code = "import sys, retain.study.workers; print({'torch', 'bitsandbytes'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_a_published_study_is_gone_on_with(tmp_path: Path) -> None:
    first, more = tmp_path / "first", tmp_path / "more"
    spec, grid, work = pretended(first, **ONE)
    run_study(spec, grid, work)
    published = work.out / "study.json"
    spec, grid, work = pretended(more, **(ONE | {"seeds": [0, 1, 2]}))
    assert take_known(published, grid, work) == len(grid.runs) - 1  # of two seeds
    counts = run_study(spec, grid, work)
    assert (counts["done"], counts["before"], len(calls(work))) == (3, 2, 1)
    kept = json.loads(published.read_text())["runs"]
    assert json.loads((work.out / "study.json").read_text())["runs"][:2] == kept
    assert take_known(published, grid, work) == 0
    with pytest.raises(ConfigError, match="no study there"):
        take_known(first / "study.yaml", grid, work)


def test_what_failed_here_and_is_done_elsewhere_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = {**ONE, "adapters": {"time": {"kind": "lora"}}, "seeds": [0]}
    spec, grid, work = pretended(tmp_path / "here", **trouble)
    monkeypatch.setitem(LACKING, "time", ValueError("a mistake that is mended by now"))
    assert run_study(spec, grid, work)["failed"] == 1
    _, _, other = pretended(tmp_path / "elsewhere", **trouble)
    monkeypatch.delitem(LACKING, "time")
    assert run_study(spec, grid, other)["done"] == 1
    assert take_known(other.out / "study.json", grid, work) == 1
    assert run_study(spec, grid, work)["before"] == 1
    assert study_status(grid, work)["done"] == 1
    assert not work.trace(grid.runs[0].key).exists()
    assert take_known(other.out / "study.json", grid, work) == 0


def test_only_some(tmp_path: Path) -> None:
    spec, grid, work = pretended(tmp_path)
    assert run_study(spec, grid, work, only="held*seed 0")["done"] == 4
    status = study_status(grid, work)
    assert (status["done"], len(status["left"]), status["total"]) == (4, 12, 16)


def test_a_claim_is_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    claim = {"claim": "c", "metric": "kl", "method": "held", "bound": 1.0}
    methods: dict[str, Any] = {"none": {}, "held": {"kind": "l2"}}
    spec, grid, work = pretended(tmp_path, **(ONE | {"methods": methods, "claims": [claim]}))
    run_study(spec, grid, work, only="none")
    run_study(spec, grid, work, only="held*seed 1")
    found = json.loads((work.out / "study.json").read_text())
    kl = {(r["config"]["method"]["name"], r["seed"]): r["retention"][-1]["kl"]
          for r in found["runs"]}  # fmt: skip
    assert len(kl) == 3
    assert found["claims"][0]["value"] == pytest.approx(kl["held", 1] / kl["none", 1])


def test_failures_are_recorded_and_do_not_stop_it(tmp_path: Path) -> None:
    changes = {"adapters": {"error": {"kind": "lora"}, "lora": {}}}
    spec, grid, work = pretended(tmp_path, **(ONE | changes))
    counts = run_study(spec, grid, work)
    assert counts == {"done": 2, "failed": 2, "unfinished": 0, "elsewhere": 0, "before": 0}
    record = read_record(work.record(grid.runs[0].key))
    assert record is not None and record.status == "failed"
    assert record.error == "the loss is not finite; got: NaN at step 3; fix: lower it"
    assert "TrainingError" in work.trace(grid.runs[0].key).read_text()
    status = study_status(grid, work)
    assert [f["error"] for f in status["failed"]] == [record.error] * 2
    cell = json.loads(tables_of(work.out))["cells"][0]
    assert (cell["adapter"], cell["n"], cell["failed"]) == ("error", 0, 2)
    assert len(calls(work)) == 4
    run_study(spec, grid, work)
    assert len(calls(work)) == 4  # not again by itself
    from dataclasses import replace

    counts = run_study(spec, grid, replace(work, retry_failed=True))
    assert counts == {"done": 2, "failed": 2, "unfinished": 0, "elsewhere": 0, "before": 2}
    assert len(calls(work)) == 6


@pytest.mark.parametrize("trouble", sorted(LACKING.keys() - FULL.keys()))
def test_what_the_machine_lacked_is_tried_again(trouble: str, tmp_path: Path) -> None:
    changes = {"adapters": {trouble: {"kind": "lora"}, "other": {"kind": "lora"}}}
    spec, grid, work = pretended(tmp_path, **(ONE | changes))
    told: list[Any] = []
    counts = run_study(spec, grid, work, tell=lambda run, outcome: told.append(outcome))
    assert (counts["done"], counts["unfinished"], counts["failed"]) == (2, 2, 0)
    assert [o.status for o in told if o.error] == ["unfinished"] * 2
    assert read_record(work.record(grid.runs[0].key)) is None
    assert len(study_status(grid, work)["left"]) == 2
    (tmp_path / "mended").touch()
    counts = run_study(spec, grid, work)
    assert (counts["done"], counts["unfinished"], counts["before"]) == (4, 0, 2)
    assert not list(work.out.glob("failures/*"))


@pytest.mark.parametrize("trouble", sorted(FULL))
def test_a_full_disk_stops_the_study_in_one_line(trouble: str, tmp_path: Path) -> None:
    changes = {"adapters": {trouble: {"kind": "lora"}, "other": {"kind": "lora"}}}
    spec, grid, work = pretended(tmp_path, **(ONE | changes))
    with pytest.raises(OutputError) as caught:
        run_study(spec, grid, work)
    assert "\n" not in str(caught.value)
    assert not list(work.out.glob("runs/*"))
    (tmp_path / "mended").touch()
    assert run_study(spec, grid, work)["done"] == 4


def test_a_failure_behind_a_wrapper_is_known_by_its_cause(tmp_path: Path) -> None:
    def wrapped(cause: BaseException) -> Exception:
        try:
            raise SourceError("rows cannot be read") from cause
        except SourceError as error:
            return error

    assert lacks_something(wrapped(LACKING["a connection"]))
    assert lacks_disk(wrapped(LACKING["disk"]))
    assert not lacks_something(wrapped(ValueError("a bad row")))
    assert not lacks_something(wrapped(FileNotFoundError(2, "No such file")))
    assert not lacks_something(OSError("repo x is not a valid model identifier"))


def test_lesser_ways_are_in_the_record_and_told(tmp_path: Path) -> None:
    spec, grid, work = pretended(tmp_path, **(ONE | {"adapters": {"note": {"kind": "lora"}}}))
    told: list[Any] = []
    run_study(spec, grid, work, tell=lambda run, outcome: told.append(outcome))
    record = read_record(work.record(grid.runs[0].key))
    assert record is not None and record.notes == ["held in a lesser way"]
    assert told[0].notes == ("held in a lesser way",)


def test_ctrl_c_leaves_no_lock_and_no_half_file(tmp_path: Path) -> None:
    spec, grid, work = pretended(tmp_path, **(ONE | {"adapters": {"stop": {"kind": "lora"}}}))
    with pytest.raises(KeyboardInterrupt):
        run_study(spec, grid, work)
    assert study_status(grid, work)["running"] == []
    assert not work.record(grid.runs[0].key).exists()


def test_a_lock_keeps_others_away_and_that_of_the_dead_does_not(tmp_path: Path) -> None:
    spec, grid, work = pretended(tmp_path, **ONE)
    first = grid.runs[0]
    work.lock(first.key).parent.mkdir(parents=True)
    with FileLock(work.lock(first.key)):
        assert [r["key"] for r in study_status(grid, work)["running"]] == [first.key]
        outcome = execute(first, work)
        assert (outcome.status, outcome.fresh) == ("elsewhere", False)
    assert calls(work) == []
    hold = (
        "import sys, os, signal; from filelock import FileLock\n"
        "lock = FileLock(sys.argv[1]); lock.acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", hold, str(work.lock(first.key))])
    assert done.returncode == -9
    assert work.lock(first.key).exists()
    assert run_study(spec, grid, work)["done"] == 2


def test_an_older_look_at_the_records_does_not_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, grid, work = pretended(tmp_path, **ONE)
    execute(grid.runs[0], work)
    other = Thread(target=studies.collect, args=(spec, grid, work))

    def late(records: Any) -> Any:
        if not other.ident:  # the first has read one record: another command ends the last run
            execute(grid.runs[1], work)
            other.start()
            other.join(timeout=0.5)
        return tables(records)

    tables = studies.tables
    monkeypatch.setattr(studies, "tables", late)
    studies.collect(spec, grid, work)
    other.join()
    found = json.loads((work.out / "study.json").read_text())
    assert [r["key"] for r in found["runs"]] == [r.key for r in grid.runs]


def test_a_damaged_record_is_done_again(tmp_path: Path) -> None:
    spec, grid, work = pretended(tmp_path, **ONE)
    run_study(spec, grid, work)
    work.record(grid.runs[0].key).write_text('{"schema": "retain.ru')
    counts = run_study(spec, grid, work)
    assert (counts["done"], counts["before"]) == (2, 1)


@pytest.mark.parametrize("options", [{"jobs": 2}, {"engine": "ray"}], ids=["processes", "ray"])
def test_other_engines_give_the_same_tables(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "engine" in options:
        pytest.importorskip("ray", reason="the extra 'ray' is not installed")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # of the workers
    spec, grid, work = pretended(tmp_path / "one", seeds=[0])
    run_study(spec, grid, work)
    _, _, other = pretended(tmp_path / "two", seeds=[0])
    assert run_study(spec, grid, other, **options)["done"] == 8
    assert tables_of(other.out) == tables_of(work.out)
    assert sorted(calls(other)) == sorted(calls(work))


@pytest.mark.parametrize(("trouble", "jobs"), [("die", 1), ("die late", 2)])
def test_a_worker_that_dies_costs_its_own_run_alone(
    trouble: str, jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.get_context", lambda _: forked.SERVER)  # quicker
    changes: dict[str, Any] = {"adapters": {"lora": {}, trouble: {"kind": "lora"}}}
    _, grid, work = pretended(tmp_path, **(ONE | changes))
    found = {}
    for outcome in in_processes(grid.runs, work, jobs):
        found[outcome.key] = outcome
        if jobs > 1:
            time.sleep(1.5)  # the other worker dies meanwhile, while the parent is busy
    for run in grid.runs:
        outcome, bad = found[run.key], run.adapter.name == trouble
        assert outcome.status == ("unfinished" if bad else "done")
        assert ("the process of the run died" in str(outcome.error)) is bad
        assert (read_record(work.record(run.key)) is None) is bad


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """A killed parent leaves no worker behind that would hold a lock or wait for ever."""
    changes: dict[str, Any] = {"adapters": {"wait": {"kind": "lora"}}, "seeds": [0, 1]}
    asked = pretended(tmp_path, **(ONE | changes))
    parent = forked.begin(partial(run_study, jobs=2), *asked, told=tmp_path / "told")
    notes = tmp_path / "out" / "calls"
    for _ in range(600):
        if notes.is_dir() and len(list(notes.iterdir())) == 2:
            break
        time.sleep(0.1)
    workers = [int(note.stem) for note in notes.iterdir()]
    assert len(workers) == 2
    parent.kill()
    parent.join()
    for _ in range(100):
        if not any(_alive(worker) for worker in workers):
            break
        time.sleep(0.1)
    assert not any(_alive(worker) for worker in workers)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_engines_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, grid, work = pretended(tmp_path, **ONE)
    with pytest.raises(ConfigError, match=r"unknown engine; got: 'rya'.*did you mean 'ray'"):
        run_study(spec, grid, work, engine="rya")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Ray is not installed.*retain-lora\[ray\]"):
        run_study(spec, grid, work, engine="ray")
