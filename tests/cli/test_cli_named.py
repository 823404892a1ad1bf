"""``retain train`` with named budgets: one run, months, what is refused, and what is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_parts import WORDS, Run, told, write_lines
from cli_parts import adapter as weights
from transformers import AutoTokenizer
from transformers.trainer_callback import PrinterCallback

import retain as package
from retain.config import TrainConfig
from retain.data.batches import Example, collate
from retain.data.general_prompts import SKILLS, general_prompts
from retain.data.sources import encode, read_rows
from retain.models.generating import sample_rows
from retain.models.sizes import pad_id, pad_multiple
from retain.training.callback import RetentionCallback
from retain.training.loop import _arguments
from retain.training.loss import head_of
from retain.training.trainer import Rows, RowTrainer
from tiny import exactly, save_tiny, with_chat

NATS = {"facts": 2e-4, "mine": 1e-4}
SIZE: dict[str, Any] = {
    "batch_size": 4, "max_steps": 4, "max_length": 16, "learning_rate": 0.05, "quiet": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat form, which answers prompts."""
    folder = tmp_path_factory.mktemp("talker") / "talker"
    return with_chat(save_tiny(folder, max_position_embeddings=512))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": " ".join(WORDS[(i * k) % 19] for k in range(1, 5))} for i in range(1, 13)]
    return write_lines(tmp_path_factory.mktemp("own") / "own.jsonl", rows)


@pytest.fixture(scope="module")
def first(talker: Path, own: Path, data: Path) -> dict[str, Any]:
    """Settings of a first month."""
    return {
        "model": talker, "data": data, "budget": NATS, "source": {"mine": own}, "rank": 2,
        "dtype": "float32", "factor_rank": 4, "keep_state": True, **SIZE,
    }  # fmt: skip


