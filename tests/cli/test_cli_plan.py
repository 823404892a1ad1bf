"""``retain plan``: the table, the numbers for programs, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from retain.cli.plan import _size
from tiny import STRUCTURES


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    """The tiny model's configuration, without its weights."""
    return Path(shutil.copy(model / "config.json", tmp_path / "config.json"))


def test_the_table_fits_80_columns(
    retain: Any, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = retain("plan", config, "--factor-rank", 4, "--tokens", 64)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert "14 LoRA layers of rank 16" in outcome.out
    assert "shared inputs: q_proj k_proj v_proj; gate_proj up_proj" in outcome.out
    assert "a step of 64 tokens" in outcome.out
    end = next(i for i, line in enumerate(lines) if line.startswith("What the recipe holds"))
    rows = {line.split()[1]: line for line in lines[:end] if line.startswith("│")}
    assert set(rows) == set(STRUCTURES)
    assert sum("KiB" in line for line in lines[end:] if line.startswith("│")) == 1
    assert "KiB" in rows["kfac"]
    assert rows["ekfac"].count(" - ") == 5
    assert "note: no sketches: ekfac, tridiagonal" in lines


def test_json_has_all_the_numbers(retain: Any, config: Path) -> None:
    found = retain("plan", config, "--rank", 2, "--tokens", 64, "--json").json
    assert found["kind"] == "LlamaForCausalLM"
    assert (found["rank"], found["tokens"], found["factor_rank"]) == (2, 64, "auto")
    first = "model.layers.0.self_attn.q_proj"
    assert found["layers"]["model.layers.0.self_attn.v_proj"] == {
        "d_out": 8, "d_in": 16, "input": first,
    }  # fmt: skip
    assert found["distinct_inputs"] == 8
    assert found["adapter_parameters"] == 2 * 2 * (32 + 24 + 24 + 32 + 3 * 48)
    assert set(found["structures"]) == set(STRUCTURES)
    inputs, outputs = 3 * 16**2 + 32**2, 3 * 16**2 + 2 * 8**2 + 2 * 32**2
    kfac = found["structures"]["kfac"]
    assert kfac["stored_bytes"] == kfac["fitting_bytes"] == 4 * 2 * (inputs + outputs)
    assert kfac["passes"] > 1
    assert 0 < kfac["step_overhead"] < 10
    assert kfac["step_work"] > 0
    assert kfac["step_reads"] == kfac["stored_bytes"]


def test_the_default_is_added_up(retain: Any, config: Path) -> None:
    """And what a sketch would leave of it is said where that is less than half."""
    outcome, found = retain("plan", config), retain("plan", config, "--json").json
    whole = found["structures"]["kfac"]["stored_bytes"] + found["recipe"]["step"]
    assert f"the default: {_size(whole)} beside plain LoRA" in outcome.out
    assert f"(the weights take {_size(2 * found['parameters'])} in bfloat16)" in outcome.out
    assert "with --factor-rank" not in outcome.out  # 64 directions are more than these layers have
    assert "the default" not in retain("plan", config, "--structure", "diagonal").out
    thin = retain("plan", "smollm2-135m", "--json", "--factor-rank", 64).json
    less = thin["structures"]["kfac"]["stored_bytes"] + thin["recipe"]["step"]
    said = f"with --factor-rank 64, rank=64 in the fit: {_size(less)}"
    assert said in retain("plan", "smollm2-135m").out


def test_one_structure(retain: Any, config: Path) -> None:
    found = retain("plan", config.parent, "--structure", "shampoo", "--json").json
    assert list(found["structures"]) == ["shampoo"]


def test_some_layers(retain: Any, config: Path) -> None:
    found = retain("plan", config, "--targets", "q_proj,v_proj", "--json").json
    assert len(found["layers"]) == 4
    assert found["distinct_inputs"] == 2


def test_a_structure_without_sketches_is_null(retain: Any, config: Path) -> None:
    found = retain("plan", config, "--factor-rank", 4, "--json").json
    assert found["structures"]["ekfac"] is None
    assert found["notes"] == ["no sketches: ekfac, tridiagonal"]
    assert found["structures"]["kfac"]["stored_bytes"] > 0


def test_a_classifier(retain: Any, config: Path) -> None:
    found = retain("plan", config, "--num-labels", 3, "--json").json
    assert found["kind"] == "LlamaForSequenceClassification"
    assert found["head_work"] == 0


def test_quiet(retain: Any, config: Path) -> None:
    outcome = retain("plan", config, "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


class TestRefusals:
    def test_names(self, retain: Any, config: Path) -> None:
        retain("plan", "smollm2-134m").refused(
            "'smollm2-134m'", "the hub is switched off", "did you mean 'smollm2-135m'?"
        )
        retain("plan", "nobody/nothing").refused("'nobody/nothing'", "a config.json")
        retain("plan", config, "--structure", "kafc").refused("'kafc'", "did you mean 'kfac'?")
        retain("plan", config, "--targets", "q_prj").refused("q_prj", "q_proj")

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--rank", 0), ("--tokens", 0), ("--num-labels", 1)],
    )
    def test_numbers(self, retain: Any, config: Path, option: str, value: int) -> None:
        retain("plan", config, option, value).refused(option, f"'{value}'", "retain plan --help")

    @pytest.mark.parametrize("value", ["0", "-1", "wide", "2.5", ""])
    def test_factor_ranks(self, retain: Any, config: Path, value: str) -> None:
        for name in ("plan", "fit"):
            outcome = retain(name, config, f"--factor-rank={value}")
            outcome.refused("no such factor rank", f"'{value}'", "auto, whole, or a number")

    def test_paths(self, retain: Any, tmp_path: Path) -> None:
        retain("plan", tmp_path).refused("without config.json")
        retain("plan", tmp_path / "none.json").refused("none.json", "check the path")
        retain("plan", tmp_path / "none.gguf").refused("none.gguf", "check the path")

    @pytest.mark.parametrize("text", ["{", "[1]", '{"hidden_size": 3}', json.dumps({})])
    def test_a_file_that_is_no_configuration(self, retain: Any, tmp_path: Path, text: str) -> None:
        path = tmp_path / "config.json"
        path.write_text(text)
        retain("plan", path).refused("config.json", "check the name, the path")
