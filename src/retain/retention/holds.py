"""What holds a model to each of its sources, and whether a budget of theirs can be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import nn

from retain.curvature.curvature import Curvature
from retain.data.batches import Example
from retain.errors import ConfigError
from retain.models.sites import Site
from retain.retention.budget import Budget
from retain.retention.displacement import anchored
from retain.retention.measure import Reference

__all__ = ["Hold", "Spent", "check_magnitudes", "check_measured", "measure_on"]


@dataclass(eq=False)
class Hold:
    """What holds the model to one source.

    Attributes:
        name: of a named budget; empty for the one without a name.
        curvature: fitted on it.
        budget: of it; None where there is a strength.
        probe: its text, with the base's predictions; None where the prediction is believed.
        rounded: whether its factors are read in bfloat16 (`Pulls.all`).
        looks: how often they may have been looked at.
        nats: predicted at the last step.
        measured: nats that were left at the end, on the probe.
        bound: with a confidence, the upper bound of these on text like it.
    """

    name: str
    curvature: Curvature
    budget: Budget | None = None
    probe: Reference | None = None
    rounded: bool = False
    looks: int = 0
    nats: float = 0.0
    measured: float | None = None
    bound: float | None = None


class Spent(NamedTuple):
    """Of one source, in nats per source token: its budget, and what was spent of it.

    Attributes:
        budget: None where there is a strength.
        predicted: at the present weights.
        measured: at the end, on the probe; None without one.
        strength: nats of task loss that one nat weighs now.
        bound: with a confidence, the upper bound of the measured nats on text like the probe.
    """

    budget: float | None
    predicted: float
    measured: float | None
    strength: float
    bound: float | None = None


def check_magnitudes(unheld: Sequence[str]) -> None:
    """Refuses a budget beside DoRA's magnitudes: they move the model as no prediction sees.

    Args:
        unheld: the names of weights that train beside those that are held.

    Raises:
        ConfigError: there are some among them.
    """
    free = [name for name in unheld if "lora_magnitude_vector" in name]
    if free:
        raise ConfigError(
            "a budget cannot be kept while DoRA's magnitudes are free to learn",
            got=f"{len(free)} that train, such as {free[0]}",
            allowed="LoRA without use_dora, or magnitudes with requires_grad=False",
            fix="use_dora=False, or a strength in place of the budget",
        )


def measure_on(
    holds: Sequence[Hold],
    probes: Mapping[str, Sequence[Example]],
    model: nn.Module,
    sites: Sequence[Site],
    other: Sequence[str],
) -> None:
    """Keeps with each hold what the base predicts on its probe.

    Args:
        holds: of sources around one point.
        probes: tokenised rows, by name.
        model: that trains.
        sites: its layers, as `Curvature.bind` gives them.
        other: the names of weights that train beside those that are held.

    Raises:
        ConfigError: there are such.
    """
    if other:
        kinds = "a new head has nothing to keep"
        fix = "requires_grad_(False) for what is pre-trained; of a new head"
        if all("trainable_tokens" in name for name in other):
            kinds = "no prediction counts tokens of trainable_token_indices"
            fix = "LoRA without trainable_token_indices; or, where those tokens are new,"
        raise ConfigError(
            "what a budget spends cannot be measured while other weights train",
            got=f"{len(other)} of them, such as {other[0]}",
            allowed=f"weights that the curvature holds; {kinds}",
            fix=f"{fix} leave the probe out (source=None), so that the prediction is believed",
        )
    first = holds[0].curvature
    for hold in holds:
        rows = probes.get(hold.name)
        if rows:
            base = partial(anchored, first, sites)
            hold.probe = Reference(model, rows, batch_size=len(rows), base=base)


def check_measured(holds: Sequence[Hold]) -> None:
    """Refuses a confidence in what is not measured, or has no spread.

    Raises:
        ConfigError: a hold has no probe, or one of fewer than two rows.
    """
    for hold in holds:
        rows = 0 if hold.probe is None else hold.probe.rows
        if rows < 2:
            of = f" of {hold.name}" if hold.name else ""
            raise ConfigError(
                f"the confidence in a budget{of} comes of the spread over measured rows",
                got=f"{rows} of them",
                allowed="two at least; a classifier's budget, which is predicted, has none",
                fix="source=rows, of two or more, or leave confidence out",
            )