@pytest.fixture(scope="module")
def months(
    first: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[package.RunResult]:
    """Two, the second within the budgets of the first."""
    folder = tmp_path_factory.mktemp("months")
    may = package.train_run(**first, out=folder / "may")
    june = package.continue_run(may.out, data=data, out=folder / "june", **SIZE)
    return [may, june]


def trainer(model: Any, rows: list[Example], config: TrainConfig, folder: Path) -> RowTrainer:
    """A trainer of a user's own, with the settings of a run."""
    pad, multiple = pad_id(model), pad_multiple(model, rows, config.pad_multiple)

    def gathered(numbered: list[tuple[int, Example]]) -> dict[str, Any]:
        found = [example for _, example in numbered]
        batch = collate(found, pad, [number for number, _ in numbered], multiple)
        return {"batch": batch, "heads": [head_of(example, None, False) for example in found]}

    made = RowTrainer(
        model=model, args=_arguments(config, str(folder), False, False),
        train_dataset=Rows(rows), data_collator=gathered,
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def test_months_end_where_a_callback_with_the_same_curvatures_does(
    months: list[package.RunResult], own: Path, tmp_path: Path
) -> None:
    may, june = months
    config = may.record.config
    base, tokenizer, _ = package.load_model(config.model, dtype=config.dtype)
    model: Any = package.attach_lora(base, **config.adapter.model_dump())
    rows = encode(
        read_rows(config.data), tokenizer, max_length=16, causal=True, loss=config.loss
    )  # fmt: skip
    answers = sample_rows(
        model, tokenizer, count=8, max_length=128, seed=config.training.seed + 1,
        prompts=[p.prompt for p in general_prompts("facts", "source")], documents=False,
    )  # fmt: skip
    files = {name: may.out / f"curvature-{name}.safetensors" for name in NATS}
    curvatures = {name: package.load_curvature(path) for name, path in files.items()}
    sources = {"facts": answers, "mine": str(own)}
    callback = RetentionCallback(curvatures, budget=NATS, source=sources, tokenizer=tokenizer)
    run = trainer(model, rows, config.training, tmp_path)
    callback.attach(run)
    run.train()
    assert callback.why_no_filter is None
    exactly(saved(model), weights(may.out))
    recipe = callback.recipe
    assert {n: h.measured_nats for n, h in may.record.held_to.items()} == {
        n: spent.measured for n, spent in recipe.spent().items()
    }
    recipe.consolidate(model, rows, seed=config.training.seed)
    model = recipe.grow(model, 2, seed=config.adapter.seed + 1)
    again = RetentionCallback.driving(recipe, sources)
    again.tokenizer = tokenizer
    run = trainer(model, rows, june.record.config.training, tmp_path)
    again.attach(run)
    run.train()
    exactly(saved(model), weights(june.out))
    kept = {n: (june.out / "state" / f"source-{n}.safetensors").read_bytes() for n in NATS}
    assert kept == {n: path.read_bytes() for n, path in files.items()}
    assert not (june.out / "state" / "source.safetensors").exists()


def saved(model: Any) -> dict[str, torch.Tensor]:
    """A and B by the names of PEFT's files."""
    return {
        name.replace(".default.weight", ".weight"): p.detach().clone()
        for name, p in model.named_parameters()
        if ".lora_" in name
    }


def test_each_name_is_held_within_its_own_budget(months: list[package.RunResult]) -> None:
    for done in months:
        found = done.record.held_to
        assert list(found) == list(NATS) and done.record.curvature is None
        for name, held in found.items():
            assert held.budget == NATS[name]
            assert held.measured_nats is not None and 0 < held.measured_nats <= NATS[name]
            assert held.predicted_nats is not None and held.predicted_nats > 0
            assert held.curvature.info["rank"] == 4
        nats = [held.predicted_nats or 0.0 for held in found.values()]
        assert done.record.predicted_nats == pytest.approx(sum(nats) / 2)
    notes = {n: h.curvature.info["note"] for n, h in months[0].record.held_to.items()}
    assert notes["facts"] == "self:facts" and Path(notes["mine"]).name == "own.jsonl"
    assert all(h.curvature.seconds for h in months[0].record.held_to.values())
    assert months[1].record.config.budget == NATS
    state = told(months[1].out / "state" / "state.json")
    assert [run["budget"] for run in state["runs"]] == [NATS, NATS]


def test_the_card_says_it_of_each_name(months: list[package.RunResult], own: Path) -> None:
    for done in months:
        card = (done.adapter / "README.md").read_text()
        assert "of facts: what the base model answers to general prompts (facts): 128 rows" in card
        assert "- Source text of mine: own.jsonl: 12 rows" in card and str(own.parent) not in card
        for name, held in done.record.held_to.items():
            assert f"- Budget of {name}: {held.budget:g} nats per token" in card
            assert f"- Predicted forgetting of {name}: {held.predicted_nats:.3g} nats" in card
            assert f"- Measured KL divergence of {name}: {held.measured_nats:.3g} nats" in card


def test_the_source_half_alone_is_asked(
    first: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are chats; those that measure are others than those of the curvature."""
    seen: list[Any] = []

    def sampled(*args: Any, **options: Any) -> Any:
        seen.append((options["prompts"], sample_rows(*args, **options)))
        return seen[-1][1]

    monkeypatch.setattr("retain.models.generating.sample_rows", sampled)
    package.train_run(**first | {"budget": {"code": 0.1}, "source": None}, out=tmp_path / "run")
    source = [p.prompt for p in general_prompts("code", "source")]
    held_out = [p.prompt for p in general_prompts("code", "held-out")]
    assert [prompts for prompts, _ in seen] == [source, source]
    tokenizer = AutoTokenizer.from_pretrained(first["model"])
    (fitted, measured) = [[tokenizer.decode(r["input_ids"]) for r in rows] for _, rows in seen]
    assert (len(fitted), len(measured)) == (128, 8)
    assert all(text.startswith("<user>") for text in fitted + measured)
    assert not any(prompt[:40] in text for prompt in held_out for text in fitted + measured)
    assert not set(fitted) & set(measured)


def test_the_command_says_what_python_does(
    retain: Run, first: dict[str, Any], months: list[package.RunResult], tmp_path: Path
) -> None:
    argv: list[Any] = ["train", "--budget", "facts=2e-4", "--budget", "mine=1e-4"]
    argv += ["--source", f"mine={first['source']['mine']}", "--keep-state"]
    rest = {k: v for k, v in first.items() if k not in ("budget", "source", "keep_state", "quiet")}
    for name, value in rest.items():
        argv += [f"--{name.replace('_', '-')}", value]
    outcome = retain(*argv, "--out", tmp_path / "a").done()
    exactly(weights(tmp_path / "a"), weights(months[0].out))
    held = months[0].record.held_to["mine"]
    assert re.search(rf"mine\W+0.0001\W+{held.predicted_nats:.3g}\W+{held.measured_nats:.3g}\W",
                     outcome.out)  # fmt: skip
    yaml = tmp_path / "run.yaml"
    yaml.write_text(json.dumps({"budget": NATS, "source": {"mine": str(first["source"]["mine"])}}))
    short = [a for a in argv if "=" not in str(a) and a not in ("--budget", "--source")]
    retain(*short, "-c", yaml, "--out", tmp_path / "b", "-q").done()
    exactly(weights(tmp_path / "b"), weights(months[0].out))
    short.remove("--keep-state")
    more = ("--method", "none", "--budget", "code=0.1, mine=0.2", "--out", tmp_path / "c")
    found = retain(*short, "-c", yaml, *more, "--json").json
    assert found["config"]["budget"] == {"code": 0.1, "mine": 0.2}  # in place of the file's
    assert any("not used: source, budget" in note for note in found["notes"])


def test_the_last_line_of_the_trainer_s_log(
    first: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []
    before = RowTrainer.log

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        before(self, logs, *args, **kwargs)
        seen.append(logs)

    monkeypatch.setattr(RowTrainer, "log", log)
    done = package.train_run(**first, out=tmp_path / "run")
    last = seen[-1]
    for name, held in done.record.held_to.items():
        assert last[f"budget/{name}"] == NATS[name]
        assert last[f"predicted_nats/{name}"] == pytest.approx(held.predicted_nats)
        assert last[f"measured_nats/{name}"] == held.measured_nats


def test_with_a_confidence_the_bounds_are_within_the_budgets(
    retain: Run, first: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    done = package.train_run(**first, confidence=0.95, out=tmp_path / "may")
    june = retain(
        "train", "--continue-from", done.out, "--data", data, "--out", tmp_path / "june",
        "--max-steps", 2, "--batch-size", 4,
    )  # fmt: skip
    assert "at most" in june.done().out
    for out in (done.out, tmp_path / "june"):
        record = told(out / "train.json")
        assert record["config"]["confidence"] == 0.95
        for name, held in record["held_to"].items():
            assert 0 < held["measured_nats"] < held["bound_nats"] <= NATS[name]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--budget", "facs=0.02"], ["facs", ", ".join(SKILLS), "--source facs=FILE"]),
        (["--budget", "facts=0.02", "--source", "mine=x.txt"], ["mine", "--budget mine=0.02"]),
        (["--budget", "facts=0.02", "--source", "x.txt"], ["no name", "--source facts=FILE"]),
        (["--budget", "0.02", "--source", "a=x", "--source", "b=y"], ["--budget a=0.02"]),
        (["--budget", "facts=0.02", "--budget", "0.1"], ["'0.1'", "NAME=VALUE"]),
        (["--budget", "facts=0.02,facts=0.1"], ["twice"]),
        (["--budget", "facts=0"], ["above 0"]),
        (["--budget", "../facts=1"], ["letters, digits"]),
        (["--budget", "facts=0.02", "--curvature", "c"], ["leave --curvature out"]),
        (["--budget", "facts=0.02,code=0.1", "--update", "proximal"], ["leave --update out"]),
        (["--budget", "mine=0.02", "--source", "mine=none.txt"], ["no such source", "none.txt"]),
        (["--budget", "facts=0.02", "--num-labels", "3"], ["named budgets are of a model"]),
        (["--confidence", "0.95"], ["a confidence without one", "budget=0.05, confidence=0.95"]),
        (["--budget", "0.02", "--confidence", "95"], ["confidence", "0.999"]),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unloaded")
def test_what_is_refused_before_the_model_is_loaded(
    retain: Run, talker: Path, data: Path, tmp_path: Path, argv: list[str], said: list[str]
) -> None:
    outcome = retain("train", "--model", talker, "--data", data, "--out", tmp_path / "o", *argv)
    outcome.refused(*said)
    assert not (tmp_path / "o" / "adapter").exists()


def test_a_model_without_a_chat_form_wants_text(
    retain: Run, model: Path, data: Path, own: Path, tmp_path: Path
) -> None:
    argv = ("train", "--model", model, "--data", data, "--out", tmp_path / "o", "--rank", 2)
    argv = (*argv, "--max-steps", 1, "--budget")
    retain(*argv, "facts=1").refused("no chat template", "--source facts=FILE")
    retain(*argv, "facts=1,rest=1", "--source", f"facts={own}", "--source", "rest=self").done()
    held = told(tmp_path / "o" / "train.json")["held_to"]
    assert [h["curvature"]["info"]["note"] for h in held.values()] == [str(own), "self"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--budget", "0.1"], ["got: budget 0.1", "budgets of facts, mine"]),
        (["--budget", "facts=0.1"], ["got: budgets of facts"]),
        (["--budget", "facts=0.1,mine=1,code=1"], ["facts, mine, code"]),
        (["--strength", "3"], ["got: strength 3"]),
        (["--source", "mine=x.txt"], ["leave source out"]),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_a_month_of_other_names_is_refused(
    retain: Run, months: list[package.RunResult], data: Path, tmp_path: Path, argv: list[str],
    said: list[str],
) -> None:  # fmt: skip
    before = ("train", "--continue-from", months[0].out, "--data", data, "--out", tmp_path / "o")
    retain(*before, *argv).refused(*said)


def test_a_run_is_resumed_with_the_same_names(
    retain: Run, first: dict[str, Any], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    done = package.train_run(**first, save_steps=2, out=out)
    monkeypatch.chdir(own.parent)
    argv = ("train", "--resume", "--out", out, "-q", "--source", f"mine={own.name}")
    retain(*argv, "--budget", "mine=1e-4,facts=2e-4").done()
    assert list(told(out / "train.json")["held_to"]) == list(NATS)
    exactly(weights(out), weights(done.out))
    for other in ("0.1", "facts=2e-4,mine=3e-4", "facts=2e-4,code=1e-4,mine=1e-4"):
        retain(*argv, "--budget", other).refused("the run to resume has another budget")


def test_a_month_may_have_other_numbers(
    months: list[package.RunResult], data: Path, tmp_path: Path
) -> None:
    more = {"mine": 3e-4, "facts": 4e-4}
    done = package.continue_run(
        months[0].out, data=data, out=tmp_path / "run", **SIZE | {"max_steps": 1}, budget=more
    )
    assert done.record.config.budget == more
    assert {n: h.budget for n, h in done.record.held_to.items()} == more


def test_a_month_of_one_source_takes_no_names(
    retain: Run, trained: Path, talker: Path, data: Path, curvature: Path, model: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    one = tmp_path / "one"
    argv = ("train", "--data", data, "--max-steps", 1, "--batch-size", 4, "-q")
    retain(*argv, "--model", model, "--curvature", curvature, "--keep-state", "--out", one).done()
    retain(*argv, "--continue-from", one, "--out", tmp_path / "b", "--budget", "facts=1").refused(
        "got: budgets of facts", "allowed: one budget, or a strength"
    )


def test_what_reads_a_run_afterwards(
    retain: Run, months: list[package.RunResult], tmp_path: Path
) -> None:
    out = months[1].out
    retain("explain", months[0].out).refused("named budgets (facts, mine)")
    retain("compact", out, "--rank", 2, "--out", tmp_path / "cut", "-q").done()
    record = told(tmp_path / "cut" / "compact.json")
    assert [Path(p).name for p in record["curvature"]] == [
        "source-facts.safetensors", "source-mine.safetensors", "past.safetensors",
    ]  # fmt: skip
    assert record["nats"]["before"] == pytest.approx(months[1].record.predicted_nats, rel=1e-4)
