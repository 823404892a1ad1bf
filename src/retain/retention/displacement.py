"""How far the weights have moved from a curvature's anchor: moving them straight back towards it.

Where the predicted nats go with the square of the share of the displacement that is kept, that
share is known at once. It is searched for where the divergence is measured, and for a LoRA whose
anchor has values of A and B in weight space, where the product is not linear in the share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from retain.curvature.curvature import Curvature
from retain.errors import ConfigError, MismatchError, warn
from retain.models.shards import scatter
from retain.models.sites import LinearSite, LoraSite, Site

__all__ = ["anchored", "back_within", "check_way_back", "largest_share", "scale_back"]

TRIES, SLACK = 12, 0.02
"""Measurements at the end, and how far below the budget is near enough."""

NEAR = 0.01
"""The same of predicted nats, which cost less."""

ROUNDED = 1e-3
"""How far above them a share that is known may end, rounded."""

ALL = slice(None)
"""All rows of A."""

POWERS = 1.0, 8.0
"""The least and the highest power of the share that a divergence is taken to go with."""


def scale_back(
    curvature: Curvature,
    sites: Sequence[Site],
    nats: float,
    rows: slice = ALL,
    now: float | None = None,
) -> float:
    """Moves the weights straight back towards the anchor until so many nats are predicted.

    Args:
        curvature: whose prediction, and whose anchor.
        sites: the layers, as `Curvature.bind` gives them.
        nats: what may be left; a displacement below it is left alone.
        rows: of LoRA's A, and columns of B, that move; the others stay.
        now: nats that are predicted now, where they are known.

    Returns:
        The share of the displacement that is left.
    """

    def predicted() -> float:
        return curvature.pulls(sites)[0]

    now = predicted() if now is None else now
    if now <= nats:
        return 1.0
    away = _Away(curvature, sites, rows)
    if not away.linear:
        return away.shorten(nats, now, predicted, NEAR)[0]
    share = math.sqrt(nats / now)
    away.keep(share)
    if away.partial and predicted() > nats * (1 + ROUNDED):
        return away.shorten(nats, now, predicted, NEAR)[0]
    return share


def check_way_back(curvature: Curvature, sites: Sequence[Site], nats: float) -> None:
    """Refuses a budget that what does not train has spent: nothing would lead back to it.

    Raises:
        ConfigError: so it is.
    """
    lora = [site for site in sites if isinstance(site, LoraSite)]
    if all(site.a.requires_grad and site.b.requires_grad for site in lora):
        return
    away = _Away(curvature, sites)
    if not away.partial:
        return
    moving = [*away.bare, *away.weights]
    before = [weight.clone() for weight in moving]
    away.keep(0.0)
    left = curvature.pulls(sites)[0]
    if moving:
        torch._foreach_copy_(moving, before)
    if left > nats:
        raise ConfigError(
            "weights of the adapter that do not train have spent the budget",
            got=f"a budget of {nats:g}, and {left:.3g} predicted nats of A and B that stay",
            allowed="a budget above that",
            fix="let A or B of each layer train, or give a strength in place of the budget",
        )


def back_within(
    curvature: Curvature,
    sites: Sequence[Site],
    nats: float,
    measure: Callable[[], float],
    rows: slice = ALL,
) -> float:
    """Moves the weights straight back until the divergence that `measure` gives is within nats.

    See `scale_back`. One that is not finite, as where float16 overflows, is above any budget; that
    it was is warned of.

    Returns:
        The measured nats that are left.
    """
    now = measure()
    if now <= nats:
        return now
    share, left = _Away(curvature, sites, rows).shorten(nats, now, measure, SLACK)
    if not left <= nats:
        warn(
            f"the budget of {nats:g} is not kept: {left:.3g} measured nats are left where all that "
            "trains is back at the anchor"
        )
        return left
    if not math.isfinite(now):
        warn(
            f"the model's predictions on the probe were not finite ({now} measured nats): the "
            f"weights were moved back until they were, to {share:.3g} of their way from the anchor"
        )
    return left


def largest_share(
    nats: float, now: float, measure: Callable[[float], float], *, slack: float = SLACK
) -> tuple[float, float]:
    """The largest share of a displacement whose divergence is within a budget, nearly.

    Args:
        nats: of the budget.
        now: the divergence of the whole displacement, more than that or not finite.
        measure: gives the divergence of a share; one that is not finite is above the budget.
        slack: how far below the budget is near enough, relative to it.

    Returns:
        The share and its divergence, at most `slack` below the budget unless 12 tries do not get
        there; 0 and 0 if none of them is within it.
    """
    low, high, left = 0.0, 1.0, 0.0
    wanted = nats * (1 - slack / 2)
    last, power = 1.0, 2.0  # the divergence is about quadratic in the share
    share = math.sqrt(wanted / now) if math.isfinite(now) else 0.5
    for attempt in range(TRIES):
        before, now = now, measure(share)
        if not now <= nats:
            high = share
        else:
            low, left = share, now
            if now >= nats * (1 - slack):
                break
        known = 0 < now < math.inf
        if known and 0 < before < math.inf and share != last:  # what it is shows in two of them
            found = math.log(now / before) / math.log(share / last)
            power = min(max(found, POWERS[0]), POWERS[1])
        last = share
        guess = share * (wanted / now) ** (1 / power) if known else 0.0
        sound = low < guess < high and attempt % 4 < 3  # halving gets there whatever it is
        share = guess if sound else 0.5 * (low + high)
    return low, left


class _Away:
    """The displacement of all trained weights from the anchor, of which a share is kept."""

    def __init__(self, curvature: Curvature, sites: Sequence[Site], rows: slice = ALL) -> None:
        weights: list[Tensor] = []
        starts: list[Tensor] = []
        self.bare: list[Tensor] = []  # those that are 0 at the anchor
        self.linear = rows == ALL  # then the prediction goes with the square of the share
        self.partial = False  # whether something does not train, which may be away and stays
        for site in sites:
            for parameter, start in _starts(curvature, site):
                if not parameter.requires_grad:
                    self.partial = True
                    continue
                of_a = isinstance(site, LoraSite) and parameter is site.a
                part = (rows, ALL) if of_a else (ALL, rows)
                now = parameter.detach()[part]
                if start is None:
                    self.bare.append(now)
                    continue
                weights.append(now)
                starts.append(start.detach()[part])
            bent = isinstance(site, LoraSite) and site.name in curvature.anchor
            self.linear = self.linear and not (bent and curvature.info.space == "weight")
        self.weights, self.starts = weights, starts
        self.moved = torch._foreach_sub(weights, starts) if weights else ()
        self.whole = torch._foreach_mul(self.bare, 1.0) if self.bare else ()

    def keep(self, share: float) -> None:
        if self.bare:
            torch._foreach_copy_(self.bare, torch._foreach_mul(self.whole, share))
        if self.weights:
            found = torch._foreach_mul(self.moved, share)
            torch._foreach_add_(found, self.starts)
            torch._foreach_copy_(self.weights, found)

    def shorten(
        self, nats: float, now: float, measure: Callable[[], float], slack: float
    ) -> tuple[float, float]:
        """Keeps the largest share within a budget, and returns it with what is left.

        See `largest_share`. Where no share is within it, 0 is kept, and what is left is above it.
        """

        def at(share: float) -> float:
            self.keep(share)
            return measure()

        share, left = largest_share(nats, now, at, slack=slack)
        self.keep(share)
        return share, left if share else measure()


def _starts(
    curvature: Curvature, site: Site, *, grown: bool = False
) -> list[tuple[nn.Parameter, Tensor | None]]:
    """Each trained weight of a layer that counts, with its value at the anchor; None for 0.

    With `grown`, rows of A beyond the anchor's are allowed: their columns of B are 0 there.
    """
    kept = curvature.anchor.get(site.name, ())
    if isinstance(site, LinearSite):
        return [(site.weight, kept[0].to(site.weight.dtype))]
    if curvature.info.space == "adapter":
        return [(site.b, kept[0].to(site.b.dtype)), (site.a, kept[1].to(site.a.dtype))]
    if len(kept) != 2:  # B = 0, whatever A is; or A = 0, where B does not train
        return [(site.b if site.b.requires_grad else site.a, None)]
    more = site.rank - len(kept[1])
    if more < 0 or (more and not grown):
        raise MismatchError(
            "the anchor that a budget or kl counts from belongs to one rank",
            got=f"r={site.rank} at {site.name}",
            allowed=f"r={kept[1].shape[0]}, the anchor's",
            fix="use that rank, or give a strength in place of a budget, and no kl",
        )
    b, a = (kept[0] / site.scaling).to(site.b.dtype), kept[1].to(site.a.dtype)
    if more:
        b = pad(b, (0, more))
        a = torch.cat([a, site.a.detach()[len(a) :]])
    return [(site.b, b), (site.a, a)]


@contextmanager
def anchored(curvature: Curvature, sites: Sequence[Site], *, grown: bool = False) -> Iterator[None]:
    """Inside it the model is where the curvature's anchor is.

    Args:
        curvature: whose anchor.
        sites: the model's layers.
        grown: whether the adapter may have more rows than the anchor has.

    Raises:
        MismatchError: it has another rank than the anchor.
    """
    pairs = [pair for site in sites for pair in _starts(curvature, site, grown=grown)]
    before: list[tuple[nn.Parameter, Tensor | None]]
    before = [(parameter, parameter.detach().clone()) for parameter, _ in pairs]
    _copy(pairs)
    try:
        yield
    finally:
        _copy(before)


@torch.no_grad()
def _copy(pairs: Sequence[tuple[nn.Parameter, Tensor | None]]) -> None:
    for parameter, value in pairs:
        if value is None:
            parameter.zero_()
        else:
            parameter.copy_(value)
    scatter(parameter for parameter, _ in pairs)  # for what runs the model
