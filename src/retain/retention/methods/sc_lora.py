"""SC-LoRA: what B can write begins as what the new rows use and the old do not (arXiv 2505.23724).

A layer's outputs have the second moments ``C = W S W^T``. Of ``(1 - beta) C_new - beta C_old`` the
r eigenvectors Q of the largest eigenvalues are taken, and ``B_0 = Q``, ``A_0 = Q^T W``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from retain.errors import check_number
from retain.retention.moments import Moments
from retain.retention.starts import Factors, Start

__all__ = ["SCLoRA"]


class SCLoRA(Start):
    """See the module, and `Start` for rows and for sequences of tasks.

    Args:
        beta: how much the old counts; 1 looks at nothing else, 0 at the new alone.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "sc_lora"
    reads_new: ClassVar[bool] = True

    def __init__(self, *, beta: float = 0.5, rows: int = 64) -> None:
        super().__init__(rows=rows)
        check_number("beta is out of range", beta, "beta: 0.5", most=1)
        self.beta = beta

    def starts(
        self, weights: dict[str, Tensor], rank: int, old: Moments, new: Moments | None
    ) -> dict[str, Factors]:
        assert new is not None
        found = {}
        for name, weight in weights.items():
            w = weight.double()
            s = (1 - self.beta) * new.of(name).double() - self.beta * old.of(name).double()
            q = torch.linalg.eigh(w @ s @ w.T).eigenvectors[:, -rank:].to(weight)
            found[name] = q, q.T @ weight
        return found
