"""Grams, eigenvectors that always come out, systems of equations, checks of a matrix that is given.

Whether a matrix is symmetric and positive semi-definite is found in a few passes over it. Up to
`EXACT` wide its smallest eigenvalue is computed; a wider one is tried: its diagonal, its 2 x 2
minors, and the smallest Ritz value of a few Lanczos steps, which finds any eigenvalue that is far
below zero for the size of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from retain.errors import CurvatureError

__all__ = [
    "EXACT",
    "check_basis",
    "check_dense",
    "check_nonnegative",
    "chunks",
    "eigh",
    "float32_products",
    "gram_update",
    "leading",
    "mirror",
    "slack",
    "solve_positive",
]

EXACT = 512
"""Widest factor whose eigenvalues are computed."""

STEPS = 12
"""Lanczos steps for a wider one."""

MOST = 512 * 2**20
"""Bytes that batched work may take at a time."""

SMALL = 512
"""Of a narrower gram all is computed, and nothing mirrored."""

_T = TypeVar("_T")


def chunks(
    items: Sequence[_T], like: Callable[[_T], object], numbers: Callable[[_T], int]
) -> Iterator[list[_T]]:
    """Items that can be stacked, as many at a time as `MOST` allows, one at least.

    Args:
        items: of all kinds.
        like: what those have in common that can be stacked.
        numbers: in float64, that the work on one of them takes.
    """
    groups: dict[object, list[_T]] = {}
    for item in items:
        groups.setdefault(like(item), []).append(item)
    for group in groups.values():
        step = max(1, MOST // (8 * max(1, numbers(group[0]))))
        for i in range(0, len(group), step):
            yield group[i : i + step]


@contextmanager
def float32_products(cpu: str, gpu: str) -> Iterator[None]:
    """Float32 matrix products in a precision of torch's: ``ieee``, ``bf16`` or ``tf32``."""
    torch_backends: Any = torch.backends
    backends = [(torch_backends.mkldnn.matmul, cpu), (torch_backends.cuda.matmul, gpu)]
    before = [backend.fp32_precision for backend, _ in backends]
    try:
        for backend, precision in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for (backend, _), precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


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
        if not bool(wide.isfinite().all()):
            raise _no_eigenvectors("entries that are not finite") from error
        size = wide.diagonal(dim1=-2, dim2=-1).abs().amax()
        scale = torch.where(size > 0, size, torch.ones_like(size))
        try:
            values, vectors = torch.linalg.eigh((wide + wide.mT) / (2 * scale))
        except RuntimeError as again:
            raise _no_eigenvectors(str(again).partition("\n")[0]) from again
        return (values * scale).to(matrix.dtype), vectors.to(matrix.dtype)
    return values, vectors


def gram_update(state: dict[str, Tensor], key: str, rows: Tensor, weight: float = 1.0) -> None:
    """Adds ``weight rows^T rows`` to a sum, which `mirror` makes whole when all have been added.

    On a CPU what is below the diagonal is left out where it is worth it, for it is what is above:
    a third of the time. A GPU does one large product sooner than several.

    Args:
        state: keeps the sum, [size, size], as `key`, where the rows are.
        key: of the sum.
        rows: [count, size].
        weight: of these rows.
    """
    size = rows.shape[1]
    found = state.get(key)
    if found is None:
        found = rows.new_zeros(size, size)
    state[key] = found = found.to(rows.device)  # one that comes from a file lies elsewhere
    for panel in _panels(size) if found.device.type == "cpu" else (slice(0, size),):
        right = slice(panel.start, size)
        found[panel, right].addmm_(rows[:, panel].T, rows[:, right], alpha=weight)


def mirror(found: Tensor) -> Tensor:
    """What `gram_update` has summed, whole: changed in place, and given back."""
    for panel in _panels(len(found)):
        rest = slice(panel.stop, len(found))
        found[rest, panel] = found[panel, rest].T
    return found


