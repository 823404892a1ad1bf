"""A Wiener filter in front of LoRA: the update reads what is new, and little of what is old.

A layer's update ``s B A`` reads its input x through A alone. With S_new and S_old the second
moments of x (`retain.retention.moments`) on the new task's rows, and on the source text and all
tasks before, the filter

    P = S_new (S_new + weight S_old + epsilon mean(diag S_new) I)^-1

turns any row a of A into the row ``a P`` which reads the same of the new text, as nearly as the
price of what it reads of the old allows:

    a P = argmin_b  E_new |(a - b) x|^2 + weight E_old |b x|^2 + epsilon mean(diag S_new) |b|^2

(N. Wiener, Extrapolation, Interpolation and Smoothing of Stationary Time Series, 1949: S_new is the
signal, S_old the noise). P is close to 1 in directions that only the new task uses and close to
``S_new / (weight S_old)`` where both do; a weight without bound gives the null space of the old.

All of training happens behind it: A begins as ``gain A_0 P``, and each step of the optimiser moves
it by ``step P`` for a gradient ``grad P^T``, which is training A' in ``A = A' P`` (but for weight
decay, which is a part of the step: A' decays by its filtered values). So nothing of
what the filter stops is ever learned, nothing is added to the loss, and the result is plain LoRA.

Related: gradient projection (GPM, arXiv 2103.09762), InfLoRA (arXiv 2404.00228) and RegMean (arXiv
2212.09849), whose closed form for merging two linear layers weighs their inputs in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from retain.curvature.blocks.estimator import has_bf16
from retain.curvature.blocks.factor import Factor, SketchFactor
from retain.curvature.blocks.linalg import chunks, solve_positive
from retain.errors import ConfigError, check_number
from retain.models.forward import no_autocast
from retain.models.processes import share
from retain.models.sites import LoraSite
from retain.retention.groups import Behind, grouped
from retain.retention.hooks import GradientHooks
from retain.retention.moments import Moments, check_reading, inputs_of
from retain.types import Gain

__all__ = [
    "MOST",
    "WIDE",
    "Filter",
    "InputFilter",
    "Thin",
    "Whole",
    "filter_of",
    "filters_of",
    "matched_gain",
    "wiener",
]

MOST = 3.0
"""The largest gain that is matched: what a filter stops almost whole stays small."""

WIDE = 512
"""From which size on a whole P is read in bfloat16, where the hardware has its products."""

MORE = 1.05
"""Of the old that a filter in bfloat16 may let through, over what it lets through in float32."""

NOW = ".now"
"""Ending of a layer's name, for the A that something was kept beside."""


@dataclass(frozen=True)
class Filter:
    """The options of the filter.

    Args:
        gain: of A's start over PEFT's, before the filter, which shrinks what it is given. With
            ``matched`` each layer's is what makes the filtered rows read as much of the new text
            as PEFT's own, at most `MOST`: training begins at plain LoRA's pace.
        epsilon: of the filter's ridge, relative to the mean second moment of the rows.
        answers: the share of predicting positions in the rows' second moments.
        rows: of the training data that are read.
        weight: what reading a unit of the old costs, in units of the new that is missed. The old
            second moments are brought to the unit of the rows', so it means the same for any
            curvature.
        tokens: that are read of them at most: rows count whole, in their order, as long as they
            fit; of a first one that is longer alone, its beginning.

    Raises:
        ConfigError: a value out of range.
    """

    gain: Gain = 3.0
    epsilon: float = 1e-3
    answers: float = 0.5
    rows: int = 64
    weight: float = 1.0
    tokens: int = 16384

    def __post_init__(self) -> None:
        check_reading(self.answers, self.rows)
        if self.tokens < 1:
            raise ConfigError(
                "too few tokens to read", got=self.tokens, allowed="1 or more", fix="tokens=16384"
            )
        check_number("weight is out of range", self.weight, "weight=1")
        check_number("epsilon is out of range", self.epsilon, "epsilon=0.001", positive=True)
        if self.gain != "matched":
            check_number("gain is out of range", self.gain, 'gain=3, or "matched"', positive=True)


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
        new: S_new.
        old: S_old; None where there is no old text.
        weight: of the old.
        epsilon: see `wiener`.
    """

    basis: Tensor
    root: Tensor
    share: Tensor
    new: Tensor
    stopped: Tensor
    dtype: torch.dtype

    def __init__(
        self, new: SketchFactor, old: SketchFactor | None, *, weight: float, epsilon: float
    ) -> None:
        vars(self).update(vars(Thin.batch([new], [old], weight=weight, epsilon=epsilon)[0]))

    @classmethod
    def batch(
        cls,
        news: Sequence[SketchFactor],
        olds: Sequence[SketchFactor | None],
        *,
        weight: float,
        epsilon: float,
    ) -> list[Thin]:
        """Those of sketches of one shape, with an old one each or none at all."""
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
        found = []
        for i in range(len(news)):
            thin = cls.__new__(cls)
            vars(thin).update({name: part[i] for name, part in parts.items()} | {"dtype": kind})
            found.append(thin)
        return found

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


def filter_of(new: Factor, old: Factor | None, *, weight: float, epsilon: float) -> Whole | Thin:
    """P of whole matrices, or of sketches; see `wiener`."""
    return filters_of([(new, old)], weight=weight, epsilon=epsilon)[0]


def filters_of(
    pairs: Sequence[tuple[Factor, Factor | None]], *, weight: float, epsilon: float
) -> list[Whole | Thin]:
    """P of each S_new and S_old. Those of one shape are made together."""

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


def _begun(a: Tensor, p: Whole | Thin, new: Factor, gain: Gain) -> Tensor:
    """Rows of A as they begin behind a filter, in A's precision."""
    rows = a.to(p.dtype)
    times = matched_gain(new, rows, p.rows(rows)) if gain == "matched" else gain
    return p.rows(times * rows).to(a.dtype)


