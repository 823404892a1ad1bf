"""Fits of tiny models on random text, and how two curvatures are compared."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from retain import Curvature, fit_curvature
from tiny import base, move, relative, tiny

__all__ = ["definite", "dense", "dora", "fit", "measure", "pair", "same", "text"]


def text(seed: int, count: int = 4) -> list[dict[str, Any]]:
    """Random rows of 2 to 6 tokens, with a label for the classifier."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, number: int = 1) -> list[int]:
        return torch.randint(low, high, (number,), generator=random).tolist()

    lengths = [2 + i % 5 for i in draw(0, 5, count)]
    return [{"input_ids": draw(1, 12, n), "label": draw(0, 3)[0]} for n in lengths]


def measure(model: nn.Module, seed: int, structure: str, **options: Any) -> Curvature:
    """A fit on text of a seed, in small batches."""
    options = {"seed": seed, "batch_size": 2, "progress": False, **options}
    return fit_curvature(model, text(seed), structure, **options)


@cache
def fit(
    kind: str, space: str, structure: str, seed: int, moved: bool = True, **options: Any
) -> Curvature:
    """The same, of a tiny model, made once."""
    return measure(tiny(kind, moved=moved), seed, structure, space=space, **options)


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


def pair(kind: str, space: str, structure: str, moved: bool = True) -> tuple[Curvature, Curvature]:
    """Two fits of one model on different text."""
    return fit(kind, space, structure, 1, moved), fit(kind, space, structure, 2, moved)


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
    """Checks that two curvatures have the same blocks and links."""
    assert list(got.blocks) == list(want.blocks)
    assert list(got.links) == list(want.links)
    for name, block in dense(want).items():
        assert relative(got.blocks[name].to_dense(), block) < tolerance, name
    for ends, link in want.links.items():
        assert relative(got.links[ends].to_dense(), link.to_dense()) < tolerance
