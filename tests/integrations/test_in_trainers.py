"""The real axolotl, LLaMA-Factory, ms-swift and Unsloth on a CPU (docs/support.md).

Each skips where its package is not installed: what passed elsewhere
`scripts/support_table.py --keep` has put into docs/support/.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import forked
from retain import attach_lora, fit_curvature, grow_lora, load_model
from retain.errors import ModelError
from retain.integrations import FittingCallback
from retain.models.processes import count
from retain.models.sites import lora_sites
from retain.retention.loader import loader_examples
from retain.training.zero import zero_of
from tiny import move, save_tiny

PACKAGES = {
    "axolotl": "axolotl", "LLaMA-Factory": "llamafactory", "ms-swift": "swift",
    "Unsloth": "unsloth",
}  # fmt: skip
SIZE = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
"""The smallest that bitsandbytes packs into 4 bits on a CPU."""

SOURCE = [{"text": f"a dog ran over hill {i} at noon"} for i in range(8)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": f"say {i}"},
                  {"role": "assistant", "content": f"it is {i} ok"}]}
    for i in range(16)
]  # fmt: skip

CALLED: dict[str, dict[str, Any]] = {
    "force": {"parts": ["force"]},
    "filter": {"parts": ["rows", "filter", "force"]},
    "budget": {"budget": 1e-3},
    "KL on answers": {"kl": 1.0},
    "layer-wise optimiser": {"parts": ["force"]},
    "full fine-tuning": {"parts": ["force"], "update": "proximal"},
    "4-bit base": {"parts": ["force"]},
    "DoRA": {"parts": ["force"]},
}
"""By feature: what the callback is told."""

STEPS = {"KL on answers": 6}
"""The divergence is measured at the first step, where it is 0, and each fourth after it."""

EVERY = (
    "force", "filter", "fresh rows", "budget", "KL on answers", "resume", "gradient accumulation",
    "bf16 autocast", "gradient checkpointing", "packing", "padding-free rows",
    "assistant-only loss", "torch.compile", "layer-wise optimiser", "DDP", "DeepSpeed",
    "4-bit base", "DoRA", "full fine-tuning",
)  # fmt: skip
NEVER = {
    *((t, "packing") for t in ("ms-swift", "Unsloth")),
    *((t, "padding-free rows") for t in ("axolotl", "ms-swift", "Unsloth")),
    *(("axolotl", f) for f in ("bf16 autocast", "DDP", "DeepSpeed", "torch.compile",
                               "layer-wise optimiser")),
}  # fmt: skip
REFUSED = "layer-wise optimiser"
"""GaLore's, in ms-swift LOMO: the layer-wise schedule of its transformers, 4.57, ends in an error
under torch 2.13."""
CELLS = [(t, f) for t in PACKAGES for f in EVERY if (t, f) not in NEVER]
Told = dict[str, Any]

COMPILED: Told = {"torch_compile": True, "torch_compile_backend": "eager"}
ZERO: Told = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip


def saved(place: Path) -> Path:
    save_tiny(place, **SIZE)
    _, tokenizer, _ = load_model(place)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(place)
    return place


def written(place: Path, rows: list[Any]) -> str:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place)


def curvature_of(base: Path, place: Path) -> Path:
    model, tokenizer, _ = load_model(base, dtype="float32")
    model = attach_lora(model, rank=2)
    return fit_curvature(model, SOURCE, tokenizer=tokenizer, progress=False).save(place)


def grown(base: Path, place: Path) -> Path:
    """An adapter that has learned, with fresh rows."""
    model, _, _ = load_model(base, dtype="float32")
    model = attach_lora(model, rank=2)
    move(model, 1, 0.05)
    grow_lora(model, 2).save_pretrained(place)
    return place


def of_axolotl(base: Path, out: Path, feature: str, called: Told, resume: Path | None) -> None:
    from axolotl.cli.train import do_cli
    from axolotl.integrations.base import PluginManager

    PluginManager._instance = None  # one of a process, which keeps the plug-ins of all trainings
    half, lora = feature == "bf16 autocast", feature != "full fine-tuning"
    told: Told = {
        "base_model": str(base), "plugins": ["retain.integrations.axolotl.RetentionPlugin"],
        "retention": called,
        "datasets": [{
            "path": written(out.parent / "chats.jsonl", CHATS), "ds_type": "json",
            "type": "chat_template", "roles_to_train": ["assistant"], "train_on_eos": "turn",
        }],
        "adapter": "lora", "lora_r": 4, "lora_alpha": 4, "lora_target_linear": True,
        "sequence_len": 256, "micro_batch_size": 2, "num_epochs": 1,
        "max_steps": STEPS.get(feature, 4),
        "gradient_accumulation_steps": 2 if feature == "gradient accumulation" else 1,
        "learning_rate": 0.02, "optimizer": "adamw_torch", "lr_scheduler": "constant",
        "output_dir": str(out), "logging_steps": 1, "bf16": half, "fp16": False, "tf32": False,
        "sample_packing": feature == "packing", "pad_to_sequence_len": False,
        "flash_attention": False, "sdp_attention": True, "val_set_size": 0,
        "gradient_checkpointing": feature == "gradient checkpointing", "seed": 1,
        **({"save_steps": 2} if feature == "resume" else {"save_strategy": "no"}),
        "dataset_prepared_path": str(out.parent / "prepared"), "use_wandb": False,
        **{f"lora_{n}_kernel": False for n in ("mlp", "qkv", "o")},
    }  # fmt: skip
    if feature == "4-bit base":
        told |= {"adapter": "qlora", "load_in_4bit": True}
    if feature == "DoRA":
        told["peft_use_dora"] = True
    if feature == "fresh rows":
        told["lora_model_dir"] = str(grown(base, out.parent / "grown"))
    if not lora:
        told = {n: v for n, v in told.items() if "lora" not in n and n != "adapter"}
    if resume:
        told["resume_from_checkpoint"] = str(resume)
    path = out.parent / "may.yaml"
    path.write_text(json.dumps(told))
    do_cli(str(path))


def of_llamafactory(base: Path, out: Path, feature: str, called: Told, resume: Path | None) -> None:
    sys.modules.setdefault("torchaudio", _empty("torchaudio"))  # of sounds, which are not read
    from llamafactory.train.tuner import run_exp

    data = out.parent
    rows = [{"instruction": q["content"], "input": "", "output": a["content"]}
            for q, a in (c["messages"] for c in CHATS)]  # fmt: skip
    (data / "rows.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    told: Told = {
        "model_name_or_path": str(base), "stage": "sft", "do_train": True,
        "finetuning_type": "full" if feature == "full fine-tuning" else "lora", "lora_rank": 4,
        "lora_alpha": 4, "lora_target": "all", "dataset_dir": str(data), "dataset": "rows",
        "template": "default", "cutoff_len": 96, "output_dir": str(out), "logging_steps": 1,
        "max_steps": STEPS.get(feature, 4), "per_device_train_batch_size": 2, "learning_rate": 0.02,
        "lr_scheduler_type": "constant", "bf16": feature == "bf16 autocast", "report_to": "none",
        "use_cpu": True, "packing": feature == "packing", "seed": 1,
        "neat_packing": feature == "padding-free rows",
        "gradient_accumulation_steps": 2 if feature == "gradient accumulation" else 1,
        "disable_gradient_checkpointing": feature != "gradient checkpointing",
        "save_strategy": "steps" if feature == "resume" else "no", "save_steps": 2,
    }  # fmt: skip
    if feature == "4-bit base":
        told |= {"quantization_bit": 4, "quantization_method": "bnb"}
    if feature == "DoRA":
        told["use_dora"] = True
    if feature == "torch.compile":
        told |= COMPILED
    if feature == "layer-wise optimiser":  # its own, which it has for whole models alone
        told |= {"finetuning_type": "full", "optim": "adamw_torch", "use_galore": True,
                 "galore_layerwise": True}  # fmt: skip
    if feature == "DeepSpeed":
        told["deepspeed"] = written(data / "zero.json", [ZERO])
    if feature == "fresh rows":
        told["adapter_name_or_path"] = str(grown(base, data / "grown"))
    if resume:
        told["resume_from_checkpoint"] = str(resume)
    run_exp(told, callbacks=[FittingCallback(**called)])


def of_swift(base: Path, out: Path, feature: str, called: Told, resume: Path | None) -> None:
    from swift.pipelines.train.sft import sft_main

    from retain.integrations.swift import register

    register(**called)
    told: Told = {
        "model": base, "model_type": "llama", "template": "chatml",
        "tuner_type": "full" if feature == "full fine-tuning" else "lora", "lora_rank": 4,
        "lora_alpha": 4, "dataset": written(out.parent / "chats.jsonl", CHATS),
        "callbacks": "retention", "per_device_train_batch_size": 2,
        "max_steps": STEPS.get(feature, 4), "learning_rate": 0.02, "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "output_dir": out, "add_version": "false", "torch_dtype": "float32", "max_length": 256,
        "report_to": "none", "use_cpu": "true", "fp16": "false",
        "bf16": str(feature == "bf16 autocast").lower(),
        "gradient_accumulation_steps": 2 if feature == "gradient accumulation" else 1,
        "gradient_checkpointing": str(feature == "gradient checkpointing").lower(), "seed": 1,
        "save_strategy": "steps" if feature == "resume" else "no", "save_steps": 2,
        "split_dataset_ratio": 0, "dataloader_num_workers": 0, "dataset_num_proc": 1,
    }  # fmt: skip
    if feature == "4-bit base":
        told |= {"quant_method": "bnb", "quant_bits": 4}
    if feature == "DoRA":
        told["use_dora"] = "true"
    if feature == "torch.compile":
        told |= COMPILED
    if feature == "layer-wise optimiser":
        told["optim"] = "lomo"
    if feature == "DeepSpeed":
        told["deepspeed"] = written(out.parent / "zero.json", [ZERO])
    if feature == "fresh rows":
        told["adapters"] = grown(base, out.parent / "grown")
    if resume:
        told["resume_from_checkpoint"] = resume
    sft_main([str(w) for n, v in told.items() for w in (f"--{n}", v)])


def of_unsloth(base: Path, out: Path, feature: str, called: Told, resume: Path | None) -> None:
    import unsloth
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    again, full = feature == "gradient checkpointing", feature == "full fine-tuning"
    place = grown(base, out.parent / "grown") if feature == "fresh rows" else base
    torch.manual_seed(1)
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(place), dtype=torch.float32, load_in_4bit=feature == "4-bit base",
        full_finetuning=full, use_gradient_checkpointing=again and "unsloth",
    )  # fmt: skip
    if not full:
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=4, lora_alpha=4, use_dora=feature == "DoRA",
            use_gradient_checkpointing=again and "unsloth",
        )  # fmt: skip
    more: Told = {
        "torch.compile": COMPILED,
        "layer-wise optimiser": {
            "optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"},
        "DeepSpeed": {"deepspeed": ZERO},
    }.get(feature, {})  # fmt: skip
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(CHATS),
        callbacks=[FittingCallback(**called)],
        args=SFTConfig(
            output_dir=str(out), max_steps=STEPS.get(feature, 4),
            per_device_train_batch_size=2, learning_rate=0.02,
            lr_scheduler_type="constant", logging_steps=1, report_to="none", disable_tqdm=True,
            gradient_accumulation_steps=2 if feature == "gradient accumulation" else 1,
            gradient_checkpointing=again, bf16=feature == "bf16 autocast",
            save_strategy="steps" if feature == "resume" else "no", save_steps=2, seed=1,
            assistant_only_loss=feature == "assistant-only loss", **more,
        ),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume and str(resume))


RUN = {
    "axolotl": of_axolotl, "LLaMA-Factory": of_llamafactory, "ms-swift": of_swift,
    "Unsloth": of_unsloth,
}  # fmt: skip


def _empty(name: str) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    return made


class Heard:
    """What the callback hears in a training."""

    def __init__(self, feature: str) -> None:
        begun = FittingCallback.on_train_begin

        def on_train_begin(call: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.call, self.args, self.state, self.model = call, args, state, more["model"]
            self.processes, self.zero = count(), zero_of(more["optimizer"]) is not None
            loader = more["train_dataloader"]
            if feature in ("packing", "padding-free rows", "assistant-only loss"):
                self.batch = next(iter(loader))
            if feature == "padding-free rows":
                self.rows = loader_examples(loader, 8, 0, causal=True)
            begun(call, args, state, control, **more)

        self.patch = (FittingCallback, "on_train_begin", on_train_begin)

    @property
    def nats(self) -> float:
        said = [e["predicted_nats"] for e in self.state.log_history if "predicted_nats" in e]
        return float(said[-1])

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {
            n.replace("module.", ""): p.detach().clone()
            for n, p in self.model.named_parameters() if p.requires_grad
        }  # fmt: skip


def check(feature: str, heard: Heard) -> None:
    """That the feature was on, and not only asked for."""
    args, call, modules = heard.args, heard.call, list(heard.model.modules())
    named = dict(heard.model.named_parameters())
    assert args.gradient_accumulation_steps == 1 + (feature == "gradient accumulation")
    assert bool(args.bf16) is (feature == "bf16 autocast")
    assert (call.why_no_filter is None) or feature not in ("filter", "fresh rows", "resume")
    on = [m for m in modules if getattr(m, "gradient_checkpointing", False)]
    assert bool(on) is (feature == "gradient checkpointing")
    assert any("magnitude" in n for n in named) is (feature == "DoRA")
    assert any(type(m).__name__ == "Linear4bit" for m in modules) is (feature == "4-bit base")
    assert any("lora_A" in n for n in named) is (feature != "full fine-tuning")
    if feature == "packing":
        assert heard.batch["input_ids"].shape[1] > 90  # two rows of it, or more
    if feature == "padding-free rows":  # rows of the filter are the documents
        longest = max(len(row.tokens) for row in heard.rows)
        assert heard.batch["input_ids"].shape[1] > 90 > 1.5 * longest
    if feature == "torch.compile":
        assert counters["frames"]["ok"] > 0
    if feature == "assistant-only loss":
        share = (heard.batch["labels"] != -100).float().mean()
        assert 0 < float(share) < 0.7
    if feature == "KL on answers":
        kl = [e["source_kl"] for e in heard.state.log_history if "source_kl" in e]
        assert kl[0] == 0 < kl[-1]


def trained(name: str, feature: str, base: Path, place: Path, **more: Any) -> Heard:
    place.mkdir(parents=True, exist_ok=True)
    called: Told = {
        "source": written(place / "source.jsonl", SOURCE), "strength": 1000.0,
        "fit": {"progress": False, "rows": 8, "batch_size": 4}, **CALLED.get(feature, {}),
    } | more.pop("called", {})  # fmt: skip
    if "budget" in called:
        called.pop("strength")
    if feature == "fresh rows":  # the trainer's model has moved
        called["curvature"] = str(curvature_of(base, place / "base.safetensors"))
    heard = Heard(feature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*heard.patch)
        RUN[name](base, place / "out", feature, called, more.pop("resume", None))
    return heard


def in_two(name: str, feature: str, base: Path, place: Path, called: Told) -> None:
    """One of the processes."""
    me = os.environ["RANK"]  # LLaMA-Factory ends the group with the training
    if feature == "DeepSpeed":
        import deepspeed

        for op in deepspeed.ops.__compatible_ops__:  # compile nothing
            deepspeed.ops.__compatible_ops__[op] = False
    heard = trained(name, feature, base, place / me, called=called)
    assert heard.processes == 2 and heard.zero is (feature == "DeepSpeed")
    torch.save((heard.nats, heard.weights), place / f"told-{me}.pt")


FREE: Told = {
    "strength": 0.0, "parts": ["force"], "budget": None, "kl": 0.0, "update": "gradient",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        pytest.param(t, f, marks=pytest.mark.shows(t, f, refused=f == REFUSED)) for t, f in CELLS
    ],
)  # fmt: skip
def test_it_trains_and_is_held(
    name: str, feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    base = saved(tmp_path / "base")
    if feature == REFUSED:
        pytest.importorskip("lomo_optim" if name == "ms-swift" else "galore_torch")
        with pytest.raises(ModelError, match="steps inside the backward pass"):
            trained(name, feature, base, tmp_path / "held")
        return
    if feature == "DeepSpeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    if feature in ("DDP", "DeepSpeed"):
        found = []
        for which, called in (("held", {}), ("free", FREE)):
            (place := tmp_path / which).mkdir()
            ended = forked.run(in_two, name, feature, base, place, called, processes=2,
                               CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # fmt: skip
            assert ended.returncode == 0, ended.stderr[-3000:]
            (nats, one), (_, two) = (torch.load(place / f"told-{i}.pt") for i in (0, 1))
            assert all(torch.equal(two[n], t) for n, t in one.items())
            found.append(nats)
        assert 0 < found[0] < 0.8 * found[1]
        return
    torch.compiler.reset()
    counters.clear()
    held = trained(name, feature, base, tmp_path / "held")
    check(feature, held)
    free = trained(name, feature, base, tmp_path / "free", called=FREE)
    assert 0 < held.nats < (0.8 * free.nats if feature != "fresh rows" else 1.0)
    if feature == "fresh rows":  # its nats are of what moved before, too
        old = lora_sites(load_grown(base, tmp_path / "held" / "grown"))
        for site, was in zip(lora_sites(held.model), old, strict=True):
            assert torch.equal(site.a[:2], was.a[:2]) and not torch.equal(site.a, was.a)
    if feature == "resume":
        out = tmp_path / "held" / "out"
        checkpoint = next(out.rglob("checkpoint-2"))
        again = trained(name, feature, base, tmp_path / "held", resume=checkpoint)
        assert again.state.global_step == 4
        for n, t in again.weights.items():
            assert torch.allclose(held.weights[n], t, atol=1e-6), n


def load_grown(base: Path, place: Path) -> nn.Module:
    from peft import PeftModel

    model, _, _ = load_model(base, dtype="float32")
    found: nn.Module = PeftModel.from_pretrained(model, str(place))
    return found
