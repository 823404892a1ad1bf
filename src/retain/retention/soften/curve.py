"""All softened versions of one adapter (`retain.soften`): by mu, by a budget, as a curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from retain.errors import ConfigError, check_number
from retain.models.sites import LoraSite
from retain.retention.bounds import check_budget
from retain.retention.displacement import largest_share
from retain.retention.soften.subspace import Subspace

__all__ = ["Point", "SoftenedAdapter", "Softening"]

CLOSE, ROUNDS, HALVINGS = 1e-10, 60, 60
"""How near a budget is met; tries, before what is missing is made up by scaling; bisections."""

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""(B, A) by layer."""

REACH = 1e-3
"""Share of the adapter's nats where a curve ends."""


@dataclass(frozen=True)
class Point:
    """One softened adapter, as it would be written.

    Attributes:
        mu: the weight of forgetting; 0 is the adapter itself.
        nats: predicted forgetting, nats per token.
        loss: ``sum 0.5 <D - D*, F_t (D - D*)>``: the task's predicted loss above the adapter's,
            in nats per token; half a squared distance without a curvature of the task.
        learned: ``1 - loss / loss of the base``: the share of what was learned that stays.
        scaled: the same share for the whole adapter multiplied by one number, at the same nats.
        norm: ``|D| / |D*|``, Frobenius, over all layers.
        cut_nats: relative change of the nats by the cut to the adapter's rank.
        cut_norm: relative size of what the cut removes, Frobenius.
    """

    mu: float
    nats: float
    loss: float
    learned: float
    scaled: float
    norm: float
    cut_nats: float
    cut_norm: float

    def to_dict(self) -> dict[str, float]:
        """As plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SoftenedAdapter:
    """A softened adapter: its numbers, and (B, A) by layer for `Softening.apply`."""

    point: Point
    factors: Factors


class Softening:
    """All softened versions of one adapter, made by `soften`: a subspace a layer with an update."""

    def __init__(self, sites: list[LoraSite], spaces: Mapping[str, Subspace], depth: int) -> None:
        self.sites, self.spaces, self.depth = sites, dict(spaces), depth
        self._start = self._present()
        every, none = self.spaces.values(), torch.zeros(1, dtype=torch.float64)
        ratios = torch.cat([s.ratios.reshape(-1) for s in every] or [none])
        squares = torch.cat([s.coordinates.reshape(-1).square() for s in every] or [none])
        costly = ratios > 0
        self._ratios, self._nats = ratios[costly], 0.5 * (ratios * squares)[costly]
        self._reach = 0.5 * float(squares.sum())  # the base's loss
        self._square = sum(_square(s.core(s.coordinates)) for s in every)

    def predicted(self, mu: float) -> float:
        """Predicted nats per token of D(mu), before it is cut to the adapter's rank."""
        return float((self._nats / (1.0 + mu * self._ratios).square()).sum())

    def weight(self, nats: float) -> float:
        """The mu at which D(mu), before it is cut, is predicted to cost so many nats; 0 if none."""
        if self.predicted(0.0) <= nats:
            return 0.0
        low, high = 0.0, 1.0 / float(self._ratios.max())
        while self.predicted(high) > nats:
            low, high = high, 4.0 * high
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.predicted(middle) > nats else (low, middle)
        return high

    def at(self, mu: float) -> SoftenedAdapter:
        """The adapter softened by mu, at its own rank.

        Raises:
            ConfigError: mu is below 0 or not finite.
        """
        check_number("mu is out of range", mu, "0 is the adapter itself")
        return self._built(mu)

    def within(self, budget: float) -> SoftenedAdapter:
        """The least softened adapter that is predicted to forget no more than a budget.

        Args:
            budget: nats per token. An adapter that is within it comes back as it is.

        Raises:
            ConfigError: the budget is not above 0.
        """
        check_budget(budget)
        if self.predicted(0.0) <= budget:
            return self.at(0.0)
        aim, slope = budget, 1.0
        before: tuple[float, float] | None = None
        for _ in range(ROUNDS):  # a secant: log nats after the cut against log nats before it
            mu = self.weight(aim)
            made = self._built(mu)
            here = math.log(aim), math.log(max(made.point.nats, 1e-300) / budget)
            if abs(here[1]) < CLOSE:
                return made
            if before is not None and here[0] != before[0]:
                slope = (here[1] - before[1]) / (here[0] - before[0])
            before = here
            aim *= math.exp(-here[1] / (slope if 0.2 < slope < 5.0 else 1.0))
        return made if here[1] < 0 else self._built(mu, math.sqrt(budget / made.point.nats))

    def within_measured(self, budget: float, measure: Callable[[], float]) -> SoftenedAdapter:
        """The least softened adapter whose measured forgetting is within a budget, nearly.

        What is left forgets more than is predicted, by a factor that grows as it is softened
        (docs/soften.md), so the predicted nats are searched. It ends within 2 % of the budget, or
        after 12 tries with the best one that was within it.

        Args:
            budget: nats per token. An adapter that is within it comes back as it is.
            measure: gives the true KL divergence of the model as it is.

        Raises:
            ConfigError: the budget is not above 0, or no try was within it.
        """
        check_budget(budget)
        before, most, found = self._present(), self.predicted(0.0), math.nan
        made: dict[float, SoftenedAdapter] = {1.0: self.at(0.0)}

        def at(share: float) -> float:
            nonlocal found
            if share not in made:
                made[share] = self.within(share**2 * most)
            self.apply(made[share])
            try:
                found = measure()
            finally:
                self._write(before)
            return found

        if at(1.0) <= budget:
            return made[1.0]
        share, _ = largest_share(budget, found, at)
        if not share:
            least = made[min(made)].point.nats
            raise ConfigError(
                "no softened adapter was measured within the budget",
                got=f"{found:.3g} nats at {least:.3g} predicted", allowed=f"{budget:g}",
                fix="raise the budget, or measure in float32",
            )  # fmt: skip
        return made[share]

    def curve(self, points: int = 12) -> list[Point]:
        """Points from the adapter itself down to a thousandth of its nats, evenly in log nats."""
        most = self.predicted(0.0)
        shares = [REACH ** (i / max(1, points - 1)) for i in range(points)]
        return [self.at(self.weight(most * share)).point for share in shares]

    def scaled(self, nats: float) -> SoftenedAdapter:
        """The whole adapter times one number instead, at so many predicted nats: to compare with.

        Its point has no mu, and nothing is cut.
        """
        most = self.predicted(0.0)
        size = math.sqrt(min(1.0, _share(nats, most, 1.0)))
        lost = (1.0 - size) ** 2
        point = Point(
            mu=math.nan, nats=size**2 * most, loss=lost * self._reach, learned=1.0 - lost,
            scaled=1.0 - lost, norm=size, cut_nats=0.0, cut_norm=0.0,
        )  # fmt: skip
        return SoftenedAdapter(point, {n: (size * b, a) for n, (b, a) in self._start.items()})

    def apply(self, update: SoftenedAdapter) -> None:
        """Writes a softened adapter into the model's A and B, in place."""
        self._write(update.factors)

    def _present(self) -> Factors:
        return {s.name: (s.b.detach().clone(), s.a.detach().clone()) for s in self.sites}

    @torch.no_grad()
    def _write(self, factors: Factors) -> None:
        for site in self.sites:
            b, a = factors[site.name]
            site.b.copy_(b)
            site.a.copy_(a)

    def _built(self, mu: float, scale: float = 1.0) -> SoftenedAdapter:
        """D(mu) cut to the adapter's rank, times a number."""
        factors = dict(self._start)
        nats = whole = loss = left = full_left = cut = 0.0
        for site in self.sites:
            space = self.spaces.get(site.name)
            if space is None:
                continue
            full = space.softened(mu)
            low = scale * space.cut(mu, site.rank)
            nats += 0.5 * float((space.ratios * low.square()).sum())
            whole += 0.5 * float((space.ratios * full.square()).sum())
            loss += 0.5 * _square(low - space.coordinates)
            left += _square(space.core(low))
            full_left += _square(space.core(full))
            cut += _square(space.core(full - low))
            if mu > 0:
                factors[site.name] = _factors(site, *space.thin(low, site.rank))
        most = self.predicted(0.0)
        shrunk = 1.0 - math.sqrt(nats / most) if most > 0 else 0.0
        point = Point(
            mu=mu, nats=nats, loss=loss, learned=1.0 - _share(loss, self._reach),
            scaled=1.0 - shrunk**2, norm=math.sqrt(_share(left, self._square, 1.0)),
            cut_nats=_share(nats - whole, whole), cut_norm=math.sqrt(_share(cut, full_left)),
        )  # fmt: skip
        return SoftenedAdapter(point, factors)


def _factors(site: LoraSite, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """B and A of the site's shapes and precision."""
    rank, b, a = left.shape[1], torch.zeros_like(site.b), torch.zeros_like(site.a)
    b[:, :rank], a[:rank] = left / site.scaling, right
    return b, a


def _square(coordinates: Tensor) -> float:
    return float(coordinates.square().sum())


def _share(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole > 0 else empty
