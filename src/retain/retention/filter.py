"""A filter in front of LoRA's A: the update reads what is new, and little of what is old.

A layer's update ``s B A`` reads its input x through A alone; behind the filter P
(`retain.retention.wiener`) it reads of x what the new rows use and the old text does not.

All of training happens behind it: A begins as ``gain A_0 P``, and each step of the optimiser moves
it by ``step P`` for a gradient ``grad P^T``, which is training A' in ``A = A' P`` (but for weight
decay, which is a part of the step: A' decays by its filtered values). So nothing of
what the filter stops is ever learned, nothing is added to the loss, and the result is plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retain.curvature.blocks.factor import Factor
from retain.errors import ConfigError, check_number
from retain.models.forward import no_autocast
from retain.models.processes import share
from retain.models.sites import LoraSite
from retain.retention.groups import Behind, grouped
from retain.retention.hooks import GradientHooks
from retain.retention.moments import Moments, check_answers, check_rows, inputs_of
from retain.retention.wiener import Thin, Whole, filters_of, matched_gain
from retain.types import Gain

__all__ = ["Filter", "InputFilter"]

NOW = ".now"
"""Ending of a layer's name, for the A that something was kept beside."""


@dataclass(frozen=True)
class Filter:
    """The options of the filter.

    Args:
        gain: of A's start over PEFT's, before the filter, which shrinks what it is given. With
            ``matched`` each layer's is what makes the filtered rows read as much of the new text
            as PEFT's own, 3 at most: training begins at plain LoRA's pace.
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
        check_rows(self.rows)
        check_answers(self.answers)
        if self.tokens < 1:
            raise ConfigError(
                "too few tokens to read", got=self.tokens, allowed="1 or more", fix="tokens=16384"
            )
        check_number("weight is out of range", self.weight, "weight=1")
        check_number("epsilon is out of range", self.epsilon, "epsilon=0.001", positive=True)
        if self.gain != "matched":
            check_number("gain is out of range", self.gain, 'gain=3, or "matched"', positive=True)


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

    def restore(self, state: Mapping[str, Tensor]) -> int:
        """Takes up what A does not hold: bits that it has no place for, a proximal step.

        Args:
            state: `state` of a checkpoint. What belongs to another A is of another time, and A's
                own is taken.

        Returns:
            Of how many layers it has nothing, or what is of another shape or belongs to another A.
        """
        lost = 0
        for group, mine in zip(self.groups, self._kept, strict=True):
            for place, rows in zip(group.whole.places, mine, strict=True):
                site = self.sites[place]
                a, found = site.a.detach()[self.active], state.get(site.name)
                rows = rows[: len(a)]
                if found is None or found.shape != rows.shape:
                    lost += 1
                else:
                    found = found.to(rows)
                    now = state.get(f"{site.name}{NOW}", found)  # before 0.2 it rounded to A
                    same = now.to(a) == a
                    lost += not bool(same.all())
                    rows.copy_(found.where(same, rows))
        share(self._kept)
        return lost

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
