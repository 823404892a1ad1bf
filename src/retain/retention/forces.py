"""All that pulls at the weights in a step.

The force is that of the source's curvature, with that of the past and of a displacement that stays
beside the moving one, where there are any. On hardware with bfloat16 products it is read from
rounded factors, as long as that does no harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from retain.curvature.blocks.estimator import has_bf16
from retain.curvature.curvature import Curvature, Pull
from retain.errors import ConfigError
from retain.models.sites import LinearSite, Site
from retain.retention.beside import Beside

__all__ = ["Forces"]

ROUNDING = 0.05
"""The relative error of a force up to which it is read from factors in bfloat16."""

LOOK = 64
"""Steps between two looks at that error; before, at steps 1, 2, 4 and so on."""


class Forces:
    """See the module.

    Args:
        curvature: of the source.
        sites: the layers, as `Curvature.bind` gives them.
        past: a second curvature; it pulls, and no nats are counted for it.
        beside: a displacement that stays, ``(left, right)`` by layer.

    Raises:
        ConfigError: a curvature that `beside` cannot be read by, or a past beside it.
    """

    def __init__(
        self,
        curvature: Curvature,
        sites: Sequence[Site],
        *,
        past: Curvature | None = None,
        beside: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.curvature, self.sites, self.past = curvature, sites, past
        if beside and past is not None:
            raise ConfigError(
                "a curvature of the past does not know a displacement that stays",
                got="both",
                allowed="one of them",
                fix="leave beside out",
            )
        self.beside = Beside(curvature, beside) if beside else None
        self._still: dict[int, Tensor] = {}
        self._rounded, self._looks = has_bf16(), 0

    def predicted(self) -> float:
        """Predicted nats per source token at the present weights."""
        nats = self.curvature.pulls(self.sites)[0]
        return nats if self.beside is None else nats + self.beside.pulls(self.sites)[0]

    def only(self, rows: slice) -> None:
        """Only these rows of A and columns of B train; the others feel no force.

        Args:
            rows: of every layer.
        """
        self._still = {}
        for site in self.sites:
            if not isinstance(site, LinearSite):
                moving = torch.zeros(site.a.shape[0], 1, dtype=torch.bool, device=site.a.device)
                moving[rows] = True
                self._still |= {id(site.a): moving, id(site.b): moving.T}

    def pulls(self) -> tuple[float, list[Pull]]:
        """Predicted nats, and the gradients of all that holds."""
        nats, pulls = self.curvature.pulls(self.sites, rounded=self._rounded)
        if self._rounded and nats:
            self._looks += 1
            if nats < 0 or self._looks % LOOK == 0 or self._looks & (self._looks - 1) == 0:
                nats, pulls = self._checked(nats, pulls)
        if self.past is not None:
            pulls = _summed(pulls, self.past.pulls(self.sites)[1])
        if self.beside is not None:
            more, others = self.beside.pulls(self.sites)
            nats, pulls = nats + more, _summed(pulls, others)
        if self._still:
            pulls = [Pull(p, pull * self._still[id(p)]) for p, pull in pulls]
        return nats, pulls

    def _checked(self, nats: float, pulls: list[Pull]) -> tuple[float, list[Pull]]:
        """What was rounded, if rounding did it no harm; else the exact, from now on.

        Rounded factors are not positive semi-definite. Where the weights have moved in directions
        that the curvature hardly sees, as behind a filter, what is left of S is less than what
        rounding has added, and the force may push.
        """
        exact, wanted = self.curvature.pulls(self.sites)
        error = sum(
            float((g - w).square().sum()) for (_, g), (_, w) in zip(pulls, wanted, strict=True)
        )
        size = sum(float(w.square().sum()) for _, w in wanted)
        if nats >= 0 and error <= ROUNDING**2 * size:
            return nats, pulls
        self._rounded = False
        self.curvature.drop_rounded()
        return exact, wanted


def _summed(pulls: Sequence[Pull], others: Sequence[Pull]) -> list[Pull]:
    return [Pull(p, mine + other) for (p, mine), (_, other) in zip(pulls, others, strict=True)]
