"""Fits of every structure, space and Fisher on small models, to be drawn by hypothesis."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from retain import Curvature, fit_curvature
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.models.sites import find_sites
from retain.types import FISHERS, SPACES
from tiny import KINDS, ROWS, STRUCTURES, base, move, tiny

__all__ = ["SEEDS", "Fit", "Setup", "fitted", "groups", "model_of", "moved", "setups"]

SEEDS = st.integers(0, 2**31 - 1)
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value", "pooler.dense"]}
SKETCHED = ("kfac", "shampoo", "activation")


class Setup(NamedTuple):
    """What is fitted; `rank` is that of sketches, if any."""

    kind: str
    space: str
    structure: str
    fisher: str
    moved: bool
    rank: int | None


class Fit(NamedTuple):
    curvature: Curvature
    dense: Tensor


@st.composite
def setups(draw: st.DrawFn, spaces: tuple[str, ...] = (*SPACES, "full")) -> Setup:
    space, structure = draw(st.sampled_from(spaces)), draw(st.sampled_from(STRUCTURES))
    return Setup(
        draw(st.sampled_from(KINDS)),
        space,
        structure,
        draw(st.sampled_from(FISHERS)),
        space != "full" and draw(st.booleans()),
        draw(st.sampled_from([None, 2, 3])) if structure in SKETCHED else None,
    )


def model_of(setup: Setup) -> nn.Module:
    """At the anchor; small, so that dense matrices are."""
    if setup.space != "full":
        return tiny(setup.kind, moved=setup.moved, targets=TARGETS[setup.kind])
    model = base(setup.kind)
    for site in find_sites(model):
        ends = tuple(f".{target}" for target in TARGETS[setup.kind])
        site.weight.requires_grad_(site.name.endswith(ends))
    return model


@cache
def fitted(setup: Setup) -> Fit:
    curvature = fit_curvature(
        model_of(setup), ROWS[setup.kind], setup.structure,
        space="adapter" if setup.space == "adapter" else "weight",
        fisher=setup.fisher, rank=setup.rank, batch_size=2, progress=False,
    )  # fmt: skip
    return Fit(curvature, curvature.to_dense())


def moved(setup: Setup, seed: int) -> nn.Module:
    model = model_of(setup)
    if setup.space != "full":
        move(model, seed)
        return model
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in find_sites(model):
            step = torch.randn(site.weight.shape, generator=random, dtype=torch.float64)
            site.weight.add_(0.3 * step)
    return model


def groups(curvature: Curvature) -> list[int]:
    """For each factor and tensor of the blocks, the first that it is one and the same with."""
    things: list[Any] = []
    for block in curvature.blocks.values():
        parts = block.factors() if isinstance(block, KroneckerBlock) else block.tensors()
        things += parts.values()
    known: dict[int, int] = {}
    return [known.setdefault(id(thing), n) for n, thing in enumerate(things)]
