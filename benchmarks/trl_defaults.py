"""What people see after TRL's own defaults: `SFTTrainer` as it comes, plain and with the two lines.

SmolLM2-135M learns the demo's word problems from ``prompt`` and ``completion`` rows. Of `SFTConfig`
only the steps and the learning rate are named (32 steps of 8 rows, 2e-3, as in the demo); precision
(bf16 autocast over float32 weights), checkpointing, clipping and schedule are TRL's. An arm is
``plain`` or options of `retain.RetentionCallback`: ``strength=1000,kl=1,update=proximal``, or
``strength=100,parts=rows+force``. Measured as in `first_words.py`: loss on 96 problems of another draw, KL on 24 held-out rows of the model's
own, greedy answers to the held-out general prompts that are no sums.

    python benchmarks/trl_defaults.py --out trl.jsonl plain strength=1000,kl=1,update=proximal
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from first_words import BATCH, RATE, STEPS, seen
from peft import LoraConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import retain
from retain.curvature.fit.source import source_examples
from retain.data.draws import HELD_OUT
from retain.data.problems import problem_examples, problem_rows, word_problems
from retain.data.tokens import need
from retain.models.generating import sample_rows
from retain.models.view import ModelView
from retain.provenance import provenance
from retain.retention.measure import Reference

READ: dict[str, Any] = {"update": str, "parts": lambda text: text.split("+")}


def arm_of(text: str, seed: int) -> dict[str, Any]:
    torch.backends.cuda.enable_cudnn_sdp(False)  # whose plans break off for some shapes
    base, tokenizer, _ = retain.load_model("smollm2-135m", dtype="float32")
    words = need(tokenizer)
    rows = problem_rows(words, word_problems("train", STEPS * BATCH, seed, 30))
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=base,
            args=SFTConfig(out, max_steps=STEPS, learning_rate=RATE, seed=seed,
                           use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no", disable_tqdm=True),
            train_dataset=Dataset.from_list(rows),
            processing_class=words,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )  # fmt: skip
        model: Any = trainer.model
        if text != "plain":
            asked: dict[str, Any] = dict(part.split("=") for part in text.split(","))
            options = {k: READ.get(k, float)(v) for k, v in asked.items()}
            curvature = retain.fit_curvature(model, "self", rows=64, tokenizer=words, seed=seed)
            trainer.add_callback(retain.RetentionCallback(curvature, **options))
        trainer.train()
        said = trainer.args
    view = ModelView(model, tokenizer)
    held = sample_rows(
        model, tokenizer, count=24, max_length=128, seed=HELD_OUT + seed, half="held-out"
    )
    reference = Reference(model, source_examples(view, held, 24, 128, 0))
    test = problem_examples(words, word_problems("test", 96, 77, 30))
    return {
        "arm": text, "seed": seed, **seen(model, tokenizer, reference, test),
        "trl": {"bf16": said.bf16, "gradient_checkpointing": said.gradient_checkpointing,
                "max_grad_norm": said.max_grad_norm, "schedule": str(said.lr_scheduler_type)},
        **provenance(seed),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for arm in given.arms:
        found = arm_of(arm, given.seed)
        print(json.dumps(found), flush=True)
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
