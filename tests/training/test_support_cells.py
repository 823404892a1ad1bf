"""Each feature in each trainer of transformers and TRL and in a plain loop, and some in
``retain train`` and in a study (docs/support.md)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_head import classifier, labelled
from test_precisions import CHATML, padded
from test_trl import of_trl, rewards
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from retain import (
    OutputKL,
    Retention,
    RetentionCallback,
    continue_run,
    fit_curvature,
    fit_head,
    grow_lora,
    load_model,
    train_run,
)
from retain.errors import ModelError, SourceError
from retain.models.sites import lora_sites
from retain.models.view import ModelView
from retain.study.grid import expand
from retain.study.sequence import run_sequence
from retain.study.spec import read_study
from retain.study.state import SequenceState
from retain.study.work import Work
from study_parts import tiny_study
from tiny import exactly, move

SOURCE = [{"text": f"the cat sat on mat {i}"} for i in range(8)]
TRAINERS = ("transformers.Trainer", "SFTTrainer", "DPOTrainer", "GRPOTrainer", "plain loop")
SAID: dict[str, dict[str, Any]] = {
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16 autocast": {"bf16": True},
    "fp16 autocast": {"fp16": True, "max_steps": 3},
    "packing": {"packing": True, "max_length": 32},
    "assistant-only loss": {"assistant_only_loss": True},
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "resume": {"save_strategy": "steps", "save_steps": 1},
}
"""By feature: what the trainer's arguments say of it."""

CALLED: dict[str, dict[str, Any]] = {
    "force": {"parts": ("force",)},
    "filter": {"parts": ("rows", "filter", "force")},
    "budget": {"budget": 0.01, "source": SOURCE},
    "full fine-tuning": {"parts": ("force",)},
    "4-bit base": {"parts": ("force",)},
    "DoRA": {"parts": ("force",)},
    "KL on answers": {"kl": OutputKL(1.0, every=1), "source": SOURCE},
}
"""And what the callback is told."""

HALF = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}

REFUSED = {
    **{(t, "layer-wise optimiser"): ModelError for t in TRAINERS},
    ("plain loop", "DeepSpeed"): ModelError,
    ("GRPOTrainer", "filter"): SourceError,
}
EVERY = ("force", "fresh rows", "budget", "KL on answers", "gradient accumulation",
         *HALF, "gradient checkpointing", "4-bit base", "DoRA", "full fine-tuning")  # fmt: skip
CELLS = [
    *((t, f) for t in TRAINERS for f in EVERY),
    *((t, "filter") for t in TRAINERS if t != "GRPOTrainer"),
    *(("SFTTrainer", f) for f in ("packing", "assistant-only loss")),
    *((t, "torch.compile") for t in TRAINERS[1:]),
    ("DPOTrainer", "resume"), ("GRPOTrainer", "resume"), ("transformers.Trainer", "head"),
    *REFUSED,
]  # fmt: skip


def in_4_bits(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, device_map="cpu")


def saved_in_4_bits(folder: Path, out: Path) -> Path:
    in_4_bits(folder).save_pretrained(out)
    load_model(folder).tokenizer.save_pretrained(out)
    return out


def model_for(feature: str, folder: Path) -> tuple[Any, Any, Any, Any]:
    """A model, with its adapter where it has one; its tokenizer; the source's curvature and
    that of the past."""
    if feature == "4-bit base":
        _, tokenizer, _ = load_model(folder)
        model = in_4_bits(folder)
    else:
        model, tokenizer, _ = load_model(folder, dtype="float32")
    tokenizer.chat_template = CHATML
    options: dict[str, Any] = {"tokenizer": tokenizer, "rows": 4, "batch_size": 4}
    if feature != "full fine-tuning":
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM",
                          use_dora=feature == "DoRA")  # fmt: skip
        model = get_peft_model(model, lora)
    curvature = fit_curvature(model, SOURCE, progress=False, **options)
    past = None
    if feature == "fresh rows":
        move(model, 1, 0.05)
        past = fit_curvature(model, SOURCE, progress=False, **options)
        model = grow_lora(model, 2)
    return model, tokenizer, curvature, past


