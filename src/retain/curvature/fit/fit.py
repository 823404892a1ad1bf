"""Measure a curvature on source text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from retain.curvature.blocks.activation import ActivationEstimator, nats_of_noise, noisy_rows
from retain.curvature.blocks.diagonal import DiagonalEstimator
from retain.curvature.blocks.eigen import EigenEstimator
from retain.curvature.blocks.estimator import Estimator, Layout
from retain.curvature.blocks.identity import IdentityEstimator
from retain.curvature.blocks.kronecker import KroneckerEstimator, ShampooEstimator, rank_of
from retain.curvature.blocks.tridiagonal import TridiagonalEstimator
from retain.curvature.curvature import Curvature
from retain.curvature.displacement import anchor_of, place
from retain.curvature.fit.accumulator import Accumulator
from retain.curvature.fit.capture import capture, shared_inputs, split_idle, watch
from retain.curvature.fit.checkpoint import FitCheckpoint, fit_key
from retain.curvature.fit.layers import adapters_of, check_alive, fit_sites, hooked
from retain.curvature.fit.settings import SKETCHES, check_settings
from retain.curvature.fit.source import glance, source_examples
from retain.curvature.info import CurvatureInfo, describe
from retain.data.batches import Batch, Example, batches, collate
from retain.data.sources import Row
from retain.models.fingerprint import fingerprint
from retain.models.forward import evaluating, no_autocast
from retain.models.heads import is_causal
from retain.models.names import unwrap
from retain.models.off import check_on, start_of
from retain.models.sites import bypassed, is_idle, row_scales
from retain.models.sizes import pad_id
from retain.provenance import versions
from retain.types import FactorRank, Fisher, Products, Space, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["fit_curvature"]

ESTIMATORS: dict[str, type[Estimator]] = {
    "identity": IdentityEstimator,
    "diagonal": DiagonalEstimator,
    "kfac": KroneckerEstimator,
    "shampoo": ShampooEstimator,
    "ekfac": EigenEstimator,
    "activation": ActivationEstimator,
    "tridiagonal": TridiagonalEstimator,
}
"""A structure's estimator: what a new one adds."""


