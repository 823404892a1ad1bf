"""A stream of rows as a low-rank-plus-diagonal matrix: a Nyström sketch with its diagonal.

For rows z_1 .. z_n the matrix wanted is ``S = sum z z^T``, [d, d]. All that is held of it is
``Y = S Omega``, [d, l], for a fixed random Omega, and its diagonal. A stream costs two products a
piece, ``Y += Z^T (Z Omega)``, and decomposes nothing, however long it is.

Of the l columns, about twice the rank k, all but `PROBES` are an orthonormal basis of a random
subspace, Q. When the stream has ended, ``N = Y_Q (Q^T Y_Q)^+ Y_Q^T``, in the form ``F F^T``, is the
part of S that it knows (Nyström; Halko et al. 2011, arXiv 0909.4061), and U U^T are its k largest
eigenvalues (Tropp et al. 2017, arXiv 1706.05736). Rounding is kept off the small eigenvalues of
``Q^T Y_Q`` by a shift: all is done for ``S + nu I``, with nu the rounding of Y, and nu is taken off
the eigenvalues that come out. So ``E = S - U U^T`` is positive semi-definite. S of a rank of no
more than k comes out whole.

What U U^T leaves is not lost but kept on the diagonal, which is streamed exactly: the result is
``U U^T + diag(E)``. It is positive semi-definite, and has the exact diagonal and trace of S. Its
error is ``|| S - result ||_2 = || E - diag(E) ||_2 <= || E ||_2``, which is at most tr(E). The
other columns of Omega, the probes, are independent standard Gaussians w that N has not seen, and

    || E ||_2 <= 10 sqrt(2 / pi) max_w || E w ||

but for a chance of ``10^-PROBES`` over their draw (Halko et al. 2011, lemma 4.1). The less of the
two is the bound that each sketch carries.

Cost: ``2 l d`` a row, and memory ``l d`` and the diagonal, against d^2 each for the whole factor.
Decompositions are those of matrices of l columns, two a sketch, for many sketches at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from retain.curvature.blocks.factor import SketchFactor
from retain.curvature.blocks.linalg import chunks, eigh, float32_products
from retain.curvature.blocks.ranks import PROBES, sketch_columns

__all__ = ["FORM", "sketch_sizes", "sketch_update", "sketches_finish"]

FORM = "nystrom 1"
"""Names what is streamed, for the key of a fit that goes on from a file."""

SAFETY = 10 * math.sqrt(2 / math.pi)
"""Of lemma 4.1, with 10 in the place of its alpha."""


def sketch_update(state: dict[str, Tensor], key: str, rows: Tensor, rank: int) -> None:
    """Takes rows, [n, d], into the tensors ``key.*`` of a state.

    In full float32: a bfloat16 or TF32 product would lose all but the largest eigenvalues.
    """
    d = rows.shape[1]
    if f"{key}.range" not in state:
        state[f"{key}.range"] = rows.new_zeros(d, sketch_columns(d, rank))
        state[f"{key}.diagonal"] = rows.new_zeros(d, dtype=torch.float64)
    omega = _omega(d, state[f"{key}.range"].shape[1], rows.dtype, rows.device)
    state[f"{key}.diagonal"] += rows.double().square().sum(0)
    with float32_products("ieee", "ieee"):
        state[f"{key}.range"].addmm_(rows.T, rows @ omega)


def sketch_sizes(state: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """The keys of all sketches in a state, and the sizes of their sides."""
    ending = ".range"
    return [(k.removesuffix(ending), len(t)) for k, t in state.items() if k.endswith(ending)]


def sketches_finish(
    state: dict[str, Tensor], ranks: Mapping[str, int], dtype: torch.dtype | None = None
) -> dict[str, SketchFactor]:
    """The sketches of ``sum z z^T`` by key; their tensors leave the state.

    Args:
        state: it has taken the rows.
        ranks: key -> the rank.
        dtype: of the sketches; that of their rows by default.
    """

    def like(key: str) -> tuple[object, ...]:
        y = state[f"{key}.range"]
        return (ranks[key], y.shape, y.dtype, y.device)

    def numbers(key: str) -> int:
        return int(6 * state[f"{key}.range"].shape[1] ** 2)

    found: dict[str, SketchFactor] = {}
    for keys in list(chunks(list(ranks), like, numbers)):
        found |= _finish(state, keys, ranks[keys[0]], dtype)
    _omega.cache_clear()
    return {key: found[key] for key in ranks}


def _finish(
    state: dict[str, Tensor], keys: Sequence[str], rank: int, dtype: torch.dtype | None
) -> dict[str, SketchFactor]:
    """Of sides of one shape. What is as long as a side is made of one side at a time, and anew."""
    like = state[f"{keys[0]}.range"]
    dtype = like.dtype if dtype is None else dtype
    omega = _omega(*like.shape, like.dtype, like.device).double()
    q, probes = omega[:, :-PROBES], omega[:, -PROBES:]

    def shifted(key: str) -> tuple[Tensor, Tensor]:
        y = state[f"{key}.range"][:, :-PROBES].double()
        nu = torch.finfo(like.dtype).eps * y.norm()
        return y + nu * q, nu

    cores, shifts = [], []
    for key in keys:
        y, nu = shifted(key)
        core = q.T @ y
        cores.append((core + core.T) / 2)
        shifts.append(nu)
    values, turn = eigh(torch.stack(cores))
    nus = torch.stack(shifts)[:, None]
    # No eigenvalue of the shifted core is below the shift, but for rounding.
    roots = turn * _inverse(values.clamp(min=nus)).sqrt()[:, None]
    grams = []
    for key, root in zip(keys, roots, strict=True):
        f = shifted(key)[0] @ root
        grams.append(f.T @ f)
    values, turn = eigh(torch.stack(grams))
    top = values[:, -rank:]
    share = ((top - nus).clamp(min=0) * _inverse(top)).sqrt()
    mixes = roots @ (turn[:, :, -rank:] * share[:, None])
    found = {}
    for key, mix in zip(keys, mixes, strict=True):
        y, nu = shifted(key)
        u = y @ mix
        seen = state.pop(f"{key}.range")[:, -PROBES:].double()
        left = (state.pop(f"{key}.diagonal") - u.square().sum(1)).clamp(min=0)
        error = SAFETY * (seen - u @ (u.T @ probes)).norm(dim=0).amax()
        bound = torch.minimum(error, left.sum()) + nu
        found[key] = SketchFactor(u.to(dtype).contiguous(), left.to(dtype), bound.to(dtype))
    return found


def _inverse(values: Tensor) -> Tensor:
    return 1 / values.clamp(min=torch.finfo(values.dtype).tiny)


@lru_cache(maxsize=16)
def _omega(size: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Omega, [size, columns]: the same wherever it is drawn, and not a part of any state."""
    random = torch.Generator("cpu").manual_seed(size)
    draw = torch.randn(size, columns, generator=random, dtype=torch.float64, device="cpu")
    draw[:, :-PROBES] = torch.linalg.qr(draw[:, :-PROBES])[0]
    return draw.to(device, dtype)
