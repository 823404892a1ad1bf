"""Eigenvectors that always come out."""

from __future__ import annotations

import torch
from torch import Tensor

from retain.errors import CurvatureError

__all__ = ["eigh"]


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of symmetric matrices [..., n, n], in float64 where float32 fails.

    LAPACK's divide and conquer now and then does not converge in float32 on a matrix of low rank.

    Raises:
        CurvatureError: the matrix is not finite, or float64 fails as well.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError as error:  # LinAlgError
        wide = matrix.double()
        size = wide.diagonal(dim1=-2, dim2=-1).abs().amax()
        if not bool(wide.isfinite().all()):
            raise _bad("entries that are not finite") from error
        scale = torch.where(size > 0, size, torch.ones_like(size))
        try:
            values, vectors = torch.linalg.eigh((wide + wide.mT) / (2 * scale))
        except RuntimeError as again:
            raise _bad(str(again).partition("\n")[0]) from again
        return (values * scale).to(matrix.dtype), vectors.to(matrix.dtype)
    return values, vectors


def _bad(why: str) -> CurvatureError:
    return CurvatureError(
        "a factor has no eigenvectors",
        got=why,
        allowed="a symmetric matrix of finite numbers",
        fix="check the model's weights, or load it with dtype='float32'",
    )
