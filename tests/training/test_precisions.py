"""The two lines in every trainer and precision; bf16 agrees with float32 but for its rounding."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from retain import RetentionCallback, fit_curvature, load_model, measure_forgetting
from tiny import ROWS

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"bf16": False},
    "bf16": {"bf16": True},
    "nothing said": {},
}
DEFAULTS = {"sft": "bf16", "dpo": "bf16", "causal": "float32", "classifier": "float32"}
"""What is meant where nothing is said: TRL's default is bf16, that of transformers is not."""

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "filter": ({}, {}),
    "sketched": ({"rank": 4}, {}),
    "force alone": ({}, {"parts": ("force",)}),
    "budget": ({}, {"parts": ("force",), "budget": 0.02}),
    "filter and budget": ({}, {"budget": 0.02}),
    "proximal": ({}, {"parts": ("force",), "update": "proximal"}),
}
"""Of the fit, and of the callback."""

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
TEXTS = [f"{a} {b} {c}." for a in ("the", "a") for b in ("cat", "dog", "owl") for c in "xyzw"]
CHATS = [[{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}] for t in TEXTS]
SETS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text": ([{"text": t} for t in TEXTS], {}),
    "packing": ([{"text": t} for t in TEXTS], {"packing": True, "max_length": 32}),
    "wrapped": (
        [{"text": t} for t in TEXTS],
        {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
    ),
    "completion": ([{"prompt": t, "completion": " " + t[:5]} for t in TEXTS], {}),
    "assistant": ([{"messages": c} for c in CHATS], {"assistant_only_loss": True}),
}


def lora(kind: str = "CAUSAL_LM") -> LoraConfig:
    targets = ["query", "value", "dense"] if kind == "SEQ_CLS" else "all-linear"
    return LoraConfig(r=4, lora_alpha=8, task_type=kind, target_modules=targets)


def made(kind: str, data: str, half: bool, folder: Path, out: Path, said: dict[str, Any]) -> Any:
    """A trainer as a user's script has it."""
    common: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant", **said,
    }  # fmt: skip
    model, tokenizer, _ = load_model(folder, dtype="bfloat16" if half else "float32")
    tokenizer.chat_template = CHATML
    wilder(model)
    torch.manual_seed(0)
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        rows, more = SETS[data]
        return SFTTrainer(
            model=model, processing_class=tokenizer, peft_config=lora(),
            train_dataset=Dataset.from_list(rows), args=SFTConfig(**{**common, **more}),
        )  # fmt: skip
    if kind == "dpo":
        from trl import DPOConfig, DPOTrainer

        rows = [{"prompt": t, "chosen": " yes", "rejected": " no"} for t in TEXTS]
        return DPOTrainer(
            model=model, processing_class=tokenizer, peft_config=lora(),
            train_dataset=Dataset.from_list(rows), args=DPOConfig(**common),
        )  # fmt: skip
    if kind == "causal":
        data_set = [dict(tokenizer(t)) for t in TEXTS]
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        peft = get_peft_model(model, lora())
        arguments = TrainingArguments(**common)
        return Trainer(peft, arguments, data_collator=collator, train_dataset=data_set)
    peft = get_peft_model(encoder(half), lora("SEQ_CLS"))
    data_set = [{"input_ids": row["input_ids"], "labels": row["label"]} for row in LABELLED]
    arguments = TrainingArguments(**common)
    return Trainer(peft, arguments, data_collator=padded, train_dataset=data_set)


