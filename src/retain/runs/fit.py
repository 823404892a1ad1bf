"""``retain fit``: a curvature of a named model, on a named source, in a file."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from retain.config import AdapterConfig, Measured, validate
from retain.curvature.blocks.ranks import RANKS, factor_rank_of
from retain.curvature.blocks.registry import names
from retain.curvature.fit.settings import FitSettings
from retain.files import check_ours, clear_scratch, locked
from retain.runs.folders import is_curvature
from retain.runs.messages import Interrupted, Messages
from retain.runs.tuned import check_base
from retain.types import Fisher, Space

__all__ = ["FitConfig", "Fitted", "fit_run"]


class FitConfig(Measured):
    """Settings of ``retain fit``."""

    model: str = Field(
        description="A built-in name (smollm2-135m), a hub id, a folder or a .gguf file"
    )
    source: str = Field(
        "self",
        description="What the model should not forget: a file of text or rows, a folder of them, "
        "or 'self': text that the model writes itself",
    )
    output: Path = Field(Path("curvature.safetensors"), description="The file to write")
    structure: str = Field("kfac", description=f"How detailed: {', '.join(names())}")
    space: str = Field(
        "weight", description="weight: fits an adapter of any rank. adapter: one adapter alone"
    )
    fisher: str = Field(
        "mc",
        description="Labels: mc (drawn from the model), exact (all), empirical (the data's), or, "
        "for models that are sure of everything, tempered or reversed",
    )
    samples: int = Field(1, ge=1, description="Label draws a token, for mc and tempered")
    temperature: float = Field(2.0, description="Of tempered labels")
    factor_rank: str = Field(
        "auto", description=f"Sketch wide factors by so many directions each; {RANKS}"
    )
    share: float = Field(1.0, description="Share of the texts that enters each layer's products")
    save_every: float = Field(
        60.0, ge=0, description="Seconds between savings of an unfinished fit"
    )
    rows: int = Field(128, ge=1, description="Read at most so many texts")
    rank: int = Field(16, ge=1, description="Rank of the fresh adapter")
    alpha: float | None = Field(None, description="LoRA's alpha; twice the rank by default")
    targets: str = Field(
        "all-linear", description="Layers that get an adapter: all-linear, or names with commas"
    )
    adapter_seed: int = Field(0, description="Seed of the fresh adapter")
    adapter: Path | None = Field(
        None, description="Measure around this PEFT adapter (a folder), not a fresh one"
    )
    num_labels: int | None = Field(None, ge=2, description="Load a classifier with so many classes")


@dataclass(frozen=True)
class Fitted:
    """A curvature in a file, and the seconds that it took."""

    path: Path
    curvature: Any
    seconds: float


def fit_run(config: FitConfig, targets: str | list[str], messages: Messages) -> Fitted:
    """Measures a curvature and writes it; an unfinished one beside it goes on after a kill.

    Raises:
        RetainError: whatever cannot be read, measured or written.
        Interrupted: Ctrl-C.
    """
    c, sketches, output = config, factor_rank_of(config.factor_rank), config.output
    FitSettings(
        c.structure, c.space, c.fisher, samples=c.samples, rows=c.rows, rank=sketches,
        batch_size=c.batch_size, share=c.share, temperature=c.temperature,
    )  # fmt: skip
    check_ours(output, is_curvature, "the curvature of a fit", output)
    partial = output.with_name(f"{output.name}.partial")
    if c.adapter is not None:
        from retain.models.saved import check_adapter

        check_adapter(c.adapter)
    fresh = {"rank": c.rank, "alpha": c.alpha, "targets": targets, "seed": c.adapter_seed}
    adapter = validate(fresh, AdapterConfig)
    messages.libraries()
    from retain.curvature.fit.checkpoint import forget
    from retain.curvature.fit.fit import fit_curvature
    from retain.data.sources import read_rows
    from retain.models.load import load_model
    from retain.models.lora import attach_lora
    from retain.models.saved import load_adapter

    text: Any = c.source
    if text != "self":  # a mistake in the source shows before the model loads
        text = read_rows(c.source, c.rows, seed=c.seed, max_length=c.max_length)
    with locked(output, file=True):
        clear_scratch(output)  # of a fit that was killed while it wrote
        try:
            messages.say(f"loading {c.model}")
            base, tokenizer, _ = load_model(
                c.model, dtype=c.dtype, num_labels=c.num_labels,
                trust_remote_code=c.trust_remote_code,
            )  # fmt: skip
            start = time.perf_counter()
            if c.adapter is None:
                model = attach_lora(base, **adapter.model_dump())
            else:
                model = load_adapter(base, c.adapter)
                if c.num_labels is None:  # a classifier's base has another head each time
                    check_base(model, c.adapter, messages)
            curvature = fit_curvature(
                model, text, c.structure, tokenizer=tokenizer, space=cast(Space, c.space),
                fisher=cast(Fisher, c.fisher), samples=c.samples, rows=c.rows,
                max_length=c.max_length, batch_size=c.batch_size, seed=c.seed, rank=sketches,
                share=c.share, temperature=c.temperature, partial=partial,
                save_every=c.save_every, progress=messages.progress,
            )  # fmt: skip
            curvature.info = replace(curvature.info, note=c.source)
            seconds = time.perf_counter() - start
            curvature.save(output)
            forget(partial)
        except KeyboardInterrupt:
            kept = f"; the same command goes on from {partial}" if partial.is_file() else ""
            raise Interrupted(f"{output} was not written or changed{kept}") from None
    return Fitted(output, curvature, seconds)
