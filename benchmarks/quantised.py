"""A curvature that was measured in bfloat16, used on the same base in 4 bits: what that costs.

    python benchmarks/quantised.py [--steps 60] [--strength 100] [--seeds 0] [--out FILE]

SmolLM2-135M learns word problems in nf4 (bitsandbytes), held by the curvature of the nf4 model
itself, and by that of the model in bfloat16, at one strength. Writes
benchmarks/results/quantised.json, or FILE: the KL divergence from the nf4 base on text that the model
sampled, and the loss on new problems, for each.
"""

from __future__ import annotations

import argparse
import base64
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from first_words import BATCH, loss_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import retain
from retain.curvature.fit.source import source_examples
from retain.data.problems import problem_examples, word_problems
from retain.files import write_json
from retain.models.builtin import locate
from retain.models.fingerprint import signature
from retain.models.sites import base_layers, lora_sites
from retain.models.view import ModelView
from retain.provenance import provenance
from retain.retention.measure import Reference

RESULT = Path(__file__).resolve().parent / "results" / "quantised.json"
ROWS, HELDOUT, LENGTH = 64, 16, 96
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--strength", type=float, default=100.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.backends.cuda.enable_cudnn_sdp(False)  # whose plans break off for some shapes
    loaded = retain.load_model("smollm2-135m", dtype="bfloat16")
    plain, tokenizer = retain.attach_lora(loaded.model, rank=16), loaded.tokenizer
    view = ModelView.of(plain, tokenizer)
    texts = source_examples(view, "self", ROWS + HELDOUT, LENGTH, 0, progress=False)
    source, heldout = texts[:ROWS], texts[ROWS:]
    ofplain = retain.fit_curvature(plain, source, progress=False)
    base = _packed(tokenizer)
    packed = retain.attach_lora(base, rank=16)
    own = retain.fit_curvature(packed, source, progress=False)
    cosine = _cosine(plain, packed)
    print(f"cosine of the signatures {cosine:.4f}", flush=True)
    runs = []
    for seed in options.seeds:
        for name, curvature in (("none", None), ("nf4", own), ("bfloat16", ofplain)):
            runs.append(_run(name, curvature, tokenizer, heldout, seed, options))
            print(runs[-1], flush=True)
    means = {
        name: {
            key: statistics.mean(r[key] for r in runs if r["curvature"] == name)
            for key in ("kl", "loss")
        }
        for name in ("none", "nf4", "bfloat16")
    }
    result = {
        **provenance(0), "steps": options.steps, "strength": options.strength, "cosine": cosine,
        "runs": runs, "means": means,
    }  # fmt: skip
    write_json(options.out, result)
    print(means)


def _packed(tokenizer: Any) -> Any:
    where, extra = locate("smollm2-135m")
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        where, quantization_config=four, dtype=torch.bfloat16, device_map=DEVICE, **extra
    ).eval()
    model.retain_tokenizer = tokenizer
    return model


def _cosine(plain: Any, packed: Any) -> float:
    vectors = []
    for model in (plain, packed):
        text = signature(model, base_layers(lora_sites(model))).partition(":")[2]
        raw = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.int8)
        vectors.append(raw.double())
    x, y = vectors
    return float(x @ y / (x.norm() * y.norm()))


def _run(
    name: str, curvature: Any, tokenizer: Any, heldout: Any, seed: int, options: Any
) -> dict[str, Any]:
    steps = options.steps
    model = retain.attach_lora(_packed(tokenizer), rank=16, seed=seed)
    view = ModelView.of(model, tokenizer)
    problems = {
        "train": word_problems("train", steps * BATCH, seed, 30),
        "test": word_problems("test", 48, seed, 30),
    }
    splits = {split: problem_examples(tokenizer, found) for split, found in problems.items()}
    reference = Reference(model, heldout)
    held = None
    if curvature is not None:
        held = retain.Retention(model, curvature, options.strength, rows=splits["train"], seed=seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for step in range(steps):
        loss_of(view, splits["train"][step * BATCH : (step + 1) * BATCH]).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if held is None:
            optimizer.step()
        else:
            held.step(optimizer)
        falling.step()
        optimizer.zero_grad()
    if held is not None:
        held.finish()
    model.eval()
    with torch.no_grad():
        losses = [float(loss_of(view, splits["test"][i : i + BATCH])) for i in range(0, 48, BATCH)]
    return {
        "curvature": name, "seed": seed, "kl": reference.measure(model).kl,
        "loss": statistics.mean(losses),
    }  # fmt: skip


if __name__ == "__main__":
    main()
