"""What a curvature costs: against a plain forward and backward pass, and against other libraries.

    python benchmarks/overhead.py [--repeats 5] [--rows 32] [--dtype float32] [--no-peers]

Everything is measured in one process, in turns, so that what else the machine does falls on all
alike; a ratio is the median over repeats of the ratio to the baseline of the same repeat. Writes
benchmarks/results/overhead.json, docs/images/overhead.png and the tables of docs/overhead.md.

The other libraries are optional: see `peers` for how to install them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import torch
from peers import peers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

import retain
from retain.files import write_json
from retain.models.generating import sample_rows
from retain.models.sites import lora_sites
from retain.provenance import provenance
from retain.report.draw import write_figure
from retain.study.resources import trim_memory

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "overhead.json"
AGAIN = RESULT.with_name("overhead-zen4.json")
THIRD = RESULT.with_name("overhead-zen5.json")
FIGURE = ROOT / "docs" / "images" / "overhead.png"
PAGE = ROOT / "docs" / "overhead.md"
LENGTH, RANK, STEP_ROWS = 128, 8, 4
PARTS = ("fit", "step", "error")
Run = Callable[[Tensor], object]

FITS: dict[str, dict[str, Any]] = {
    "diagonal, adapter space": {"structure": "diagonal", "space": "adapter"},
    "diagonal, a quarter": {"structure": "diagonal", "share": 0.25},
    "kfac": {"structure": "kfac"},
    "shampoo": {"structure": "shampoo"},
    "tridiagonal": {"structure": "tridiagonal"},
    "activation": {"structure": "activation"},
    "ekfac": {"structure": "ekfac"},
    "kfac, rank 64": {"structure": "kfac", "rank": 64},
}
SLOW = {"ekfac", "kfac, rank 64"}
"""Measured twice only; they have no bound."""

STEPS: dict[str, dict[str, Any]] = {
    "diagonal, adapter space": {"structure": "diagonal", "space": "adapter"},
    "diagonal": {"structure": "diagonal"},
    "kfac": {"structure": "kfac"},
    "kfac, rank 64": {"structure": "kfac", "rank": 64},
    "shampoo": {"structure": "shampoo"},
    "tridiagonal": {"structure": "tridiagonal"},
    "kfac and the filter": {"structure": "kfac"},
}
FILTERED = {"kfac and the filter"}
TARGETS = {
    ("fit", "diagonal, adapter space"): 1.08,
    ("fit", "diagonal, a quarter"): 1.08,
    ("fit", "kfac"): 1.30,
    ("fit", "tridiagonal"): 1.50,
    ("fit", "activation"): 0.60,
    ("step", "diagonal, adapter space"): 1.02,
    ("step", "kfac"): 1.05,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--fits", nargs="+", choices=FITS, default=list(FITS))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument(
        "--in-a-row", type=int, default=0, metavar="N",
        help="time N steps after another in each turn, as training makes them; by default one, which "
        "has to ask the system for its memory again",
    )  # fmt: skip
    args = parser.parse_args()
    base, tokenizer, _ = retain.load_model(args.model, dtype=args.dtype)
    model = retain.attach_lora(base, rank=RANK)
    tokens = _tokens(model, tokenizer, args.rows)
    result = {
        "model": args.model,
        "dtype": args.dtype,
        "rank": RANK,
        "tokens": tokens.numel(),
        "step_tokens": STEP_ROWS * LENGTH,
        "repeats": args.repeats,
        **provenance(0),
    }
    parts: dict[str, Callable[[], Any]] = {
        "fit": lambda: _fits(model, tokens, args.repeats, args.fits, not args.no_peers),
        "step": lambda: _steps(model, tokens, args.repeats, args.steps, args.in_a_row),
        "error": lambda: _errors(model, tokens),
    }
    if len(args.parts) < len(PARTS):  # goes on with a result whose other parts are there
        result = json.loads(args.out.read_text(encoding="utf-8"))
    some = {"fit": len(args.fits) < len(FITS), "step": len(args.steps) < len(STEPS)}
    of = {"tokens": tokens.numel(), "commit": provenance(0)["commit"]}
    for name in args.parts:  # written after each: it is half an hour's work
        found, known = parts[name](), result.get(name)
        if known and some.get(name):  # ratios are of one run, whatever the others were beside
            new = {way: row | of for way, row in found.items() if row["kind"] != "baseline"}
            result[name] = known | new
        else:
            result[name], result[f"{name}_of"] = found, of
        write_json(args.out, result)
    if not result.keys() >= set(PARTS):
        return
    if args.out == RESULT:
        PAGE.write_text(page(result), encoding="utf-8")
        _figure(result)
    for kind in ("fit", "step"):
        for name, row in result[kind].items():
            bound = TARGETS.get((kind, name))
            said = "" if bound is None else f"  (at most {bound}: {row['ratio'] <= bound})"
            print(f"{kind:5}{name:32}{row['ratio']:8.3f}{said}")
    print(result["error"])


def _tokens(model: nn.Module, tokenizer: Any, rows: int) -> Tensor:
    """Text that the model writes itself, cut into rows of one length, [rows, LENGTH]."""
    text = sample_rows(model, tokenizer, count=2 * rows, max_length=LENGTH, seed=0, progress=True)
    stream = [token for row in text for token in row["input_ids"]]
    stream = (stream * 4)[: rows * LENGTH]
    return torch.tensor(stream).reshape(rows, LENGTH)


def _fits(
    model: nn.Module, tokens: Tensor, repeats: int, names: Sequence[str], with_peers: bool
) -> dict[str, Any]:

    def plain(tokens: Tensor) -> None:
        model.train()
        for batch in tokens.split(8):
            model(input_ids=batch, labels=batch).loss.backward()
            model.zero_grad()

    def ours(options: dict[str, Any]) -> Run:
        def run(tokens: Tensor) -> object:
            rows = [{"input_ids": row.tolist()} for row in tokens]
            return retain.fit_curvature(model, rows, progress=False, batch_size=8, **options)

        return run

    ways: dict[str, tuple[str, Run]] = {"forward and backward": ("baseline", plain)}
    ways |= {name: ("retain", ours(options)) for name, options in FITS.items() if name in names}
    for peer in peers() if with_peers else ():
        if peer.version is not None:
            run = peer.run
            name = f"{peer.name} ({peer.structure})"
            ways[name] = ("peer", lambda t, run=run: run(model, list(t.split(8))))  # type: ignore[misc]
    return _measure(ways, repeats, tokens, SLOW)


def _steps(
    model: nn.Module, tokens: Tensor, repeats: int, names: Sequence[str], in_a_row: int
) -> dict[str, Any]:
    """A training step of 512 tokens with AdamW, without and with the force.

    Each way has its own plain steps beside it, so ways may be measured at different times.
    """
    rows = [{"input_ids": row.tolist()} for row in tokens[:8]]
    batch = tokens[:STEP_ROWS]
    start = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    loader = DataLoader(TensorDataset(tokens[8:]), collate_fn=_collated)

    def step(model: nn.Module, retention: retain.Retention | None) -> Run:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def run(batch: Tensor) -> None:
            model.train()
            model(input_ids=batch, labels=batch).loss.backward()
            if retention is None:
                optimizer.step()
            else:
                retention.step(optimizer)
            optimizer.zero_grad()

        return run

    found: dict[str, Any] = {}
    for name in names:  # two at a time, or all factors would be held at once
        model.load_state_dict(start, strict=False)
        curvature = retain.fit_curvature(model, rows, progress=False, **STEPS[name])
        fitted = curvature.memory()
        # Hooks stay on the other. Both are copies: a copy's weights lie better, by 1 % of a step.
        plain, held = (copy.deepcopy(model) if name in FILTERED else model for _ in range(2))
        parts = None if name in FILTERED else ["force"]
        retention = retain.Retention(held, curvature, strength=1.0, rows=loader, parts=parts)
        pair = _measure(
            {
                "plain LoRA": ("baseline", step(plain, None)),
                name: ("retain", step(held, retention)),
            },
            2 * repeats + 1,
            batch,
            in_a_row=in_a_row,
        )
        pair[name] |= {"factors": curvature.memory(), "fitted": fitted}
        found.setdefault("plain LoRA", pair["plain LoRA"])
        found[name] = pair[name]
        retention.finish()
        del curvature, retention, plain, held
    return found


def _collated(rows: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    ids = torch.stack([row[0] for row in rows])
    return {"input_ids": ids, "labels": ids}


def _measure(
    ways: dict[str, tuple[str, Run]],
    repeats: int,
    tokens: Tensor,
    slow: Container[str] = (),
    in_a_row: int = 0,
) -> dict[str, dict[str, Any]]:
    """Seconds, their ratio to the first way's, and the most memory beyond what was held before.

    With `in_a_row` the seconds are of that many runs behind the one whose memory is measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[int]] = {name: [] for name in ways}
    bar = tqdm(total=(repeats + 1) * len(ways))
    for repeat in range(repeats + 1):
        turn = list(ways.items())
        for name, (_, run) in turn if repeat % 2 else reversed(turn):  # nobody always comes second
            if repeat > 2 and name in slow:
                bar.update()
                continue
            bar.set_description(name)
            gc.collect()
            trim_memory()  # so that the next reading begins at the bottom
            with _Peak() as peak:
                start = time.perf_counter()
                kept = run(tokens if repeat else tokens[:8])
                took = time.perf_counter() - start
            del kept
            if repeat and in_a_row:
                start = time.perf_counter()
                for _ in range(in_a_row):
                    run(tokens)
                took = (time.perf_counter() - start) / in_a_row
            if repeat:  # the first, on one batch, is for warming up
                seconds[name].append(took)
                peaks[name].append(peak.bytes)
            bar.update()
    bar.close()
    first = next(iter(ways))
    return {
        name: {
            "kind": kind,
            "seconds": seconds[name],
            "median": statistics.median(seconds[name]),
            "ratio": statistics.median(
                a / b for a, b in zip(seconds[name], seconds[first], strict=False)
            ),
            "peak_bytes": int(statistics.median(peaks[name])),
        }
        for name, (kind, _) in ways.items()
    }


