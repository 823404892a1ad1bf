"""``retain train --continue-from``: month after month inside one budget, at constant memory."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_parts import Run, told, write_lines
from cli_parts import adapter as weights

from retain.cli import main
from retain.config import RunConfig
from retain.curvature.blocks.kronecker import rank_of
from retain.curvature.curvature import load_curvature
from retain.errors import ConfigError
from retain.evaluation.forgetting import measure_forgetting
from retain.files import write_json
from retain.models.generating import sample_rows
from retain.models.load import load_model
from retain.models.saved import load_adapter
from retain.runs.months import previous_run
from retain.runs.records import ModelOf, TrainRecord, write_record
from retain.types import STRENGTH

BUDGET = 0.002


@pytest.fixture(scope="module")
def months(model: Path, curvature: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four runs, each with data of its own, each continuing from the one before."""
    folder, runs = tmp_path_factory.mktemp("months"), list[Path]()
    words = ["red", "blue", "green", "one", "two", "three"]
    for month in range(4):
        rows = [
            {"prompt": f"{words[i % 6]} {words[(i + month) % 6]}", "completion": words[month]}
            for i in range(16)
        ]
        data, out = write_lines(folder / f"{month}.jsonl", rows), folder / f"run{month}"
        argv = ["train", "--data", data, "--out", out, "--budget", BUDGET, "--batch-size", 4]
        argv += ["--epochs", 6, "--learning-rate", 0.02, "--max-length", 16, "--quiet"]
        argv += ["--set", "max_rank=12"]
        if runs:
            argv += ["--continue-from", runs[-1]]
        else:
            argv += ["--model", model, "--rank", 4, "--curvature", curvature, "--keep-state"]
            argv += ["--source", "self"]  # told, so no later month may have another
        assert main([str(a) for a in argv]) == 0
        runs.append(out)
    return runs


@pytest.fixture
def june(retain: Run, data: Path, tmp_path: Path) -> Run:
    """A short run on other data; later options come before these."""
    argv = ("train", "--data", data, "-o", tmp_path / "out", "--batch-size", 4, "-q")
    argv = (*argv, "--max-length", 16, "--max-steps", 2)
    return lambda *more: retain(*argv, *more)


def test_each_run_starts_at_the_one_before_and_moves_on(months: list[Path]) -> None:
    for before, after in pairwise(months):
        old, new = weights(before), weights(after)
        assert old.keys() == new.keys()
        past = load_curvature(after / "state" / "past.safetensors")
        name, (b0, a0) = next(iter(past.anchor.items()))
        head = f"base_model.model.{name}"
        assert torch.equal(a0, new[f"{head}.lora_A.weight"].float())
        assert torch.equal(b0, 2.0 * new[f"{head}.lora_B.weight"].float())
    state = told(months[-1] / "state" / "state.json")
    assert [Path(run["data"]).stem for run in state["runs"]] == ["0", "1", "2", "3"]


def test_what_a_smaller_budget_takes_back_is_said(
    june: Run, months: list[Path], tmp_path: Path
) -> None:
    june("--continue-from", months[0], "--budget", BUDGET / 10).done()
    (note,) = [n for n in told(tmp_path / "out" / "train.json")["notes"] if "scaled back" in n]
    share = "scaled back to four fifths of the budget of 0.0002, from "
    found = re.search(re.escape(share) + r"(\S+) to (\S+) predicted nats per token", note)
    assert found is not None and float(found[1]) > 2 * float(found[2]) > 0
    june("--continue-from", months[0], "--budget", 10 * BUDGET, "--overwrite").done()
    assert "scaled back" not in str(told(tmp_path / "out" / "train.json")["notes"])


def test_a_month_that_is_resumed_says_what_was_taken_back(
    retain: Run, june: Run, months: list[Path], tmp_path: Path
) -> None:
    argv = ("--continue-from", months[0], "--budget", BUDGET / 10, "--max-steps", 4)
    june(*argv, "--save-steps", 2).done()
    whole = told(tmp_path / "out" / "train.json")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-4")
    retain("train", "--resume", "--out", tmp_path / "out", "-q").done()
    resumed = told(tmp_path / "out" / "train.json")
    assert resumed["resumed_from"] == "checkpoint-2"
    first, again = ([n for n in r["notes"] if "scaled back" in n] for r in (whole, resumed))
    assert len(first) == 1 and again == first


