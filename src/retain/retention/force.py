"""The force: a quadratic's pull towards the anchor, once an optimiser step (Laplace).

Total loss = task loss + strength x predicted nats. Two ways to apply the force:

- ``gradient``: its gradient is added to the task's, before the optimiser steps.
- ``proximal``: after the optimiser has stepped, the step's own implicit problem is solved in
  closed form, ``X = argmin 0.5/eta ||X - X'||^2 + strength * q(X)``, as AdamW decouples its
  weight decay. It is stable for any strength. ``eta`` is the learning rate, over the mean
  denominator of Adam where the optimiser is one, and over 1 - momentum of SGD (so that a strength
  means about the same number of nats as in the other way). Beside other optimisers it is refused.

Both are computed in closed form, without an autograd graph, and do not depend on the batch.
In place of the strength a budget may be given; see `retain.retention.budget`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retain.curvature.anchor import proximal
from retain.curvature.blocks.estimator import has_bf16
from retain.curvature.curvature import Curvature, Pull
from retain.data.batches import Example
from retain.errors import ConfigError, MismatchError, TrainingError
from retain.models.forward import no_autocast
from retain.models.heads import head_kind
from retain.models.processes import of_first
from retain.models.shards import own, reshard, scatter
from retain.models.sites import LinearSite, check_held
from retain.retention.bounds import check_confidence, check_strength, check_update
from retain.retention.budget import Budget
from retain.retention.displacement import back_within, check_way_back, scale_back
from retain.retention.holds import Hold, Spent, check_magnitudes, check_measured, measure_on
from retain.retention.named import (
    ALONE,
    Budgets,
    Curvatures,
    by_name,
    check_names,
    check_together,
)
from retain.retention.optimizers import step_lengths
from retain.retention.pulls import Felt, Pulls
from retain.retention.watch import Watched, read
from retain.types import STRENGTH, Update

__all__ = ["Force"]

ROOM = 0.8
"""Of a budget, the share that earlier tasks may have used when training begins."""


class Force:
    """Holds a model near its anchor while it trains; `retain.Retention` is the whole recipe.

    Args:
        model: a PEFT model with LoRA, or a plain one whose curvature was fitted on it.
        curvature: fitted on this model; or several by name, fitted at one point.
        strength: how many nats of task loss one nat of predicted forgetting weighs. 0 is plain
            training, bit for bit.
        budget: nats of KL divergence per source token that may be spent; the strength is then
            found by itself, and `finish` is to be called when training ends. Of several curvatures
            each has its own, by the same names: the force is then
            ``sum over k of strength_k dq_k``.
        confidence: with which a budget is to hold on text like the probe, such as 0.95: what counts
            against it is then the one-sided upper bound of what is measured
            (`retain.retention.measure.Forgetting.bound`). None: what is measured itself.
        past: a second curvature, held with the same strength: that of the tasks before, around the
            model's present weights (`retain.reanchored`). The budget is that of the first alone,
            which stays where the base model is. Beside several it has the largest strength.
        probe: tokenised source text, a few rows: with a budget, the true divergence on it corrects
            the predicted one now and then, and at the end. Without it the prediction is believed.
            Of several budgets by name; those that are missing believe the prediction.
        update: ``gradient`` or ``proximal``.
        resuming: the adapter is expected to be away from the anchor already.

    Attributes:
        holds: of each source, what holds the model to it.

    Raises:
        MismatchError: the curvature is of another model; or, in adapter space and in full
            fine-tuning, the model does not start at the anchor.
        ModelError: pre-trained weights train beside the LoRA that nothing would hold; or a head
            that is not known.
        ConfigError: a strength that is negative or not finite, a budget that is not above 0 or
            beside DoRA's magnitudes, a probe beside other trained weights, an unknown update,
            names that differ, or a confidence without a probe of two rows.
    """

    @no_autocast()
    def __init__(
        self,
        model: nn.Module,
        curvature: Curvatures,
        strength: float = STRENGTH,
        *,
        budget: Budgets | None = None,
        confidence: float | None = None,
        past: Curvature | None = None,
        probe: Sequence[Example] | Mapping[str, Sequence[Example]] = (),
        update: Update = "gradient",
        resuming: bool = False,
    ) -> None:
        check_update(update)
        check_strength(strength)
        check_confidence(confidence, budget)
        head_kind(model)
        probes = by_name(probe or None)
        check_names(curvature, budget, **({"probes": probe} if probe else {}))
        nats = by_name(budget)
        self.update, self._strength, self._confidence = update, strength, confidence
        rounded = all(map(has_bf16, {p.device for p in model.parameters() if p.requires_grad}))
        known = by_name(curvature)
        self.holds = [
            Hold(name, known[name], Budget(nats[name]) if nats else None, rounded=rounded)
            for name in nats or known
        ]
        for hold in self.holds:
            self.sites = hold.curvature.bind(model)
        check_together(known)
        if past is not None:
            past.bind(model)
        if len(self.holds) > 1 and update != "gradient":
            raise ConfigError(
                "a proximal step knows one source",
                got=f"{len(self.holds)} of them",
                allowed="update='gradient'",
                fix="leave update out",
            )
        whole = isinstance(self.sites[0], LinearSite)
        if not whole:
            check_held(model)
        first = self.holds[0].curvature
        exact = whole or first.info.space == "adapter"
        if exact and not resuming and past is None and not first.at_anchor(self.sites):
            raise MismatchError(
                "the model does not start where the curvature was fitted",
                got="other values of " + ("its weights" if whole else "A or B"),
                allowed="the anchor's",
                fix="curvature.load_anchor(model)" + ("" if whole else ", or space='weight'"),
            )
        if nats:
            check_magnitudes(self.unheld(model))
            for hold in self.holds:
                check_way_back(hold.curvature, self.sites, nats[hold.name])
        if nats and probes:
            measure_on(self.holds, probes, model, self.sites, self.unheld(model))
        if confidence is not None:
            check_measured(self.holds)
        self.model, self.past = model, past
        self.pulls = Pulls(self.sites, self.holds, past)

    @property
    def curvature(self) -> Curvature:
        """Of the source; the first of several, which are around one point."""
        return self.holds[0].curvature

    @property
    def budget(self) -> Budget | None:
        """Of the source; the first of several, which are in `holds`."""
        return self.holds[0].budget

    @property
    def strengths(self) -> dict[str, float]:
        """By name: nats of task loss that one nat of predicted forgetting weighs now."""
        return {
            h.name: self._strength if h.budget is None else h.budget.strength for h in self.holds
        }

    @property
    def strength(self) -> float:
        """Nats of task loss that one nat on the source weighs now, or one nat on all of several."""
        return sum(self.strengths.values())

    @no_autocast()
    def predicted(self) -> float:
        """Predicted nats per source token at the present adapter; of several sources the mean."""
        return _mean([self._predicted(hold) for hold in self.holds])

    @no_autocast()
    def spent(self) -> dict[str, Spent]:
        """What each source's budget is, and what was spent of it, by name."""
        strengths = self.strengths
        return {
            hold.name: Spent(
                None if hold.budget is None else hold.budget.nats, self._predicted(hold),
                hold.measured, strengths[hold.name], hold.bound,
            )
            for hold in self.holds
        }  # fmt: skip

    def _predicted(self, hold: Hold) -> float:
        return hold.curvature.pulls(self.sites)[0]

    def parameters(self) -> list[nn.Parameter]:
        """The trained weights that are held."""
        found: list[nn.Parameter] = []
        for site in self.sites:
            found += [site.weight] if isinstance(site, LinearSite) else [site.a, site.b]
        return found

    def _own(self) -> set[int]:
        """``id`` of the model's parameters that are held."""
        return {id(own(p)) for p in self.parameters()}

    def unheld(self, model: nn.Module) -> list[str]:
        """The names of weights that train beside those that are held."""
        held = self._own()
        return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]

    def only(self, rows: slice) -> None:
        """Only these rows of A and columns of B train; the others feel no force.

        Args:
            rows: of every layer.
        """
        self.pulls.only(rows)

    @no_autocast()
    def make_room(self) -> bool:
        """Before training: what is there may have spent four fifths of each budget.

        What counts is the measured divergence where there is a probe, else the predicted one.

        Returns:
            Whether it had spent more, and was moved back.
        """
        if self.budget is None:
            return False
        before = self.predicted()
        left = self._take_back(ROOM)
        for hold, nats in zip(self.holds, left, strict=True):
            assert hold.budget is not None
            hold.budget.spent = (nats, self._predicted(hold))
        return self.predicted() < before

    def _take_back(self, share: float = 1.0, rows: slice = slice(None)) -> list[float]:
        """Moves the weights straight back until all budgets are kept.

        On the way back no quadratic that is within its budget leaves it, for it is within it at
        both ends.

        Args:
            share: of the budgets.
            rows: see `scale_back`.

        Returns:
            Of each source the nats that are left: measured (with a confidence, their bound), or
            without a probe predicted.

        Raises:
            TrainingError: the weights have left the finite numbers; they are left as they are.
        """
        self.pulls.forget()  # whatever stays may have moved
        _check_finite(self.predicted())
        for hold in self.holds:
            assert hold.budget is not None
            if hold.probe is None:
                most = hold.budget.allowed() if share == 1.0 else share * hold.budget.nats
                scale_back(hold.curvature, self.sites, most, rows)
                left = self._predicted(hold)
            else:
                most = share * hold.budget.nats
                measure = partial(self._measure, hold)
                left = back_within(hold.curvature, self.sites, most, measure, rows)
        return [left] if len(self.holds) == 1 else [self._left(hold) for hold in self.holds]

    def _left(self, hold: Hold) -> float:
        return self._predicted(hold) if hold.probe is None else self._measure(hold)

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
        felt = self.pulls.all(watched)
        nats = _mean([each.nats for each in felt])
        _check_finite(nats)
        if self._spend(felt):
            felt = self.pulls.all(balanced=False)
            nats = _mean([each.nats for each in felt])
        for hold, each in zip(self.holds, felt, strict=True):
            hold.nats = each.nats
        for strength, pulls in self._terms(felt):
            if not strength:
                continue
            for parameter, _ in pulls:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            pairs = self.pulls.pairs(pulls)
            if pairs:
                grads, forces = zip(*pairs, strict=True)
                torch._foreach_add_(grads, forces, alpha=strength)
        return nats

    def _terms(self, felt: Sequence[Felt]) -> Iterator[tuple[float, list[Pull]]]:
        """What pulls, and how strongly."""
        strengths = self.strengths
        for hold, each in zip(self.holds, felt, strict=True):
            yield strengths[hold.name], each.pulls
        if len(felt) > 1 and self.past is not None:
            yield max(strengths.values()), self.pulls.of(self.past)[1]

    @no_autocast()
    def apply_proximal(self, *optimizers: Optimizer) -> float:
        """Pulls the adapter back after a step of the optimisers; returns predicted nats."""
        value: Tensor | None = None
        if self.strength:
            active = {id(own(p)): self.pulls.active.get(id(p), ...) for p in self.parameters()}
            lengths = [step_lengths(each, active) for each in optimizers]
            rates = {key: length for each in lengths for key, length in each.items()}
            held = [p for p in self.parameters() if id(own(p)) in rates]
            steps = {id(p): self.strength * rates[id(own(p))] for p in held}
            for curvature in [c for c in (self.past, self.curvature) if c is not None]:
                anchors = self.pulls.anchors(curvature)
                value = proximal(curvature, self.sites, steps, self.pulls.rows, anchors)
        pulls: list[Pull] = []
        if value is None or self.budget is not None:
            value, pulls = self.pulls.of(self.curvature)
        nats, *balance = read([value, *self.pulls.balance(pulls)])
        _check_finite(nats)
        if self._spend([Felt(nats, pulls, balance)]):
            nats = self.predicted()
        return nats

    def _measure(self, hold: Hold) -> float:
        """What counts against a budget of what is measured: with a confidence, its bound."""
        return self._found(hold)[-1]

    def _found(self, hold: Hold) -> list[float]:
        """The true divergence on a probe and, with a confidence, its upper bound."""
        assert hold.probe is not None
        scatter(self.parameters())
        found = hold.probe.measure(self.model)
        reshard(self.model)
        nats = [found.kl]
        if self._confidence is not None:
            nats.append(found.bound(self._confidence))
        return of_first(nats, next(self.model.parameters()).device)

    @no_autocast()
    def finish(self) -> float | None:
        """When training has ended: takes back what is above a budget.

        Returns:
            The measured nats (without a probe, the predicted ones), of several budgets their mean;
            None without a budget.

        Raises:
            TrainingError: the weights have left the finite numbers; they are left as they are.
        """
        if self.budget is None:
            return None
        left = self._take_back(rows=self.pulls.rows)
        if self._confidence is not None:
            found = [self._found(hold) for hold in self.holds]
            left = [nats for nats, _ in found]
            for hold, (_, bound) in zip(self.holds, found, strict=True):
                hold.bound = bound
        for hold, nats in zip(self.holds, left, strict=True):
            hold.measured = None if hold.probe is None else nats
        return _mean(left)

    def state(self) -> dict[str, Any]:
        """What it has learned while training, as plain data for JSON."""
        states = {
            hold.name: {"rounded": hold.rounded, "looks": hold.looks}
            | ({} if hold.budget is None else hold.budget.state())
            for hold in self.holds
        }
        return states.get(ALONE) or {"budgets": states}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts a `state` back, as far as it goes: one of before 0.2, or of one without a budget."""
        kept = {ALONE: state, **state.get("budgets", {})}
        for hold in self.holds:
            found = kept.get(hold.name, {})
            hold.rounded = hold.rounded and bool(found.get("rounded", True))
            hold.looks = int(found.get("looks", 0))
            if hold.budget is not None and "strength" in found:
                hold.budget.restore(dict(found))

    def _spend(self, felt: Sequence[Felt]) -> bool:
        """With budgets, dual ascent after a step; whether the weights had to be moved back."""
        budgets = [hold.budget for hold in self.holds if hold.budget is not None]
        if not all(math.isfinite(b) for each in felt for b in each.balance):
            return False  # a gradient scaler skips this step
        for hold, budget, each in zip(self.holds, budgets, felt, strict=False):
            budget.weigh(*(each.balance or (0.0, 0.0)))
            if hold.probe is not None and budget.due():
                budget.correct(self._measure(hold), each.nats)
            budget.ascend(each.nats)
        reached = any(budget.reached for budget in budgets)
        moved = False
        for hold, budget, each in zip(self.holds, budgets, felt, strict=False):
            budget.reached = reached  # where one binds, those that do not let go
            if each.nats > budget.allowed():  # of those that are left, the nats were before a move
                now = None if moved else each.nats
                scale_back(hold.curvature, self.sites, budget.allowed(), self.pulls.rows, now)
                moved = True
        return moved


def _check_finite(nats: float) -> None:
    if not math.isfinite(nats):
        raise TrainingError(
            "the weights are no longer finite",
            got=f"{nats} predicted nats",
            allowed="finite numbers",
            fix="lower the learning rate; the last checkpoint is untouched",
        )


def _mean(values: Sequence[float]) -> float:
    return values[0] if len(values) == 1 else sum(values) / len(values)
