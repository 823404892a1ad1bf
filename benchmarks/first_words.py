"""How near the base's own answers a model stays: strengths, and the KL on the beginnings of answers.

SmolLM2-135M learns word problems in the shape of the demo (32 steps of 8 rows, 2e-3 falling to 0) in
a plain loop with `retain.Retention`. An arm is a strength, with or without the KL
(`retain.OutputKL`): ``s=1000,kl=1,batch=4``, or ``plain``. Loss is on 96 problems of another draw,
KL on 24 rows of the model's own that are held out, and the rest on greedy answers to the held-out
general prompts that are no sums, half of which (`tune`) are for choosing.

    python benchmarks/first_words.py --out words.jsonl plain s=100 s=1000,kl=1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import retain
from retain.curvature.fit.source import source_examples
from retain.data.batches import Example
from retain.data.draws import HELD_OUT
from retain.data.general_prompts import general_prompts
from retain.data.problems import problem_examples, word_problems
from retain.data.tokens import need
from retain.evaluation.answers import Answers, measure_answers
from retain.models.generating import sample_rows
from retain.models.sites import lora_sites
from retain.models.view import ModelView
from retain.provenance import provenance
from retain.retention.measure import Reference

STEPS, BATCH, RATE = 32, 8, 2e-3


def loss_of(view: ModelView, rows: list[Example]) -> Tensor:
    """The mean over predictions, in nats."""
    total, count = torch.zeros((), device=view.device), 0
    for batch in view.batches(rows, BATCH):
        logits = view.logits(batch).float()
        total = total + nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
        count += len(batch.targets)
    return total / count


def shares(answers: Answers, every: int = 1) -> dict[str, float]:
    """Of every so many-th answer: log-ratio a token, and shares."""
    rows = answers.rows[::every]
    tokens = sum(row.tokens for row in rows)
    return {
        "log_ratio": sum(row.log_ratio for row in rows) / tokens,
        "first_word": sum(row.first_word for row in rows) / len(rows),
        "task_form": sum(row.task_form for row in rows) / len(rows),
    }


def seen(model: Any, tokenizer: Any, reference: Reference, test: list[Example]) -> dict[str, Any]:
    """What people see of a trained model: see the module; greedy answers of 24 tokens."""
    model.eval()
    with torch.no_grad():
        loss = float(loss_of(ModelView(model, tokenizer), test))
    prompts = [p for p in general_prompts(half="held-out") if p.skill != "arithmetic"]
    answers = measure_answers(model, prompts, tokenizer=tokenizer, new_tokens=24)
    france = measure_answers(
        model, ["What is the capital of France?"], tokenizer=tokenizer, new_tokens=16
    )
    told = answers.summary()
    kept = {skill: group["kept"] for skill, group in told["skills"].items()}
    return {
        "loss": loss, "kl": reference.measure(model).kl, **shares(answers),
        "kept": told["overall"]["kept"]["value"], "kept_of": kept, "tune": shares(answers, 2),
        "prompts": len(answers.rows), "france": france.rows[0].tuned,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64, help="of the source")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # whose plans break off for some shapes
    base, tokenizer, _ = retain.load_model("smollm2-135m", dtype="bfloat16")
    torch.manual_seed(given.seed)
    model: Any = retain.attach_lora(base.to(given.device), rank=16, alpha=32)
    view, seed = ModelView(model, tokenizer), given.seed
    source = source_examples(view, "self", given.rows, 128, seed)
    held = sample_rows(
        model, tokenizer, count=24, max_length=128, seed=HELD_OUT + seed, half="held-out"
    )
    reference = Reference(model, source_examples(view, held, 24, 128, 0))
    curvature = retain.fit_curvature(model, source, progress=False)
    sites = lora_sites(model)
    weights = [w for site in sites for w in (site.a, site.b)]
    start = [w.detach().clone() for w in weights]
    train = problem_examples(need(tokenizer), word_problems("train", given.steps * BATCH, seed, 30))
    test = problem_examples(need(tokenizer), word_problems("test", 96, 77, 30))
    for arm in given.arms:
        with torch.no_grad():
            for w, first in zip(weights, start, strict=True):
                w.copy_(first)
        asked = {} if arm == "plain" else dict(part.split("=") for part in arm.split(","))
        options = {k: int(v) for k, v in asked.items() if k in ("every", "batch", "answers")}
        retention = None if arm == "plain" else retain.Retention(
            model, curvature, float(asked["s"]), rows=train, source=source,
            update="proximal" if asked.get("update") == "proximal" else "gradient",
            kl=retain.OutputKL(float(asked.get("kl", 0)), **options),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / given.steps)
        model.train()
        for step in range(given.steps):
            loss_of(view, train[step * BATCH : (step + 1) * BATCH]).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            if retention is None:
                optimizer.step()
            else:
                retention.step(optimizer)
            schedule.step()
            optimizer.zero_grad()
        if retention is not None:
            retention.finish()
        told = seen(model, tokenizer, reference, test)
        found = {"arm": arm, "seed": seed, **told, **provenance(seed)}
        print(json.dumps(found), flush=True)
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