class InputFilter:
    """Holds the training of LoRA's A behind a filter, until `release`.

    Args:
        sites: the layers.
        new: S_new.
        old: S_old; None where there is no old text.
        options: of the filter; a weight of 0 leaves nothing but the ridge.
        active: the rows of A that train.
        resuming: A has been set before.
    """

    @no_autocast()
    def __init__(
        self,
        sites: Sequence[LoraSite],
        new: Moments,
        old: Moments | None,
        options: Filter | None = None,
        *,
        active: slice = slice(None),
        resuming: bool = False,
    ) -> None:
        o = Filter() if options is None else options
        self.sites, self.active = list(sites), active
        # Layers that read one input share one, on each device.
        firsts: dict[tuple[object, torch.device], LoraSite] = {}
        for site in self.sites:
            firsts.setdefault((inputs_of(site.name, new, old), site.a.device), site)
        pairs = [
            (new.factor(s.name), None if old is None else old.factor(s.name))
            for s in firsts.values()
        ]
        made = filters_of(pairs, weight=o.weight, epsilon=o.epsilon)
        found = {
            both: p.to(site.a.device) for (both, site), p in zip(firsts.items(), made, strict=True)
        }
        self.filters = [found[inputs_of(s.name, new, old), s.a.device] for s in self.sites]
        self._before = [] if resuming else [s.a[active].detach().clone() for s in self.sites]
        begun = [s.a.detach()[active] for s in self.sites]
        if not resuming:
            begun = [
                _begun(rows, p, new.factor(s.name), o.gain)
                for rows, p, s in zip(begun, self.filters, self.sites, strict=True)
            ]
        # From now on steps alone are filtered. Layers that share a filter go on sharing it.
        light = {
            id(p): p.rounded(None if old is None else old.factor(firsts[both].name))
            for both, p in found.items()
        }
        self.filters = [light[id(p)] for p in self.filters]
        del made, found, light  # of each filter one is held
        self.groups = grouped(self.filters, begun)
        # In the filter's precision: what a step adds may be below the last bit of a bfloat16.
        self._kept = [
            g.whole.lay([begun[i] for i in g.whole.places]).to(g.whole.p.dtype) for g in self.groups
        ]
        self._behind = Behind(self.sites, self.groups, active)
        if not resuming:  # last: where something above fails, A is as it was
            with torch.no_grad():
                for site, rows in zip(self.sites, begun, strict=True):
                    site.a[active] = rows
        self.hooks = GradientHooks([s.a for s in self.sites], self._behind)

    @property
    def kept(self) -> list[Tensor]:
        """The active rows of each A, in the filter's precision."""
        found: dict[int, Tensor] = {}
        for group, kept in zip(self.groups, self._kept, strict=True):
            found |= zip(group.whole.places, kept, strict=True)
        return [found[i][: len(s.a[self.active])] for i, s in enumerate(self.sites)]

    @property
    def narrow(self) -> bool:
        """Whether A, and so its checkpoint, holds fewer bits than what is kept beside it."""
        sizes = [(s.a.dtype.itemsize, p.dtype.itemsize) for s, p in self._pairs()]
        return any(mine < kept for mine, kept in sizes)

    def _pairs(self) -> list[tuple[LoraSite, Whole | Thin]]:
        return list(zip(self.sites, self.filters, strict=True))

    def state(self) -> dict[str, Tensor]:
        """What is kept of each A, by layer; and A's own active rows, which it belongs to."""
        own = {f"{s.name}{NOW}": s.a.detach()[self.active].clone() for s in self.sites}
        kept = zip(self.sites, self.kept, strict=True)
        return own | {site.name: rows.contiguous() for site, rows in kept}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what A does not hold: bits that it has no place for, a proximal step.

        Args:
            state: `state` of a checkpoint. What belongs to another A is of another time, and A's
                own is taken.
        """
        for group, mine in zip(self.groups, self._kept, strict=True):
            for place, rows in zip(group.whole.places, mine, strict=True):
                site = self.sites[place]
                a, found = site.a.detach()[self.active], state.get(site.name)
                rows = rows[: len(a)]
                if found is not None and found.shape == rows.shape:
                    found = found.to(rows)
                    now = state.get(f"{site.name}{NOW}", found)  # before 0.2 it rounded to A
                    rows.copy_(found.where(now.to(a) == a, rows))
        share(self._kept)

    @no_autocast()
    def after_step(self) -> None:
        """Filters what the optimiser's step has added to A."""
        self._behind.forget()
        every: list[Tensor] = []
        found: list[Tensor] = []
        with torch.no_grad():
            for i, group in enumerate(self.groups):
                rows = [self.sites[place].a[self.active] for place in group.whole.places]
                now = group.whole.lay(rows)
                step = now - self._kept[i].to(now.dtype)
                self._kept[i] = self._kept[i] + group.whole.rows(step)
                every += rows
                found += [k[: len(r)] for k, r in zip(self._kept[i], rows, strict=True)]
            torch._foreach_copy_(every, found)

    def undo(self) -> None:
        """Puts A back as it was before the filter, as long as nothing was learned behind it."""
        with torch.no_grad():
            for site, before in zip(self.sites, self._before, strict=False):
                site.a[self.active] = before

    def release(self) -> None:
        """Lets A train freely again."""
        self.hooks.detach()
