"""The activation curvature: input second moments alone, from forward passes without labels.

``F(D) = gamma D S / E||y||^2`` with ``S = E[x x^T]`` over a layer's inputs and y its outputs, so

    0.5 <D, F D> = 0.5 gamma E||D x||^2 / E||y||^2 :

the layer's relative change of output. It stands on two guesses: that a layer's output gradients
have no direction (``G`` is a multiple of the identity), and that the same *relative* noise costs
the same in each layer, ``tr G_l * E||y_l||^2 / d_out = const``. On SmolLM2-135M the second holds
within a factor of 2.4 (one standard deviation over layers) where ``tr G_l = const`` is off by 5.

gamma brings it to nats: noise of relative size eta is added to the outputs of all L layers on
one in eight rows, the KL divergence that it causes is measured, and
``KL = 0.5 eta^2 L gamma``. Two forward passes over these rows more, each of all at once, as the
noise is relative to what a layer puts out on all of them, and still no gradient: it runs on any
quantised base. Rows differ: on text that SmolLM2-135M samples, gamma of four rows has a
relative standard deviation of 0.55.

In adapter space it is the pull-back through (A, B): ``s^2 B^T B (x) S`` for A and
``s^2 I (x) A S A^T`` for B, with the same scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.estimator import Estimator
from retain.curvature.blocks.factor import ScalarFactor, SketchFactor
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.blocks.observation import Observation
from retain.curvature.blocks.structure import Ranks, Structure
from retain.data.batches import Batch, Example
from retain.errors import CurvatureError
from retain.models.forward import forward_logits, logit_divergence
from retain.models.heads import are_values

if TYPE_CHECKING:
    from retain.models.skeleton import Outline

__all__ = ["STRUCTURE", "ActivationEstimator", "nats_of_noise", "noisy_rows"]

NOISY_SHARE, NOISY_TOKENS = 8, 250
"""Gamma is measured on one in so many rows, drawn, that have at least so many tokens."""

_CHUNK = 32
"""Predictions whose probabilities are held in float32 at a time."""

ETA = 0.02
"""Size of the noise, relative to each output's root mean square."""


class ActivationEstimator(Estimator):
    """Streams S once for each input, and the energy of each output."""

    backward: ClassVar[bool] = False
    same: ClassVar[tuple[str, ...]] = ("width/",)

    def update(self, seen: Observation) -> None:
        name, y = seen.name, seen.gradients
        self.input_moment(seen)
        self.add(f"energy/{name}", torch.linalg.vecdot(y, y).sum(dtype=torch.float64))
        self.add(f"seen/{name}", torch.tensor(seen.source.positions))
        self.state.setdefault(f"width/{name}", torch.tensor(y.shape[-1]))

    def finish(self, predictions: int, traces: Mapping[str, float]) -> dict[str, Block]:
        """The blocks; here `traces` holds gamma for each layer.

        Raises:
            CurvatureError: a layer's outputs are not finite.
        """
        state = self.state
        blocks: dict[str, Block] = {}
        for name, s in self.input_factors().items():
            energy = float(state[f"energy/{name}"]) / float(state[f"seen/{name}"])
            _check_finite(energy, f"NaN or infinity from {name}")
            scale = traces[name] / energy if energy > 0 else 0.0
            like = next(iter(s.tensors().values()))
            if name in self.layout.adapters:
                b, a, scaling = self.layout.adapters[name]
                scale *= scaling**2
                blocks[f"{name}.lora_A"] = KroneckerBlock(s, scale * (b.T @ b))
                unit = ScalarFactor(a.new_tensor(scale), len(b))
                blocks[f"{name}.lora_B"] = KroneckerBlock(a @ s.matmul(a.T), unit)
            elif name in self.layout.rows:  # D acts on the output through the rows' factors
                rows = self.layout.rows[name].to(like)
                none = rows.new_zeros(len(rows), 0)
                diagonal = SketchFactor(none, scale * rows.square(), rows.new_zeros(()))
                blocks[name] = KroneckerBlock(s, diagonal)
            else:
                unit = ScalarFactor(like.new_tensor(scale), int(state[f"width/{name}"]))
                blocks[name] = KroneckerBlock(s, unit)
        return blocks


def nats_of_noise(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch, seed: int, eta: float = ETA
) -> float:
    """gamma: twice the nats per prediction that noise at all outputs costs, over ``eta^2 L``.

    The noise is eta times the root mean square of each layer's output; the model in evaluation
    mode.

    Raises:
        CurvatureError: the model's outputs are not finite.
    """
    with torch.no_grad():
        base = forward_logits(model, batch)
        regression = are_values(model, base)
        with _noise(layers, batch, seed, eta):
            moved = forward_logits(model, batch)
        total = 0.0
        for one, other in zip(base.split(_CHUNK), moved.split(_CHUNK), strict=True):
            total += float(logit_divergence(one, other, regression).double().sum())
    _check_finite(total, "NaN or infinity in its predictions")
    return max(2 * total / len(base), 0.0) / (eta**2 * len(layers))


def _check_finite(value: float, got: str) -> None:
    if not math.isfinite(value):
        raise CurvatureError(
            "the model's outputs are not finite",
            got=got,
            allowed="finite numbers",
            fix="check the model's weights, or load it with dtype='float32'",
        )


def noisy_rows(examples: Sequence[Example], seed: int) -> list[int]:
    """The numbers of the rows that gamma is measured on, drawn: a source may be in some order."""
    random = torch.Generator().manual_seed(seed)
    order, tokens = torch.randperm(len(examples), generator=random).tolist(), 0
    for n, row in enumerate(order, 1):
        tokens += len(examples[row].tokens)
        if tokens >= NOISY_TOKENS and n * NOISY_SHARE >= len(examples):
            return sorted(order[:n])
    return sorted(order)


@contextmanager
def _noise(layers: Mapping[str, nn.Module], batch: Batch, seed: int, eta: float) -> Iterator[None]:
    random = torch.Generator().manual_seed(seed)
    mask = batch.mask

    def hook(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        live = y[mask.to(y.device)] if y.dim() == 3 else y  # a pooled layer has no padding
        size = eta * live.double().square().mean().sqrt()
        noise = torch.randn(y.shape, generator=random, dtype=torch.float32)
        wide = torch.promote_types(y.dtype, torch.float32)
        return y + (size.to(wide) * noise.to(y.device, wide)).to(y.dtype)

    handles = [layer.register_forward_hook(hook) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noise_passes(model: Outline, rank: Ranks) -> int:
    """Two forward passes of an eighth of the rows, for the scale."""
    return model.linear // 4


STRUCTURE = Structure(
    KroneckerBlock,
    ActivationEstimator,
    inputs="shared",
    scalars="each",
    extra_work=_noise_passes,
)
