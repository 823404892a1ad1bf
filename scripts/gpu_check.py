"""What a GPU computes and costs: the same numbers as the CPU's, and the price of the recipe at 8B.

    python scripts/gpu_check.py --out runs/gpu                    # one GPU, some 5 minutes
    python scripts/gpu_check.py --device cpu --tiny --out runs/gpu-tiny

Parts, each of which writes one JSON file into --out as soon as it ends:

- ``versions``: libraries, card, and its rates of copies and of products.
- ``agreement``: fit, filter, training with a budget, months and softening in float64, on the CPU
  and on the device; the largest relative difference of each. A training on the device that is
  interrupted and resumed, against one that was not.
- ``large``: a Llama of the shape of an 8B model with random weights in bfloat16: seconds and peak
  memory of the fit, of the start, and of steps of 8,192 tokens, plain and held, in turns.
- ``small``: the same of a model of the shape of SmolLM2-135M, where launches cost more than
  arithmetic.

A part that fails writes what it said, and the next part runs. The exit status is 1 then.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainingArguments,
)

import retain
from retain.curvature.blocks.registry import names
from retain.data.batches import Example
from retain.models.sites import lora_sites
from retain.provenance import provenance
from retain.retention.recipe import Recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--layers", type=int, default=32, help="of the large model")
    parser.add_argument("--rounds", type=int, default=3, help="of turns")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument(
        "--tolerance", type=float, default=1e-9,
        help="of the agreement in float64, relative to the largest entry",
    )  # fmt: skip
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    failed = 0
    for part in options.parts.split(","):
        start = time.perf_counter()
        found: dict[str, Any] = {"part": part, "tiny": options.tiny, **provenance(0)}
        try:
            found |= PARTS[part](options)
            failed += "error" in found
        except Exception as error:
            failed += 1
            found |= {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        found["seconds"] = round(time.perf_counter() - start, 2)
        (options.out / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({k: v for k, v in found.items() if k not in _QUIET}), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 1 if failed else 0


_QUIET = ("versions", "hardware", "created", "seed", "commit", "tiny")


# Versions.


def _versions(options: Any) -> dict[str, Any]:
    device, size = options.device, 256 if options.tiny else 8192
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = _median(lambda: x @ x, device, 2 if options.tiny else 10)
    wide = torch.randn(2**16 if options.tiny else 2**29, device=device)
    copied = _median(wide.clone, device, 2 if options.tiny else 10)
    square = torch.randn(32 if options.tiny else 512, 32 if options.tiny else 512, device=device)
    gram = (square @ square.T).double()
    eigh = _median(lambda: torch.linalg.eigh(gram), device, 3)
    return {
        "bf16_tflops": round(2 * size**3 / seconds / 1e12, 2),
        "copy_gb_a_second": round(8 * wide.numel() / copied / 1e9, 1),
        "eigh_seconds": {str(len(gram)): eigh},
        "cuda": torch.version.cuda,
    }


# Agreement.


def _agreement(options: Any) -> dict[str, Any]:
    device = options.device
    wide = 32 if options.tiny else 64
    rows = _rows(12, 16, vocabulary=50, seed=1)
    source = _rows(16, 20, vocabulary=50, seed=2)
    found: dict[str, float] = {}
    kinds: list[tuple[str, int | None]] = [(name, None) for name in names()]
    kinds += [("kfac", 6), ("activation", 6)]
    for structure, rank in kinds:
        both = []
        for where in ("cpu", device):
            model = _opt(wide).to(where)
            c = retain.fit_curvature(
                model, source, structure=structure, rank=rank, batch_size=8, progress=False
            )
            random = torch.Generator().manual_seed(3)
            moved = {
                name: torch.randn(b.shape, generator=random, dtype=torch.float64).to(where)
                for name, b in c.blocks.items()
            }
            both.append({n: t.cpu() for n, t in c.matvec(moved).items()})
        found[f"fit {structure}" + (f" sketched {rank}" if rank else "")] = _apart(*both)
    for name, rank, extra in (
        ("filter and force", None, {"strength": 3.0}),
        ("filter of sketches", 6, {"strength": 3.0}),
        ("budget", None, {"budget": 1e-4}),
        ("proximal", None, {"strength": 3.0, "update": "proximal", "parts": ("force",)}),
    ):
        both = [
            _trained(_opt(wide).to(where), source, rows, rank, extra) for where in ("cpu", device)
        ]
        found[f"training, {name}"] = _apart(both[0], both[1])
    both = [_months(_opt(wide).to(where), source, rows) for where in ("cpu", device)]
    found["two tasks in fresh rows"] = _apart(both[0], both[1])
    both = [_softened(_opt(wide).to(where), source, rows) for where in ("cpu", device)]
    found["softening"] = _apart(both[0], both[1])
    resumed = _resumed(options, wide, source, rows)
    worst = max(found.values())
    told: dict[str, Any] = {"largest": worst, "apart": found, "resumed": resumed}
    if not worst <= options.tolerance:
        told["error"] = f"{worst:.3g} apart, above the tolerance of {options.tolerance:g}"
    return told


def _apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry of each tensor."""
    return max(
        float((a[n].cpu() - b[n].cpu()).abs().max() / a[n].abs().max().clamp(min=1e-300)) for n in a
    )