def wilder(model: torch.nn.Module) -> None:
    """Weights large enough for predictions that differ, so that there is something to forget."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(10)


LABELLED = [{"input_ids": [*r["input_ids"], 1 + i], "label": r["label"]}
            for i in range(6) for r in ROWS["bert"]]  # fmt: skip


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    size = max(len(r["input_ids"]) for r in rows)
    ids = torch.zeros(len(rows), size, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    labels = torch.tensor([r["labels"] for r in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def encoder(half: bool) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=32, num_attention_heads=2, num_labels=3, pad_token_id=0, **shape)
    )
    wilder(model)
    return model.to(torch.bfloat16) if half else model


@functools.cache
def trained(
    kind: str, way: str, precision: str, folder: Path, out: Path, data: str = "text",
    half: bool = False,
) -> tuple[list[float], list[float], float, float]:  # fmt: skip
    """Losses, predicted nats, and what is measured and predicted of the trained model."""
    fit, hold = WAYS[way]
    run = made(kind, data, half, folder, out, PRECISIONS[precision])
    source: list[dict[str, Any]] = [{"text": t.upper()} for t in TEXTS[:12]]
    if kind == "classifier":
        source = LABELLED[:12]
    tokenizer = None if kind == "classifier" else AutoTokenizer.from_pretrained(folder)
    curvature = fit_curvature(run.model, source, tokenizer=tokenizer, progress=False, **fit)
    if "budget" in hold and kind != "classifier":
        hold = {**hold, "source": source, "tokenizer": tokenizer}
    call = RetentionCallback(curvature, **{"strength": 3.0, **hold})
    run.add_callback(call)
    run.train()
    assert call.why_no_filter is None
    assert (call.recipe.filter is None) is (hold.get("parts") == ("force",))
    log = [e for e in run.state.log_history if "loss" in e]
    assert len(log) == 4
    measured = measure_forgetting(run.model, source, tokenizer=tokenizer).kl
    found = fit_curvature(run.model, source, tokenizer=tokenizer, progress=False, **fit)
    assert found.info.model == curvature.info.model
    nats = [e["predicted_nats"] for e in log]
    return [e["loss"] for e in log], nats, measured, curvature.quadratic(run.model)


CASES = [
    *(("sft", way, "text") for way in WAYS),
    *(("sft", "filter", data) for data in SETS if data != "text"),
    *(("sft", "filter and budget", data) for data in ("packing", "completion", "assistant")),
    *(("dpo", way, "text") for way in ("filter", "sketched", "force alone")),
    *(("causal", way, "text") for way in ("filter", "sketched", "budget")),
    *(("classifier", way, "text") for way in ("filter", "sketched", "force alone")),
    ("classifier", "budget", "text"),
]


@pytest.mark.parametrize(("kind", "way", "data"), CASES)
def test_bf16_agrees_with_float32(
    kind: str, way: str, data: str, tiny_folder: Path, tmp_path_factory: Any
) -> None:
    out = tmp_path_factory.getbasetemp()
    want = trained(kind, way, "float32", tiny_folder, out, data)
    got = trained(kind, way, "bf16", tiny_folder, out, data)
    # 8 bits of mantissa through two layers; and Adam's first steps are signs, so that a gradient
    # whose rounding is as large as itself moves a weight the whole way
    assert got[0] == pytest.approx(want[0], rel=0.02)
    assert got[1][-1] > 1e-4
    assert got[1] == pytest.approx(want[1], rel=0.15)
    assert got[2:] == pytest.approx(want[2:], rel=0.1)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_where_nothing_is_said_the_default_is_meant(
    kind: str, tiny_folder: Path, tmp_path_factory: Any
) -> None:
    told = (tiny_folder, tmp_path_factory.getbasetemp())
    want, got = (trained(kind, "filter", p, *told) for p in (DEFAULTS[kind], "nothing said"))
    assert got == want


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("way", ["filter", "filter and budget"])
def test_a_model_in_bfloat16_trains_too(
    kind: str, way: str, precision: str, tiny_folder: Path, tmp_path_factory: Any
) -> None:
    losses, nats, measured, _ = trained(
        kind, way, precision, tiny_folder, tmp_path_factory.getbasetemp(), half=True
    )
    assert all(loss == loss for loss in losses)
    assert nats[-1] > 0 and measured >= 0


def test_precisions_are_what_they_say(tiny_folder: Path, tmp_path: Path) -> None:
    """Else the tests above would compare float32 with itself."""
    for kind, default in DEFAULTS.items():
        for name, said in PRECISIONS.items():
            run = made(kind, "text", False, tiny_folder, tmp_path, said)
            assert run.args.bf16 is ((default if name == "nothing said" else name) == "bf16")
    if torch.cuda.is_available():
        return
    lost = trained("sft", "filter", "bf16", tiny_folder, tmp_path)[0]
    assert lost != trained("sft", "filter", "float32", tiny_folder, tmp_path)[0]
