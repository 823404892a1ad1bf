"""How the cost of a curvature grows: with tokens, width, layers and consolidated tasks.

    python benchmarks/scaling.py [--repeats 5]

Random Llamas from a configuration, so that one thing at a time can be made larger. Writes
benchmarks/results/scaling.json and docs/images/scaling.png.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import retain
from retain.curvature.blocks.sketch import sketch_update, sketches_finish
from retain.files import write_json
from retain.models.sites import lora_sites
from retain.provenance import provenance
from retain.report.draw import write_figure

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
FIGURE = ROOT / "docs" / "images" / "scaling.png"
LENGTH, SKETCH = 64, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    result = {
        "repeats": repeats,
        **provenance(0),
        "tokens": _tokens(repeats),
        "width": _width(repeats),
        "layers": _layers(repeats),
        "tasks": _tasks(repeats),
    }
    for kind, x in (("tokens", "tokens"), ("width", "width"), ("layers", "layers")):
        rows = result[kind]
        powers = {
            name: _power([row[x] for row in rows], [row[name] for row in rows])
            for name in rows[0]
            if name.endswith(("seconds", "bytes"))
        }
        result[f"{kind}_power"] = powers
        print(kind, {name: round(power, 2) for name, power in powers.items()})
    tasks = result["tasks"]
    for name in ("bytes", "step_seconds", "merge_seconds"):
        values = [row[name] for row in tasks if row[name] is not None]
        print("tasks", name, f"last over first {values[-1] / values[0]:.3f}")
    write_json(RESULT, result)
    _figure(result)


def _model(hidden: int = 256, layers: int = 4) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
    )
    return retain.attach_lora(LlamaForCausalLM(config).eval(), rank=8)


def _rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 512, (count, LENGTH), generator=random)
    return [{"input_ids": row.tolist()} for row in ids]


def _time(run: Callable[[], object], repeats: int) -> float:
    run()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _fit(model: Any, rows: list[dict[str, Any]], **options: Any) -> retain.Curvature:
    options = {"structure": "kfac", "rows": len(rows), "progress": False, **options}
    return retain.fit_curvature(model, rows, **options)


def _tokens(repeats: int) -> list[dict[str, Any]]:
    model = _model()
    out = []
    for count in (32, 64, 128, 256):
        rows = _rows(count)
        seconds = _time(lambda rows=rows: _fit(model, rows), repeats)  # type: ignore[misc]
        curvature = _fit(model, rows)
        out.append({"tokens": count * LENGTH, "fit_seconds": seconds, "bytes": curvature.memory()})
    return out


def _width(repeats: int) -> list[dict[str, Any]]:
    """One side of one layer: 1,024 rows streamed into a sketch, and into a whole factor."""
    out = []
    for width in (1024, 2048, 4096, 8192, 14336):
        rows = torch.randn(1024, width, generator=torch.Generator().manual_seed(0))

        def sketch(rows: Tensor = rows) -> int:
            state: dict[str, Tensor] = {}
            for part in rows.split(256):
                sketch_update(state, "x", part, SKETCH)
            made = sketches_finish(state, {"x": SKETCH})["x"]
            return sum(t.numel() * t.element_size() for t in made.tensors().values())

        def whole(rows: Tensor = rows) -> int:
            total = torch.zeros(rows.shape[1], rows.shape[1])
            for part in rows.split(256):
                total.addmm_(part.T, part)
            return total.numel() * total.element_size()

        out.append(
            {
                "width": width,
                "sketch_seconds": _time(sketch, repeats),
                "sketch_bytes": sketch(),
                "whole_seconds": _time(whole, repeats),
                "whole_bytes": whole(),
            }
        )
    return out


def _layers(repeats: int) -> list[dict[str, Any]]:
    rows = _rows(32)
    out = []
    for layers in (2, 4, 8, 16):
        model = _model(layers=layers)
        curvature = _fit(model, rows)
        sites = lora_sites(model)
        out.append(
            {
                "layers": layers,
                "fit_seconds": _time(lambda model=model: _fit(model, rows), repeats),  # type: ignore[misc]
                "force_seconds": _time(lambda c=curvature, s=sites: c.pulls(s), 20),  # type: ignore[misc]
                "bytes": curvature.memory(),
            }
        )
    return out


def _tasks(repeats: int) -> list[dict[str, Any]]:
    """A model that goes from task to task: its curvature joins, and the anchor moves."""
    model = _model()
    sites = lora_sites(model)
    random = torch.Generator().manual_seed(1)
    whole: retain.Curvature | None = None
    out: list[dict[str, Any]] = []
    for task in range(1, 21):
        with torch.no_grad():
            for site in sites:  # what training would do
                site.b.add_(0.01 * torch.randn(site.b.shape, generator=random))
        new = _fit(model, _rows(32, seed=task))
        seconds = None
        if whole is None:
            whole = new
        else:
            start = time.perf_counter()
            whole = retain.reanchored(whole, model) + new
            seconds = time.perf_counter() - start
        held: retain.Curvature = whole
        out.append(
            {
                "tasks": task,
                "bytes": held.memory(),
                "merge_seconds": seconds,
                "step_seconds": _time(lambda c=held: c.pulls(sites), 10 * repeats),  # type: ignore[misc]
                "merge_loss": held.info.merge_loss,
            }
        )
    return out


def _power(x: list[float], y: list[float]) -> float:
    """The slope in logarithms: 1 is linear, 2 is quadratic."""
    lx, ly = torch.tensor(x).double().log(), torch.tensor(y).double().log()
    dx = lx - lx.mean()
    return float((dx * (ly - ly.mean())).sum() / dx.square().sum())


def _figure(result: dict[str, Any]) -> None:
    tokens, width, layers, tasks = (result[k] for k in ("tokens", "width", "layers", "tasks"))
    first, sketch = tasks[0], f"sketch, k = {SKETCH}"

    def rows(x: str, y: str, name: str, found: list[Any], over: float = 1.0) -> list[Any]:
        return [{"x": r[x], "y": r[y] / over, "line": name} for r in found]

    drawn = [
        ("Tokens: linear", "tokens", "seconds", rows("tokens", "fit_seconds", "fit", tokens)),
        ("Width: 1,024 rows", "width of a side", "seconds",
         rows("width", "sketch_seconds", sketch, width)
         + rows("width", "whole_seconds", "whole factor", width)),
        ("Layers: linear", "layers", "seconds", rows("layers", "fit_seconds", "fit", layers)),
        ("Tasks: flat", "tasks consolidated", "over one task",
         rows("tasks", "bytes", "memory", tasks, first["bytes"])
         + rows("tasks", "step_seconds", "step", tasks, first["step_seconds"])),
    ]  # fmt: skip
    charts = []
    for title, across, upright, values in drawn:
        names = list(dict.fromkeys(row["line"] for row in values))
        color = alt.Color(
            "line:N", title=None, scale=alt.Scale(domain=names, range=["#2a7f62", "#c4703f"])
        )
        x, y = alt.X("x:Q", title=across), alt.Y("y:Q", title=upright)
        line = alt.Chart(alt.InlineData(values=values)).mark_line(point=True)
        charts.append(line.encode(x=x, y=y, color=color).properties(title=title, width=230))
    joined = alt.concat(*charts, columns=4).resolve_scale(color="independent")
    write_figure(FIGURE, joined)


if __name__ == "__main__":
    main()
