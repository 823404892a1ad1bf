"""A retention budget in nats per token: the strength is found while the model trains.

What is wanted is ``min task loss  subject to  q <= budget``, with q the predicted forgetting. Its
Lagrangian is what `retain.retention.force` descends, with the multiplier as strength; here the
multiplier climbs by dual ascent, in its logarithm since its scale is not known beforehand:

    log strength  +=  rate * tanh(4 (c q / budget - 1)) ,

where c, the measured KL divergence over the predicted one on a few rows of source text, corrects
the prediction as training goes. At the solution the force balances the task's gradient g, so the
multiplier is ``||g|| / ||dq||`` there; four times the ratio of their running means is the most that
the strength may be, or a step far too long would let it climb until nothing is learned.

A multiplier is always late, and whatever the learning rate, a step can cross the budget; so after
each step that has, the weights are moved straight back towards the anchor until ``c q = budget``
(`retain.retention.displacement`). That changes no direction: the multiplier sees what the step
wanted, and takes over. At the end the true divergence is measured, and what is above the budget
goes back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from retain.errors import ConfigError, TrainingError
from retain.retention.bounds import check_budget

__all__ = ["PROBE_ROWS", "Budget"]

PROBE_ROWS = 8
"""Of source text, on which the true divergence is measured."""

START = 0.2
"""The first strength times the budget: a strength of 4 for 0.05 nats."""

RATE = 0.3
"""Of the ascent, each step."""

LEAST = 1e-4
"""The least strength times the budget, from which it can climb again."""

MEMORY, MOST = 0.9, 4.0
"""Of the running means, and how far the force may be above the task's gradient."""

EVERY = 64
"""Steps between two measurements of the true divergence, after steps 1, 2, 4, 8 and so on."""

TELLING, BELIEF = 0.05, 1e6
"""The share of the budget from which on a measurement says something (below it bfloat16's noise
speaks), and the factor that no correction exceeds."""


@dataclass
class Budget:
    """Finds the strength that spends a budget.

    Args:
        nats: of KL divergence per source token that may be spent.
        strength: where it begins; by the budget's size where it is 0.

    Attributes:
        correction: measured over predicted nats.
        reached: whether the budget has ever been reached.
        spent: nats of what stays as it is, measured and predicted: the correction is of the rest.
        pull: running means of ``<g, g>`` and ``<dq, dq>``.
        steps: how often it has been asked.
    """

    nats: float
    strength: float = 0.0
    correction: float = 1.0
    reached: bool = False
    pull: tuple[float, float] = (0.0, 0.0)
    steps: int = 0
    spent: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        check_budget(self.nats)
        self.strength = self.strength or START / self.nats

    def weigh(self, task: float, force: float) -> None:
        """Takes in what balances at a step: ``<g, g>`` and ``<dq, dq>``."""
        old, new = MEMORY, 1.0 - MEMORY
        self.pull = (old * self.pull[0] + new * task, old * self.pull[1] + new * force)

    def ascend(self, predicted: float) -> None:
        """One step of dual ascent, from the predicted nats that an optimiser's step led to."""
        self.steps += 1
        believed = self.spent[0] + self.correction * (predicted - self.spent[1])
        excess = believed / self.nats - 1.0
        self.reached = self.reached or excess >= 0
        if not self.reached:
            return
        self.strength *= math.exp(RATE * math.tanh(4.0 * excess))
        if self.pull[1] > 0:
            most = MOST * math.sqrt(self.pull[0] / self.pull[1])
            self.strength = max(min(self.strength, most), LEAST / self.nats)

    def allowed(self) -> float:
        """Predicted nats that may be spent."""
        return self.spent[1] + (self.nats - self.spent[0]) / self.correction

    def due(self) -> bool:
        """Whether the next step is one after which the true divergence is measured."""
        n = self.steps + 1
        return n % EVERY == 0 or n & (n - 1) == 0

    def correct(self, measured: float, predicted: float) -> None:
        """Learns how far the prediction is off.

        Raises:
            TrainingError: what was measured is not finite.
        """
        if not math.isfinite(measured):
            raise TrainingError(
                "the model's predictions on the probe are no longer finite",
                got=f"{measured} measured nats",
                allowed="finite numbers",
                fix="lower the learning rate, or train in bfloat16 or float32; the weights are "
                "left as they are",
            )
        measured, predicted = measured - self.spent[0], predicted - self.spent[1]
        if predicted <= 0 or measured < TELLING * self.nats:
            return
        self.correction = min(max(measured / predicted, 1 / BELIEF), BELIEF)

    def state(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "nats": self.nats, "strength": self.strength,
            "correction": self.correction, "reached": self.reached, "pull": list(self.pull),
            "steps": self.steps, "spent": list(self.spent),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Puts a `state` back; the budget itself may have been changed since.

        Raises:
            ConfigError: to less than what stays as it is has spent.
        """
        self.strength, self.correction = float(state["strength"]), float(state["correction"])
        self.reached, self.steps = bool(state["reached"]), int(state["steps"])
        self.pull = (float(state["pull"][0]), float(state["pull"][1]))
        measured, predicted = state.get("spent", (0.0, 0.0))
        self.spent = (float(measured), float(predicted))
        if self.spent[0] >= self.nats:
            raise ConfigError(
                "what stays as it is has spent more than the budget",
                got=f"a budget of {self.nats:g}, and {self.spent[0]:.3g} nats that are spent",
                allowed=f"more than {self.spent[0]:.3g}",
                fix=f"a budget of {float(state['nats']):g}, as it was",
            )
