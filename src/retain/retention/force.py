"""The force: a quadratic's pull towards the anchor, once an optimiser step (Laplace).

Total loss = task loss + strength x predicted nats. Two ways to apply the force:

- ``gradient``: its gradient is added to the task's, before the optimiser steps.
- ``proximal``: after the optimiser has stepped, the step's own implicit problem is solved in
  closed form, ``X = argmin 0.5/eta ||X - X'||^2 + strength * q(X)``, as AdamW decouples its
  weight decay. It is stable for any strength. ``eta`` is the learning rate, over the mean
  denominator of Adam where the optimiser is one (so that a strength means about the same
  number of nats as in the other way).

Both are computed in closed form, without an autograd graph, and do not depend on the batch.
In place of the strength a budget may be given; see `retain.retention.budget`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retain.curvature.anchor import proximal
from retain.curvature.blocks.estimator import has_bf16
from retain.curvature.curvature import Curvature, Pull
from retain.curvature.stack import total
from retain.data.batches import Example
from retain.errors import ConfigError, MismatchError, TrainingError, check_number, unknown
from retain.models.forward import no_autocast
from retain.models.heads import head_kind
from retain.models.processes import of_first
from retain.models.shards import own, reshard, scatter
from retain.models.sites import LinearSite, check_held
from retain.retention.budget import Budget, anchored, scale_back, settle
from retain.retention.lengths import step_lengths
from retain.retention.measure import Reference
from retain.retention.watch import Watched, read
from retain.types import STRONGEST, UPDATES, Update

__all__ = ["Force", "check_strength"]

ROOM = 0.8
"""Of a budget, the share that earlier tasks may have used when training begins."""

ROUNDING = 0.05
"""The relative error of a pull up to which it is read from factors in bfloat16."""

LOOK = 64
"""Steps between two looks at that error; before, at steps 1, 2, 4 and so on."""


class Force:
    """Holds a model near its anchor while it trains; `retain.Retention` is the whole recipe.

    Args:
        model: a PEFT model with LoRA, or a plain one whose curvature was fitted on it.
        curvature: fitted on this model.
        strength: how many nats of task loss one nat of predicted forgetting weighs. 0 is plain
            training, bit for bit.
        budget: nats of KL divergence per source token that may be spent; the strength is then
            found by itself, and `finish` is to be called when training ends.
        past: a second curvature, held with the same strength: that of the tasks before, around the
            model's present weights (`retain.reanchored`). The budget is that of the first alone,
            which stays where the base model is.
        probe: tokenised source text, a few rows: with a budget, the true divergence on it corrects
            the predicted one now and then, and at the end. Without it the prediction is believed.
        update: ``gradient`` or ``proximal``.
        resuming: the adapter is expected to be away from the anchor already.

    Raises:
        MismatchError: the curvature is of another model; or, in adapter space and in full
            fine-tuning, the model does not start at the anchor.
        ModelError: pre-trained weights train beside the LoRA that nothing would hold; or a head
            that is not known.
        ConfigError: a strength that is negative or not finite, a budget that is not above 0, a
            probe beside other trained weights, or an unknown update.
    """

    @no_autocast()
    def __init__(
        self,
        model: nn.Module,
        curvature: Curvature,
        strength: float = 10.0,
        *,
        budget: float | None = None,
        past: Curvature | None = None,
        probe: Sequence[Example] = (),
        update: Update = "gradient",
        resuming: bool = False,
    ) -> None:
        if update not in UPDATES:
            raise unknown("update", update, UPDATES)
        check_strength(strength)
        head_kind(model)
        self.curvature, self.update = curvature, update
        self.budget = None if budget is None else Budget(budget)
        self._strength = strength
        self.sites = curvature.bind(model)
        if past is not None:
            past.bind(model)
            if update != "gradient":
                raise ConfigError(
                    "a proximal step knows one curvature",
                    got="a curvature of the past beside it",
                    allowed="update='gradient'",
                    fix="leave update out",
                )
        whole = isinstance(self.sites[0], LinearSite)
        if not whole:
            check_held(model)
        exact = whole or curvature.info.space == "adapter"
        if exact and not resuming and past is None and not curvature.at_anchor(self.sites):
            raise MismatchError(
                "the model does not start where the curvature was fitted",
                got="other values of " + ("its weights" if whole else "A or B"),
                allowed="the anchor's",
                fix="curvature.load_anchor(model)" + ("" if whole else ", or space='weight'"),
            )
        self.probe: Reference | None = None
        if self.budget is not None and probe:
            held = self._own()
            other = [
                n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held
            ]
            if other:
                raise ConfigError(
                    "what a budget spends cannot be measured while other weights train",
                    got=f"{len(other)} of them, such as {other[0]}",
                    allowed="weights that the curvature holds; a new head has nothing to keep",
                    fix="leave the probe out (source=None), so that the prediction is believed",
                )
            self.probe = Reference(
                model, probe, batch_size=len(probe), base=lambda _: anchored(curvature, self.sites)
            )
        self.model, self.rows, self.past = model, slice(None), past
        self._active: dict[int, Any] = {}
        self._rounded, self._looks = has_bf16(), 0

    @property
    def strength(self) -> float:
        """Nats of task loss that one nat of predicted forgetting weighs now."""
        return self._strength if self.budget is None else self.budget.strength

    @no_autocast()
    def predicted(self) -> float:
        """Predicted nats per source token at the present adapter."""
        return self.curvature.pulls(self.sites)[0]

    def parameters(self) -> list[nn.Parameter]:
        """The trained weights that are held."""
        found: list[nn.Parameter] = []
        for site in self.sites:
            found += [site.weight] if isinstance(site, LinearSite) else [site.a, site.b]
        return found

    def _own(self) -> set[int]:
        """``id`` of the model's parameters that are held."""
        return {id(own(p)) for p in self.parameters()}

    def only(self, rows: slice) -> None:
        """Only these rows of A and columns of B train; the others feel no force.

        Args:
            rows: of every layer.
        """
        self.rows, self._active = rows, {}
        for site in self.sites:
            if not isinstance(site, LinearSite):
                self._active |= {id(site.a): rows, id(site.b): (slice(None), rows)}

    @no_autocast()
    def make_room(self) -> bool:
        """Before training: what is there may have spent four fifths of the budget.

        What counts is the measured divergence where there is a probe, else the predicted one.

        Returns:
            Whether it had spent more, and was moved back.
        """
        if self.budget is None:
            return False
        before, most = self.predicted(), ROOM * self.budget.nats
        if self.probe is None:
            scale_back(self.curvature, self.sites, most)
            left = self.predicted()
        else:
            left = settle(self.curvature, self.sites, most, self._measure)
        self.budget.spent = (left, self.predicted())
        return self.predicted() < before

    def step(self, optimizer: Optimizer) -> float:
        """Steps the optimiser with the force applied, in place of ``optimizer.step()``.

        Returns:
            Predicted nats per source token (before the step for ``gradient``).
        """
        if self.update == "gradient":
            nats = self.add_force()
            optimizer.step()
            return nats
        optimizer.step()
        return self.apply_proximal(optimizer)

    @no_autocast()
    def add_force(self, watched: Watched | None = None) -> float:
        """Adds ``strength * dq`` to each gradient; returns predicted nats.

        Args:
            watched: is judged before anything is done.

        Raises:
            TrainingError: the weights have left the finite numbers.
        """
        nats, pulls, balance = self._feel(watched)
        _check_finite(nats)
        if self._spend(nats, balance):
            nats, pulls, _ = self._feel(balanced=False)
        if self.strength:
            for parameter, _ in pulls:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            pairs = self._pairs(pulls)
            if pairs:
                grads, forces = zip(*pairs, strict=True)
                torch._foreach_add_(grads, forces, alpha=self.strength)
        return nats

    def _feel(
        self, watched: Watched | None = None, *, balanced: bool = True
    ) -> tuple[float, list[Pull], list[float]]:
        """Predicted nats, the gradients of all that holds, and what balances (`_squares`).

        On hardware with bfloat16 products the source's is read from rounded factors, as long as
        that does no harm: rounded factors are not positive semi-definite, and where the weights
        have moved in directions that the curvature hardly sees, as behind a filter, what is left of
        S may be less than what rounding has added.
        """
        value, own = self.curvature.felt(self.sites, rounded=self._rounded)
        pulls = self._with_past(own)
        values = [value, *(self._squares(pulls) if balanced else ())]
        nats, *balance = read(values if watched is None else [*values, watched.value])
        if watched is not None:
            watched.judge(balance.pop())
        if self._rounded and nats:
            self._looks += 1
            if nats < 0 or self._looks % LOOK == 0 or self._looks & (self._looks - 1) == 0:
                value, wanted = self.curvature.felt(self.sites)
                size = [w for _, w in wanted]
                error = torch._foreach_sub([g for _, g in own], size)
                exact, off, whole = read([value, _square(error), _square(size)])
                if nats < 0 or off > ROUNDING**2 * whole:
                    self._rounded, nats, pulls = (
                        False,
                        exact,
                        self._with_past(wanted),
                    )  # from now on
                    self.curvature.drop_rounded()
                    squares = self._squares(pulls)
                    balance = read(squares) if squares else []
        return nats, pulls, balance

    def _with_past(self, pulls: list[Pull]) -> list[Pull]:
        """With the pulls of the tasks before."""
        if self.past is None:
            return pulls
        others = self.past.felt(self.sites)[1]
        both = torch._foreach_add([g for _, g in pulls], [g for _, g in others])
        return [Pull(p, g) for (p, _), g in zip(pulls, both, strict=True)]

    def _pairs(self, pulls: Sequence[Pull]) -> list[tuple[Tensor, Tensor]]:
        """In the rows that train, a weight's gradient and its pull."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for p, dq in pulls:
            if p.requires_grad and p.grad is not None:
                place = self._active.get(id(p), ...)
                pairs.append((p.grad[place], dq[place]))
        return pairs

    def _squares(self, pulls: Sequence[Pull]) -> list[Tensor]:
        """With a budget ``<g, g>`` and ``<dq, dq>``, over the weights that have a gradient g."""
        pairs = [] if self.budget is None else self._pairs(pulls)
        return [_square(found) for found in zip(*pairs, strict=True)]

    @no_autocast()
    def apply_proximal(self, optimizer: Optimizer) -> float:
        """Pulls the adapter back after a step of `optimizer`; returns predicted nats."""
        if self.strength:
            rates = step_lengths(optimizer)
            held = [p for p in self.parameters() if id(own(p)) in rates]
            steps = {id(p): self.strength * rates[id(own(p))] for p in held}
            proximal(self.curvature, self.sites, steps)
        value, pulls = self.curvature.felt(self.sites)
        nats, *balance = read([value, *self._squares(pulls)])
        _check_finite(nats)
        if self._spend(nats, balance):
            nats = self.predicted()
        return nats

    def measured(self) -> float | None:
        """The true KL divergence from the anchor on the probe; None without one."""
        return None if self.probe is None else self._measure()

    def _measure(self) -> float:
        assert self.probe is not None
        scatter(self.parameters())
        kl = self.probe.measure(self.model).kl
        reshard(self.model)
        return of_first([kl], next(self.model.parameters()).device)[0]

    @no_autocast()
    def finish(self) -> float | None:
        """When training has ended: takes back what is above the budget.

        Returns:
            The measured nats (without a probe, the predicted ones); None without a budget.
        """
        if self.budget is None:
            return None
        if self.probe is None:
            scale_back(self.curvature, self.sites, self.budget.allowed(), self.rows)
            return self.predicted()
        return settle(self.curvature, self.sites, self.budget.nats, self._measure, self.rows)

    def state(self) -> dict[str, Any]:
        """What it has learned while training, as plain data for JSON."""
        found = {"rounded": self._rounded, "looks": self._looks}
        return found if self.budget is None else found | self.budget.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Puts a `state` back, as far as it goes: one of before 0.2, or of one without a budget."""
        self._rounded = self._rounded and bool(state.get("rounded", True))
        self._looks = int(state.get("looks", 0))
        if self.budget is not None and "strength" in state:
            self.budget.restore(state)

    def _spend(self, nats: float, balance: Sequence[float]) -> bool:
        """With a budget, dual ascent after a step; whether the weights had to be moved back."""
        if self.budget is None:
            return False
        if not all(map(math.isfinite, balance)):  # a gradient scaler skips this step
            return False
        self.budget.weigh(*(balance or (0.0, 0.0)))
        if self.probe is not None and self.budget.due():
            self.budget.correct(self._measure(), nats)
        self.budget.ascend(nats)
        if nats <= self.budget.allowed():
            return False
        scale_back(self.curvature, self.sites, self.budget.allowed(), self.rows, nats)
        return True


def check_strength(strength: float) -> None:
    """Raises `ConfigError` unless the strength is a number from 0 to `STRONGEST`."""
    check_number("the strength is no strength", strength, "strength=10")
    if strength > STRONGEST:
        raise ConfigError(
            "the strength is too large", got=strength, allowed=f"0 to {STRONGEST:g}",
            fix="strength=10",
        )  # fmt: skip


def _square(tensors: Sequence[Tensor]) -> Tensor:
    """``<t, t>`` over all, in float32 at least."""
    kinds = {t.dtype for t in tensors} | {torch.float32}
    norms = torch._foreach_norm(list(tensors), 2.0, reduce(torch.promote_types, kinds))
    if len({norm.device for norm in norms}) > 1:
        return total([norm.square() for norm in norms])
    return torch.stack(norms).square().sum()


def _check_finite(nats: float) -> None:
    if not math.isfinite(nats):
        raise TrainingError(
            "the weights are no longer finite",
            got=f"{nats} predicted nats",
            allowed="finite numbers",
            fix="lower the learning rate; the last checkpoint is untouched",
        )
