"""Measure a curvature on source text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from retain.curvature.anchor import anchor_of, site_tensor
from retain.curvature.blocks.activation import nats_of_noise, noisy_rows
from retain.curvature.blocks.estimator import Layout
from retain.curvature.blocks.kronecker import rank_of
from retain.curvature.blocks.registry import structure_of
from retain.curvature.blocks.sketch import FORM
from retain.curvature.curvature import Curvature
from retain.curvature.fit.accumulator import Accumulator
from retain.curvature.fit.capture import (
    capture,
    check_gradients,
    fit_sites,
    hooked,
    lora_factors,
    shared_inputs,
    watch,
)
from retain.curvature.fit.checkpoint import FitCheckpoint, fit_key
from retain.curvature.fit.divided import adding_up, own_batches, rows_of_first
from retain.curvature.fit.settings import FitSettings
from retain.curvature.fit.source import glance, source_examples
from retain.curvature.info import CurvatureInfo, describe
from retain.data.batches import Batch, Example, batches, collate
from retain.data.general_prompts import Prompts
from retain.data.sources import Row
from retain.models import processes
from retain.models.fingerprint import signature
from retain.models.forward import no_autocast
from retain.models.heads import has_fitted_head
from retain.models.off import check_on, start_of
from retain.models.sites import Site, base_layers, bypassed, is_idle, row_scales
from retain.models.view import ModelView
from retain.provenance import versions
from retain.types import FactorRank, Fisher, Products, Space

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["fit_curvature"]


@no_autocast()
def fit_curvature(
    model: nn.Module,
    source: str | Path | Iterable[Row] | Sequence[Example] = "self",
    structure: str = "kfac",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    space: Space = "weight",
    fisher: Fisher = "mc",
    samples: int = 1,
    rows: int = 128,
    max_length: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    prompts: Prompts = None,
    rank: FactorRank = "auto",
    share: float = 1.0,
    temperature: float = 2.0,
    calibrate: bool = True,
    products: Products = "auto",
    partial: str | Path | None = None,
    save_every: float = 60.0,
    divide: bool = True,
    progress: bool = True,
) -> Curvature:
    """Measures how much a model's predictions on source text rely on each weight direction.

    The Fisher information at the model's present adapter, which becomes the anchor, for the
    layers that carry LoRA (of a plain model: its trainable linear layers). It is a mean over
    predictions, so ``curvature.quadratic(model)`` predicts ``KL(anchor || model)`` in nats per
    token of the source, of a classifier per row.

    Args:
        model: a PEFT model with LoRA on linear layers, or a plain one to be trained in full; a
            causal or sequence-classification head.
        source: ``"self"`` (text that the base model samples), a file, a folder, a data set, a
            table, a list or a stream; see `retain.data.sources.read_rows`, and docs/data.md for
            the columns. A list of `Example` is taken as it is, but for rows that ask for no
            prediction.
        structure: its name; see docs/curvature.md.
        tokenizer: for text; not needed for rows with ``input_ids``. A model loaded from a name
            finds its own.
        space: ``weight`` (of the update s B A, for any rank) or ``adapter`` (of A and B).
        fisher: ``mc`` (labels sampled from the model), ``empirical`` (the data's labels; a
            sequence's own gradient is squared), ``exact`` (all labels), ``tempered`` or
            ``reversed``; see `retain.curvature.fit.labels`. ``activation`` uses no labels.
        samples: draws of each label (``mc``, ``tempered``).
        rows: rows of the source that are read at most, drawn from all of them.
        max_length: tokens of a row that are read at most.
        batch_size: rows a pass. Memory and speed only: the result does not depend on it, but for
            rounding. The rows of ``activation``'s noise, an eighth of all, are read in one pass
            whatever it is, without gradients: the noise is relative to all of a layer's outputs.
        seed: of the rows, of label draws, of noise (``activation``) and of the self-sampled text.
        prompts: of the model's own text (``"self"``), what users ask in all of its chats; the model
            answers. ``"general"`` for the source half of `retain.data.general_prompts`, a file, or
            a list of texts. By default three of four chats ask one of the general prompts, and
            the model asks in the fourth.
        rank: keep each side of a factor that is at least twice as wide as a sketch of this rank
            (``kfac``, ``shampoo``, ``activation``); see `retain.curvature.blocks.sketch`. ``auto``
            keeps sides up to 2048 whole, wider ones as sketches of rank 256; None keeps all whole.
        share: of the sequences that enter a layer's products, rounded to one in n. Each layer reads
            others, and its trace comes from all. ``info.share_error`` tells the error.
        temperature: of ``tempered``.
        calibrate: scale each block of ``kfac`` and ``tridiagonal`` to its true trace.
        products: ``auto`` lets the factors' products use the hardware's bfloat16 or TF32 units,
            with sums in float32, where it has fast ones.
        partial: a file to keep unfinished sums in. A fit with the same settings goes on from it,
            to the same result; delete it when the curvature is saved.
        save_every: least seconds between two savings of it.
        divide: where several processes run (`torch.distributed`), each reads its own rows, and all
            get one curvature. All must call it then, with one source; unfinished sums are not kept.
            False for a fit in one of them alone.
        progress: show a bar.

    Raises:
        ConfigError: an unknown structure, space or Fisher, a number out of range, or settings that
            exclude each other.
        SourceError: text that is missing or empty, or that asks for no prediction.
        ModelError: a model without LoRA or without a head that predicts.
        CurvatureError: a layer that got no gradient where theory says it should.
        OutputError: the unfinished sums cannot be written.
    """
    settings = FitSettings(
        structure=structure, space=space, fisher=fisher, samples=samples, rows=rows,
        max_length=max_length, batch_size=batch_size, seed=seed, rank=rank, share=share,
        temperature=temperature, calibrate=calibrate, products=products,
    )  # fmt: skip
    if not settings.sketchable:
        settings = replace(settings, rank=None)
    view = ModelView.of(model, tokenizer)
    _, sites = view.head, fit_sites(model, space)  # a head that is not known is refused first
    idle = space == "weight" and is_idle(sites)
    if not is_idle(sites):
        check_on(model)
    start_of(model)  # of an adapter that began in the base's weights, for what is measured later
    examples = source_examples(
        view, source, rows, max_length, seed,
        prompts=prompts, partial=partial, progress=progress,
    )  # fmt: skip
    device, pad = site_tensor(sites[0]).device, view.pad
    together = divide and processes.several()
    if together:
        examples = rows_of_first(examples, device)
    every = max(1, round(min(1 / share, len(examples))))
    estimating = structure_of(structure).estimator
    layers = hooked(sites, space if estimating.backward else "weight")
    known = asdict(settings) | {"every": every, "model": view.fingerprint, "sites": describe(sites)}
    known["sketches"] = FORM
    # Reads all weights that the fingerprint leaves out or rounds.
    kept = None if together else partial
    key = "" if kept is None else fit_key(known, examples, _own_weights(model))
    unfinished = FitCheckpoint(kept, key, save_every)
    apart = together and len(examples) >= processes.count()  # each has rows of its own
    with view.evaluating(checkpoint=estimating.backward):
        scales = row_scales(sites) if space == "weight" else {}
        layout = Layout(
            shared_inputs(model, layers, glance(examples[0], pad).to(device)),
            settings.rank,
            calibrate,
            lora_factors(sites) if space == "adapter" and not estimating.backward else {},
            scales,
        )
        run = Accumulator(model, estimating(layout), settings, every=every, scales=scales)
        hooks = (capture if estimating.backward else watch)(model, layers, run.receive)
        with bypassed(sites) if idle else nullcontext():
            with hooks:
                cut = own_batches if apart else batches
                pass_over = list(cut(examples, min(batch_size, len(examples)), pad))
                _read(run, pass_over, unfinished, device, progress, apart, sites)
            if estimating.backward:
                # In the layers' order: a resumed fit has them in another, and sums would differ.
                traces = {
                    n: float(run.traces[n]) / run.predictions for n in layers if n in run.traces
                }
            else:
                some = noisy_rows(examples, seed)
                noisy = collate([examples[i] for i in some], pad, some).to(device)
                nats = nats_of_noise(model, layers, noisy, seed)
                traces = dict.fromkeys(
                    layers, processes.of_first([nats], device)[0] if together else nats
                )
    blocks = run.estimator.finish(run.predictions, traces)
    info = CurvatureInfo(
        structure=structure,
        space=space,
        fisher=fisher,
        tokens=sum(len(e.tokens) for e in examples),
        predictions=run.predictions,
        sequences=len(examples),
        samples=samples,
        max_length=max_length,
        seed=seed,
        error=run.error(),
        model=view.fingerprint,
        sites=describe(sites),
        versions=versions(),
        note=str(source) if isinstance(source, str | Path) else type(source).__name__,
        rank=settings.rank if settings.rank != "auto" else rank_of(blocks.values()),
        share=1 / every,
        share_error=run.share_error(),
        temperature=temperature if fisher == "tempered" else 1.0,
        weights=signature(model, base_layers(sites)),
    )
    curvature = Curvature(blocks, {}, info, run.estimator.links)
    curvature.anchor = anchor_of(curvature, sites)
    curvature.fitted_head = has_fitted_head(model)
    if together:
        processes.share(list({id(t): t for t in curvature.tensors().values()}.values()))
    return curvature


def _own_weights(model: nn.Module) -> list[torch.Tensor]:
    """What trains, and all of the adapter."""
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad or ".lora_" in name or ".modules_to_save." in name
    ]


def _read(
    run: Accumulator,
    pass_over: list[Batch],
    unfinished: FitCheckpoint,
    device: torch.device,
    progress: bool,
    apart: bool,
    sites: Sequence[Site],
) -> None:
    """Reads the source as often as the estimator asks, from where an earlier run stopped.

    Where each process reads rows `apart`, their sums are added up after each pass. The first tells
    whether each of the `sites` got a gradient.
    """
    done, known = unfinished.load(run, device), set[str]()
    bar = tqdm(
        total=len(pass_over) * run.estimator.passes,
        initial=run.passes * len(pass_over) + done,
        desc="curvature",
        unit="batch",
        disable=not progress or (apart and processes.rank() > 0),
    )
    with bar:
        while run.passes < run.estimator.passes:
            with adding_up(run, known, device) if apart else nullcontext():
                for number in range(done, len(pass_over)):
                    run.batch(pass_over[number].to(device))
                    bar.update()
                    if number + 1 < len(pass_over):
                        unfinished.save(run, number + 1)
            if run.estimator.backward and not run.passes:
                dead = run.without_gradient()
                certain = set(dead) == run.traces.keys()  # gradients came, and all are 0
                check_gradients(dead, sites, run.settings.space, certain=certain)
            done, summed = 0, set(run.estimator.state)
            run.end_pass()
            if apart:  # what was made of the sums is the first one's
                state = run.estimator.state
                processes.share([state[key] for key in sorted(state.keys() - summed)])
                known |= state.keys()
            unfinished.save(run, 0, force=run.estimator.passes > 1)
