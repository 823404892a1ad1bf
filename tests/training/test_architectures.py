"""The two lines on models of many families, tiny and untrained: filter and force are at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Trainer,
    TrainingArguments,
)

from families import DEBERTA, ENCODERS, EXPERTS, FAMILIES, WORDS, built
from retain import RetentionCallback, attach_lora, fit_curvature
from retain.errors import CurvatureError, ModelError, SourceError


def adapted(family: str, targets: str | list[str] = "all-linear", **changes: Any) -> Any:
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(built(AutoModelForCausalLM, family, **changes), lora)


def classifier(family: str, targets: str | list[str] = "all-linear", **changes: Any) -> Any:
    model = built(AutoModelForSequenceClassification, family, **changes, num_labels=3)
    return attach_lora(model, rank=4, targets=targets)


def rows(count: int, length: int, seed: int) -> list[dict[str, Any]]:
    ids = torch.randint(2, WORDS, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def labelled(count: int, length: int, seed: int) -> list[dict[str, Any]]:
    found = rows(count, length, seed)
    return [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(found)]


def trained(model: Any, folder: Path, make: Any = rows) -> tuple[RetentionCallback, float]:
    """After three steps: the callback, and the nats it predicted last."""
    source = make(16, 12, seed=1)
    callback = RetentionCallback(fit_curvature(model, source, progress=False))
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=make(12, 10, seed=2), callbacks=[callback])
    trainer.train()
    predicted = [e["predicted_nats"] for e in trainer.state.log_history if "predicted_nats" in e]
    return callback, predicted[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_lines_hold_a_decoder(family: str, tmp_path: Path) -> None:
    callback, predicted = trained(adapted(family, **FAMILIES[family]), tmp_path)
    assert callback.why_no_filter is None
    assert predicted > 0


@pytest.mark.parametrize("family", ENCODERS)
def test_two_lines_hold_an_encoder(family: str, tmp_path: Path) -> None:
    model = classifier(family, **ENCODERS[family])
    callback, predicted = trained(model, tmp_path, labelled)
    assert callback.why_no_filter is None
    assert predicted > 0


@pytest.mark.parametrize("shared", [True, False])
def test_what_reads_tokens_of_deberta_is_held(shared: bool, tmp_path: Path) -> None:
    model = classifier("DebertaV2", ["value_proj", "dense"], share_att_key=shared, **DEBERTA)
    assert trained(model, tmp_path, labelled)[1] > 0


@pytest.mark.parametrize(
    ("shared", "said"),
    [(True, r"does not run exactly once.* 2 runs"), (False, r"pos_\w+_proj: \[1, 128, 16\]")],
)
def test_what_reads_positions_of_deberta_is_refused(shared: bool, said: str) -> None:
    model = classifier("DebertaV2", share_att_key=shared, **DEBERTA)
    with pytest.raises(CurvatureError, match=said) as caught:
        fit_curvature(model, labelled(8, 10, seed=1), progress=False)
    assert "target_modules" in str(caught.value)


def test_the_attention_of_a_mixture_of_experts_is_held(tmp_path: Path) -> None:
    callback, predicted = trained(adapted("Mixtral", ["q_proj", "v_proj"], **EXPERTS), tmp_path)
    assert callback.why_no_filter is None
    assert predicted > 0


def test_lora_on_bare_parameters_is_refused() -> None:
    model = adapted("Mixtral", **EXPERTS)  # PEFT wraps the router's and the experts' parameters
    with pytest.raises(ModelError, match=r"a bare parameter \(weight\) at .*mlp\.gate") as caught:
        fit_curvature(model, rows(4, 8, seed=1), progress=False)
    fix = 'target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]'
    assert fix in str(caught.value)
    model = adapted("Mixtral", ["q_proj", "k_proj", "v_proj", "o_proj"], **EXPERTS)
    assert fit_curvature(model, rows(4, 8, seed=1), progress=False).blocks


def seeing(**lora: Any) -> Any:
    """What AutoModelForCausalLM makes of a checkpoint that reads images too."""
    text = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **lora))


def test_a_model_that_reads_images_too_is_held_on_text(tmp_path: Path) -> None:
    model = seeing(exclude_modules=r".*vision_tower.*")
    callback, predicted = trained(model, tmp_path)
    assert callback.why_no_filter is None
    assert predicted > 0
    assert all("language_model" in site.name for site in callback.recipe.sites)


def test_lora_that_no_text_goes_through_is_refused_with_what_to_exclude() -> None:
    with pytest.raises(ModelError, match=r"9 of them, such as model\.vision_tower") as caught:
        fit_curvature(seeing(), rows(4, 8, seed=1), progress=False)
    assert 'exclude_modules=r".*vision_tower.*"' in str(caught.value)


def test_rows_with_images_are_refused_before_the_first_step(tmp_path: Path) -> None:
    def with_images(count: int, length: int, seed: int) -> list[dict[str, Any]]:
        some = rows(count, length, seed)
        images = {"pixel_values": torch.zeros(3, 28, 28)} if seed == 2 else {}
        return [row | images for row in some]

    model = seeing(exclude_modules=r".*vision_tower.*")
    with pytest.raises(SourceError, match="hold more than text; got: pixel_values"):
        trained(model, tmp_path, with_images)
