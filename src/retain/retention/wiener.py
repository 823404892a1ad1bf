"""The matrix P of a Wiener filter, which passes what new rows use and stops what old text uses.

With S_new and S_old the second moments of a layer's input x (`retain.retention.moments`) on the new
task's rows, and on the source text and all tasks before,

    P = S_new (S_new + weight S_old + epsilon mean(diag S_new) I)^-1

turns any row a of A into the row ``a P`` which reads the same of the new text, as nearly as the
price of what it reads of the old allows:

    a P = argmin_b  E_new |(a - b) x|^2 + weight E_old |b x|^2 + epsilon mean(diag S_new) |b|^2

(N. Wiener, Extrapolation, Interpolation and Smoothing of Stationary Time Series, 1949: S_new is the
signal, S_old the noise). P is close to 1 in directions that only the new task uses and close to
``S_new / (weight S_old)`` where both do; a weight without bound gives the null space of the old.

Related: gradient projection (GPM, arXiv 2103.09762), InfLoRA (arXiv 2404.00228) and RegMean (arXiv
2212.09849), whose closed form for merging two linear layers weighs their inputs in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from retain.curvature.blocks.estimator import has_bf16
from retain.curvature.blocks.factor import Factor, SketchFactor
from retain.curvature.blocks.linalg import chunks, solve_positive

__all__ = ["MOST", "WIDE", "Thin", "Whole", "filters_of", "matched_gain", "wiener"]

MOST = 3.0
"""The largest gain that is matched: what a filter stops almost whole stays small."""

WIDE = 512
"""From which size on a whole P is read in bfloat16, where the hardware has its products."""

MORE = 1.05
"""Of the old that a filter in bfloat16 may let through, over what it lets through in float32."""


def wiener(new: Tensor, old: Tensor | None, *, weight: float, epsilon: float) -> Tensor:
    """P, to be multiplied from the right; see the module.

    Args:
        new: S_new, [size, size] or a stack of them, positive semi-definite.
        old: S_old likewise; None where there is no old text.
        weight: of the old.
        epsilon: of the identity, relative to the mean of S_new's diagonal.

    Returns:
        As S_new, in float32 at least.
    """
    wide = new.to(torch.promote_types(new.dtype, torch.float32))
    mean = wide.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(mean > 0, epsilon * mean, 1.0)  # where nothing is read, P is zero
    total = wide if old is None else wide + weight * old.to(wide)
    total = total + ridge[..., None, None] * torch.eye(wide.shape[-1]).to(wide)
    return solve_positive(total, wide).mT  # both are symmetric


class Whole:
    """P as a matrix.

    Args:
        p: [size, size].

    Attributes:
        dtype: of what comes out of the filter; `p` may have fewer bits (`rounded`).

    Its methods also take a stack of rows, [count, n, size], for a stack of P (`Group`).
    """

    def __init__(self, p: Tensor) -> None:
        self.p, self.dtype = p, p.dtype

    def rows(self, a: Tensor) -> Tensor:
        """``a P``, for a [n, size]."""
        return (a.to(self.p.dtype) @ self.p).to(self.dtype)

    def back(self, g: Tensor) -> Tensor:
        """``g P^T``, for g [n, size]."""
        return (g.to(self.p.dtype) @ self.p.mT).to(self.dtype)

    def dense(self) -> Tensor:
        """P, [size, size]."""
        return self.p.to(self.dtype)

    def to(self, device: torch.device) -> Whole:
        """The same on a device."""
        moved = copy.copy(self)
        moved.p = self.p.to(device)
        return moved

    def rounded(self, old: Factor | None = None) -> Whole:
        """P in bfloat16 where that pays: a step is bound by reading it, twice.

        Rounding is relative to each number of P, of a row and of what comes out, so what is stopped
        stays so: filtered rows of SmolLM2-135M read 0.01 to 0.04 % more or less of a source text by
        it, 0.2 % at most of any layer (docs/log.md, "A gram's half ..."). Itself where it does not
        pay, or where filtered rows would read over `MORE` times as much of the old.

        Args:
            old: S_old; None to leave what is read of it alone.
        """
        wide = self.p.dtype == torch.float32 and self.p.shape[-1] >= WIDE
        if not (wide and has_bf16(self.p.device)):
            return self
        found = copy.copy(self)
        found.p = self.p.to(torch.bfloat16)
        return self if old is not None and found._reads(old) > MORE * self._reads(old) else found

    def _reads(self, old: Factor) -> float:
        """How much filtered rows read of the old, of rows drawn alike whenever this is asked."""
        draw = torch.randn(8, old.size, generator=torch.Generator().manual_seed(0))
        like = next(iter(old.tensors().values()))
        rows = self.rows(draw.to(self.p.device)).T.to(like)
        return float((rows * old.matmul(rows)).sum())


class Thin:
    """P of two sketches, ``U U^T + diag(v)`` each, without a matrix of its size.

    With ``D = v_new + weight v_old + ridge``, ``D^(-1/2) [U_new, weight^(1/2) U_old] = Q R`` and
    ``R R^T = T_new + T_old`` the new and the old in the basis Q,

        P = D^(1/2) (Q C Q^T + V - V Q H Q^T) D^(-1/2),
        V = v_new / D,  H = R R^T (1 + R R^T)^-1,  C = T_new (1 + R R^T)^-1

    which is Woodbury's identity without the difference of two large terms in it.

    Args:
        parts: Q, D^(1/2), v_new / D, C and H, by the names below.
        dtype: of the parts.
    """

    basis: Tensor
    root: Tensor
    share: Tensor
    new: Tensor
    stopped: Tensor
    dtype: torch.dtype

    def __init__(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        vars(self).update(parts)
        self.dtype = dtype

    @classmethod
    def batch(
        cls,
        news: Sequence[SketchFactor],
        olds: Sequence[SketchFactor | None],
        *,
        weight: float,
        epsilon: float,
    ) -> list[Thin]:
        """Those of sketches of one shape, with an old one each or none at all.

        Args:
            news: S_new of each.
            olds: S_old of each.
            weight: of the old.
            epsilon: see `wiener`.
        """
        kind = torch.promote_types(news[0].vectors.dtype, torch.float32)
        u = torch.stack([s.vectors for s in news]).double()
        v = torch.stack([s.diagonal for s in news]).double()
        size, k = u.shape[1:]
        trace = u.square().sum((1, 2)) + v.sum(1)
        d, wide = v + (epsilon / size) * trace[:, None], u
        held = [s for s in olds if s is not None]
        if held:
            d = d + weight * torch.stack([s.diagonal for s in held]).to(v)
            before = torch.stack([s.vectors for s in held]).to(u)
            wide = torch.cat([u, weight**0.5 * before], 2)
        d = torch.where(trace[:, None] > 0, d, 1.0)
        q, r = torch.linalg.qr(wide / d.sqrt()[:, :, None])
        one = torch.eye(r.shape[1]).to(r)
        t_new = r[:, :, :k] @ r[:, :, :k].mT
        inverse = solve_positive(one + r @ r.mT, one.expand_as(t_new))
        parts = {
            "basis": q,
            "root": d.sqrt(),
            "share": v / d,
            "new": t_new @ inverse,  # C
            "stopped": one - inverse,  # H
        }
        parts = {name: part.to(kind) for name, part in parts.items()}
        return [cls({name: p[i] for name, p in parts.items()}, kind) for i in range(len(news))]

    def rows(self, a: Tensor) -> Tensor:
        """``a P``, for a [n, size]."""
        root, share = self.root.unsqueeze(-2), self.share.unsqueeze(-2)
        z = a * root
        kept = z * share
        inner = (z @ self.basis) @ self.new - (kept @ self.basis) @ self.stopped
        found: Tensor = (inner @ self.basis.mT + kept) / root
        return found

    def back(self, g: Tensor) -> Tensor:
        """``g P^T``, for g [n, size]."""
        root, share = self.root.unsqueeze(-2), self.share.unsqueeze(-2)
        z = g / root
        inner = z @ self.basis
        passed = z - (inner @ self.stopped) @ self.basis.mT
        found: Tensor = ((inner @ self.new.mT) @ self.basis.mT + passed * share) * root
        return found

    def dense(self) -> Tensor:
        """P, [size, size]."""
        return self.rows(torch.eye(len(self.root)).to(self.root))

    def rounded(self, old: Factor | None = None) -> Thin:
        """Itself: it is read fast as it is, and its parts cancel."""
        return self

    def to(self, device: torch.device) -> Thin:
        """The same on a device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        return moved


