"""``retain soften``: the folder that it writes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retain.curvature.curvature import load_curvature
from retain.models.load import load_model
from retain.models.saved import load_adapter
from retain.models.sites import lora_sites
from retain.report.metrics import number, short

WRITTEN = ["adapter", "soften.json", "soften.png", "soften.svg"]


@pytest.fixture
def soften(retain: Any, trained: Path, curvature: Path, tmp_path: Path) -> Any:
    def run(*argv: object, adapter: Path | None = None) -> Any:
        given: list[object] = ["soften", adapter or trained / "adapter", "--out", tmp_path / "out"]
        for option, value in (("--curvature", curvature), ("--budget", 1e-3)):
            given += [] if option in argv else [option, value]
        return retain(*given, *argv)

    return run


@pytest.fixture
def refuse(soften: Any, tmp_path: Path) -> Any:
    """Runs a command that must be refused, and must leave nothing."""

    def run(*argv: object, adapter: Path | None = None) -> Any:
        outcome = soften(*argv, "-q", adapter=adapter)
        assert not (tmp_path / "out").exists()
        return outcome

    return run


def record_of(out: Path) -> Any:
    return json.loads((out / "soften.json").read_text())


def nats(trained: Path, curvature: Path, adapter: Path) -> float:
    name = json.loads((trained / "train.json").read_text())["model"]["name"]
    return load_curvature(curvature).quadratic(load_adapter(load_model(name).model, adapter))


@pytest.fixture(scope="module")
def before(trained: Path, curvature: Path) -> float:
    """Predicted nats of the trained adapter."""
    return nats(trained, curvature, trained / "adapter")


def test_json(
    soften: Any, trained: Path, curvature: Path, model: Path, before: float, tmp_path: Path
) -> None:
    budget = 0.2 * before
    found = soften("--budget", budget, "--points", 5, "--json").json
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == WRITTEN
    record = record_of(out)
    assert found == {"adapter": str(out / "adapter"), "record": str(out / "soften.json"), **record}
    assert record["schema"] == "retain.soften/1"
    assert {"seed", "versions", "commit", "hardware", "created"} <= record.keys()
    assert (record["budget"], record["inside"], record["depth"]) == (budget, False, 2)
    assert record["budget_of"] == "predicted"
    assert record["unit"] == "half a squared distance"
    assert record["target_curvature"] is record["target_info"] is None
    curve, chosen = record["curve"], record["chosen"]
    assert len(curve) == 5
    assert curve[0]["nats"] == pytest.approx(before, rel=1e-4)
    assert chosen["nats"] == pytest.approx(budget, rel=1e-6)
    assert chosen["learned"] > chosen["scaled"]
    assert all(p["measured"] is None for p in [chosen, *curve])
    assert nats(trained, curvature, out / "adapter") == pytest.approx(budget, rel=1e-4)
    kept = [trained / "adapter" / "adapter_config.json", out / "adapter" / "adapter_config.json"]
    old, new = (json.loads(path.read_text()) for path in kept)
    for config in (old, new):
        config["target_modules"].sort()  # PEFT keeps a set
    assert old == new
    names = [p.name for p in (trained / "adapter").iterdir()]
    assert sorted(names) == sorted(p.name for p in (out / "adapter").iterdir())
    weights = [load_file(path.with_name("adapter_model.safetensors")) for path in kept]
    assert [(k, v.shape, v.dtype) for k, v in weights[0].items()] == [
        (k, v.shape, v.dtype) for k, v in weights[1].items()
    ]
    assert found["model"]["name"] == str(model)


def test_the_base_is_found_from_another_folder(
    soften: Any, retain: Any, model: Path, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(model.parent)
    assert soften("--model", model.name, "-q").code == 0
    monkeypatch.chdir(tmp_path)
    argv = ("--adapter", "out/adapter", "--source", source, "--rows", 2, "-q")
    assert retain("eval", *argv).code == 0


def test_another_base_is_told_by_the_record(
    soften: Any, retain: Any, other_model: Path, source: Path, tmp_path: Path
) -> None:
    assert soften("-q").code == 0
    argv = ("eval", "--adapter", tmp_path / "out" / "adapter", "--source", source, "--rows", 2)
    retain(*argv, "--model", other_model).refused("another base model")
    assert retain(*argv, "--json").json["notes"] == []


def test_text_and_pictures(soften: Any, before: float, tmp_path: Path) -> None:
    outcome = soften("--budget", 0.5 * before, "--points", 4)
    assert (outcome.code, outcome.err) == (0, "")
    for said in ("softened", "before", "after", "plain scaling", "next: retain eval --adapter"):
        assert said in outcome.out
    assert "measured" not in outcome.out
    out = tmp_path / "out"
    assert (out / "soften.png").read_bytes().startswith(b"\x89PNG")
    drawn = ElementTree.parse(out / "soften.svg")
    said = [e.get("aria-label") or "" for e in drawn.iter()]
    points = record_of(out)["curve"]
    for key, name in (("learned", "softened"), ("scaled", "scaled as a whole")):
        marks = [text for text in said if f"{name}, predicted" in text and "% kept" in text]
        assert len(marks) == len(points) + 1
        last = f"{number(points[-1]['nats'])} nats per token, {short(100 * points[-1][key])}% kept"
        assert any(last in text for text in marks)


def test_a_target_and_a_measurement(
    soften: Any, retain: Any, model: Path, trained: Path, data: Path, source: Path,
    before: float, tmp_path: Path,
) -> None:  # fmt: skip
    target = tmp_path / "target.safetensors"
    around = ("--adapter", trained / "adapter", "--structure", "kfac", "-q", "-o", target)
    assert retain("fit", model, data, *around).code == 0
    budget = 0.1 * before
    argv = ("--budget", budget, "--target-curvature", target, "--measure")
    found = soften(*argv, "--source", source, "--points", 7, "--json").json
    assert found["unit"] == "nats per token"
    assert found["depth"] == 1
    assert (found["target_around"], found["source"]) == ("adapter", str(source))
    known = [p for p in found["curve"] if p["measured"]]
    assert len(known) == 5
    assert (known[0]["mu"], known[-1]["mu"]) == (0, found["curve"][-1]["mu"])
    chosen = found["chosen"]
    assert found["budget_of"] == "measured"
    assert 0.98 * budget <= chosen["measured"]["kl"] <= budget < known[0]["measured"]["kl"]
    assert 0 < chosen["scaled_measured"]["kl"] < known[0]["scaled_measured"]["kl"]
    assert known[0]["scaled_measured"] == known[0]["measured"]
    written = tmp_path / "out" / "adapter"
    card = (written / "README.md").read_text()
    assert f"- Budget: {budget:g} measured nats per token\n- Predicted" in card
    assert f"- Measured KL divergence: {chosen['measured']['kl']:.3g} nats per token\n" in card
    assert f"- Softened from: {trained.name}, digest " in card and str(trained) not in card
    measured = retain(
        "eval", "--model", model, "--adapter", written, "--source", source, "--rows", 16, "--json"
    ).json["scores"]["source.kl"]["tuned"][0]  # fmt: skip
    assert chosen["measured"]["kl"] == pytest.approx(measured["value"], rel=1e-4)
    drawn = (tmp_path / "out" / "soften.svg").read_text()
    marks = [text for text in re.findall(r'aria-label="([^"]*)"', drawn) if "% kept" in text]
    assert sum("softened, measured" in text for text in marks) == 6
    assert sum("whole, measured" in text for text in marks) == 6


def test_text_that_the_model_writes(soften: Any, before: float) -> None:
    argv = ("--measure", "--rows", 4, "--max-length", 8, "--points", 2)
    found = soften("--budget", 0.3 * before, *argv, "--json").json
    assert found["source"] == "self"
    assert [bool(p["measured"]) for p in found["curve"]] == [True, True]


def test_inside_the_budget_it_is_the_adapter(
    soften: Any, trained: Path, before: float, tmp_path: Path
) -> None:
    outcome = soften("--budget", 2 * before, "--dtype", "float32")
    assert outcome.code == 0
    assert "inside the budget already" in outcome.out
    weights = [
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (trained, tmp_path / "out")
    ]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
    assert record_of(tmp_path / "out")["inside"] is True


def test_the_folder_is_plain_peft(
    soften: Any, model: Path, trained: Path, before: float, tmp_path: Path
) -> None:
    assert soften("--budget", 0.05 * before, "-q").code == 0
    ids = torch.tensor([[3, 8, 20, 7]])
    outs = []
    for folder in (None, trained / "adapter", tmp_path / "out" / "adapter"):
        base = AutoModelForCausalLM.from_pretrained(model)
        peft = base if folder is None else PeftModel.from_pretrained(base, str(folder))
        with torch.no_grad():
            outs.append(peft.eval()(ids).logits)
    assert 0 < float((outs[2] - outs[0]).norm()) < float((outs[1] - outs[0]).norm())


class TestRefusals:
    def test_values(self, refuse: Any, source: Path) -> None:
        refuse("--budget", 0).refused("budget", "above 0")
        refuse("--budget", -1).refused("budget", "above 0")
        refuse("--budget", "nan").refused("budget", "above 0")
        refuse("--source", source).refused("--source without --measure")
        refuse("--points", 1).refused("--points")
        refuse("--dtype", "bfloat").refused("did you mean 'bfloat16'?")
        refuse("--epsilon", 0).refused("epsilon")
        refuse("--depht", 2).refused("did you mean '--depth'?")

    def test_missing_options(self, retain: Any, trained: Path) -> None:
        for given in (["--budget", 1, "--out", "o"], ["--curvature", "c", "--out", "o"]):
            outcome = retain("soften", trained / "adapter", *given)
            assert outcome.code == 2
            assert outcome.err.count("\n") == 1
            assert "retain soften --help" in outcome.err

    def test_files(self, refuse: Any, tmp_path: Path, curvature: Path) -> None:
        refuse("--curvature", tmp_path / "none").refused("no such curvature", "retain fit")
        refuse("--target-curvature", tmp_path / "none").refused("no such curvature")
        refuse(adapter=tmp_path / "none").refused("no such adapter folder")
        refuse("--measure", "--source", tmp_path / "none.jsonl").refused("no such source")
        refuse("--curvature", curvature, "--model", tmp_path).refused("config.json")

    def test_another_model(self, refuse: Any, other_model: Path) -> None:
        refuse("--model", other_model).refused("another base model", "fingerprint")

    def test_another_model_and_its_curvature(
        self, refuse: Any, retain: Any, other_model: Path, source: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "other.safetensors"
        assert retain("fit", other_model, source, "-q", "-o", path).code == 0
        argv = ("--model", other_model, "--curvature", path)
        refuse(*argv).refused("the adapter was trained on another base model")

    def test_curvatures(
        self, refuse: Any, retain: Any, model: Path, source: Path, trained: Path, tmp_path: Path
    ) -> None:
        for options, said in (
            (("--space", "adapter"), "--space weight"),
            (("--structure", "tridiagonal"), "--structure kfac"),
            (("--adapter", trained / "adapter"), "without --adapter"),
            (("--targets", "q_proj"), "other layers"),
        ):
            path = tmp_path / "odd.safetensors"
            assert retain("fit", model, source, *options, "--rank", 4, "-q", "-o", path).code == 0
            refuse("--curvature", path).refused(said)
        refuse("--structure", "kfac").refused("unknown option")

    def test_layers_that_no_last_name_tells(
        self, soften: Any, retain: Any, model: Path, source: Path, tmp_path: Path
    ) -> None:
        """The refusal names what a curvature of an adapter on some blocks alone is fitted with."""
        config = LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1],
            init_lora_weights=False, task_type="CAUSAL_LM",
        )  # fmt: skip
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        tuned.save_pretrained(tmp_path / "some")
        names = [site.name for site in lora_sites(tuned)]
        soften(adapter=tmp_path / "some").refused("--targets takes whole names", names[0])
        fitted = ("--targets", ",".join(names), "-q", "-o", tmp_path / "some.safetensors")
        retain("fit", model, source, *fitted).done()
        soften("--curvature", tmp_path / "some.safetensors", adapter=tmp_path / "some").done()

    def test_an_adapter_that_is_not_finite(
        self, refuse: Any, trained: Path, tmp_path: Path
    ) -> None:
        adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
        weights = adapter / "adapter_model.safetensors"
        save_file({k: v * float("nan") for k, v in load_file(weights).items()}, weights)
        refuse(adapter=adapter).refused("not finite")

    def test_over_the_adapter_itself(self, soften: Any, trained: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "out" / "adapter"))
        kept = {p.name: p.read_bytes() for p in adapter.iterdir()}
        soften(adapter=adapter).refused("take the place of the adapter", "another --out")
        assert {p.name: p.read_bytes() for p in adapter.iterdir()} == kept
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["adapter"]

    def test_a_place_that_cannot_be_written(self, retain: Any, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        argv = ("--curvature", "c", "--budget", 1, "--out", tmp_path / "file" / "folder")
        retain("soften", "a", *argv).refused("cannot be written")
