"""Whether the bounds of `retain certify` hold on items that they were not made from.

    python benchmarks/certified.py run --data-dir DATA --out certified.jsonl [--part 0/2]
    python benchmarks/certified.py read certified.jsonl [...] --out benchmarks/results/certified.json

60 adapters: five tasks, plain LoRA at three rates and one that is held, three seeds. Each answers 300
items of common knowledge and 400 of ARC's easy ones as ``certify`` asks them. ``read`` draws a third
of a skill's items, makes the bound from them, and compares it with what the others show: the loss
among those right before, of which the bound is an upper one. It does so once for each adapter, and
again with many draws. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from dearest_rows import STEPS, learn

from retain import Retention, fit_curvature
from retain.data.batches import Example
from retain.data.general_prompts import general_prompts
from retain.data.knowledge import knowledge_items
from retain.data.loading import encode_items, load_items
from retain.data.problems import problem_examples, word_problems
from retain.data.specs import load_task
from retain.data.tokens import need
from retain.errors import RetainWarning
from retain.evaluation.certify import answers_of, loss_bound
from retain.evaluation.skills import read_skills
from retain.files import write_json
from retain.models.generating import sample_rows
from retain.models.load import load_model
from retain.models.lora import attach_lora
from retain.models.view import ModelView
from retain.provenance import provenance

TASKS = ("word-problems", "cl15/agnews", "cl15/sst2", "cl15/dbpedia", "gsm8k")
ARMS = {
    "plain, 3e-4": (3e-4, 0),
    "plain, 1e-3": (1e-3, 0),
    "plain, 3e-3": (3e-3, 0),
    "held": (1e-3, 10),
}
SEEDS, BATCH, LENGTH, ARC = (0, 1, 2), 4, 64, 400
LONG = {"gsm8k": 640}  # whose answers are of up to 300 tokens
LEVEL, DRAWS = 0.95, 500
"""What a bound promises, and how often a skill's items are drawn anew."""


def items_of(data_dir: Path) -> list[dict[str, Any]]:
    """Rows as a user would give them to ``certify``."""
    known: list[dict[str, Any]] = [
        {"skill": "knowledge", "prompt": k.prompt, "choices": [o.strip() for o in k.options],
         "answer": k.options[k.answer].strip()}
        for k in knowledge_items()
    ]  # fmt: skip
    arc = load_items(load_task("arc_easy"), "eval", data_dir=data_dir, limit=ARC)
    asked: list[dict[str, Any]] = [
        {"skill": "arc", "prompt": i.prompt, "choices": [o.strip() for o in i.options],
         "answer": i.options[int(i.answer)].strip()}
        for i in arc
    ]  # fmt: skip
    told = [r for r in known + asked if len(set(r["choices"])) == len(r["choices"])]
    return list({(r["skill"], r["prompt"]): r for r in told}.values())


def rows_of(task: str, tokenizer: Any, data_dir: Path, seed: int) -> list[Example]:
    if task == "word-problems":
        return problem_examples(tokenizer, word_problems("train", STEPS * BATCH, seed, 30))
    length = LONG.get(task, LENGTH)
    spec, cut = load_task(task), {"tokenizer": tokenizer, "max_length": length}
    found = load_items(spec, "train", data_dir=data_dir, limit=STEPS * BATCH, seed=seed, **cut)
    return encode_items(found, tokenizer, max_length=length, causal=True, spec=spec)