def _trained(
    model: nn.Module, source: list[Example], rows: list[Example], rank: int | None, extra: Any
) -> dict[str, Tensor]:
    c = retain.fit_curvature(model, source, structure="kfac", rank=rank, progress=False)
    held = retain.Retention(model, c, **({"rows": rows} | extra))
    _loop(model, rows, held.step)
    held.finish()
    nats = torch.tensor(c.quadratic(model), dtype=torch.float64)
    return _weights(model) | {"nats": nats, "strength": torch.tensor(held.strength)}


def _months(model: nn.Module, source: list[Example], rows: list[Example]) -> dict[str, Tensor]:
    c = retain.fit_curvature(model, source, structure="kfac", progress=False)
    recipe = Recipe(c, 3.0)
    for task in (rows[:6], rows[6:]):
        model = recipe.grow(model, 4)
        recipe.begin(model, partial(_all_of, task))

        def step(optimizer: Any) -> None:
            recipe.before_optimizer()
            optimizer.step()
            recipe.after_step(optimizer)

        _loop(model, task, step)
        recipe.end()
        recipe.consolidate(model, task)
    return _weights(model)


def _all_of(task: list[Example], count: int, seed: int) -> list[Example]:
    return task


def _softened(model: nn.Module, source: list[Example], rows: list[Example]) -> dict[str, Tensor]:
    c = retain.fit_curvature(model, source, structure="kfac", progress=False)
    held = retain.Retention(model, c, strength=0.0)
    _loop(model, rows, held.step)
    held.finish()
    soft = retain.soften(model, c).at(1.0)
    return {f"{n}": b @ a for n, (b, a) in soft.factors.items()}


def _loop(model: nn.Module, rows: list[Example], step: Callable[[Any], Any]) -> None:
    """Six steps of four rows, in the weights' own precision.

    Adam's usual epsilon of 1e-8 would turn rounding of 1e-16 in a gradient that is all but zero
    into a difference of 1e-8.
    """
    device = next(model.parameters()).device
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-2, eps=1e-3)
    for i in range(6):
        batch = [rows[(4 * i + j) % len(rows)].tokens for j in range(4)]
        ids = torch.tensor(batch, device=device)
        logits = model(input_ids=ids).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        step(optimizer)
        optimizer.zero_grad()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What the adapter adds to each layer."""
    return {s.name: (s.b.detach() @ s.a.detach()).cpu() for s in lora_sites(model)}


def _resumed(options: Any, wide: int, source: list[Example], rows: list[Example]) -> dict[str, Any]:
    """A trainer's run of 8 steps, and one that begins again at its checkpoint of step 4."""
    texts = [{"input_ids": list(e.tokens), "labels": list(e.tokens)} for e in rows]
    probe = [{"input_ids": list(e.tokens)} for e in source]
    ended = []
    with tempfile.TemporaryDirectory() as out:
        for checkpoint in (None, f"{out}/checkpoint-4"):
            model = _opt(wide).float().to(options.device)
            c = retain.fit_curvature(model, source, structure="kfac", progress=False)
            trainer = Trainer(
                model=model, train_dataset=texts,
                args=TrainingArguments(
                    output_dir=out, max_steps=8, per_device_train_batch_size=2, save_steps=4,
                    learning_rate=1e-2, report_to="none", use_cpu=options.device == "cpu",
                    disable_tqdm=True, logging_steps=100,
                ),
            )  # fmt: skip
            trainer.add_callback(retain.RetentionCallback(c, budget=1e-4, source=probe))
            trainer.train(resume_from_checkpoint=checkpoint)
            ended.append(_weights(model))
    equal = all(torch.equal(ended[0][n], ended[1][n]) for n in ended[0])
    return {"apart": _apart(ended[0], ended[1]), "bit_for_bit": equal}


