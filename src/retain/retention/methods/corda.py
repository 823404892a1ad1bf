"""CorDA that keeps knowledge, by PEFT: Yang et al. 2024, arXiv 2406.05223, "KPM" there.

``W S_old`` is decomposed, and B_0 and A_0 are its r smallest singular directions, with ``S_old^-1``
on the right again: PEFT's ``init_lora_weights="corda"`` on the present weights, which are handed to
it as plain layers that read a square root of S_old.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

from retain.extras import load
from retain.models.sites import lora_sites
from retain.retention.moments import Moments
from retain.retention.starts import Factors, Start

__all__ = ["CorDA"]


class CorDA(Start):
    """See the module, and `Start` for the argument and for sequences of tasks."""

    name: ClassVar[str] = "corda"

    def starts(
        self, weights: dict[str, Tensor], rank: int, old: Moments, new: Moments | None
    ) -> dict[str, Factors]:
        roots = {name: _root(factor.dense()) for name, factor in old.factors.items()}
        layers, names = nn.ModuleDict(), [f"layer{i}" for i in range(len(weights))]
        for place, weight in zip(names, weights.values(), strict=True):
            layers[place] = layer = nn.Linear(1, 1, bias=False, device="meta")
            layer.weight = nn.Parameter(weight.float(), requires_grad=False)
            layer.out_features, layer.in_features = weight.shape
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=names, init_lora_weights="corda",
            corda_config=CordaConfig(corda_method="kpm", verbose=False),
        )  # fmt: skip

        def run() -> None:
            for place, name in zip(names, weights, strict=True):
                layers[place](roots[old.readers[name]])

        # Only here, since that module needs attrs, which PEFT does not ask for.
        corda = load("peft.tuners.lora.corda", "method corda")
        with torch.random.fork_rng(), torch.no_grad():
            corda.preprocess_corda(layers, config, run_model=run)
            model: Any = layers
            made = get_peft_model(model, config)
        found = [(site.b.detach(), site.a.detach()) for site in lora_sites(made)]
        return dict(zip(weights, found, strict=True))


def _root(s: Tensor) -> Tensor:
    """A symmetric X with ``X X = S``."""
    values, vectors = torch.linalg.eigh(s.double())
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root.float()