class _Peak:
    """The most resident memory that a block takes beyond what was there before (Linux)."""

    def __enter__(self) -> _Peak:
        self.bytes, self._before, self._on = 0, _resident(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()

    def _watch(self) -> None:
        while self._on:
            self.bytes = max(self.bytes, _resident() - self._before)
            time.sleep(0.02)


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def _errors(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """Quadratics from a share, and from fast products, against all tokens in plain float32."""
    rows = [{"input_ids": row.tolist()} for row in tokens]
    start = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    ways: dict[str, dict[str, Any]] = {
        "kfac, float32": {"structure": "kfac", "products": "float32"},
        "kfac": {"structure": "kfac"},
        "kfac, a half": {"structure": "kfac", "share": 0.5},
        "kfac, a quarter": {"structure": "kfac", "share": 0.25},
        "kfac, rank 64": {"structure": "kfac", "rank": 64},
        "diagonal, float32": {"structure": "diagonal", "products": "float32"},
        "diagonal, a quarter": {"structure": "diagonal", "share": 0.25},
        "shampoo, float32": {"structure": "shampoo", "products": "float32"},
        "shampoo": {"structure": "shampoo"},
        "shampoo, a quarter": {"structure": "shampoo", "share": 0.25},
        "shampoo, rank 64": {"structure": "shampoo", "rank": 64},
    }
    values: dict[str, dict[str, float]] = {}
    stated = {}
    moved: dict[str, dict[str, Tensor]] = {}
    for name, options in tqdm(ways.items(), desc="errors"):
        model.load_state_dict(start, strict=False)
        curvature = retain.fit_curvature(model, rows, progress=False, **options)
        stated[name] = curvature.info.share_error
        if not moved:
            moved = {"random": _random(model, start), "trained": _trained(model, tokens, start)}
        values[name] = {}
        for kind, weights in moved.items():
            model.load_state_dict(weights, strict=False)
            values[name][kind] = curvature.quadratic(model)
        del curvature
    model.load_state_dict(start, strict=False)
    return {
        name: {
            "against": (against := f"{name.partition(',')[0]}, float32"),
            **{kind: value / values[against][kind] - 1 for kind, value in found.items()},
            "stated_share_error": stated[name],
        }
        for name, found in values.items()
        if not name.endswith("float32")
    }


def _random(model: nn.Module, start: dict[str, Tensor]) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        k: v + 0.01 * torch.randn(v.shape, generator=random).to(v.dtype) if "lora_B" in k else v
        for k, v in start.items()
    }


def _trained(model: nn.Module, tokens: Tensor, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ten steps of plain LoRA on text in another order."""
    model.load_state_dict(start, strict=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = tokens[:STEP_ROWS].flip(1)
    for _ in range(10):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(bool(site.b.any()) for site in lora_sites(model))
    return {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}


def page(result: dict[str, Any]) -> str:
    """The page of a result."""
    hardware, versions = result["hardware"], result["versions"]
    lines = [
        "# What a curvature costs",
        "",
        "Written by `benchmarks/overhead.py`; the numbers are in `benchmarks/results/overhead.json`.",
        "",
        f"{result['model']} in {result['dtype']} with LoRA r = {result['rank']} on all linear layers, "
        f"{result['tokens']:,} tokens in rows of {LENGTH}, {result['repeats']} repeats in turns; "
        f"{hardware['cpu']}, {hardware['cores']} cores; torch {versions['torch']}; "
        f"commit {result['commit']}.",
        "",
        "![Cost over a plain forward and backward pass](images/overhead.png)",
        "",
        "## Measuring a curvature, over a plain forward and backward pass",
        "",
        "A call of `fit_curvature` with everything in it; the other libraries measure the curvature "
        "of the LoRA weights, as retain does in adapter space. Memory is the most beyond the loaded "
        "model.",
        "",
        *_table(result["fit"], "fit"),
        "",
        f"## A training step of {result['step_tokens']} tokens with the force, over plain LoRA",
        "",
        "Each ratio is over plain steps that were run in turns with it.",
        "",
        *_table(result["step"], "step"),
        "",
        *_again(),
        "## What is lost on the way",
        "",
        "The predicted nats of a small random update and of one that plain LoRA made, relative to "
        "those from all tokens in plain float32 products "
        f"({result['error_of']['tokens']:,} tokens, commit {result['error_of']['commit']}).",
        "",
        "| curvature | random | trained | stated error of the share |",
        "|---|---|---|---|",
    ]
    for name, row in result["error"].items():
        lines.append(
            f"| {name} | {row['random']:+.2%} | {row['trained']:+.2%} | "
            f"{row['stated_share_error']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def _again() -> list[str]:
    """What was measured later, with later code, on another processor."""
    found = json.loads(AGAIN.read_text(encoding="utf-8"))
    rows = [row for kind in ("fit", "step") for row in found[kind].values()]
    commits = sorted({row["commit"] for row in rows if "commit" in row})
    processor = found.get("processor", found["hardware"]["cpu"])
    return [
        "## Later, on another processor",
        "",
        f"{processor}, {found['hardware']['cores']} cores, commit {', '.join(commits)} "
        f"(`benchmarks/results/{AGAIN.name}`); 2 repeats of the sketched fit, 4 of the other, 29 of the "
        "step. Sketches are other ones than above, and take less time; float32 products in bfloat16 "
        "gain nothing on this processor, so whole factors take more, and more than their bound. Fits:",
        "",
        *_table(found["fit"], "fit"),
        "",
        "A step:",
        "",
        *_table(found["step"], "step"),
        "",
        *_third(),
    ]


def _third() -> list[str]:
    """On a third processor: a step, before and after its factors stayed in bfloat16, and fits."""
    found = json.loads(THIRD.read_text(encoding="utf-8"))
    turns = ", ".join(str(len(row["seconds"])) for row in found["step"].values())
    commits = ", ".join(row["commit"] for row in found["step"].values())
    return [
        f"{found['processor']}, {found['hardware']['cores']} cores (`benchmarks/results/{THIRD.name}`; "
        f"{turns} turns; commits {commits}). Behind a filter the force had read its factors in float32 "
        "from the second step on, for their bfloat16 copies told it little but rounding; these keep "
        "their eight largest directions in float32 now, and serve to the end. A step:",
        "",
        *_table(found["step"], "step"),
        "",
        f"Fits, {found['fit_turns']} turns, commit {found['fit_commit']}:",
        "",
        *_table(found["fit"], "fit"),
        "",
    ]


def _table(rows: dict[str, Any], kind: str) -> list[str]:
    lines = ["| | seconds | ratio | bound | peak memory |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        bound = TARGETS.get((kind, name))
        told = "" if bound is None else f"{bound:.2f}"
        lines.append(
            f"| {name} | {row['median']:.2f} | {row['ratio']:.2f} | {told} | "
            f"{row['peak_bytes'] / 2**30:.2f} GiB |"
        )
    return lines


def _figure(result: dict[str, Any]) -> None:
    kinds = {"baseline": "plain pass", "retain": "retain", "peer": "other libraries"}
    rows = [
        {"name": name, "kind": kinds[row["kind"]], "ratio": row["ratio"]}
        for name, row in sorted(result["fit"].items(), key=lambda kv: kv[1]["ratio"])
    ]
    colors = alt.Scale(domain=list(kinds.values()), range=["#8a8f98", "#2a7f62", "#c4703f"])
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=300)),
        x=alt.X(
            "ratio:Q", title="time over a plain forward and backward pass over the same tokens"
        ),
    )
    bars = base.mark_bar().encode(color=alt.Color("kind:N", title=None, scale=colors))
    told = base.mark_text(align="left", dx=4).encode(text=alt.Text("ratio:Q", format=".2f"))
    one = (
        alt.Chart(alt.InlineData(values=[{"at": 1}])).mark_rule(strokeDash=[2, 3]).encode(x="at:Q")
    )
    write_figure(FIGURE, alt.layer(bars, told, one).properties(width=560, height=alt.Step(24)))


if __name__ == "__main__":
    main()