def _opt(wide: int) -> Any:
    """A decoder in float64 throughout, which Llama is not: its norms round to float32."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50, hidden_size=wide, ffn_dim=2 * wide, num_hidden_layers=2, dropout=0.0,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=wide,
        attention_dropout=0.0, pad_token_id=0, init_std=0.1,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = OPTForCausalLM(config).double()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    return retain.attach_lora(model, rank=4, targets=targets)


def _rows(count: int, length: int, *, vocabulary: int, seed: int) -> list[Example]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (count, length), generator=random).tolist()
    return [Example(tuple(row), (*row[1:], 0), (*(True,) * (length - 1), False)) for row in ids]


# Cost.


TINY: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
"""The shape of both models where the script is tried."""


def _large(options: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": options.layers, "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    shape |= TINY if options.tiny else {}
    batch, length = (2, 16) if options.tiny else (4, 2048)
    return _cost(options, shape, [(batch, length)], checkpointing=True)


def _small(options: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    }  # fmt: skip
    shape |= TINY if options.tiny else {}
    return _cost(options, shape, [(2, 16)] if options.tiny else [(4, 128), (16, 512)])


ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "force": {"strength": 10.0, "parts": ("force",)},
    "recipe": {"strength": 10.0},
    "recipe with a budget": {"budget": 0.05},
}


def _cost(
    options: Any, shape: dict[str, Any], sizes: list[tuple[int, int]], checkpointing: bool = False
) -> dict[str, Any]:
    device, tiny = options.device, options.tiny
    torch.manual_seed(0)
    with _timed(device) as made:
        model = _llama(shape, device)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    vocabulary, count = shape["vocab_size"], 8 if tiny else 128
    source = _rows(count, 16 if tiny else 128, vocabulary=vocabulary, seed=1)
    rank: Any = 8 if tiny else "auto"
    found: dict[str, Any] = {
        "shape": shape, "adapter_rank": 16, "model": made, "fit": {},
        "source_tokens": sum(len(e.tokens) for e in source),
    }  # fmt: skip
    with _timed(device) as passed:
        _read(model, source, device)
    found["one_pass"] = passed
    for structure in ("activation", "kfac"):
        with _timed(device) as fitted:
            c = retain.fit_curvature(
                model, source, structure=structure, rank=rank, batch_size=8, progress=False
            )
        found["fit"][structure] = fitted | {"curvature_bytes": c.memory()}
        print(f"fit {structure}: {found['fit'][structure]}", flush=True)
    optimizer_of = torch.optim.AdamW
    fresh = [(s, s.a.detach().clone(), s.b.detach().clone()) for s in lora_sites(model)]
    found["steps"] = []
    for batch, length in sizes:
        ids = torch.randint(1, vocabulary, (batch, length), device=device)
        rows = _rows(8 if tiny else 64, min(length, 256), vocabulary=vocabulary, seed=2)
        starts: dict[str, list[float]] = {}
        steps: dict[str, list[float]] = {arm: [] for arm in ARMS}
        peaks: dict[str, float] = {}
        for _ in range(1 if tiny else options.rounds):
            for arm, held in ARMS.items():
                with torch.no_grad():
                    for site, a, b in fresh:
                        site.a.copy_(a)
                        site.b.copy_(b)
                with _timed(device) as start:
                    retention = held and retain.Retention(
                        model, c, rows=rows if "parts" not in held else None, **held
                    )
                starts.setdefault(arm, []).append(start["seconds"])
                optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad], 1e-4)
                with _timed(device) as all_of:
                    for number in range(2 if tiny else 5):
                        begun = _now(device)
                        with torch.autocast(torch.device(device).type, torch.bfloat16):
                            loss = model(input_ids=ids, labels=ids).loss
                        loss.backward()
                        retention.step(optimizer) if retention else optimizer.step()
                        optimizer.zero_grad()
                        if number:
                            steps[arm].append(_now(device) - begun)
                peaks[arm] = all_of["peak_gib"]
                told = [round(t, 4) for t in steps[arm]]
                print(f"{batch} x {length} {arm}: start {start}, steps {told}", flush=True)
                if retention:
                    retention.recipe.release()
                del retention, optimizer
        medians = {arm: statistics.median(times) for arm, times in steps.items()}
        found["steps"].append(
            {
                "batch": batch, "length": length, "seconds": medians, "all": steps,
                "over_plain": {a: round(t / medians["plain"], 4) for a, t in medians.items()},
                "start_seconds": {a: [round(t, 3) for t in ts] for a, ts in starts.items()},
                "start_tokens": sum(len(r.tokens) for r in rows), "peak_gib": peaks,
                "tokens_a_second": round(batch * length / medians["plain"], 1),
            }
        )  # fmt: skip
    return found


def _llama(shape: dict[str, Any], device: str) -> Any:
    config = LlamaConfig(**shape, max_position_embeddings=4096, pad_token_id=0)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.config.use_cache = False
    model = retain.attach_lora(model, rank=16)
    for site in lora_sites(model):  # as PEFT has them beside a base in bfloat16
        site.a.data, site.b.data = site.a.data.float(), site.b.data.float()
    return model


@torch.no_grad()
def _read(model: Any, source: list[Example], device: str) -> None:
    for i in range(0, len(source), 8):
        model(input_ids=torch.tensor([e.tokens for e in source[i : i + 8]], device=device))


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _timed(device: str) -> Iterator[dict[str, Any]]:
    """Seconds, and GiB at the peak (None on a CPU)."""
    cuda = device != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {}
    start = _now(device)
    yield found
    found["seconds"] = round(_now(device) - start, 3)
    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None
    found["now_gib"] = round(torch.cuda.memory_allocated() / 2**30, 3) if cuda else None


def _median(act: Callable[[], Any], device: str, repeats: int) -> float:
    act()
    times = []
    for _ in range(repeats):
        start = _now(device)
        act()
        times.append(_now(device) - start)
    return statistics.median(times)


PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "versions": _versions,
    "agreement": _agreement,
    "large": _large,
    "small": _small,
}


if __name__ == "__main__":
    sys.exit(main())
