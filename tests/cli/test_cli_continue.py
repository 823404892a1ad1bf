"""``retain train --continue-from``: month after month inside one budget, at constant memory."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retain.curvature.curvature import load_curvature
from retain.evaluation.forgetting import measure_forgetting
from retain.models.load import load_model
from retain.models.saved import load_adapter

BUDGET = 0.002


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def months(model: Path, curvature: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four runs, each with data of its own, each continuing from the one before."""
    from retain.cli import main

    folder = tmp_path_factory.mktemp("months")
    runs = []
    for month in range(4):
        data = folder / f"{month}.jsonl"
        words = ["red", "blue", "green", "one", "two", "three"]
        rows = [
            {"prompt": f"{words[i % 6]} {words[(i + month) % 6]}", "completion": words[month]}
            for i in range(16)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        out = folder / f"run{month}"
        argv = ["train", "--data", data, "--out", out, "--budget", BUDGET, "--batch-size", 4]
        argv += ["--epochs", 6, "--learning-rate", 0.02, "--max-length", 16, "--quiet"]
        argv += ["--set", "max_rank=12"]
        if runs:
            argv += ["--continue-from", runs[-1]]
        else:
            argv += ["--model", model, "--rank", 4, "--curvature", curvature, "--keep-state"]
        assert main([str(a) for a in argv]) == 0
        runs.append(out)
    return runs


def test_each_run_starts_at_the_one_before_and_moves_on(months: list[Path]) -> None:
    for before, after in pairwise(months):
        old, new = weights(before), weights(after)
        assert old.keys() == new.keys()
        past = load_curvature(after / "state" / "past.safetensors")
        name, (b0, a0) = next(iter(past.anchor.items()))
        head = f"base_model.model.{name}"
        assert torch.equal(a0, new[f"{head}.lora_A.weight"].float())
        assert torch.equal(b0, 2.0 * new[f"{head}.lora_B.weight"].float())
    state = json.loads((months[-1] / "state" / "state.json").read_text())
    assert [Path(run["data"]).stem for run in state["runs"]] == ["0", "1", "2", "3"]


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
    config = json.loads((months[-1] / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (12, 24)


def test_the_force_alone_goes_on_with_all_rows(
    months: list[Path], data: Path, tmp_path: Path, retain: Any
) -> None:
    out = tmp_path / "out"
    argv = ("--data", data, "-o", out, "--method", "laplace", "--max-steps", 2, "--batch-size", 4)
    outcome = retain("train", "--continue-from", months[0], *argv)
    assert outcome.code == 0, outcome.err
    old, new = weights(months[0]), weights(out)
    for name, weight in old.items():
        assert new[name].shape == weight.shape
    assert any(not torch.equal(new[name], weight) for name, weight in old.items())


def test_the_model_stays_inside_its_budget(months: list[Path], model: Path) -> None:
    base = load_model(model)
    for run in months:
        tuned = load_adapter(load_model(model).model, run / "adapter")
        curvature = load_curvature(run / "state" / "source.safetensors")
        record = json.loads((run / "train.json").read_text())
        assert curvature.quadratic(tuned) == pytest.approx(record["predicted_nats"], rel=1e-3)
        from retain.models.generating import sample_rows

        text = sample_rows(base.model, base.tokenizer, count=32, max_length=16, seed=5)
        spent = measure_forgetting(tuned, text, tokenizer=base.tokenizer, max_length=16).kl
        assert spent <= 1.5 * BUDGET  # other samples than those that it was kept on


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
    ],
)
def test_what_differs_is_refused(
    retain: Any, months: list[Path], data: Path, tmp_path: Path, more: list[Any], said: str
) -> None:
    argv = ("--data", data, "-o", tmp_path / "out", "--continue-from", months[0], *more)
    outcome = retain("train", *argv)
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["file", "set"])
def test_the_file_may_say_what_to_continue_from(
    retain: Any, months: list[Path], data: Path, tmp_path: Path, how: str
) -> None:
    if how == "file":
        (tmp_path / "run.yaml").write_text(f"continue_from: {months[0]}\n", encoding="utf-8")
        more: list[Any] = ["--config", tmp_path / "run.yaml"]
    else:
        more = ["--set", f"continue_from={months[0]}"]
    argv = ("--data", data, "-o", tmp_path / "out", *more, "--batch-size", 4, "--max-length", 16)
    assert retain("train", *argv, "--set", "training.max_steps=2", "-q").code == 0
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (told["adapter"]["rank"], told["keep_state"], told["max_rank"]) == (4, True, 12)
    assert len(json.loads((tmp_path / "out" / "state" / "state.json").read_text())["runs"]) == 2