def filters_of(
    pairs: Sequence[tuple[Factor, Factor | None]], *, weight: float, epsilon: float
) -> list[Whole | Thin]:
    """P of each S_new and S_old, see `wiener`. Those of one shape are made together."""

    def like(i: int) -> tuple[object, ...]:
        return tuple(_like(s) for s in pairs[i])

    def numbers(i: int) -> int:
        new, old = pairs[i]
        if _thin(new, old):
            columns = [s.vectors.shape[1] for s in pairs[i] if isinstance(s, SketchFactor)]
            return 5 * new.size * sum(columns)
        return 5 * new.size**2

    found: dict[int, Whole | Thin] = {}
    for some in chunks(range(len(pairs)), like, numbers):
        news, olds = [pairs[i][0] for i in some], [pairs[i][1] for i in some]
        if _thin(news[0], olds[0]):
            made: Sequence[Whole | Thin] = Thin.batch(
                cast("list[SketchFactor]", news), cast("list[SketchFactor | None]", olds),
                weight=weight, epsilon=epsilon,
            )  # fmt: skip
        else:
            before = [s.dense() for s in olds if s is not None]
            p = wiener(
                torch.stack([s.dense() for s in news]),
                torch.stack(before) if before else None,
                weight=weight,
                epsilon=epsilon,
            )
            made = [Whole(each) for each in p]
        found |= dict(zip(some, made, strict=True))
    return [found[i] for i in range(len(pairs))]


def _thin(new: Factor, old: Factor | None) -> bool:
    return isinstance(new, SketchFactor) and (old is None or isinstance(old, SketchFactor))


def _like(factor: Factor | None) -> tuple[object, ...] | None:
    """What factors that can be stacked have in common."""
    if factor is None:
        return None
    tensors = factor.tensors().values()
    return (type(factor), factor.size, *((t.shape, t.dtype, t.device) for t in tensors))


def matched_gain(new: Factor, a: Tensor, filtered: Tensor) -> Tensor:
    """The gain with which filtered rows of A read as much of the new text as they did unfiltered.

    It is the root of ``tr(a S_new a^T)`` over that of the filtered rows, `MOST` at most.

    Args:
        new: S_new.
        a: [n, size].
        filtered: ``a P``.

    Returns:
        A number, []; 1 where `a` reads nothing.
    """
    like = next(iter(new.tensors().values()))
    before, after = (
        (rows.T.to(like) * new.matmul(rows.T.to(like))).sum().to(a) for rows in (a, filtered)
    )
    ratio = (before / after.clamp(min=torch.finfo(after.dtype).tiny)).sqrt().clamp(max=MOST)
    return torch.where(before > 0, ratio, torch.ones_like(ratio))