def test_the_card_tells_of_all_months(months: list[Path], model: Path) -> None:
    card = (months[2] / "adapter" / "README.md").read_text()
    record = told(months[2] / "train.json")
    assert "- Data: 0.jsonl (16 rows), then 1.jsonl (16 rows), then 2.jsonl (16 rows)\n" in card
    assert f"- Base model: {model.name}\n" in card and f"- Budget: {BUDGET} nats" in card
    assert f"- Predicted forgetting: {record['predicted_nats']:.3g} nats per token\n" in card
    measured = float(re.search(r"- Measured KL divergence: (\S+) nats", card)[1])  # type: ignore[index]
    assert 0 < measured <= BUDGET
    assert (
        "- Tasks before: 2, held too\n" in card and "- Source text: source.jsonl: 16 rows" in card
    )
    assert str(model.parent) not in card and str(months[0].parent) not in card


def test_what_was_learned_stays_beside_fresh_rows(months: list[Path]) -> None:
    """Rank 4, 8, 12, and then cut to 8 before 4 are added."""
    ranks = [next(iter(weights(run).values())).shape[0] for run in months]
    assert ranks == [4, 8, 12, 12]
    for before, after in pairwise(months[:3]):
        old, new = weights(before), weights(after)
        for name in old:
            if "lora_A" in name:
                size = len(old[name])
                assert torch.equal(new[name][:size], old[name])
                assert float(new[name][size:].abs().max()) > 0
            else:
                size = old[name].shape[1]
                learned = new[name][:, size:]
                # all of it alike may have been scaled back into the budget when training ended
                share = float((new[name][:, :size] * old[name]).sum() / old[name].square().sum())
                torch.testing.assert_close(new[name][:, :size], share * old[name])
                assert 0.5 < share <= 1.0 + 1e-6
                assert float(learned.abs().max()) > 0
    config = told(months[-1] / "adapter" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (12, 24)


def test_months_of_sketched_factors_and_proximal_steps(
    model: Path, source: Path, data: Path, june: Run, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    june("--model", model, "--source", source, "--rank", 2, "--factor-rank", 3, "--keep-state",
         "-o", first).done()  # fmt: skip
    june("--continue-from", first, "--keep-state", "--update", "proximal", "--kl", 1).done()
    run = told(tmp_path / "out" / "run.json")
    assert (run["training"]["update"], run["kl"], run["factor_rank"]) == ("proximal", 1.0, "auto")
    third, other = tmp_path / "third", tmp_path / "other"
    june("--continue-from", tmp_path / "out", "--strength", 3, "-o", third).done()
    june("--continue-from", tmp_path / "out", "--update", "gradient", "-o", other).done()
    updates = [told(run / "run.json")["training"]["update"] for run in (third, other)]
    assert updates == ["proximal", "gradient"]
    assert "- Update: proximal" in (third / "adapter" / "README.md").read_text()
    for run in (first, tmp_path / "out"):
        for name in ("source", "past"):
            held = load_curvature(run / "state" / f"{name}.safetensors")
            assert rank_of(held.blocks.values()) == 3


def test_the_force_alone_goes_on_with_all_rows(
    months: list[Path], june: Run, tmp_path: Path
) -> None:
    june("--continue-from", months[0], "--method", "laplace").done()
    old, new = weights(months[0]), weights(tmp_path / "out")
    assert all(new[name].shape == weight.shape for name, weight in old.items())
    assert any(not torch.equal(new[name], weight) for name, weight in old.items())


def test_the_model_stays_inside_its_budget(months: list[Path], model: Path) -> None:
    base = load_model(model)
    for run in months:
        tuned = load_adapter(load_model(model).model, run / "adapter")
        curvature = load_curvature(run / "state" / "source.safetensors")
        record = told(run / "train.json")
        assert curvature.quadratic(tuned) == pytest.approx(record["predicted_nats"], rel=1e-3)
        text = sample_rows(base.model, base.tokenizer, count=32, max_length=16, seed=5)
        spent = measure_forgetting(tuned, text, tokenizer=base.tokenizer, max_length=16).kl
        assert spent <= 1.5 * BUDGET  # other samples than those that it was kept on


def test_a_month_measures_on_a_source_that_the_first_one_did_not_have(
    model: Path, curvature: Path, source: Path, june: Run, tmp_path: Path
) -> None:
    one, argv = tmp_path / "one", ("--rank", 2, "--keep-state", "--budget", BUDGET)
    june("--model", model, "--curvature", curvature, *argv, "-o", one).done()
    june("--continue-from", one, "-o", tmp_path / "two").done()
    june("--continue-from", one, "--source", source, "-o", tmp_path / "three").done()
    strong = ("--continue-from", one, "--strength", 10, "--source", source)
    june(*strong, "-o", tmp_path / "four").refused("has a curvature of its own")  # nothing reads it
    for name, other in (("one", True), ("two", True), ("three", False)):
        notes = " ".join(told(tmp_path / name / "train.json")["notes"])
        assert ("the budget is measured on text that the model writes" in notes) == other


def test_the_state_does_not_grow(months: list[Path]) -> None:
    sizes = [sum(p.stat().st_size for p in (run / "state").glob("*.safetensors")) for run in months]
    assert sizes[-1] <= 1.01 * sizes[-2]
    past = load_curvature(months[-1] / "state" / "past.safetensors")
    assert past.info.merged == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rank", 5], "has another adapter.rank"),
        (["--method", "none"], "held by what came before"),
        (["--set", "max_rank=7"], "leaves no room for what was learned before"),
        (["--curvature", "c.safetensors"], "has a curvature of its own"),
        (["--source", "text.jsonl"], "has a curvature of its own"),
        (["--alpha", 3], "got: 3.0; allowed: none"),
        ("method: none", "held by what came before"),
        ("adapter: {rank: 5}", "has another adapter.rank"),
        ("curvature: c.safetensors", "has a curvature of its own"),
    ],
)
def test_what_differs_is_refused(
    months: list[Path], june: Run, tmp_path: Path, more: Any, said: str
) -> None:
    if isinstance(more, str):  # in the file
        (tmp_path / "run.yaml").write_text(more + "\n", encoding="utf-8")
        more = ["--config", tmp_path / "run.yaml"]
    june("--continue-from", months[0], *more).refused(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["file", "set"])
