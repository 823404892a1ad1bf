"""``retain soften``: trade what a finished adapter learned for what it made the model forget."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from retain.cli.options import (
    DTYPES,
    AsJson,
    BatchSize,
    DType,
    MaxLength,
    Quiet,
    Screen,
    Trust,
    check_choices,
)

__all__ = ["EXAMPLE", "soften"]

EXAMPLE = (
    "Example: retain soften runs/mine/adapter --curvature curvature.safetensors --budget 0.05 "
    "--out runs/soft"
)


def soften(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="Folder of the finished PEFT adapter."),
    ],
    curvature: Annotated[
        Path,
        typer.Option(help="Of what must not be forgotten: a file of retain fit, weight space."),
    ],
    budget: Annotated[
        float, typer.Option(help="Forgetting to end at, nats per token: measured with --measure.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")],
    target_curvature: Annotated[
        Path | None,
        typer.Option(
            help="Of the task's rows, fitted with --adapter ADAPTER; plain distance without one."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model; the one that the adapter names by default.")
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of the subspaces: deeper is nearer to the optimum, and slower (2 or 1).",
        ),
    ] = None,
    epsilon: Annotated[
        float, typer.Option(help="Damping of the target's curvature, relative to its mean.")
    ] = 1e-3,
    points: Annotated[int, typer.Option(min=2, help="Points of the curve.")] = 12,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="The budget is of measured KL; some points of the curve are measured."
        ),
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(help="Text for --measure; by default the base model writes it."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Measure on at most so many texts.")] = 16,
    max_length: MaxLength = 128,
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of text that the model writes.")] = 0,
    dtype: DType = "float32",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Pull a finished adapter back to a budget of forgetting, without training."""
    from retain.runs.eval import Sizes
    from retain.runs.soften import soften_run

    screen = Screen(as_json, quiet)
    check_choices(("dtype", dtype, DTYPES))
    result = soften_run(
        adapter, curvature, budget=budget, out=out, target=target_curvature, model=model,
        depth=depth, epsilon=epsilon, points=points, measure=measure, source=source,
        sizes=Sizes(rows, max_length, batch_size), seed=seed, dtype=dtype,
        trust_remote_code=trust_remote_code, pictures=_pictures, messages=screen,
    )  # fmt: skip
    written = out.expanduser() / "adapter"
    _tell(screen, result, written)
    screen.emit({"adapter": written, "record": out.expanduser() / "soften.json", **result})


def _pictures(result: dict[str, Any]) -> dict[str, bytes]:
    from retain.report.figures import soften_png
    from retain.report.softening import SoftCurve
    from retain.report.svg import soften_svg

    curve = SoftCurve.of(result)
    drawn = soften_svg(curve, 820, 430, 13.5).encode()
    return {"soften.svg": drawn, "soften.png": soften_png(curve)}


def _tell(screen: Screen, result: dict[str, Any], written: Path) -> None:
    chosen, before = result["chosen"], result["curve"][0]
    if result["inside"]:
        screen.say("the adapter is inside the budget already: it is written as it is")
    lines = [
        ["predicted forgetting, nats per token", f"{before['nats']:.3g}", f"{chosen['nats']:.3g}"],
        ["learning kept, predicted", "100.0%", f"{chosen['learned']:.1%}"],
        ["the same by plain scaling", "100.0%", f"{chosen['scaled']:.1%}"],
    ]
    if chosen["measured"]:
        for key, name in (("measured", "measured KL"), ("scaled_measured", "by plain scaling")):
            kl = [p[key]["kl"] for p in (before, chosen)]
            lines.append([f"{name}, nats per token", *(f"{value:.3g}" for value in kl)])
    screen.table("softened", ["", "before", "after"], lines)
    screen.say(f"{written}\nnext: retain eval --adapter {quote(str(written))} --probe")
