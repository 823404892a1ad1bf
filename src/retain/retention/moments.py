"""Second moments of what a model's layers read, with a say for the places that predict.

    S = (1 - answers) mean over all positions of x x^T  +  answers mean over predictions of x x^T

A row of a classification task predicts at one position of a hundred. In the plain mean that place
counts for a hundredth, though whatever is read there goes straight into the answer. Of a text all
positions predict, and both means are one.

What a causal model reads at a row's first position is no news: attention parks there (arXiv
2309.17453), with activations that can be a hundred times those of any other place (arXiv
2402.17762) whatever the token is. So a task's rows are read without it, and a source with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from retain.curvature.blocks.estimator import products
from retain.curvature.blocks.factor import DenseFactor, Factor, SketchFactor, diagonal_of
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.blocks.linalg import gram_update, mirror
from retain.curvature.blocks.sketch import sketch_update, sketches_finish
from retain.curvature.curvature import Curvature
from retain.curvature.fit.capture import shared_inputs
from retain.curvature.fit.source import glance
from retain.data.batches import Batch, Example
from retain.errors import ConfigError, MismatchError, SourceError, check_number
from retain.models.forward import no_autocast
from retain.models.sites import LoraSite
from retain.models.view import ModelView

__all__ = ["Moments", "check_answers", "check_rows", "input_moments", "inputs_of", "moments_of"]


class Moments:
    """S of each input, which several layers may read.

    Args:
        factors: S by the first layer that reads it, of size d_in; of wide inputs it may be a
            sketch, as in a curvature that has one.
        readers: layer -> that first layer.
    """

    def __init__(self, factors: Mapping[str, Factor], readers: Mapping[str, str]) -> None:
        self.factors, self.readers = dict(factors), dict(readers)

    def factor(self, layer: str) -> Factor:
        """S of a layer."""
        return self.factors[self.readers[layer]]

    def of(self, layer: str) -> Tensor:
        """S of a layer, [d_in, d_in]."""
        return self.factor(layer).dense()

    def ranks(self) -> dict[str, int]:
        """How many directions the sketches have, by all layers that read them."""
        found = {layer: self.factor(layer) for layer in self.readers}
        return {n: s.vectors.shape[1] for n, s in found.items() if isinstance(s, SketchFactor)}

    def plus(self, other: Moments) -> Moments:
        """``self + other``, in place of self."""
        for name, s in self.factors.items():
            self.factors[name] = s.plus(other.factor(name))
        return self

    def times(self, weight: float) -> Moments:
        """``weight self``, in place of self."""
        for name, s in self.factors.items():
            self.factors[name] = s.scaled(weight)
        return self

    def sized_as(self, other: Moments) -> Moments:
        """Each S in the unit of the other's: the median ratio of their diagonals is 1.

        Of the traces nothing could be said: what a source keeps at a row's first position, and a
        task's rows are read without, may be all of one. Values that are 0 in all rows of one of
        the two, as many are behind a ReLU, say nothing either.
        """
        sized = {}
        for name, s in self.factors.items():
            own, wanted = diagonal_of(s).double(), diagonal_of(other.factor(name)).double()
            wanted = wanted.to(own)
            ratios = (wanted / own)[(own > 0) & (wanted > 0)]
            sized[name] = s.scaled(float(ratios.median()) if len(ratios) else 1.0)
        return Moments(sized, self.readers)


def inputs_of(layer: str, new: Moments, old: Moments | None) -> tuple[str, str]:
    """What two layers have in common if they read one input in both (gradients may weigh it)."""
    return new.readers[layer], "" if old is None else old.readers[layer]


def moments_of(curvature: Curvature) -> Moments:
    """The input sides of a curvature: of ``shampoo`` those weighted by gradients.

    Raises:
        MismatchError: a curvature that has none.
    """
    factors: dict[str, Factor] = {}
    readers: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, block in curvature.blocks.items():
        if not isinstance(block, KroneckerBlock) or curvature.info.space != "weight":
            raise MismatchError(
                "the curvature does not tell what a layer reads",
                got=f"structure {curvature.info.structure}, {curvature.info.space} space",
                allowed="activation, kfac, shampoo or tridiagonal in weight space",
                fix="fit it with structure='activation' or 'kfac'",
            )
        readers[name] = first.setdefault(id(block.inputs), name)
        if readers[name] == name:
            factors[name] = block.inputs
    return Moments(factors, readers)


def check_rows(rows: int) -> None:
    """Raises `ConfigError` unless it is a whole number of rows to read, 1 or more."""
    check_number("too few rows to read", rows, "rows=64", least=1, whole=True)


def check_answers(share: float) -> None:
    """Raises `ConfigError` unless the predicting positions' share is from 0 to 1."""
    if not (isinstance(share, int | float) and math.isfinite(share) and 0 <= share <= 1):
        raise ConfigError(
            "the answers' share is out of range",
            got=share,
            allowed="from 0 (all positions alike) to 1 (the predicting ones alone)",
            fix="answers=0.5",
        )


