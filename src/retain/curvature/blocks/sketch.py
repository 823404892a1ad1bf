"""A stream of rows as a low-rank-plus-diagonal matrix: a Nyström sketch with its diagonal.

For rows z_1 .. z_n the matrix wanted is ``S = sum z z^T``, [d, d]. All that is held of it is
``Y = S Omega``, [d, l], for a fixed random Omega, and its diagonal. A stream costs two products a
piece, ``Y += Z^T (Z Omega)``, and decomposes nothing, however long it is.

Of the l columns, about twice the rank k, all but `PROBES` are a basis of a random subspace, Q. When
the stream has ended, ``N = Y_Q (Q^T Y_Q)^+ Y_Q^T``, in the form ``F F^T``, is the part of S that it
knows (Nyström; Halko et al. 2011, arXiv 0909.4061), and U U^T are its k largest eigenvalues (Tropp
et al. 2017, arXiv 1706.05736). So ``E = S - U U^T`` is positive semi-definite, and S of a rank of
no more than k comes out whole.

Rounding of Y is kept off the small eigenvalues of ``Q^T Y_Q`` by a shift, which is taken off the
eigenvalues that come out. A shift of S by a multiple of the identity, as is usual, would drown
whatever is small beside a massive activation. N does not depend on the units of the coordinates, so
all is done where the diagonal D of S is 1: the basis is ``D^(1/2) Q W``, orthonormal with
``W = (Q^T D Q)^(-1/2)``, and S is shifted by ``nu D``.

What U U^T leaves is not lost but kept on the diagonal, which is streamed exactly: the result is
``U U^T + diag(E)``. It is positive semi-definite, and has the exact diagonal and trace of S. Its
error is ``|| S - result ||_2 = || E - diag(E) ||_2 <= || E ||_2``, the largest eigenvalue of N
that U U^T leaves out and ``|| S - N ||_2`` at most. Of the latter two things are known: it is at
most tr(S) - tr(N); and the other columns of Omega, the probes, are independent standard Gaussians w
that N has not seen, so

    || S - N ||_2 <= 10 sqrt(2 / pi) max_w || (S - N) w ||

but for a chance of ``10^-PROBES`` over their draw (Halko et al. 2011, lemma 4.1). The bound that
each sketch carries is made of the less of the two. It is no tight one: tens of times the error of
a flat spectrum. It and all else hold but for the rounding of the rows' own products.

Cost: ``2 l d`` a row, and memory ``l d`` and the diagonal, against d^2 each for the whole factor.
Decompositions are those of matrices of l columns, three a sketch, for many sketches at once.
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
    elif state[f"{key}.range"].device != rows.device:  # it came from a file
        for part in ("range", "diagonal"):
            state[f"{key}.{part}"] = state[f"{key}.{part}"].to(rows.device)
    omega = _omega(d, state[f"{key}.range"].shape[1], rows.dtype, rows.device)
    # Squares in the rows' own precision: float64 ones took longer than both products.
    state[f"{key}.diagonal"] += rows.square().sum(0, dtype=torch.float64)
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
        return int(8 * state[f"{key}.range"].shape[1] ** 2)

    found: dict[str, SketchFactor] = {}
    # In one order: a fit that goes on from a file has its sums in another, and would round anew.
    for keys in list(chunks(sorted(ranks), like, numbers)):
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

    def parts(key: str) -> tuple[Tensor, Tensor]:
        return state[f"{key}.range"][:, :-PROBES].double(), state[f"{key}.diagonal"]

    values, turn = eigh(torch.stack([q.T @ (parts(k)[1][:, None] * q) for k in keys]))
    least = 1e-14 * values[:, -1:]
    white = turn * _inverse(values).sqrt().where(values > least, 0.0)[:, None]  # W
    cores, sizes = [], []
    for key in keys:
        y, d = parts(key)
        core = q.T @ y
        cores.append((core + core.T) / 2)
        sizes.append((y.square() * _inverse(d)[:, None]).sum(0))
    # What the rounding of each number of Y comes to, in units of the diagonal.
    noise = (torch.stack(sizes) * white.square().sum(2)).sum(1).sqrt()
    nus = torch.finfo(like.dtype).eps * noise[:, None]
    values, turn = eigh(
        white.mT @ torch.stack(cores) @ white + torch.diag_embed(nus.expand(values.shape))
    )
    # No eigenvalue is below the shift, but for rounding.
    roots = white @ (turn * _inverse(values.clamp(min=nus)).sqrt()[:, None])

    def factor(key: str, root: Tensor, nu: Tensor) -> Tensor:
        y, d = parts(key)
        return (y + nu * d[:, None] * q) @ root

    grams = []
    for key, root, nu in zip(keys, roots, nus, strict=True):
        f = factor(key, root, nu)
        grams.append(f.T @ f)
    mixes = roots @ eigh(torch.stack(grams))[1]
    found = {}
    for key, mix, nu in zip(keys, mixes, nus, strict=True):
        f, d = factor(key, mix, nu), state[f"{key}.diagonal"]
        squares = f.square()
        raised = squares.sum(0)
        size = (raised - nu * (d @ squares) * _inverse(raised)).clamp(min=0)
        n = f * (size * _inverse(raised)).sqrt()  # N is n n^T
        u = n[:, -rank:]
        seen = state.pop(f"{key}.range")[:, -PROBES:].double()
        missed = SAFETY * (seen - n @ (n.T @ probes)).norm(dim=0).amax()
        trace = (d.sum() - size.sum()).clamp(min=0)
        out = size[:-rank].max() if len(size) > rank else 0.0
        bound = torch.minimum(missed, trace) + out
        # Rounding may have raised a coordinate by nu of itself.
        u = u * (d * _inverse(u.square().sum(1))).clamp(max=1).sqrt()[:, None]
        left = (state.pop(f"{key}.diagonal") - u.square().sum(1)).clamp(min=0)
        found[key] = SketchFactor(u.to(dtype).contiguous(), left.to(dtype), bound.to(dtype))
    return found


def _inverse(values: Tensor) -> Tensor:
    """Of what is above zero; 0 where it is not."""
    tiny = torch.finfo(values.dtype).tiny
    return (1 / values.clamp(min=tiny)).where(values > tiny, 0.0)


@lru_cache(maxsize=16)
def _omega(size: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Omega, [size, columns]: the same wherever it is drawn, and not a part of any state."""
    random = torch.Generator("cpu").manual_seed(size)
    draw = torch.randn(size, columns, generator=random, dtype=torch.float64, device="cpu")
    draw[:, :-PROBES] = torch.linalg.qr(draw[:, :-PROBES])[0]
    return draw.to(device, dtype)
