"""``retain eval``: what an adapter learned, and what the model forgot."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from retain.cli.common import (
    DTYPES,
    AsJson,
    Interrupted,
    Quiet,
    Screen,
    Trust,
    base_of,
    check_choices,
    check_file,
    finite,
    load_base,
    problem_count,
    quieten,
)
from retain.cli.folders import check_result
from retain.cli.measure import measure, result_of, train_record
from retain.errors import ConfigError, unknown

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
    max_length: Annotated[int, typer.Option(min=2, help="Cut texts to so many tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the text and of the task.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"Precision: {', '.join(DTYPES)}.")] = "float32",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what the model forgot, and what it learned, with an adapter on."""
    screen = Screen(as_json, quiet)
    check_choices(("dtype", dtype, DTYPES))
    problems = problem_count(task, "test") if task is not None else 0
    if problems is None:
        raise unknown("task", str(task), ["word-problems"])
    if adapter is None:
        raise ConfigError(
            "nothing says which adapter to measure",
            got="no --adapter",
            allowed="the folder of a PEFT adapter",
            fix="--adapter runs/held/adapter",
        )
    out = out and check_file(out)
    if out is not None:
        check_result(out)
    name = base_of(adapter, model)
    quieten(screen.progress)
    from retain.data.draws import HELD_OUT
    from retain.data.sources import read_rows
    from retain.files import write_json
    from retain.models.saved import load_adapter

    given = None
    if source is not None:
        given = read_rows(source, rows, seed=HELD_OUT + seed, max_length=max_length)
    size = {"rows": rows, "max_length": max_length, "batch_size": batch_size}
    try:
        screen.say(f"loading {name}")
        base, tokenizer, _ = load_base(
            name, None if model else "the adapter", dtype=dtype, trust_remote_code=trust_remote_code
        )
        tuned = load_adapter(base, adapter)
        record = train_record(adapter, tuned)
        if not record:
            screen.note(
                "no train.json beside the adapter: that this is its base model is not checked"
            )
        measured = measure(tuned, tokenizer, given, size, seed, probe, problems, screen)
    except KeyboardInterrupt:
        raise Interrupted("nothing was written") from None
    result = finite(
        result_of(name, dtype, seed, tuned, record, measured, source or "self", adapter)
        | {"notes": screen.notes}
    )
    if out is not None:
        write_json(out, result)
    _tell(screen, measured, out)
    screen.emit(result)


def _tell(screen: Screen, found: dict[str, Any], out: Path | None) -> None:
    kept = found["forgetting"]
    low, high = kept["kl_interval"]
    rows = [
        [
            "forgotten: KL to the base, nats per token",
            "0",
            f"{kept['kl']:.3g} [{low:.3g}, {high:.3g}]",
        ],
        ["perplexity of the text", f"{kept['ppl_base']:.2f}", f"{kept['ppl']:.2f}"],
        ["predictions that changed", "0", f"{kept['flips']:.1%}"],
    ]
    for key, label in (("probe", "knowledge"), ("task", "word problems, exact match")):
        if found[key]:
            rows.append(
                [label, *(f"{s['accuracy']:.1%} of {s['items']}" for s in found[key].values())]
            )
    screen.table("base and tuned", ["", "base", "with the adapter"], rows)
    if out is not None:
        screen.say(f"{out}\nnext: retain report {quote(str(out))}")
