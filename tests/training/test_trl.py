"""The callback in TRL's trainers of preferences and of rewards, whose batches are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from retain import RetentionCallback, fit_curvature, load_model
from retain.errors import SourceError
from retain.retention.loader import loader_examples

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip

PRECISION: dict[str, Any] = {}
"""What the arguments say of it; see the folder's conftest."""


def common(folder: Path, tmp_path: Path, rows: list[dict[str, str]], config: Any) -> dict[str, Any]:
    model, tokenizer, _ = load_model(folder)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "model": model,
        "processing_class": tokenizer,
        "peft_config": lora,
        "train_dataset": Dataset.from_list(rows),
        "args": config(output_dir=str(tmp_path), **ARGUMENTS, **PRECISION),
    }


def of_trl(*names: str) -> list[Any]:
    """Classes of TRL; of some versions some cannot be imported beside this transformers."""
    import trl

    try:
        return [getattr(trl, name) for name in names]
    except RuntimeError as error:
        pytest.skip(f"TRL {trl.__version__} cannot import {names[-1]}: {str(error)[-60:]}")


def held(trainer: Any, **options: Any) -> RetentionCallback:
    source = [{"text": f"the cat sat on mat {i}"} for i in range(8)]
    curvature = fit_curvature(
        trainer.model, source, tokenizer=trainer.processing_class, progress=False
    )
    callback = RetentionCallback(curvature, **options)
    trainer.add_callback(callback)
    return callback


def predicted(trainer: Any) -> float:
    found = [e["predicted_nats"] for e in trainer.state.log_history if "predicted_nats" in e]
    return float(found[-1])


def test_dpo_is_filtered_and_held(tiny_folder: Path, tmp_path: Path) -> None:
    DPOConfig, DPOTrainer = of_trl("DPOConfig", "DPOTrainer")
    rows = [{"prompt": f"say {i}", "chosen": " ok", "rejected": f" no {i}"} for i in range(8)]
    trainer = DPOTrainer(**common(tiny_folder, tmp_path, rows, DPOConfig))
    if "input_ids" not in next(iter(trainer.get_train_dataloader())):
        pytest.skip("this TRL writes the rows of DPO into columns that the filter does not read")
    callback = held(trainer)
    trainer.train()
    assert callback.why_no_filter is None
    assert predicted(trainer) > 0
    read = loader_examples(trainer.get_train_dataloader(), 16, 0, causal=True)
    assert len(read) == 16  # both answers of all rows, each by itself
    say = trainer.processing_class("say").input_ids
    assert all(list(row.tokens[: len(say)]) == say for row in read)
    ids = {row["prompt"]: trainer.processing_class(row["prompt"]).input_ids for row in rows}
    for row in read:
        (prompt,) = [p for p in ids.values() if list(row.tokens[: len(p)]) == p]
        assert list(row.predict) == [at + 1 >= len(prompt) for at in range(len(row.predict))]


@pytest.mark.parametrize("name", ["KTO", "TPO"])
def test_a_mask_of_the_answer_tells_what_predicts(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Where the batches have no labels."""
    if name == "KTO":
        config, kind = of_trl("KTOConfig", "KTOTrainer")
        answers: dict[str, Any] = {"completion": " ok"}
    else:
        found = pytest.importorskip("trl.experimental.tpo")
        config, kind = found.TPOConfig, found.TPOTrainer
        answers = {"chosen": " ok", "rejected": " no", "reference": " yes"}
    rows = [
        {"prompt": f"say a rather long prompt {i}", **answers}
        | ({"label": i % 2 == 0} if name == "KTO" else {})
        for i in range(4)
    ]
    trainer = kind(**common(tiny_folder, tmp_path, rows, config))
    if "completion_mask" not in next(iter(trainer.get_train_dataloader())):
        pytest.skip("this TRL writes these rows in another way")
    callback = held(trainer)
    trainer.train()
    assert callback.why_no_filter is None
    read = loader_examples(trainer.get_train_dataloader(), 12, 0, causal=True)
    assert len(read) == len(rows) * len(answers)
    prompt = min(len(trainer.processing_class(row["prompt"]).input_ids) for row in rows)
    assert all(any(row.predict) and not any(row.predict[: prompt - 1]) for row in read)


@pytest.mark.parametrize("name", ["ORPO", "CPO"])
def test_pairs_in_columns_of_their_own_are_filtered(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    found = pytest.importorskip(f"trl.experimental.{name.lower()}")
    rows = [{"prompt": f"say {i}", "chosen": " ok", "rejected": f" no {i}"} for i in range(8)]
    arguments = common(tiny_folder, tmp_path, rows, getattr(found, f"{name}Config"))
    trainer = getattr(found, f"{name}Trainer")(**arguments)
    callback = held(trainer)
    trainer.train()
    assert callback.why_no_filter is None
    assert predicted(trainer) > 0
    read = loader_examples(trainer.get_train_dataloader(), 16, 0, causal=True)
    assert len(read) == 16  # both answers of all rows, each by itself
    say = trainer.processing_class("say").input_ids
    for row in read:
        assert say in [list(row.tokens[at : at + len(say)]) for at in (0, 1)]  # a BOS comes first
        assert any(row.predict) and not row.predict[0]  # the answer alone is predicted


def test_an_answer_without_its_prompt_is_no_row() -> None:
    """As in DPO's batches of before, whose prompt is a column of its own."""
    ids = torch.tensor([[3, 4, 5]])
    bare = {"prompt_input_ids": ids, "chosen_input_ids": ids, "rejected_input_ids": ids}
    data = torch.utils.data.DataLoader([bare], collate_fn=lambda rows: rows[0])  # type: ignore[arg-type]
    assert loader_examples(data, 4, 0, causal=True) == []
    bare |= {"chosen_labels": ids, "rejected_labels": ids}
    assert len(loader_examples(data, 4, 0, causal=True)) == 2


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


@pytest.fixture
def grpo(tiny_folder: Path, tmp_path: Path) -> Any:
    GRPOConfig, GRPOTrainer = of_trl("GRPOConfig", "GRPOTrainer")
    rows = [{"prompt": f"say {i}"} for i in range(8)]

    def config(**arguments: Any) -> Any:
        return GRPOConfig(num_generations=2, max_completion_length=4, **arguments)

    return GRPOTrainer(reward_funcs=rewards, **common(tiny_folder, tmp_path, rows, config))


def test_grpo_is_held_without_a_filter(grpo: Any) -> None:
    callback = held(grpo)
    grpo.train()
    assert callback.why_no_filter == "the trainer's batches hold no input_ids of two tokens or more"
    assert predicted(grpo) > 0


def test_a_filter_that_was_asked_for_needs_tokens(grpo: Any) -> None:
    held(grpo, parts=("rows", "filter", "force"))
    with pytest.raises(SourceError, match="hold no tokens for a filter to read"):
        grpo.train()
