"""A new classification head that begins at its best for the model as it is.

A head of random weights sends the model gradients that mean nothing, and by the time it has learned
to read the model's features they are distorted: texts look alike, and later tasks cannot be learned
any more. So the head's last layer is fitted first, with all else as it is: linear probing, then
fine-tuning (Kumar et al. 2022, arXiv 2202.10054). The fit is a logistic regression (of a single
output a ridge regression) on what that layer reads, its ridge chosen by cross-validation; one
forward pass over the rows is nearly all that it costs. Where the features foretell nothing (whether
a question is answered, of an encoder that has never read two sentences), the head stays as drawn:
the fit would be next to 0, and a model learns more slowly through that than through a random one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from retain.curvature.fit.source import source_examples
from retain.data.batches import Example
from retain.data.sources import Row
from retain.errors import ModelError, SourceError
from retain.models.forward import no_autocast
from retain.models.heads import check_single, mark_fitted
from retain.models.view import ModelView
from retain.retention.probe import Probe, fit_probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["HeadFit", "fit_head"]

ROWS = 2048
"""Rows that a head is fitted on at most."""

_Call = tuple[nn.Linear, Tensor, Tensor]
"""A layer, what it read and what it gave."""


@dataclass(frozen=True)
class HeadFit:
    """What a head's fit has found.

    Attributes:
        rows: that it was fitted on.
        ridge: the penalty's weight, for features of unit size.
        loss: of rows that the fit had not seen: nats, or squared errors of a regression, a row.
        known: the same of the classes' shares, or of the mean value, without the features.
        placed: whether the head has it.
    """

    rows: int
    ridge: float
    loss: float
    known: float
    placed: bool


@no_autocast()
def fit_head(
    model: nn.Module,
    data: str | Path | Iterable[Row] | Sequence[Example],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    columns: slice | None = None,
    rows: int = ROWS,
    max_length: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> HeadFit:
    """Fits the last layer of a new classification head, in place; see the module.

    Do it once, before training, and only with a head that is new: what it knew is overwritten.

    Args:
        model: a ``...ForSequenceClassification`` model, with or without an adapter.
        data: labelled rows, as for `retain.fit_curvature`.
        tokenizer: for text.
        columns: the outputs that answer these rows, whose labels count from 0; all by default. A
            single one is a regression.
        rows: that are used at most, drawn from all.
        max_length: tokens of a row.
        batch_size: rows a forward pass.
        seed: of the rows and of the cross-validation's parts.
        progress: show a bar.

    Raises:
        ModelError: a model without such a head.
        SourceError: fewer than two labelled rows, or a label without an output.
    """
    view = ModelView.of(model, tokenizer)
    if view.causal:
        raise ModelError(
            "a causal model has no new head",
            got=type(model).__name__,
            allowed="a ...ForSequenceClassification model",
            fix="leave fit_head out",
        )
    count = view.config.num_labels if columns is None else columns.stop - columns.start
    values = count == 1
    if columns is None:
        check_single(model)
    found = source_examples(view, data, rows, max_length, seed, values=values)
    labelled = [e for e in found if (e.targets[0] == e.targets[0] if values else e.targets[0] >= 0)]
    if len(labelled) < 2:
        raise SourceError(
            "there is too little to fit a head on",
            got=f"{len(labelled)} rows with a label",
            allowed="2 or more",
            fix="give labelled rows",
        )
    layer, features, targets = _features(view, labelled, batch_size, progress)
    outputs = columns or slice(0, layer.out_features)
    if count > 1 and int(targets.max()) >= count:
        raise SourceError(
            "a label has no output",
            got=f"label {int(targets.max())}",
            allowed=f"0 to {count - 1}",
            fix="check the labels, or the model's num_labels",
        )
    probe = fit_probe(features, targets, count, seed)
    if probe.tells:
        _place(layer, outputs, probe)
        mark_fitted(layer)
    return HeadFit(len(labelled), probe.ridge, probe.loss, probe.known, probe.tells)


@torch.no_grad()
def _features(
    view: ModelView, examples: Sequence[Example], size: int, progress: bool
) -> tuple[nn.Linear, Tensor, Tensor]:
    """The last layer of the head; what it reads, [rows, width]; and the rows' targets, [rows]."""
    seen: list[_Call] = []
    features, targets, layer = [], [], None
    every = view.batches(examples, size)
    with view.evaluating(), ExitStack() as hooks:
        for m in view.model.modules():
            if isinstance(m, nn.Linear) and m.out_features == view.config.num_labels:
                hooks.enter_context(
                    m.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
                )
        for batch in tqdm(every, "head", disable=not progress, leave=False):
            seen.clear()
            layer, read = _last(seen, view.logits(batch))
            features.append(read.double().cpu())
            targets.append(batch.targets.cpu())
    assert layer is not None
    return layer, torch.cat(features), torch.cat(targets)


def _last(seen: Sequence[_Call], logits: Tensor) -> tuple[nn.Linear, Tensor]:
    """The layer that gave the logits, and what it read of each row.

    A decoder's head answers at all positions, and the answer of one of them is taken.

    Raises:
        ModelError: there is none.
    """
    rows = torch.arange(len(logits), device=logits.device)
    for layer, read, given in reversed(seen):
        if read.dim() == 3:  # a text that ends with the token that pads ends before it, there
            alike = torch.isclose(given.to(logits), logits[:, None]).all(-1)
            last = (alike * torch.arange(1, alike.shape[1] + 1, device=alike.device)).argmax(dim=1)
            read, given = read[rows, last], given[rows, last]
        if given.shape == logits.shape and torch.allclose(given.to(logits), logits):
            return layer, read
    raise ModelError(
        "the head does not end in a linear layer",
        got=f"{len(seen)} linear layers as wide as the head, none of which gives the logits",
        allowed="a head whose last layer is torch.nn.Linear",
        fix="leave fit_head out, or head out of the parts (--parts rows,filter,force)",
    )


@torch.no_grad()
def _place(layer: nn.Linear, outputs: slice, probe: Probe) -> None:
    """Puts a fit into a head. One without a bias has the bias's part along the mean feature."""
    weight, bias = probe.weight, probe.bias
    if layer.bias is None:
        mean = probe.mean
        weight = weight + bias[:, None] * mean / mean.square().sum().clamp(min=1e-12)
    else:
        layer.bias[outputs] = bias.to(layer.bias)
    layer.weight[outputs] = weight.to(layer.weight)