def test_it_is_held_as_the_run_before_was(
    retain: Any, months: list[Path], data: Path, tmp_path: Path
) -> None:
    argv = ("--data", data, "--continue-from", months[0], "--batch-size", 4, "--max-length", 16)
    argv = (*argv, "--set", "training.max_steps=1", "-q")
    for name, more in (("same", ()), ("other", ("--strength", 3))):
        assert retain("train", *argv, "-o", tmp_path / name, *more).code == 0
    same, other = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("same", "other"))
    assert same["budget"] == BUDGET
    assert (other["budget"], other["strength"]) == (None, 3.0)


@pytest.mark.parametrize("line", ["method: none", "adapter: {rank: 5}", "curvature: c.safetensors"])
def test_what_differs_in_the_file_is_refused_too(
    retain: Any, months: list[Path], data: Path, tmp_path: Path, line: str
) -> None:
    (tmp_path / "run.yaml").write_text(line + "\n", encoding="utf-8")
    argv = ("--data", data, "-o", tmp_path / "out", "--continue-from", months[0])
    outcome = retain("train", *argv, "--config", tmp_path / "run.yaml")
    assert outcome.code == 2
    assert not (tmp_path / "out").exists()


def test_a_state_goes_with_its_adapter(
    retain: Any, months: list[Path], data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(months[0], run)
    argv = ("--data", data, "--batch-size", 4, "--max-length", 16, "-q")
    argv = (*argv, "--set", "training.max_steps=2")
    shutil.copy(months[1] / "adapter" / "adapter_model.safetensors", run / "adapter")
    shutil.copy(months[1] / "adapter" / "adapter_config.json", run / "adapter")
    outcome = retain("train", *argv, "-o", tmp_path / "june", "--continue-from", run)
    assert outcome.code == 2
    assert "--keep-state" in outcome.err
    assert not (tmp_path / "june" / "adapter").exists()
    told = json.loads((run / "run.json").read_text())
    again = ("--model", told["model"], "--rank", 4, "-o", run, "--overwrite")
    assert retain("train", *argv, *again).code == 0
    assert not (run / "state").exists()  # it was of the adapter before


def test_a_run_does_not_take_the_place_of_the_one_before(
    retain: Any, months: list[Path], data: Path
) -> None:
    argv = ("--data", data, "--continue-from", months[0], "-o", months[0] / "." / "adapter" / "..")
    retain("train", *argv).refused("take the place", "another --out")


def test_plain_lora_has_no_state(retain: Any, data: Path, tmp_path: Path) -> None:
    argv = ("--data", data, "-o", tmp_path / "out", "--method", "none", "--keep-state")
    retain("train", *argv).refused("no state to keep", "--keep-state")


def test_a_run_without_a_state_cannot_be_continued(
    retain: Any, trained: Path, data: Path, tmp_path: Path
) -> None:
    argv = ("--data", data, "-o", tmp_path / "out", "--continue-from", trained)
    outcome = retain("train", *argv)
    assert outcome.code == 2
    assert "nothing to continue from" in outcome.err and "--keep-state" in outcome.err
