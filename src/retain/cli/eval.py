"""``retain eval``: what an adapter learned, and what the model forgot."""

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
    check_file,
)

__all__ = ["EXAMPLE", "evaluate"]

EXAMPLE = "Example: retain eval --adapter runs/held/adapter --probe --task word-problems:100"


def evaluate(
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of the PEFT adapter, such as runs/held/adapter.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model; the one that the adapter names by default.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Text to measure forgetting on; by default the base writes it anew."),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also ask the knowledge questions, before and after.")
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="Also score a task, before and after: word-problems[:N].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the result to this JSON file.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Read at most so many texts.")] = 64,
    max_length: MaxLength = 128,
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the text and of the task.")] = 0,
    dtype: DType = "float32",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what the model forgot, and what it learned, with an adapter on."""
    from retain.runs.eval import Sizes, eval_run

    screen = Screen(as_json, quiet)
    check_choices(("dtype", dtype, DTYPES))
    out = out and check_file(out)
    result = eval_run(
        adapter, model=model, source=source, probe=probe, task=task, out=out,
        sizes=Sizes(rows, max_length, batch_size), seed=seed, dtype=dtype,
        trust_remote_code=trust_remote_code, messages=screen,
    )  # fmt: skip
    _tell(screen, result, out)
    screen.emit(result)


def _tell(screen: Screen, result: dict[str, Any], out: Path | None) -> None:
    kept = result["forgetting"]
    low, high = kept["kl_interval"]
    spread = f"{kept['kl']:.3g} [{low:.3g}, {high:.3g}]"
    rows = [
        ["forgotten: KL to the base, nats per token", "0", spread],
        ["perplexity of the text", f"{kept['ppl_base']:.2f}", f"{kept['ppl']:.2f}"],
        ["predictions that changed", "0", f"{kept['flips']:.1%}"],
    ]
    for key, label in (("knowledge", "knowledge"), ("exact_match", "word problems, exact match")):
        if result[key]:
            rows.append(
                [label, *(f"{s['accuracy']:.1%} of {s['items']}" for s in result[key].values())]
            )
    screen.table("base and tuned", ["", "base", "with the adapter"], rows)
    if out is not None:
        screen.say(f"{out}\nnext: retain report {quote(str(out))}")
