"""What is decomposed: as much for a deep model as for a shallow one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from retain import fit_curvature
from retain.data.batches import Example
from retain.models.lora import attach_lora
from retain.retention.loader import reader_of
from retain.retention.recipe import Recipe

KINDS = ("eigh", "svd", "cholesky", "linalg_qr", "solve", "inv")


class Decompositions(TorchDispatchMode):
    """Counts calls; one of a stack of matrices is one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if any(kind in name for kind in KINDS):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def counted(layers: int, rank: int | None, structure: str) -> tuple[int, int]:
    """Of a fit, and of the start of a training."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
            pad_token_id=0,
        )
    )  # fmt: skip
    model = attach_lora(model, rank=2)
    ids = torch.randint(1, 32, (12, 9)).tolist()
    with Decompositions() as fit:
        curvature = fit_curvature(
            model, [{"input_ids": row} for row in ids], structure, rank=rank, batch_size=4,
            progress=False,
        )  # fmt: skip
    rows = [Example(tuple(row), (*row[1:], 0), (True,) * 9) for row in ids]
    recipe = Recipe(curvature)
    with Decompositions() as start:
        recipe.begin(model, reader_of(rows))
    assert recipe.filter is not None
    recipe.release()
    return fit.calls.total(), start.calls.total()


@pytest.mark.parametrize("structure", ["kfac", "activation"])
@pytest.mark.parametrize("rank", [3, None])
def test_their_number_does_not_grow_with_the_layers(rank: int | None, structure: str) -> None:
    few, many = (counted(layers, rank, structure) for layers in (4, 8))
    assert few == many
    assert max(few) <= 20
