"""Measure a curvature on source text."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from retain.curvature.block import Block
from retain.curvature.capture import capture, shared_inputs
from retain.curvature.curvature import Curvature, CurvatureInfo, describe, part
from retain.curvature.diagonal import DiagonalEstimator
from retain.curvature.gather import Estimator, Gather
from retain.curvature.identity import IdentityEstimator
from retain.curvature.kronecker import KroneckerEstimator, ShampooEstimator
from retain.data.batches import Example, batches
from retain.data.sources import Row, encode, read_rows
from retain.errors import ConfigError, CurvatureError, SourceError, unknown
from retain.models.adapter import LoraSite, lora_sites
from retain.models.fingerprint import fingerprint
from retain.models.heads import is_causal
from retain.models.modes import evaluating
from retain.models.sample import sample_rows
from retain.types import FISHERS, SPACES, STRUCTURES, Fisher, Space, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["fit_curvature"]


def fit_curvature(
    model: nn.Module,
    source: str | Path | Iterable[Row] = "self",
    structure: Structure = "shampoo",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    space: Space = "weight",
    fisher: Fisher = "mc",
    samples: int = 1,
    rows: int = 128,
    max_length: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    calibrate: bool = True,
    progress: bool = True,
) -> Curvature:
    """Measures how much a model's predictions on source text rely on each weight direction.

    The Fisher information at the model's present adapter, which becomes the anchor, for the
    layers that carry LoRA. It is a mean over predicted tokens, so ``curvature.quadratic(model)``
    predicts ``KL(anchor || model)`` in nats per token of the source.

    Args:
        model: a PEFT model with LoRA on linear layers; a causal or sequence-classification head.
        source: ``"self"`` (text that the base model samples), a path (.txt, .jsonl, .jsonl.gz,
            .json, .csv, .parquet), a `datasets.Dataset`, or a list of rows; see
            `retain.data.sources` for the columns.
        structure: ``identity``, ``diagonal``, ``kfac`` or ``shampoo``.
        tokenizer: for text; not needed for rows with ``input_ids``. A model loaded from a name
            finds its own.
        space: ``weight`` (of the update s B A, for any rank) or ``adapter`` (of A and B).
        fisher: ``mc`` (labels sampled from the model), ``empirical`` (the data's labels; a
            sequence's own gradient is squared) or ``exact`` (all labels).
        samples: draws of each label (``mc``).
        rows: rows of the source that are read at most.
        max_length: tokens of a row that are read at most.
        batch_size: rows a pass. Memory and speed only: the result does not depend on it.
        seed: of label draws and of the self-sampled text.
        calibrate: scale each block of ``kfac`` to its true trace.
        progress: show a bar.

    Raises:
        ConfigError: an unknown structure, space or Fisher, or a number out of range.
        SourceError: text that is missing, empty or smaller than one batch.
        ModelError: a model without LoRA or without a head that predicts.
        CurvatureError: a layer that got no gradient where theory says it should.
    """
    for kind, got, allowed in (
        ("structure", structure, STRUCTURES),
        ("space", space, SPACES),
        ("fisher", fisher, FISHERS),
    ):
        if got not in allowed:
            raise unknown(kind, got, allowed)
    for label, number in (("samples", samples), ("rows", rows), ("batch_size", batch_size)):
        if number < 1:
            raise ConfigError(
                f"{label} is too small", got=number, allowed="1 or more", fix="raise it"
            )
    causal = is_causal(model)
    sites = lora_sites(model)
    examples = _examples(
        model, source, tokenizer, causal, rows, max_length, batch_size, seed, progress
    )
    layers = _layers(sites, space)
    device = sites[0].a.device
    pad = getattr(model.config, "pad_token_id", None) or 0
    pass_over = list(batches(examples, batch_size, pad))
    with evaluating(model, checkpoint=True):
        shared = shared_inputs(model, layers, pass_over[0].to(device))
        estimator = _estimator(structure, shared, calibrate)
        run = Gather(model, layers, estimator)
        with capture(model, layers, run.receive):
            for batch in tqdm(pass_over, desc="curvature", unit="batch", disable=not progress):
                run.batch(batch.to(device), fisher, samples, seed)
    _check_alive(run.dead(), sites, space)
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
        model=fingerprint(model),
        sites=describe(sites),
        versions=versions(),
        note=str(source) if isinstance(source, str | Path) else type(source).__name__,
    )
    blocks = estimator.finish(run.predictions)
    return Curvature(blocks, _anchor(sites, space, blocks), info)


def _check_alive(dead: list[str], sites: list[LoraSite], space: Space) -> None:
    """An all-zero layer is an error unless theory says so (A's block while B = 0)."""
    if space == "adapter":
        expected = {part(s.name, "lora_A") for s in sites if not bool(s.b.any())}
        dead = [name for name in dead if name not in expected]
    if dead:
        raise CurvatureError(
            "layers got no gradient at all",
            got=f"{len(dead)} layers, such as {dead[0]}",
            allowed="a gradient at each layer that carries the adapter",
            fix="check that the adapter is active, and the gradient checkpointing settings",
        )


def versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    names = ("retain", "torch", "transformers", "peft", "trl", "accelerate", "datasets")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version("retain-lora" if name == "retain" else name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _examples(
    model: Any,
    source: str | Path | Iterable[Row],
    tokenizer: PreTrainedTokenizerBase | None,
    causal: bool,
    rows: int,
    max_length: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Sequence[Example]:
    tokenizer = tokenizer or getattr(model, "retain_tokenizer", None)
    if isinstance(source, str) and source == "self":
        if not causal:
            raise SourceError(
                "only a causal model can sample its own text",
                got="source='self'",
                allowed="a data set or a file",
                fix="give source text with the classifier's fields",
            )
        source = sample_rows(
            model, tokenizer, count=rows, max_length=max_length, seed=seed, progress=progress
        )
    found = encode(read_rows(source, rows), tokenizer, max_length=max_length, causal=causal)[:rows]
    if len(found) < batch_size:
        raise SourceError(
            "the source is smaller than one batch",
            got=f"{len(found)} sequences, batch size {batch_size}",
            allowed=f"at least {batch_size} sequences",
            fix="give more text, or a smaller batch size",
        )
    return found


def _layers(sites: list[LoraSite], space: Space) -> dict[str, nn.Module]:
    """The modules to hook: the whole layer, or A and B inside it."""
    if space == "weight":
        return {s.name: s.layer for s in sites}  # type: ignore[misc]
    layers: dict[str, nn.Module] = {}
    for site in sites:
        layers[part(site.name, "lora_A")] = site.lora_a
        layers[part(site.name, "lora_B")] = site.lora_b
    return layers


def _estimator(structure: Structure, shared: dict[str, str], calibrate: bool) -> Estimator:
    if structure == "kfac":
        return KroneckerEstimator(shared, calibrate=calibrate)
    if structure == "shampoo":
        return ShampooEstimator()
    return DiagonalEstimator() if structure == "diagonal" else IdentityEstimator()


def _anchor(
    sites: list[LoraSite], space: Space, blocks: dict[str, Block]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The present adapter. In weight space, layers with no update need no entry."""
    anchor = {}
    for site in sites:
        name = site.name if space == "weight" else part(site.name, "lora_B")
        dtype = next(iter(blocks[name].tensors().values())).dtype
        a, b = site.a.detach().to(dtype, copy=True), site.b.detach().to(dtype, copy=True)
        if space == "adapter":
            anchor[site.name] = (b, a)
        elif bool(b.any()):
            anchor[site.name] = (site.scaling * b, a)
    return anchor