def run(out: Path, data_dir: Path, part: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cuda.enable_cudnn_sdp(False)  # whose plans break off for some shapes
    warnings.simplefilter("ignore", RetainWarning)
    first, of = map(int, part.split("/"))
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    known = {(d["task"], d["arm"], d["seed"]) for d in done}
    left = [
        s for s in list(product(SEEDS, TASKS, ARMS))[first::of] if (s[1], s[2], s[0]) not in known
    ]
    base, words, _ = load_model("smollm2-135m", dtype="bfloat16")
    tokenizer = need(words)
    items = read_skills(items_of(data_dir))

    def right(model: Any) -> list[bool]:
        view = ModelView(model, tokenizer)
        return [right for _, right in answers_of(view, tokenizer, items, 1, 64)]

    before = right(base)
    model: Any = attach_lora(base, rank=16)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    prompts = [p.prompt for p in general_prompts(half="source")]
    source = sample_rows(model, tokenizer, count=32, max_length=64, prompts=prompts)
    curvature = fit_curvature(model, source, rank=64, progress=False)
    for seed, task, arm in left:
        began = time.process_time()
        model.load_state_dict(start, strict=False)
        rows = rows_of(task, tokenizer, data_dir, seed)
        rate, strength = ARMS[arm]
        held = Retention(model, curvature, strength, rows=rows) if strength else None
        learn(model, held, rows, seed, rate=rate, batch_size=BATCH)
        after = right(model)
        line = {
            "task": task, "arm": arm, "seed": seed, "skills": [i.skill for i in items],
            "before": before, "after": after, "seconds": time.process_time() - began,
            **provenance(seed),
        }  # fmt: skip
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{task} {arm} {seed}: {sum(before)} right, then {sum(after)}", flush=True)


Pair = tuple[bool, bool]


def counts(pairs: Sequence[Pair]) -> tuple[int, int, int]:
    """Lost, right before, all."""
    return pairs.count((True, False)), sum(b for b, _ in pairs), len(pairs)


def bound_and_fresh(pairs: Sequence[Pair], seed: str) -> tuple[float, float]:
    """The bound of a third of the items, and what the others say that it bounds."""
    order = random.Random(seed).sample(list(pairs), len(pairs))
    third = len(order) // 3
    bound = loss_bound(*counts(order[:third]), 0.25, LEVEL)
    lost, right, n = counts(order[third:])
    return bound, min(1.0, lost / (right - 0.25 * n)) if right > 0.25 * n else 1.0


def read(paths: Sequence[Path], out: Path) -> None:
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    lines.sort(key=lambda d: (d["task"], d["arm"], d["seed"]))
    result: dict[str, Any] = {
        "schema": "retain.certified/1", "adapters": len(lines), "level": LEVEL, "draws": DRAWS,
        "made": _made(lines), "skills": {},
    }  # fmt: skip
    for skill in dict.fromkeys(lines[0]["skills"]):
        told: list[dict[str, Any]] = []
        shares: list[float] = []
        for line in lines:
            every = zip(line["skills"], line["before"], line["after"], strict=True)
            pairs = [(b, a) for s, b, a in every if s == skill]
            name = f"{line['task']} {line['arm']} {line['seed']}"
            drawn = [bound_and_fresh(pairs, f"{name} {i}") for i in range(DRAWS)]
            bound, fresh = drawn[0]
            shares.append(statistics.fmean(f <= b for b, f in drawn))
            told.append({
                "adapter": name, "bound": bound, "fresh": fresh, "held": fresh <= bound,
                "right": [sum(b for b, _ in pairs), sum(a for _, a in pairs), len(pairs)],
            })  # fmt: skip
        result["skills"][skill] = {
            "held": sum(t["held"] for t in told), "held_in_all_draws": statistics.fmean(shares),
            "least": min(shares), "adapters": told,
        }  # fmt: skip
        print(skill, result["skills"][skill]["held"], "of", len(told), statistics.fmean(shares))
    write_json(out, result)


def _made(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Versions, commit and hardware, and of how many adapters."""
    every = [{k: line[k] for k in ("versions", "commit", "hardware")} for line in lines]
    return [
        one | {"adapters": every.count(one)} for i, one in enumerate(every) if one not in every[:i]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running, reading = commands.add_parser("run"), commands.add_parser("read")
    running.add_argument("--data-dir", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--part", default="0/1", help="which share of the adapters, such as 0/2")
    reading.add_argument("paths", type=Path, nargs="+")
    reading.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "run":
        run(args.out, args.data_dir, args.part)
    else:
        read(args.paths, args.out)


if __name__ == "__main__":
    main()
