"""Whether a run forgets less without the rows that `retain.explain` names as the dearest.

    python benchmarks/dearest_rows.py --seed 0 >> benchmarks/results/dearest-rows.json

128 rows: 96 word problems, and 32 general prompts answered as if they were word problems. They are
learned once; then without the dearest 5 %, and without 5 % drawn. One JSON line a seed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from typing import Any

import torch

from retain import Retention, explain, fit_curvature
from retain.data.batches import Example, batches
from retain.data.general_prompts import general_prompts
from retain.data.problems import ask, problem_rows, word_problems
from retain.data.sources import encode
from retain.errors import RetainWarning
from retain.models.forward import forward_logits
from retain.models.generating import sample_rows
from retain.models.load import load_model
from retain.models.lora import attach_lora
from retain.provenance import provenance
from retain.retention.measure import Reference
from retain.training.loss import task_loss

ROWS, ODD, LEFT_OUT, STEPS, BATCH, RATE, STRENGTH = 128, 32, 6, 24, 8, 2e-3, 10.0


def learn(
    model: Any, held: Retention | None, rows: list[Example], seed: int, *, rate: float = RATE,
    batch_size: int = BATCH,
) -> None:  # fmt: skip
    """Trains the model's fresh adapter on the rows, in an order by the seed."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0
    )
    order = [
        i for e in range(2) for i in random.Random(seed + e).sample(range(len(rows)), len(rows))
    ]
    model.train()
    for step in range(STEPS):
        some = [rows[i] for i in order[step * batch_size : (step + 1) * batch_size]]
        (batch,) = batches(some, batch_size, 0)
        batch = batch.to(next(model.parameters()).device)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / STEPS)
        logits = forward_logits(model, batch)
        (task_loss(logits, batch, [None] * batch_size) / len(batch.targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if held is None:
            optimizer.step()
        else:
            held.step(optimizer)
        optimizer.zero_grad()
    if held is not None:
        held.finish()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RetainWarning)
    seed, began = args.seed, time.process_time()
    base, tokenizer, _ = load_model(args.model, dtype="bfloat16")
    model: Any = attach_lora(base, rank=16, seed=seed)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    problems = problem_rows(tokenizer, word_problems("train", ROWS, seed))
    asked = random.Random(seed).sample(general_prompts(half="source"), ODD)
    odd = [
        {"prompt": ask(tokenizer, p.prompt), "completion": row["completion"]}
        for p, row in zip(asked, problems[ROWS - ODD :], strict=True)
    ]

    def encoded(rows: Any) -> list[Example]:
        return encode(rows, tokenizer, max_length=256, causal=True)

    rows = encoded(problems[: ROWS - ODD] + odd)
    test = encoded(problem_rows(tokenizer, word_problems("test", 64, seed)))
    prompts = [p.prompt for p in general_prompts(half="source")]
    source = sample_rows(model, tokenizer, count=48, max_length=64, seed=seed, prompts=prompts)
    curvature = fit_curvature(model, source, rank=64, progress=False)
    held_out = sample_rows(model, tokenizer, count=48, max_length=64, seed=100, half="held-out")
    reference = Reference(model, encoded(held_out))

    def run(left_out: set[int]) -> dict[str, Any]:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        kept = [e for i, e in enumerate(rows) if i not in left_out]
        learn(model, Retention(model, curvature, STRENGTH, rows=kept), kept, seed)
        with torch.no_grad():
            every = list(batches(test, BATCH, 0))
            loss = sum(float(task_loss(forward_logits(model, b), b, [None] * BATCH)) for b in every)
        return {
            "left_out": sorted(left_out),
            "predicted": curvature.quadratic(model),
            "kl": reference.measure(model).kl,
            "answer_loss": loss / sum(len(b.targets) for b in every),
        }

    runs = {"all": run(set())}
    before = time.process_time()
    found = explain(model, curvature, rows)
    seconds = time.process_time() - before
    order = [row.row for row in found.rows]
    drawn = set(random.Random(seed + 7).sample(range(ROWS), LEFT_OUT))
    runs |= {"without dearest": run(set(order[:LEFT_OUT])), "without drawn": run(drawn)}
    runs["without cheapest"] = run(set(order[-LEFT_OUT:]))
    print(json.dumps({
        "schema": "retain.dearest-rows/1", **provenance(seed), "strength": STRENGTH, "runs": runs,
        "odd": {str(n): sum(i >= ROWS - ODD for i in order[:n]) for n in (LEFT_OUT, ODD)},
        "shares": [round(row.share, 5) for row in found.rows], "order": order,
        "seconds": {"explain": seconds, "all": time.process_time() - began},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
