"""Model cards: what an adapter's README.md says, what of it is its user's, and that no path is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

import retain
from retain.errors import ConfigError, ModelError, RetainWarning
from retain.models.cards import extend_card, hub_name, plain_name, with_base
from tiny import ROWS, tiny

DATA = [{"input_ids": row, "labels": row} for row in ([1, 5, 7, 2], [3, 5, 9, 4])]
BEGIN = "<!-- retain: written by it anew -->"


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text())


def test_peft_s_front_matter_and_our_section(tmp_path: Path) -> None:
    model = tiny("llama", moved=True)
    facts = {"Data": "96 rows\nof may.jsonl"}
    retain.save_adapter(model, tmp_path / "here", str(tmp_path), facts)
    retain.save_adapter(model, tmp_path / "hub", "smollm2-135m")
    here, hub = card_of(tmp_path / "here"), card_of(tmp_path / "hub")
    for card in (here, hub):
        assert card.data.library_name == "peft" and {"lora", "retain"} <= set(card.data.tags)
        assert str(tmp_path) not in str(card)
        assert "- Versions: retain " in card.text and "More Information Needed" not in card.text
    assert "- Data: 96 rows of may.jsonl\n" in here.text and here.data.base_model is None
    assert hub.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct" in hub.data.tags


def test_a_base_s_folder_and_a_model_that_peft_does_not_know(tmp_path: Path) -> None:
    model = tiny("llama")
    retain.save_adapter(model, tmp_path / "here", tmp_path / "base")
    told = json.loads((tmp_path / "here" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(tmp_path / "base")
    inner: Any = model.get_base_model()
    with pytest.raises(ModelError, match=r"no peft.PeftModel; got: LlamaForCausalLM"):
        retain.save_adapter(inner, tmp_path / "there", "tiny")
    assert not (tmp_path / "there").exists()


def test_what_a_user_wrote_stays(tmp_path: Path) -> None:
    model, file = tiny("llama"), tmp_path / "README.md"
    retain.save_adapter(model, tmp_path, "my/first")
    mine = file.read_text().replace(BEGIN, f"Above.\r\n\n{BEGIN}") + "\nÜber alles.\n"
    mine = mine.replace("---\n", "---\na: b\n", 1)
    file.write_bytes(mine.encode())
    retain.save_adapter(model, tmp_path, "my/first", {"Data": "june"})
    text = file.read_bytes().decode()
    assert text == mine.replace("my/first\n- V", "my/first\n- Data: june\n- V")
    retain.save_adapter(model, tmp_path, "my/second")
    text = file.read_bytes().decode()
    assert "Above.\r\n" in text and text.endswith("\nÜber alles.\n") and "a: b" in text
    assert "my/first" not in text and text.count(BEGIN) == 1


def test_what_a_killed_writer_of_a_card_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".README.md.retain-a_killed").mkdir()
    (tmp_path / ".README.md.retain-a_killed" / "README.md").touch()
    extend_card(tmp_path, "my/first", "## More", name="more")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_folder_that_one_works_in_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    retain.save_adapter(tiny("llama"), ".", "my/first")
    assert Path.cwd() == tmp_path
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("bad", [b"\xff\xfe", b"---\n[1, 2]\n---\n", b"---\na: [\n---\n"])
def test_a_card_that_cannot_be_read_stays_and_is_told(bad: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(bad)
    with pytest.warns(RetainWarning, match="the model card is not written"):
        retain.save_adapter(tiny("llama"), tmp_path, "my/base")
    assert (tmp_path / "README.md").read_bytes() == bad
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "base").mkdir(parents=True)
    names = {
        "my/base": "base", str(tmp_path / "x.gguf"): "x.gguf", "C:\\a\\b.jsonl": "b.jsonl",
        "~/models/m": "m", "/": "a folder", "word-problems:100": "word-problems:100",
    }  # fmt: skip
    for name, plain in names.items():
        assert (hub_name(name), plain_name(name)) == (None, plain), name
    assert plain_name("org/model") == hub_name("org/model") == "org/model"
    typed = "---\nbase_model: org/typed\n---\nText.\n"
    assert with_base(typed, "/of/this/machine") == typed  # who wrote it knows better
    peft = "---\nbase_model: /a/b\ntags: [lora, 'base_model:adapter:/a/b']\n---\nText.\n"
    assert yaml.safe_load(with_base(peft, "/a/b").split("---")[1]) == {"tags": ["lora"]}


def trained(
    folder: Path, arguments: Mapping[str, Any] | None = None, **options: Any
) -> tuple[retain.RetentionCallback, Trainer]:
    model = tiny("llama")
    curvature = retain.fit_curvature(model, ROWS["llama"], batch_size=4, progress=False)
    callback = retain.RetentionCallback(curvature, **{"strength": 7.0, **options})
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=1, learning_rate=0.1, report_to="none",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **(arguments or {}),
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, train_dataset=DATA, eval_dataset=DATA, callbacks=[callback]
    )
    trainer.train()
    return callback, trainer


def test_a_strength_of_0_held_nothing(tmp_path: Path) -> None:
    _, trainer = trained(tmp_path, strength=0.0)
    trainer.save_model()
    assert "- Parts that acted: none, so nothing held\n" in card_of(tmp_path).text


def test_a_trainer_s_checkpoints_and_folder_say_what_held(tmp_path: Path) -> None:
    callback, trainer = trained(tmp_path, budget=1e-3, source=ROWS["llama"])
    with pytest.raises(ConfigError, match="nothing has held a model yet"):
        retain.RetentionCallback(callback.curvature).write_card(tmp_path)
    trainer.save_model()
    found = [tmp_path / "checkpoint-1", tmp_path]
    for card in map(card_of, found):
        assert card.data.library_name == "peft"
        assert "- Parts that acted: filter, force" in card.text
        assert (
            "- Budget: 0.001 nats per token" in card.text
            and "- Source text: list: 4 rows" in card.text
        )
        assert "- Predicted forgetting: " in card.text
    for step, card in enumerate(map(card_of, found), 1):
        assert f"- Trained: {step} steps at a learning rate of 0.1, seed 42" in card.text
    measured = callback.force.holds[0].measured
    assert measured and f"- Measured KL divergence: {measured:.3g} nats" in card_of(tmp_path).text
    (tmp_path / "other").mkdir()
    trainer.save_model(str(tmp_path / "other"))
    callback.write_card(tmp_path / "other")
    assert str(card_of(tmp_path / "other")).count(BEGIN) == 1


def test_the_card_says_that_the_best_checkpoint_was_loaded(tmp_path: Path) -> None:
    best = {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True,  # so that it is the first
    }  # fmt: skip
    _, trainer = trained(tmp_path, best)
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-1")
    told = "- Trained: 2 steps at a learning rate of 0.1, seed 42"
    assert f"{told}; then the best checkpoint, checkpoint-1, was loaded\n" in card_of(tmp_path).text
    assert f"{told}\n" in card_of(tmp_path / "checkpoint-2").text


def test_a_card_stops_no_training(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, trainer = trained(tmp_path)
    assert trainer.state.global_step == 2 and (tmp_path / "README.md").read_bytes() == b"\xff"
    said = [str(w.message) for w in told if "the model card is not written" in str(w.message)]
    assert len(said) == 1
    card = card_of(tmp_path / "checkpoint-2").text
    assert "- Strength: 7" in card and "- Update:" not in card
    trained(tmp_path / "proximal", update="proximal")
    assert "- Update: proximal" in card_of(tmp_path / "proximal").text
