"""``retain fit``: measure a curvature and write it to a file."""

from __future__ import annotations

import time
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from retain.cli.options import (
    DTYPES,
    AsJson,
    Quiet,
    Screen,
    Trust,
    check_choices,
    check_file,
    name_list,
    quieten,
)
from retain.curvature.blocks.ranks import RANKS, factor_rank_of
from retain.curvature.blocks.registry import names as structures
from retain.curvature.fit.settings import FitSettings
from retain.files import clear_scratch, locked
from retain.runs.folders import check_curvature
from retain.runs.messages import Interrupted
from retain.types import FISHERS, SPACES, Fisher, Space

if TYPE_CHECKING:
    from retain.config import AdapterConfig

__all__ = ["EXAMPLE", "fit"]

EXAMPLE = "Example: retain fit smollm2-135m self -o curvature.safetensors"

Text = "What the model should not forget: a file of text or rows, a folder of them, or "


def fit(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A built-in name (smollm2-135m), a hub id, a folder or a .gguf file.",
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help=f"{Text}'self': text that the model writes itself."),
    ] = "self",
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path(
        "curvature.safetensors"
    ),
    structure: Annotated[
        str, typer.Option(help=f"How detailed: {', '.join(structures())}.")
    ] = "kfac",
    space: Annotated[
        str,
        typer.Option(help="weight: fits an adapter of any rank. adapter: one adapter alone."),
    ] = "weight",
    fisher: Annotated[
        str,
        typer.Option(
            help="Labels: mc (drawn from the model), exact (all), empirical (the data's), or, for "
            "models that are sure of everything, tempered or reversed."
        ),
    ] = "mc",
    samples: Annotated[
        int, typer.Option(min=1, help="Label draws a token, for mc and tempered.")
    ] = 1,
    temperature: Annotated[float, typer.Option(help="Of tempered labels.")] = 2.0,
    factor_rank: Annotated[
        str,
        typer.Option(help=f"Sketch wide factors by so many directions each; {RANKS}."),
    ] = "auto",
    share: Annotated[
        float, typer.Option(help="Share of the texts that enters each layer's products.")
    ] = 1.0,
    save_every: Annotated[
        float,
        typer.Option(min=0, help="Seconds between savings of an unfinished fit."),
    ] = 60.0,
    rows: Annotated[int, typer.Option(min=1, help="Read at most so many texts.")] = 128,
    max_length: Annotated[int, typer.Option(min=2, help="Cut texts to so many tokens.")] = 128,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts at once. Changes memory and speed, not the result.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the text and the label draws.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"Precision: {', '.join(DTYPES)}.")] = "float32",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the fresh adapter.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="LoRA's alpha; twice the rank by default.")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="Layers that get an adapter: all-linear, or names with commas.")
    ] = "all-linear",
    adapter_seed: Annotated[int, typer.Option(help="Seed of the fresh adapter.")] = 0,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Measure around this PEFT adapter (a folder), not a fresh one."),
    ] = None,
    num_labels: Annotated[
        int | None, typer.Option(min=2, help="Load a classifier with so many classes.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what a model relies on, so that training can leave it alone."""
    check_choices(
        ("structure", structure, structures()),
        ("space", space, SPACES),
        ("fisher", fisher, FISHERS),
        ("dtype", dtype, DTYPES),
    )
    sketches = factor_rank_of(factor_rank)
    FitSettings(
        structure, space, fisher, samples=samples, rows=rows, rank=sketches,
        batch_size=batch_size, share=share, temperature=temperature,
    )  # fmt: skip
    screen = Screen(as_json, quiet)
    output = check_file(output)
    check_curvature(output)
    partial = output.with_name(f"{output.name}.partial")
    if adapter is not None:
        from retain.models.saved import check_adapter

        check_adapter(adapter)
    from retain.config import AdapterConfig, validate

    fresh = validate(
        {"rank": rank, "alpha": alpha, "targets": name_list(targets), "seed": adapter_seed},
        AdapterConfig,
    )
    quieten(screen.progress)
    from retain.curvature.fit.checkpoint import forget
    from retain.curvature.fit.fit import fit_curvature
    from retain.data.sources import read_rows
    from retain.models.load import load_model

    if source != "self":
        # a mistake in the source shows before the model loads
        read_rows(source, rows, seed=seed, max_length=max_length)
    with locked(output, file=True):
        clear_scratch(output)  # of a fit that was killed while it wrote
        try:
            screen.say(f"loading {model}")
            base, tokenizer, _ = load_model(
                model, dtype=dtype, num_labels=num_labels, trust_remote_code=trust_remote_code
            )
            start = time.perf_counter()
            curvature = fit_curvature(
                _with_adapter(base, adapter, fresh),
                source,
                structure,
                tokenizer=tokenizer,
                space=cast(Space, space),
                fisher=cast(Fisher, fisher),
                samples=samples,
                rows=rows,
                max_length=max_length,
                batch_size=batch_size,
                seed=seed,
                rank=sketches,
                share=share,
                temperature=temperature,
                partial=partial,
                save_every=save_every,
                progress=screen.progress,
            )
            seconds = time.perf_counter() - start
            curvature.save(output)
            forget(partial)
        except KeyboardInterrupt:
            kept = f"; the same command goes on from {partial}" if partial.is_file() else ""
            raise Interrupted(f"{output} was not written or changed{kept}") from None
    info, size = curvature.info, output.stat().st_size
    screen.say(
        f"{structure} curvature of {len(info.sites)} layers from {info.tokens:,} tokens in "
        f"{seconds:.1f} s, relative error {info.error:.1%}\n{output}: {size / 2**20:.1f} MiB\n"
        f"next: retain train --model {quote(model)} --data word-problems --out runs/held "
        f"--curvature {quote(str(output))}"
    )
    found = {"path": output, "seconds": seconds, "bytes": size, "info": info.to_dict()}
    screen.emit(found | {"notes": screen.notes})


def _with_adapter(base: Any, folder: Path | None, fresh: AdapterConfig) -> Any:
    if folder is not None:
        from retain.models.saved import load_adapter

        return load_adapter(base, folder)
    from retain.models.lora import attach_lora

    return attach_lora(base, **fresh.model_dump())