def test_the_file_may_say_what_to_continue_from(
    months: list[Path], june: Run, tmp_path: Path, how: str
) -> None:
    more: list[Any] = ["--set", f"continue_from={months[0]}"]
    if how == "file":
        (tmp_path / "run.yaml").write_text(f"continue_from: {months[0]}\n", encoding="utf-8")
        more = ["--config", tmp_path / "run.yaml"]
    june(*more).done()
    run = told(tmp_path / "out" / "run.json")
    assert (run["adapter"]["rank"], run["keep_state"], run["max_rank"]) == (4, True, 12)
    assert len(told(tmp_path / "out" / "state" / "state.json")["runs"]) == 2


def test_it_is_held_as_the_run_before_was(months: list[Path], june: Run, tmp_path: Path) -> None:
    for name, more in (("same", ()), ("other", ("--strength", 3))):
        june("--continue-from", months[0], "-o", tmp_path / name, *more).done()
    same, other = (told(tmp_path / name / "run.json") for name in ("same", "other"))
    assert same["budget"] == BUDGET
    assert (other["budget"], other["strength"]) == (None, 3.0)
    back = ("--continue-from", tmp_path / "other", "--budget", BUDGET, "-o", tmp_path / "back")
    assert not [n for n in june(*back, "--json").json["notes"] if "not used" in n]
    run = told(tmp_path / "back" / "run.json")
    assert (run["budget"], run["strength"]) == (BUDGET, STRENGTH)
    sure = ("--continue-from", months[0], "--confidence", 0.9)
    june(*sure, "-o", tmp_path / "sure").done()
    june("--continue-from", tmp_path / "sure", "-o", tmp_path / "on").done()
    june("--continue-from", tmp_path / "sure", "--strength", 3, "-o", tmp_path / "off").done()
    known = [told(tmp_path / n / "run.json")["confidence"] for n in ("sure", "on", "off")]
    assert known == [0.9, 0.9, None]


@pytest.mark.parametrize("later", [("--budget", BUDGET), ("--kl", 1)])
def test_later_months_are_measured_on_the_same_source(
    model: Path,
    source: Path,
    june: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    later: Any,
) -> None:
    """The budget of the first month, and one or a KL that a later month brings."""
    from retain.training import probes

    read, whole = list[Any](), probes.source_examples
    monkeypatch.setattr(
        probes, "source_examples", lambda v, text, *a: (read.append(text), whole(v, text, *a))[1]
    )
    monkeypatch.chdir(source.parent)
    argv = ("--model", model, "--source", source.name, "--rank", 2, "--keep-state")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    june(*argv, *(later if "--budget" in later else ()), "-o", one).done()
    monkeypatch.chdir(tmp_path)
    june("--continue-from", one, "-o", two).done()
    june("--continue-from", two, *later, "-o", three).done()
    assert read == [str(source)] * (3 if "--budget" in later else 1)
    assert [told(run / "run.json")["source"] for run in (one, two, three)] == [str(source)] * 3


