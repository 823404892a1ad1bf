"""Fits of tiny models, and how curvatures are compared: with dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from oracles import Oracle
from retain import Curvature, fit_curvature
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.models.sites import LoraSite, find_sites
from retain.types import FISHERS, SPACES
from tiny import KINDS, ROWS, STRUCTURES, base, move, relative, tiny

SEEDS = st.integers(0, 2**31 - 1)
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value", "pooler.dense"]}
SKETCHED = ("kfac", "shampoo", "activation")
FIT: dict[str, Any] = {"batch_size": 2, "progress": False, "seed": 2}


# --- fits ---


def text(seed: int, count: int = 4) -> list[dict[str, Any]]:
    """Random rows of 2 to 6 tokens, with a label for the classifier."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, number: int = 1) -> list[int]:
        return torch.randint(low, high, (number,), generator=random).tolist()

    lengths = [2 + i % 5 for i in draw(0, 5, count)]
    return [{"input_ids": draw(1, 12, n), "label": draw(0, 3)[0]} for n in lengths]


def fit(model: nn.Module, kind: str, structure: str = "kfac", **options: Any) -> Curvature:
    """A fit on the rows of a kind, in small batches."""
    source = options.pop("source", ROWS[kind])
    return fit_curvature(model, source, structure, **FIT | options)


@cache
def known(
    kind: str, space: str = "weight", structure: str = "kfac", moved: bool = True, **options: Any
) -> Curvature:
    """The same, of a tiny model, made once."""
    return fit(tiny(kind, moved=moved), kind, structure, space=space, **options)


@cache
def oracle(kind: str, moved: bool = True, dtype: torch.dtype = torch.float64) -> Oracle:
    """The brute-force twin of that model on those rows."""
    return Oracle(tiny(kind, moved=moved, dtype=dtype), ROWS[kind], causal=kind == "llama")


def measure(model: nn.Module, seed: int, structure: str, **options: Any) -> Curvature:
    """A fit on text of a seed."""
    return fit_curvature(model, text(seed), structure, **FIT | {"seed": seed} | options)


@cache
def _measured(
    kind: str, space: str, structure: str, seed: int, moved: bool, **options: Any
) -> Curvature:
    return measure(tiny(kind, moved=moved), seed, structure, space=space, **options)


def pair(
    kind: str, space: str, structure: str, moved: bool = True, **options: Any
) -> tuple[Curvature, Curvature]:
    """Two fits of one model on different text, made once."""
    one, two = (_measured(kind, space, structure, seed, moved, **options) for seed in (1, 2))
    return one, two


def dora(kind: str) -> PeftModel:
    """A tiny model with DoRA, away from its start: random A, B and magnitudes."""
    config = LoraConfig(
        r=2, lora_alpha=3, use_dora=True, target_modules="all-linear",
        task_type={"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}[kind],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base(kind), config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "magnitude" in name:
                    p.mul_(1 + 0.3 * torch.rand_like(p))
    move(model, 2)
    return model.eval()


def split_anew(model: nn.Module, seed: int = 3) -> None:
    """The same updates from other factors: (B R, R^-1 A)."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in find_sites(model):
            u, _, v = torch.linalg.svd(torch.randn(site.rank, site.rank, generator=random))
            r = (u @ torch.diag(1 + torch.rand(site.rank, generator=random)) @ v).to(site.b)
            site.b.copy_(site.b @ r)
            site.a.copy_(torch.linalg.solve(r, site.a))


# --- drawn by hypothesis ---


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
    space = "adapter" if setup.space == "adapter" else "weight"
    options = {"space": space, "fisher": setup.fisher, "rank": setup.rank}
    curvature = fit(model_of(setup), setup.kind, setup.structure, **options)
    return Fit(curvature, curvature.to_dense())


def moved(setup: Setup, seed: int) -> nn.Module:
    model = model_of(setup)
    move(model, seed)
    return model


# --- what they are, written out ---


def tensors(curvature: Curvature) -> list[Tensor]:
    """All tensors of the blocks and links."""
    return list(curvature.tensors().values())


def groups(curvature: Curvature) -> list[int]:
    """For each factor and tensor of the blocks, the first that it is one and the same with."""
    things: list[Any] = []
    for block in curvature.blocks.values():
        parts = block.factors() if isinstance(block, KroneckerBlock) else block.tensors()
        things += parts.values()
    first: dict[int, int] = {}
    return [first.setdefault(id(thing), n) for n, thing in enumerate(things)]


def dense(curvature: Curvature) -> dict[str, Tensor]:
    """Each block as a matrix."""
    return {name: block.to_dense() for name, block in curvature.blocks.items()}


def definite(matrix: Tensor) -> None:
    """Checks that a matrix is finite, symmetric and positive semi-definite."""
    assert bool(matrix.isfinite().all())
    slack = 1e-12 if matrix.dtype == torch.float64 else 1e-6
    assert relative(matrix, matrix.T) <= slack
    assert float(torch.linalg.eigvalsh(matrix)[0]) >= -slack * float(matrix.trace())


def same(got: Curvature, want: Curvature, tolerance: float = 1e-9) -> None:
    """Checks that two curvatures have the same blocks and links.

    Dense matrices, since the eigenvectors of equal eigenvalues are free.
    """
    assert list(got.blocks) == list(want.blocks)
    assert list(got.links) == list(want.links)
    for name, block in dense(want).items():
        assert relative(got.blocks[name].to_dense(), block) < tolerance, name
    for ends, link in want.links.items():
        assert relative(got.links[ends].to_dense(), link.to_dense()) < tolerance, ends


def displacement(curvature: Curvature, model: nn.Module) -> dict[str, Tensor]:
    """How far each block's weight is from the anchor, with the graph to the model's own weights."""
    moves = {}
    for site in find_sites(model):
        anchor = curvature.anchor.get(site.name, ())
        if not isinstance(site, LoraSite):
            moves[site.name] = site.weight - anchor[0]
        elif curvature.info.space == "adapter":
            b0, a0 = anchor
            moves[f"{site.name}.lora_A"] = site.a - a0
            moves[f"{site.name}.lora_B"] = site.b - b0
        else:
            moves[site.name] = site.scaling * site.b @ site.a
            if len(anchor) == 2:
                moves[site.name] = moves[site.name] - anchor[0] @ anchor[1]
    return moves


def joined(curvature: Curvature, moves: Mapping[str, Tensor]) -> Tensor:
    """Row-major vectors of all displacements, in the order of the blocks."""
    assert set(moves) == set(curvature.blocks)
    return torch.cat([moves[name].reshape(-1) for name in curvature.blocks])


def dense_quadratic(curvature: Curvature, model: nn.Module, dense: Tensor | None = None) -> Tensor:
    """``0.5 d^T F d`` at a model, for autograd; `dense` is F where that is known already."""
    d = joined(curvature, displacement(curvature, model))
    return 0.5 * d @ (curvature.to_dense() if dense is None else dense) @ d
