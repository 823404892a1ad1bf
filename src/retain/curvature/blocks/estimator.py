"""What turns a stream of observations into blocks: the base of every structure's estimator.

All that an estimator has gathered is in one dictionary of tensors, so that a fit which was
stopped goes on from a file. Sums are kept in float32 (float64 for a float64 model).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.factor import DenseFactor, Factor, SketchFactor
from retain.curvature.blocks.linalg import float32_products, gram_update, mirror
from retain.curvature.blocks.observation import Observation
from retain.curvature.blocks.ranks import sketch_rank
from retain.curvature.blocks.sketch import sketch_sizes, sketch_update, sketches_finish
from retain.types import FactorRank, Products

__all__ = ["Estimator", "Layout", "calibration", "flat", "has_bf16", "products"]


@dataclass(frozen=True)
class Layout:
    """What an estimator is told of the layers before it starts.

    Attributes:
        shared: layer -> the layer whose input it shares (itself, when it shares none), in the
            order of the modules.
        rank: of sketched factors; see `retain.curvature.blocks.ranks.sketch_rank`.
        calibrate: scale each block of ``kfac`` and ``tridiagonal`` to its true trace.
        adapters: layer -> (B, A, scaling) for a pull-back to adapter space; empty otherwise.
        rows: layer -> the factors of its rows (DoRA), for estimators that see no gradients.
    """

    shared: Mapping[str, str]
    rank: FactorRank = None
    calibrate: bool = True
    adapters: Mapping[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)


class Estimator(ABC):
    """Streams observations into `state`; the blocks come out at the end."""

    passes: ClassVar[int] = 1
    """How often the source is read."""
    backward: ClassVar[bool] = True
    """Whether gradients are needed."""
    together: ClassVar[bool] = False
    """Whether all layers must see the same sequences when only a share is read."""

    same: ClassVar[tuple[str, ...]] = ()
    """Beginnings of keys of the state that hold no sum over rows: each process has the same."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.state: dict[str, Tensor] = {}
        self.links: dict[tuple[str, str], Any] = {}
        """What ties the blocks of two layers, once `finish` has made them."""
        self._sketches: dict[str, SketchFactor] = {}

    @abstractmethod
    def update(self, seen: Observation) -> None:
        """Takes one layer's inputs and gradients of one pass."""

    def end_pass(self, number: int) -> None:
        """Called when a pass over the source has ended, with its number from 0."""
        return

    @abstractmethod
    def finish(self, predictions: int, traces: Mapping[str, float]) -> dict[str, Block]:
        """The blocks by layer.

        Args:
            predictions: the number of predicted tokens that were seen.
            traces: layer -> ``E || sum_t g_t x_t^T ||^2`` per prediction, over all sequences.
        """

    def add(self, key: str, value: Tensor) -> None:
        """Adds to a sum."""
        if key in self.state:
            self._meet(key, value)
            self.state[key] += value
        else:
            self.state[key] = value.clone()

    def product(self, key: str, left: Tensor, right: Tensor, weight: float = 1.0) -> None:
        """Adds ``weight * left^T right`` for rows [n, a] and [n, b]."""
        if key in self.state:
            self._meet(key, left)
            self.state[key].addmm_(left.T, right, alpha=weight)
        else:
            found = left.T @ right
            self.state[key] = found if weight == 1 else found.mul_(weight)

    def _meet(self, key: str, value: Tensor) -> None:
        """Moves a sum to where its layer is: one that comes from a file lies elsewhere."""
        if self.state[key].device != value.device:
            self.state[key] = self.state[key].to(value.device)

    def moment(self, key: str, rows: Tensor, weight: float = 1.0) -> None:
        """Adds ``weight * rows^T rows``, to a sketch where the side is wide."""
        rank = sketch_rank(rows.shape[1], self.layout.rank)
        if rank is not None:
            sketch_update(self.state, key, rows if weight == 1 else rows * weight**0.5, rank)
        else:
            gram_update(self.state, key, rows, weight)

    def input_moment(self, seen: Observation) -> None:
        """Adds a layer's ``x x^T``, once for all layers that share the input."""
        name = seen.name
        if self.layout.shared[name] == name:
            self.moment(f"inputs/{name}", flat(seen.inputs))
            self.add(f"positions/{name}", torch.tensor(seen.source.positions))

    def factor(self, key: str, scale: float) -> Factor:
        """``scale`` times what `moment` has summed, which is gone then: it may be large."""
        if key in self.state:
            found = mirror(self.state.pop(key))
            return DenseFactor(found if scale == 1 else found.mul_(scale))
        if key not in self._sketches:  # all at once, for their decompositions are batched
            ranks = {n: sketch_rank(d, self.layout.rank) for n, d in sketch_sizes(self.state)}
            self._sketches |= sketches_finish(self.state, {n: k for n, k in ranks.items() if k})
        return self._sketches.pop(key).scaled(scale)

    def input_factors(self) -> dict[str, Factor]:
        """Layer -> ``E[x x^T]`` over positions; layers that share an input share the factor."""
        shared, made = self.layout.shared, {}
        for name in shared:
            if shared[name] == name:
                positions = float(self.state[f"positions/{name}"])
                made[name] = self.factor(f"inputs/{name}", 1 / positions)
        return {name: made[first] for name, first in shared.items()}


def flat(x: Tensor) -> Tensor:
    """[batch, seq, d] as [batch * seq, d]."""
    return x.reshape(-1, x.shape[-1])


def calibration(found: float, true: float) -> float:
    """What brings a trace to its true value; 0 for a layer without any gradient."""
    return true / found if found > 0 else 0.0


@contextmanager
def products(kind: Products) -> Iterator[None]:
    """Float32 matrix products by the hardware's bfloat16 or TF32 units, summed in float32.

    ``auto`` uses them where they are faster: on a CPU with AMX tiles or AVX512-BF16, and on a GPU.
    Only the factors' own products are inside; the model runs as it always does.
    """
    if kind != "auto" or not _HAS_BF16:
        yield
        return
    with float32_products("bf16", "tf32"):
        yield


def has_bf16(device: torch.device | None = None) -> bool:
    """Whether products in bfloat16 are faster on a device, by default on what this machine has."""
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda")
    if device is not None and device.type != "cpu":
        if device.type != "cuda" or not torch.cuda.is_available():
            return False
        # Before Ampere they are emulated, if at all.
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    # Without tiles too: AVX512-BF16 alone is 2 to 4 times as fast on a Zen 5 core.
    kinds = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, kind, lambda: False)() for kind in kinds)


_HAS_BF16 = has_bf16()