def _panels(size: int) -> list[slice]:
    """Four bands of rows; of a small matrix one, as several products are no faster there."""
    width = size if size < SMALL else -(-size // 4)
    return [slice(i, min(i + width, size)) for i in range(0, size, width)]


def _no_eigenvectors(why: str) -> CurvatureError:
    return CurvatureError(
        "a factor has no eigenvectors",
        got=why,
        allowed="a symmetric matrix of finite numbers",
        fix="check the model's weights, or load it with dtype='float32'",
    )


def check_nonnegative(where: str, values: Tensor) -> None:
    """None of them is below zero.

    Raises:
        ValueError: one is.
    """
    if values.numel() and float(values.min()) < 0:
        raise ValueError(f"{where} is negative: {float(values.min()):.3g}")


def check_dense(where: str, s: Tensor) -> None:
    """Symmetric and positive semi-definite, but for rounding."""
    if s.dim() != 2 or s.shape[0] != s.shape[1]:
        raise ValueError(f"{where} of the shape {list(s.shape)}, no square")
    if not s.numel():
        return
    largest = float(s.abs().max())
    most = slack(s) * largest
    if float((s - s.T).abs_().max()) > most:
        raise ValueError(f"{where} is not symmetric")
    if float(s.diagonal().min()) < -most:
        raise ValueError(f"{where} is negative: {float(s.diagonal().min()):.3g}")
    wide = s if s.dtype == torch.float64 else s.float()
    lowest = _lowest(wide)
    # Of the largest eigenvalue, which is at least the largest entry and at most the trace.
    if lowest < -slack(s) * float(wide.diagonal().sum()):
        raise ValueError(f"{where} has a negative eigenvalue: {lowest:.3g}")


def slack(s: Tensor) -> float:
    """What rounding may leave, relative to a matrix's largest entries."""
    return min(64 * max(torch.finfo(s.dtype).eps, 1e-9), 0.02)


def _lowest(s: Tensor) -> float:
    """The smallest eigenvalue; for a wide matrix a value that it is not above."""
    if len(s) <= EXACT:
        return float(torch.linalg.eigvalsh(s.double())[0])
    root = s.diagonal().clamp(min=0).sqrt()
    # Of a positive semi-definite matrix each 2 x 2 minor is: |s_ij| <= sqrt(s_ii s_jj).
    excess = float((s.abs() - root[:, None] * root).max())
    if excess > slack(s) * float(root.max()) ** 2:
        return -excess
    random = torch.Generator().manual_seed(0)
    v = torch.randn(len(s), generator=random, dtype=torch.float64).to(s.dtype)
    basis = [v / v.norm()]
    for _ in range(STEPS):
        w = s @ basis[-1]
        q = torch.stack(basis)
        for _ in range(2):  # twice is enough to be orthogonal
            w = w - q.T @ (q @ w)
        if float(w.norm()) < 1e-6 * float(root.max()) ** 2:
            break
        basis.append(w / w.norm())
    q = torch.stack(basis)
    inner = (q @ (s @ q.T)).double()
    return float(torch.linalg.eigvalsh((inner + inner.T) / 2)[0])


def check_basis(where: str, u: Tensor) -> None:
    """Orthogonal, tried on two random vectors."""
    if u.dim() != 2 or u.shape[0] != u.shape[1]:
        raise ValueError(f"{where} of the shape {list(u.shape)}, no square")
    wide = u if u.dtype == torch.float64 else u.float()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(len(u), 2, generator=random, dtype=torch.float64).to(wide.dtype)
    apart = float((wide.T @ (wide @ x) - x).abs().max())
    if apart > 1e3 * max(torch.finfo(u.dtype).eps, 1e-9) * max(float(x.norm()), 1.0):
        raise ValueError(f"{where} is no orthogonal basis")


def leading(m: Tensor) -> tuple[Tensor, Tensor]:
    """About the singular vectors of the largest singular value."""
    random = torch.Generator().manual_seed(0)
    v = torch.randn(m.shape[1], generator=random, dtype=torch.float64).to(m.dtype)
    u = m @ v
    for _ in range(4):
        u = m @ (v / v.norm().clamp(min=torch.finfo(m.dtype).tiny))
        v = m.T @ (u / u.norm().clamp(min=torch.finfo(m.dtype).tiny))
    tiny = torch.finfo(m.dtype).tiny
    return u / u.norm().clamp(min=tiny), v / v.norm().clamp(min=tiny)


def solve_positive(a: Tensor, b: Tensor) -> Tensor:
    """The x of ``a x = b``.

    By Cholesky's factors. A matrix that rounding has made indefinite is solved by LU, by itself: on
    several CPU threads torch 2.13 with MKL takes pivots of 0 in a batch of LU from 192 rows on.

    Args:
        a: [size, size] or [count, size, size], symmetric, positive definite up to rounding.
        b: [size, columns] or [count, size, columns].

    Returns:
        As `b`.
    """
    root, info = torch.linalg.cholesky_ex(a)
    found = torch.cholesky_solve(b, root)
    for i in info.reshape(-1).nonzero()[:, 0].tolist():
        part = i if a.ndim > 2 else ...
        found[part] = torch.linalg.solve(a[part], b[part])
    return found