@no_autocast()
def fit_curvature(
    model: nn.Module,
    source: str | Path | Iterable[Row] | Sequence[Example] = "self",
    structure: Structure = "kfac",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    space: Space = "weight",
    fisher: Fisher = "mc",
    samples: int = 1,
    rows: int = 128,
    max_length: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    rank: FactorRank = "auto",
    share: float = 1.0,
    temperature: float = 2.0,
    calibrate: bool = True,
    products: Products = "auto",
    partial: str | Path | None = None,
    save_every: float = 60.0,
    progress: bool = True,
) -> Curvature:
    """Measures how much a model's predictions on source text rely on each weight direction.

    The Fisher information at the model's present adapter, which becomes the anchor, for the
    layers that carry LoRA (of a plain model: its trainable linear layers). It is a mean over
    predicted tokens, so ``curvature.quadratic(model)`` predicts ``KL(anchor || model)`` in nats
    per token of the source.

    Args:
        model: a PEFT model with LoRA on linear layers, or a plain one to be trained in full; a
            causal or sequence-classification head.
        source: ``"self"`` (text that the base model samples), a file, a folder, a data set, a
            table, a list or a stream; see `retain.data.sources.read_rows`, and docs/data.md for
            the columns. A list of `Example` is taken as it is.
        structure: see `retain.types.Structure` and docs/curvature.md.
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
            rounding, and for what sketches of a low rank lose (0.6 % at rank 4).
        seed: of the rows, of label draws, of noise (``activation``) and of the self-sampled text.
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
        progress: show a bar.

    Raises:
        ConfigError: an unknown structure, space or Fisher, a number out of range, or settings that
            exclude each other.
        SourceError: text that is missing, empty or smaller than one batch.
        ModelError: a model without LoRA or without a head that predicts.
        CurvatureError: a layer that got no gradient where theory says it should.
        OutputError: the unfinished sums cannot be written.
    """
    check_settings(
        structure, space, fisher, samples=samples, rows=rows, rank=rank, products=products,
        batch_size=batch_size, share=share, temperature=temperature, calibrate=calibrate,
    )  # fmt: skip
    if structure not in SKETCHES:
        rank = None
    causal = is_causal(model)
    sites = fit_sites(model, space)
    if not is_idle(sites):
        check_on(model)
    start_of(model)  # of an adapter that began in the base's weights, for what is measured later
    examples = source_examples(
        model, source, tokenizer, causal, rows, max_length, batch_size, seed, partial, progress
    )
    every = max(1, round(min(1 / share, len(examples))))
    estimating = ESTIMATORS[structure]
    layers = hooked(sites, space if estimating.backward else "weight")
    device = place(sites[0]).device
    inner: Any = unwrap(model)
    pad = pad_id(inner)
    pass_over = list(batches(examples, batch_size, pad))
    base = fingerprint(model)
    settings = {
        "structure": structure, "space": space, "fisher": fisher, "samples": samples,
        "seed": seed, "rank": rank, "every": every, "temperature": temperature,
        "calibrate": calibrate, "products": products, "batch_size": batch_size,
        "model": base, "sites": describe(sites), "max_length": max_length,
    }  # fmt: skip
    weights = [
        p
        for name, p in model.named_parameters()  # all that the fingerprint leaves out or rounds
        if p.requires_grad or ".lora_" in name or ".modules_to_save." in name
    ]
    key = "" if partial is None else fit_key(settings, examples, weights)  # reads all weights
    unfinished = FitCheckpoint(partial, key, save_every)
    idle = is_idle(sites)
    with evaluating(model, checkpoint=estimating.backward):
        scales = row_scales(sites) if space == "weight" else {}
        layout = Layout(
            shared_inputs(model, layers, glance(examples[0], pad).to(device)),
            rank,
            calibrate,
            adapters_of(sites) if space == "adapter" and not estimating.backward else {},
            scales,
        )
        run = Accumulator(
            model,
            layers,
            estimating(layout),
            every=every,
            precision=products,
            scales=scales,
        )
        if idle and space == "adapter" and estimating.backward:
            hooks = capture(model, hooked(sites, "weight"), split_idle(sites, run.receive))
        else:
            hooks = (capture if estimating.backward else watch)(model, layers, run.receive)
        with bypassed(sites) if idle else nullcontext(), hooks:
            _read(
                run, pass_over, unfinished, device, (fisher, samples, seed, temperature), progress
            )
        if estimating.backward:
            check_alive(run.dead(), sites, space)
            # In the order of the layers: a resumed fit has them in another, and sums would differ.
            traces = {n: float(run.traces[n]) / run.predictions for n in layers if n in run.traces}
        else:
            some = noisy_rows(examples, seed)
            noisy = collate([examples[i] for i in some], pad, some).to(device)
            with bypassed(sites) if idle else nullcontext():
                gamma = nats_of_noise(model, layers, noisy, seed)
            traces = dict.fromkeys(layers, gamma)
    fitted = run.estimator.finish(run.predictions, traces)
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
        model=base,
        sites=describe(sites),
        versions=versions(),
        note=str(source) if isinstance(source, str | Path) else type(source).__name__,
        rank=rank if rank != "auto" else rank_of(fitted.blocks.values()),
        share=1 / every,
        share_error=run.share_error(),
        temperature=temperature if fisher == "tempered" else 1.0,
    )
    curvature = Curvature(fitted.blocks, {}, info, fitted.links)
    curvature.anchor = anchor_of(curvature, sites)
    return curvature


def _read(
    run: Accumulator,
    pass_over: list[Batch],
    unfinished: FitCheckpoint,
    device: torch.device,
    labels: tuple[Fisher, int, int, float],
    progress: bool,
) -> None:
    """Reads the source as often as the estimator asks, from where an earlier run stopped."""
    done = unfinished.load(run, device)
    total = len(pass_over) * run.estimator.passes
    bar = tqdm(
        total=total,
        initial=run.passes * len(pass_over) + done,
        desc="curvature",
        unit="batch",
        disable=not progress,
    )
    with bar:
        while run.passes < run.estimator.passes:
            for number in range(done, len(pass_over)):
                run.batch(pass_over[number].to(device), *labels)
                bar.update()
                if number + 1 < len(pass_over):
                    unfinished.save(run, number + 1)
            done = 0
            run.turn()
            unfinished.save(run, 0, force=run.estimator.passes > 1)
