"""How the quadratics of a force pull at the present weights, read once a step.

What is predicted of all sources, what balances a budget against the task, and a number of the
trainer's that is to be judged come to the host together, in one read. Of the rows that stay
everything that they alone tell is kept (`Curvature.still`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retain.curvature.anchor import Anchors, anchors_for_steps
from retain.curvature.curvature import Curvature, Pull, Still
from retain.curvature.stack import total
from retain.models.sites import LinearSite, Site
from retain.retention.holds import Hold
from retain.retention.watch import Watched, read

__all__ = ["Felt", "Pulls"]

ROUNDING = 0.05
"""The relative error of a pull up to which it is read from factors in bfloat16."""

LOOK = 64
"""Steps between two looks at that error; before, at steps 1, 2, 4 and so on."""


class Felt(NamedTuple):
    """Of one source: predicted nats, the pulls, and what balances (`Pulls.balance`)."""

    nats: float
    pulls: list[Pull]
    balance: list[float]


class Pulls:
    """Reads what holds a model.

    Args:
        sites: its layers, as `Curvature.bind` gives them.
        holds: of each source, what holds the model to it.
        past: the curvature of the tasks before.

    Attributes:
        rows: of A, and columns of B, that train; see `only`.
        active: by ``id`` of a weight, where it trains; all of a weight that is not there.
    """

    def __init__(
        self, sites: Sequence[Site], holds: Sequence[Hold], past: Curvature | None
    ) -> None:
        self.sites, self.holds, self.past = sites, holds, past
        self.rows = slice(None)
        self.active: dict[int, Any] = {}
        self.forget()

    def only(self, rows: slice) -> None:
        """Only these rows of A and columns of B train; the others feel no force."""
        self.rows, self.active = rows, {}
        self.forget()
        for site in self.sites:
            if not isinstance(site, LinearSite):
                self.active |= {id(site.a): rows, id(site.b): (slice(None), rows)}

    def forget(self) -> None:
        """Forgets what was made of the rows that stay, which have moved."""
        self._still: dict[int, Still | None] = {}
        self._anchors: dict[int, Anchors] = {}

    def all(self, watched: Watched | None = None, *, balanced: bool = True) -> list[Felt]:
        """What is felt of each source, with the pulls of the tasks before where it is but one.

        On hardware with bfloat16 products the source's is read from rounded factors, as long as
        that does no harm: rounded factors are not positive semi-definite, and where the weights
        have moved in directions that the curvature hardly sees, as behind a filter, what is left of
        S may be less than what rounding has added.

        Args:
            watched: a number that is judged before anything else.
            balanced: with a budget, what balances is read too.
        """
        owns, every, values = [], [], []
        for hold in self.holds:
            value, own = self.of(hold.curvature, hold.rounded)
            pulls = self._with_past(own)
            values += [value, *(self.balance(pulls) if balanced else ())]
            owns.append(own)
            every.append(pulls)
        numbers = read(values if watched is None else [*values, watched.value])
        if watched is not None:
            watched.judge(numbers.pop())
        width, found = len(numbers) // len(self.holds), []
        for i, (hold, own, pulls) in enumerate(zip(self.holds, owns, every, strict=True)):
            nats, *balance = numbers[i * width : (i + 1) * width]
            found.append(self._looked(hold, own, Felt(nats, pulls, balance)))
        return found

    def of(self, curvature: Curvature, rounded: bool = False) -> tuple[Tensor, list[Pull]]:
        """A quadratic, and its pulls in the rows that train."""
        key = id(curvature)
        if key not in self._still:
            self._still[key] = curvature.still(self.sites, self.rows)
        still = self._still[key]
        value, pulls = curvature.felt(self.sites, rounded=rounded, still=still)
        if still is None:
            pulls = [Pull(p, dq[self.active.get(id(p), ...)]) for p, dq in pulls]
        return value, pulls

    def anchors(self, curvature: Curvature) -> Anchors:
        """What a quadratic's proximal steps lead to, in the rows that train."""
        key = id(curvature)
        if key not in self._anchors:
            self._anchors[key] = anchors_for_steps(curvature, self.sites, self.rows)
        return self._anchors[key]

    def pairs(self, pulls: Sequence[Pull]) -> list[tuple[Tensor, Tensor]]:
        """In the rows that train, a weight's gradient and its pull."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for p, dq in pulls:
            if p.requires_grad and p.grad is not None:
                grad = p.grad[self.active.get(id(p), ...)]
                pairs.append((grad, dq))
        return pairs

    def balance(self, pulls: Sequence[Pull]) -> list[Tensor]:
        """With a budget ``<g, g>`` and ``<dq, dq>``, over the weights that have a gradient g."""
        pairs = [] if self.holds[0].budget is None else self.pairs(pulls)
        return [_square(found) for found in zip(*pairs, strict=True)]

    def _with_past(self, pulls: list[Pull]) -> list[Pull]:
        """With the pulls of the tasks before, which stand alone beside several (`Force._terms`)."""
        if self.past is None or len(self.holds) > 1:
            return pulls
        others = self.of(self.past)[1]
        both = torch._foreach_add([g for _, g in pulls], [g for _, g in others])
        return [Pull(p, g) for (p, _), g in zip(pulls, both, strict=True)]

    def _looked(self, hold: Hold, own: list[Pull], felt: Felt) -> Felt:
        """What was felt; anew from exact factors where a look shows that rounding does harm."""
        nats = felt.nats
        if not hold.rounded or not nats:
            return felt
        hold.looks += 1
        if nats >= 0 and hold.looks % LOOK and hold.looks & (hold.looks - 1):
            return felt
        value, wanted = self.of(hold.curvature)
        size = [w for _, w in wanted]
        error = torch._foreach_sub([g for _, g in own], size)
        exact, off, whole = read([value, _square(error), _square(size)])
        if nats >= 0 and off <= ROUNDING**2 * whole:
            return felt
        hold.rounded = False  # from now on
        hold.curvature.drop_rounded()
        pulls = self._with_past(wanted)
        squares = self.balance(pulls)
        return Felt(exact, pulls, read(squares) if squares else [])


def _square(tensors: Sequence[Tensor]) -> Tensor:
    """``<t, t>`` over all, in float32 at least."""
    kinds = {t.dtype for t in tensors} | {torch.float32}
    norms = torch._foreach_norm(list(tensors), 2.0, reduce(torch.promote_types, kinds))
    if len({norm.device for norm in norms}) > 1:
        return total([norm.square() for norm in norms])
    return torch.stack(norms).square().sum()
