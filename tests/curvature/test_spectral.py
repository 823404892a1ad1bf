"""Eigenvectors come out where float32's own routine fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retain.curvature.blocks.linalg import eigh
from retain.errors import CurvatureError

REAL = torch.linalg.eigh


def test_a_failure_in_float32_is_made_good_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Any) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return REAL(matrix)

    rows = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    matrix = rows @ rows.mT * 1e6  # of low rank, and large
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    values, vectors = eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    back = vectors @ torch.diag_embed(values) @ vectors.mT
    assert float((back - matrix).norm() / matrix.norm()) < 1e-6


def test_what_is_not_finite_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge\nat all")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(CurvatureError, match="not finite"):
        eigh(torch.full((2, 2), torch.nan))
    with pytest.raises(CurvatureError, match="did not converge"):
        eigh(torch.eye(2))