def trainer_of(
    name: str, feature: str, model: Any, tokenizer: Any, calls: list[Any], out: Path
) -> Trainer:
    common: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
        **{"bf16": False, "save_strategy": "no"}, **SAID.get(feature, {}),
    }  # fmt: skip
    texts = [f"say {i} and then no more" for i in range(8)]
    if name == "transformers.Trainer":
        ids = [tokenizer(t).input_ids[:16] for t in texts]
        data: Any = [{"input_ids": i, "labels": i} for i in ids]
        return Trainer(model, TrainingArguments(**common), train_dataset=data, callbacks=calls)
    kind = name.removesuffix("Trainer")
    made, config = of_trl(name, f"{kind}Config")
    rows: list[dict[str, Any]] = [{"text": t} for t in texts]
    if feature == "assistant-only loss":
        turns = ("user", "assistant")
        rows = [{"messages": [{"role": r, "content": t} for r in turns]} for t in texts]
    if kind == "DPO":
        rows = [{"prompt": t, "chosen": " yes", "rejected": " no"} for t in texts]
    if kind == "GRPO":
        rows, made = [{"prompt": t} for t in texts], functools.partial(made, reward_funcs=rewards)
        common |= {"num_generations": 2, "max_completion_length": 3}
    return made(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        args=config(**common), callbacks=calls,
    )  # fmt: skip


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def with_head(out: Path) -> None:
    """A classifier's new head, fitted first."""
    model = classifier("Bert")
    assert fit_head(model, labelled(), progress=False).placed
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    rows = [{"input_ids": r["input_ids"], "labels": r["label"]} for r in labelled()]
    curvature = fit_curvature(model, labelled(), progress=False)
    arguments = TrainingArguments(
        str(out), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    call = RetentionCallback(curvature)
    Trainer(model, arguments, padded, rows, callbacks=[call]).train()
    assert call.recipe.predicted() > 0


def scaler() -> torch.amp.GradScaler:
    """One whose first scale is too large for half a precision, and whose next one is not."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**22, backoff_factor=2.0**-15)


def in_a_loop(feature: str, model: Any, tokenizer: Any, curvature: Any, options: Any) -> float:
    def batch(texts: list[str]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([tokenizer(text).input_ids for text in texts])
        return {"input_ids": ids, "labels": ids}

    texts: Any = [f"say {i}" for i in range(8)]
    loader = torch.utils.data.DataLoader(texts, 2, collate_fn=batch)
    if feature == "gradient checkpointing":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if feature == "torch.compile":
        model.compile(backend="eager")
    source = options.pop("source", None)
    text = ModelView(model, tokenizer).read(source, 4, max_length=16) if source else ()
    held = Retention(model, curvature, rows=loader, probe=text, source=text, **options)
    assert (held.recipe.filter is None) is ("force" in options.get("parts", ())[:1])
    model.train()
    scaled = scaler()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step, each in enumerate(loader):
        with torch.autocast("cpu", HALF.get(feature), enabled=feature in HALF):
            loss = model(**each).loss
        if feature == "fp16 autocast":
            scaled.scale(loss).backward()
            if step % 2:  # to clip
                scaled.unscale_(optimizer)
            held.step(optimizer, scaled)
            optimizer.zero_grad()
            continue
        loss.backward()
        if step % 2 or feature != "gradient accumulation":
            held.step(optimizer)
            optimizer.zero_grad()
    held.finish()
    assert scaled.get_scale() == (2.0**7 if feature == "fp16 autocast" else 2.0**22)
    outputs = held.recipe.outputs
    assert (outputs is None) is ("kl" not in options) and (outputs is None or outputs.last > 0)
    return held.predicted()


@pytest.mark.parametrize(
    ("name", "feature"),
    [pytest.param(t, f, marks=pytest.mark.shows(t, f, refused=(t, f) in REFUSED))
     for t, f in CELLS],
)  # fmt: skip
def test_it_trains_and_is_held(
    name: str, feature: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if feature == "head":
        return with_head(tmp_path)

    def begun() -> tuple[Any, Any, Any, dict[str, Any]]:
        model, tokenizer, curvature, past = model_for(feature, tiny_folder)
        return model, tokenizer, curvature, {"past": past, **CALLED.get(feature, {})}

    model, tokenizer, curvature, options = begun()
    before = state_of(model)
    if (name, feature) == ("plain loop", "DeepSpeed"):
        engine = type("DeepSpeedEngine", (torch.nn.Module,), {})()
        stepper = type("DeepSpeedZeroOptimizer", (torch.optim.SGD,), {})(model.parameters(), 1.0)
        with pytest.raises(ModelError):
            Retention(engine, curvature)
        with pytest.raises(ModelError):
            Retention(model, curvature).step(stepper)
        return None
    if (name, feature) == ("plain loop", "layer-wise optimiser"):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with pytest.raises(ModelError):
            Retention(model, curvature)
        return None
    if name == "plain loop":
        assert in_a_loop(feature, model, tokenizer, curvature, options) > 0
    else:
        call = RetentionCallback(curvature, **options)
        trainer = trainer_of(name, feature, model, tokenizer, [call], tmp_path / "one")
        if feature == "fp16 autocast":  # as accelerate has it on a GPU
            trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scaler()
        if (name, feature) in REFUSED:
            if feature == "layer-wise optimiser":  # what GaLore's and APOLLO's leave the trainer
                each = {p: torch.optim.SGD([p]) for p in model.parameters() if p.requires_grad}
                trainer.optimizer = LayerWiseDummyOptimizer(optimizer_dict=each, lr=0.1)
            with pytest.raises(REFUSED[name, feature]):
                trainer.train()
            return None
        trainer.train()
        assert any(e.get("predicted_nats", 0) > 0 for e in trainer.state.log_history)
        assert trainer.args.bf16 is (feature == "bf16 autocast")
        if feature == "fp16 autocast":
            assert trainer.accelerator.scaler.get_scale() == 2.0**7  # so one step was left out
        kl = [e["source_kl"] for e in trainer.state.log_history if "source_kl" in e]
        assert (kl == []) is (feature != "KL on answers") and all(v > 0 for v in kl[1:])
    if feature == "fresh rows":
        for site in lora_sites(model):
            old = before[f"base_model.model.{site.name}.lora_A.default.weight"]
            assert torch.equal(site.a[:2], old[:2]) and not torch.equal(site.a, old)
    after = state_of(model)
    assert any(not torch.equal(after[n], t) for n, t in before.items())
    if feature == "resume":
        again, _, curvature, options = begun()
        call = RetentionCallback(curvature, **options)
        other = trainer_of(name, feature, again, tokenizer, [call], tmp_path / "two")
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1"))
        exactly(state_of(again), after)
    return None


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SHORT: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "max_length": 64, "quiet": True}


@pytest.mark.shows("retain train", "4-bit base")
def test_a_run_of_a_4_bit_base_and_the_month_after_it(tiny_folder: Path, tmp_path: Path) -> None:
    model, data = saved_in_4_bits(tiny_folder, tmp_path / "four"), tmp_path / "rows.jsonl"
    lines(data, [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(8)])
    source = lines(tmp_path / "source.jsonl", SOURCE)
    told: dict[str, Any] = {"data": data, "learning_rate": 0.02, **SHORT}
    first = {"model": model, "source": source, "rank": 2, "keep_state": True}
    may = train_run(**told, **first, out=tmp_path / "may")
    june = continue_run(may.out, **told, out=tmp_path / "june")
    for run in (may, june):
        assert run.record.why_no_filter is None
        assert (run.record.history[-1].predicted or 0) > 0


@pytest.mark.shows("retain train", "assistant-only loss")
def test_a_run_on_chats_learns_the_answers_alone(tiny_folder: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load_model(tiny_folder, dtype="float32")
    tokenizer.chat_template = CHATML
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    turns = [
        {"role": r, "content": f"{r} says {i}"} for i in range(4) for r in ("user", "assistant")
    ]
    chats = [turns[i : i + 4] for i in (0, 2, 4, 0)]
    read = [tokenizer.apply_chat_template(
        c, return_dict=True, return_assistant_tokens_mask=True) for c in chats]  # fmt: skip
    masks = [r["assistant_masks"] for r in read]
    assert all(0 < sum(mask) < len(mask) for mask in masks)
    ready = [
        {"input_ids": r["input_ids"],
         "labels": [t if m else -100 for t, m in zip(r["input_ids"], mask, strict=True)]}
        for r, mask in zip(read, masks, strict=True)
    ]  # fmt: skip
    curvature = fit_curvature(
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")), SOURCE,
        tokenizer=tokenizer, progress=False,
    ).save(tmp_path / "c")  # fmt: skip
    found = {}
    for name, rows, loss in (
        ("chats", [{"messages": c} for c in chats], "assistant"), ("ready", ready, "assistant"),
        ("all", [{"messages": c} for c in chats], "all"),
    ):  # fmt: skip
        run = train_run(
            model=tmp_path / "m", data=lines(tmp_path / f"{name}.jsonl", rows), loss=loss,
            curvature=curvature, rank=2, dtype="float32", out=tmp_path / name, **SHORT,
        )  # fmt: skip
        found[name] = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert found["chats"] == found["ready"] != found["all"]


@pytest.mark.parametrize("feature", [
    pytest.param(f, marks=pytest.mark.shows("studies", f))
    for f in ("4-bit base", "gradient checkpointing")
])  # fmt: skip
def test_a_study_s_run_is_held(feature: str, tiny_folder: Path, tmp_path: Path) -> None:
    four, found = feature == "4-bit base", []
    model = saved_in_4_bits(tiny_folder, tmp_path / "four") if four else tiny_folder
    for again in (False,) if four else (False, True):
        folder = tmp_path / f"study-{again}"
        path = tiny_study(
            folder, model, methods={"auto": {"rows": 4}}, orders={"one": ["tasks/one.yaml"]},
            training={"learning_rate": 0.02, "batch_size": 4, "gradient_checkpointing": again},
        )  # fmt: skip
        run = expand(read_study(path), folder).runs[0]
        assert run.settings(0, 0).gradient_checkpointing is again
        work = Work("tiny", folder / "out", folder, data_dir=folder / "data")
        found.append(run_sequence(run, state=SequenceState(folder / "kept", {}), work=work))
    assert found[0]["predicted"][0] > 0
    for one in found[1:]:
        assert one["predicted"] == pytest.approx(found[0]["predicted"], rel=1e-4)
        assert one["losses"] == pytest.approx(found[0]["losses"], rel=1e-4)
