"""Which labels still see a task that the model has learned too well?

    python benchmarks/confident.py --data-dir FOLDER [--seeds 3]

An encoder learns SST-2 until it is sure, its curvature is measured there with each kind of labels,
and then it learns CoLA with that curvature holding it, at several strengths. Sampled labels of a
sure model carry almost no gradient. The strengths of different Fishers are not comparable, so each
is swept, and compared at what CoLA gains. FOLDER holds ``glue/<task>/{train,validation}.jsonl.gz``
with the hub's field names (nyu-mll/glue). Writes benchmarks/results/confident.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

import retain
from retain.data.batches import Batch, batches
from retain.data.sources import encode, read_rows
from retain.files import write_json
from retain.models.forward import evaluating
from retain.provenance import provenance
from retain.types import Fisher

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "confident.json"
FISHERS: tuple[Fisher, ...] = ("mc", "exact", "empirical", "tempered", "reversed")
STRENGTHS = (1.0, 30.0, 1000.0, 30000.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="minilm-22m")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--structure", default="shampoo")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    sure: list[dict[str, Any]] = []
    bar = tqdm(total=args.seeds * (1 + len(FISHERS) * (len(STRENGTHS))))
    for seed in range(args.seeds):
        found, facts = _sequence(args, seed, bar)
        rows += found
        sure.append({"seed": seed, **facts})
    write_json(RESULT, {"model": args.model, "structure": args.structure, **provenance(0),
                        "confidence": sure, "rows": rows})  # fmt: skip
    for kind in ("none", *FISHERS):
        for strength in (0.0,) if kind == "none" else STRENGTHS:
            some = [r for r in rows if (r["fisher"], r["strength"]) == (kind, strength)]
            old, new = (sum(r[k] for r in some) / len(some) for k in ("old", "new"))
            print(f"{kind:10} {strength:8g}  sst2 {old:.3f}  cola {new:.3f}  sum {old + new:.3f}")


def _sequence(
    args: argparse.Namespace, seed: int, bar: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base, tokenizer, _ = retain.load_model(args.model, num_labels=2)
    model = retain.attach_lora(base, rank=8, seed=seed)

    def load(task: str, split: str, count: int) -> list[Batch]:
        path = args.data_dir / "glue" / task / f"{split}.jsonl.gz"
        found = encode(read_rows(path, count), tokenizer, max_length=64, causal=False)
        return list(batches(found, 16, 0))

    old, new = load("sst2", "train", 512), load("cola", "train", 256)
    old_test, new_test = load("sst2", "validation", 400), load("cola", "validation", 400)
    _train(model, old, epochs=8, seed=seed)
    learned, confidence = _score(model, old_test)
    for name, parameter in model.named_parameters():  # one head for both, which stays
        if "lora_" not in name:
            parameter.requires_grad_(False)
    start = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    _train(model, new, epochs=5, seed=seed)
    rows = [_row(seed, "none", 0.0, 0.0, model, old_test, new_test)]
    bar.update()
    text = list(read_rows(args.data_dir / "glue" / "sst2" / "train.jsonl.gz", 256))
    traces = {}
    for fisher in FISHERS:
        model.load_state_dict(start, strict=False)
        curvature = retain.fit_curvature(
            model, text, args.structure, tokenizer=tokenizer, fisher=fisher, rows=256,
            max_length=64, batch_size=16, temperature=4.0, seed=seed, progress=False,
        )  # fmt: skip
        traces[fisher] = sum(block.trace() for block in curvature.blocks.values())
        for strength in STRENGTHS:
            model.load_state_dict(start, strict=False)
            _train(model, new, epochs=5, seed=seed, curvature=curvature, strength=strength)
            nats = curvature.quadratic(model)
            rows.append(_row(seed, fisher, strength, nats, model, old_test, new_test))
            bar.update()
    return rows, {"sst2": learned, "mean_top_probability": confidence, "traces": traces}


def _train(
    model: nn.Module,
    data: Sequence[Batch],
    *,
    epochs: int,
    seed: int,
    curvature: retain.Curvature | None = None,
    strength: float = 0.0,
) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    held = None
    if curvature is not None:
        held = retain.Retention(model, curvature, strength)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(data), generator=order).tolist():
            logits = model(**data[i].inputs).logits
            nn.functional.cross_entropy(logits, data[i].targets).backward()
            optimizer.step() if held is None else held.step(optimizer)
            optimizer.zero_grad()


def _score(model: nn.Module, data: Sequence[Batch]) -> tuple[float, float]:
    """Accuracy, and the mean probability of the predicted class."""
    right, total, sure = 0, 0, 0.0
    with torch.no_grad(), evaluating(model):
        for batch in data:
            p = model(**batch.inputs).logits.softmax(-1)
            right += int((p.argmax(-1) == batch.targets).sum())
            sure += float(p.max(-1).values.sum())
            total += len(p)
    return right / total, sure / total


def _row(
    seed: int, fisher: str, strength: float, nats: float, model: nn.Module,
    old: Sequence[Batch], new: Sequence[Batch],
) -> dict[str, Any]:  # fmt: skip
    return {
        "seed": seed, "fisher": fisher, "strength": strength, "predicted_nats": nats,
        "old": _score(model, old)[0], "new": _score(model, new)[0],
    }  # fmt: skip


if __name__ == "__main__":
    main()
