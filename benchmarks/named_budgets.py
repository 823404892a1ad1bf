"""One budget for three skills, or one for each: what each skill loses, and what is learned.

    python benchmarks/named_budgets.py --arm single --seed 0 >> benchmarks/results/named-budgets.jsonl

Writes one JSON line a run. The sources are the model's own answers to general prompts of a skill
(the half ``source``), and each KL is measured on its answers to other prompts (``held-out``). With
``--confidence`` a budget is measured on eight other answers than those that its curvature was
fitted on, as ``retain train`` does; without it on eight of them, as the first runs were.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import torch

from retain import Retention, fit_curvature
from retain.data.batches import Example, batches
from retain.data.general_prompts import general_prompts
from retain.data.problems import problem_rows, word_problems
from retain.data.sources import encode
from retain.errors import RetainWarning
from retain.models.forward import forward_logits
from retain.models.generating import sample_rows
from retain.models.load import load_model
from retain.models.lora import attach_lora
from retain.provenance import provenance
from retain.retention.measure import Reference
from retain.training.loss import task_loss

NATS = {"facts": 0.02, "writing": 0.01, "code": 0.005}
ONE = 0.02
ROWS, PROBE, DOCUMENTS, STEPS, BATCH, RATE = 24, 8, 8, 24, 8, 2e-3
FIT: dict[str, Any] = {"rank": 64, "progress": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=("plain", "single", "named"), required=True)
    parser.add_argument("--confidence", type=float, help="0.5 is that of what is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RetainWarning)
    torch.manual_seed(args.seed)
    base, tokenizer, _ = load_model(args.model, dtype="bfloat16")
    model: Any = attach_lora(base, rank=16, seed=args.seed)
    began = time.process_time()

    def encoded(rows: Any) -> list[Example]:
        return encode(rows, tokenizer, max_length=256, causal=True)

    def written(skill: str, half: Any, seed: int) -> list[Any]:
        """So many answers of the base model; the documents, which come first, are left out."""
        prompts = [p.prompt for p in general_prompts(skill, half)]
        rows = sample_rows(
            model, tokenizer, count=ROWS + DOCUMENTS, max_length=64, seed=seed, prompts=prompts
        )
        return rows[DOCUMENTS:]

    sure = args.confidence is not None
    sources = {skill: written(skill, "source", args.seed) for skill in NATS}
    read = {s: written(s, "source", 200 + args.seed) for s in NATS} if sure else sources
    probes = {skill: encoded(rows[:PROBE]) for skill, rows in read.items()}
    held_out = {s: Reference(model, encoded(written(s, "held-out", 100 + args.seed))) for s in NATS}
    problems = (
        word_problems("train", STEPS * BATCH, args.seed), word_problems("test", 64, args.seed)
    )  # fmt: skip
    tasks = [encoded(problem_rows(tokenizer, some)) for some in problems]
    steps = [
        b for i in range(STEPS) for b in batches(tasks[0][i * BATCH : (i + 1) * BATCH], BATCH, 0)
    ]
    held: Retention | None = None
    if args.arm == "named":
        curvature = {s: fit_curvature(model, rows, **FIT) for s, rows in sources.items()}
        held = Retention(
            model, curvature, budget=NATS, confidence=args.confidence, probe=probes, rows=tasks[0]
        )
    elif args.arm == "single":
        rows = [row for some in sources.values() for row in some]
        probe = [e for some in probes.values() for e in some]
        held = Retention(
            model, fit_curvature(model, rows, **FIT), budget=ONE, confidence=args.confidence,
            probe=probe, rows=tasks[0],
        )  # fmt: skip
    fitted, spans = time.process_time(), [0.0, 0.0]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0
    )
    model.train()
    for number, batch in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - number / len(steps))
        start = time.process_time()
        loss = task_loss(forward_logits(model, batch), batch, [None] * BATCH) / len(batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        middle = time.process_time()
        if held is None:
            optimizer.step()
        else:
            held.step(optimizer)
        spans = [spans[0] + middle - start, spans[1] + time.process_time() - middle]
        optimizer.zero_grad()
    if held is not None:
        held.finish()
    force = None if held is None else held.recipe.force
    spent = {} if force is None else force.spent()
    with torch.no_grad():
        model.eval()
        total = count = 0.0
        for batch in batches(tasks[1], 8, 0):
            total += float(task_loss(forward_logits(model, batch), batch, [None] * 8))
            count += len(batch.targets)
    print(json.dumps({
        "schema": "retain.named-budgets/1", **provenance(args.seed), "arm": args.arm,
        "confidence": args.confidence,
        "budget": None if held is None else NATS if args.arm == "named" else ONE,
        "kl": {s: r.measure(model).kl for s, r in held_out.items()},
        "probe_kl": None if force is None else {n: one.measured for n, one in spent.items()},
        "probe_bound": None if force is None else {n: one.bound for n, one in spent.items()},
        "strength": None if force is None else force.strengths,
        "answer_loss": total / count,
        "seconds": {"fit": fitted - began, "backward": spans[0], "step": spans[1]},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
