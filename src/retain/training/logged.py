"""What retention adds to the lines of a trainer's log."""

from __future__ import annotations

from collections.abc import Mapping

from retain.retention.named import named
from retain.retention.recipe import Recipe

__all__ = ["last_line", "step_line"]


def step_line(recipe: Recipe, loss: float, nats: float) -> dict[str, float]:
    """Of the line of a step.

    Args:
        recipe: that holds the model.
        loss: of the task, in nats, as the trainer has logged it.
        nats: predicted at this step.
    """
    found = {"task_loss": loss, "predicted_nats": nats, "retention_strength": recipe.weight()}
    if recipe.outputs is not None and not recipe.outputs.last.isnan():
        found["source_kl"] = float(recipe.outputs.last)
    for hold in () if recipe.force is None else recipe.force.holds:
        if hold.budget is not None and not hold.name:
            found["retention_correction"] = hold.budget.correction
        elif hold.budget is not None:
            found[named("predicted_nats", hold.name)] = hold.nats
            found[named("strength", hold.name)] = hold.budget.strength
            found[named("correction", hold.name)] = hold.budget.correction
    return found


def last_line(recipe: Recipe) -> dict[str, float]:
    """Of the last line: what was spent of each named budget; nothing without them."""
    if not isinstance(recipe.budget, Mapping):
        return {}
    found: dict[str, float] = {}
    for name, spent in recipe.spent().items():
        values = {
            "budget": spent.budget, "predicted_nats": spent.predicted,
            "measured_nats": spent.measured, "bound_nats": spent.bound,
        }  # fmt: skip
        found |= {named(k, name): value for k, value in values.items() if value is not None}
    return found