def input_moments(
    model: nn.Module,
    sites: Sequence[LoraSite],
    examples: Sequence[Example],
    *,
    answers: float = 0.5,
    first: bool = True,
    ranks: Mapping[str, int] | None = None,
    batch_size: int = 8,
) -> Moments:
    """S of all layers, from forward passes alone; see the module. In float32 at least.

    Args:
        model: it carries the layers, and is left as it was.
        sites: the layers.
        examples: tokenised rows.
        answers: the share of the predicting positions; a classifier's rows have none.
        first: whether a causal model's rows count with their first position. It counts in rows
            that have no other, and for a classifier, whose first position may be the one it reads.
        ranks: of the sketches that are to be made of some layers' S in place of the whole.
        batch_size: rows a pass. Memory and speed only.

    Raises:
        SourceError: no rows.
        ConfigError: a share out of range.
    """
    check_answers(answers)
    if not examples:
        raise SourceError(
            "there are no rows to see what the layers read",
            got="no rows",
            allowed="one at least",
            fix="give more data",
        )
    view = ModelView.of(model)
    skip = not first and view.causal
    starts = [int(skip and len(e.tokens) > 1) for e in examples]
    tokens = sum(len(e.tokens) - s for e, s in zip(examples, starts, strict=True))
    predictions = sum(sum(e.predict[s:]) for e, s in zip(examples, starts, strict=True))
    share = answers if predictions else 0.0
    layers: dict[str, Any] = {site.name: site.layer for site in sites}
    with view.evaluating(), torch.no_grad(), products("auto"), ExitStack() as hooks:
        readers = shared_inputs(model, layers, glance(examples[0], view.pad).to(view.device))
        found: dict[str, Tensor] = {}
        sketches: dict[str, Tensor] = {}
        wide = {readers[layer]: rank for layer, rank in (ranks or {}).items()}
        weights: list[Tensor] = []  # of the batch that runs, [batch * seq]

        def hear(name: str) -> Any:
            @no_autocast()  # a layer may run in one of its own
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].detach()
                rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
                if len(rows) == len(weights[0]):
                    rows = rows * weights[0].sqrt()[:, None].to(rows)
                else:  # behind a classifier's pooling there is one place a row
                    rows = rows / len(examples) ** 0.5
                if name in wide:
                    sketch_update(sketches, name, rows, wide[name])
                else:
                    gram_update(found, name, rows)

            return hook

        for name in dict.fromkeys(readers.values()):
            hooks.enter_context(layers[name].register_forward_pre_hook(hear(name)))
        for batch in view.batches(examples, batch_size):
            weights[:] = [_weights(batch, share, tokens, predictions, skip)]
            view.run(batch)
    kind = torch.promote_types(sites[0].a.dtype, torch.float32)
    factors: dict[str, Factor] = {name: DenseFactor(mirror(s)) for name, s in found.items()}
    factors |= sketches_finish(sketches, wide, kind)
    return Moments(factors, readers)


def _weights(batch: Batch, share: float, tokens: int, predictions: int, skip: bool) -> Tensor:
    """Of each position, [batch * seq]; rows are padded on the right."""
    mask = batch.inputs["attention_mask"]
    weights = (1.0 - share) / tokens * mask.double()
    if share and batch.predict is not None:
        weights = weights + share / predictions * batch.predict
    if skip:
        weights[:, 0] *= mask.sum(1) == 1
    return weights.reshape(-1)