def test_a_source_that_was_rewritten_is_told(
    model: Path, source: Path, june: Run, tmp_path: Path
) -> None:
    text = Path(shutil.copy(source, tmp_path / source.name))
    argv = ("--model", model, "--source", text, "--rank", 2, "--keep-state", "--budget", BUDGET)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    june(*argv, "-o", one).done()
    june("--continue-from", one, "-o", two).done()
    text.write_text("".join(reversed(text.read_text().splitlines(keepends=True))))
    june("--continue-from", one, "-o", three).done()
    said = "measured on other text than the run before was: budget"
    assert [told(run / "train.json")["notes"].count(said) for run in (two, three)] == [0, 1]


def test_a_source_may_have_moved(model: Path, source: Path, june: Run, tmp_path: Path) -> None:
    """Once nothing is at its place; that it has other text now is told."""
    text, there = Path(shutil.copy(source, tmp_path / source.name)), tmp_path / "there.jsonl"
    argv = ("--model", model, "--source", text, "--rank", 2, "--keep-state", "--budget", BUDGET)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    june(*argv, "--max-steps", 2, "--save-steps", 1, "-o", one).done()
    want, moved = weights(one), ("--source", there)
    shutil.copy(text, there)
    june("--continue-from", one, *moved, "-o", two).refused("has a curvature of its own")
    june("--resume", "-o", one, *moved).refused("another source")
    text.unlink()
    june("--continue-from", one, "-o", two).refused("no such source")
    june("--continue-from", one, *moved, "-o", two).done()
    shutil.rmtree(one / "checkpoints" / "checkpoint-2")
    june("--resume", "-o", one, *moved).done()
    assert all(torch.equal(tensor, want[name]) for name, tensor in weights(one).items())
    there.write_text("".join(reversed(there.read_text().splitlines(keepends=True))))
    june("--continue-from", one, "-o", three).done()
    for run, told_of in ((one, 0), (two, 0), (three, 1)):
        notes = " ".join(told(run / "train.json")["notes"])
        assert notes.count("measured on other text than") == told_of
        assert told(run / "run.json")["source"] == str(there)


def test_a_state_goes_with_its_adapter(months: list[Path], june: Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(months[0], tmp_path / "run"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(months[1] / "adapter" / name, run / "adapter")
    june("--continue-from", run).refused("--keep-state")
    assert not (tmp_path / "out").exists()
    again = ("--model", told(run / "run.json")["model"], "--rank", 4, "-o", run, "--overwrite")
    june(*again).done()
    assert not (run / "state").exists()  # it was of the adapter before


def test_a_run_that_was_to_take_its_place_and_broke_off_changes_nothing(
    months: list[Path], june: Run, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(months[0], tmp_path / "run"))
    begun = told(run / "run.json") | {"budget": None, "strength": 7.0}
    del begun["digest"]
    write_json(run / "run.json", begun)  # the settings of one that began, and never ended
    ended = told(run / "train.json")
    del ended["digest"]  # as of an earlier version
    ended["history"] *= -(-8000 // len(ended["history"]))  # of a long training
    write_json(run / "train.json", ended)
    assert (run / "train.json").stat().st_size > 2**20
    found = june("--continue-from", run, "--json").json
    assert found["config"]["budget"] == BUDGET
    write_json(run / "train.json", {k: v for k, v in ended.items() if k != "config"})
    june("--continue-from", run, "--overwrite").refused("nothing to continue from", "--keep-state")


def test_a_changed_record_is_refused(tmp_path: Path) -> None:
    """The settings of later months are read from it; those of before have no seal."""
    config = RunConfig(model="m", data="rows.jsonl", out=str(tmp_path), budget=0.05)
    base = ModelOf(name="m", fingerprint="f")
    write_json(tmp_path / "run.json", config.model_dump(mode="json"))
    write_record(tmp_path / "train.json", TrainRecord(config=config, model=base), seal=True)
    with pytest.raises(ConfigError, match=r"nothing to continue from.*state\.json"):
        previous_run(tmp_path)
    ended = told(tmp_path / "train.json")
    ended["config"]["budget"] = 5.0
    write_json(tmp_path / "train.json", ended)
    said = r"nothing to continue from; got: .*train.json: it has changed since it was written"
    with pytest.raises(ConfigError, match=said):
        previous_run(tmp_path)
    del ended["digest"]
    write_json(tmp_path / "train.json", ended)
    with pytest.raises(ConfigError, match=r"nothing to continue from.*state\.json"):
        previous_run(tmp_path)


def test_what_cannot_be(months: list[Path], trained: Path, june: Run) -> None:
    here = months[0] / "." / "adapter" / ".."
    june("--continue-from", months[0], "-o", here).refused("take the place", "another --out")
    june("--method", "none", "--keep-state").refused("no state to keep", "--keep-state")
    june("--continue-from", trained).refused("nothing to continue from", "--keep-state")
