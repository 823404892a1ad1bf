"""What held a model while it trained, for its model card: no rows, and no paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from retain.curvature.curvature import Curvature
from retain.curvature.info import CurvatureInfo
from retain.models.cards import plain_name
from retain.models.heads import predicts_per
from retain.retention.named import by_name
from retain.retention.recipe import Recipe

__all__ = ["changed", "facts", "settings_of", "source_of", "texts_of", "trained"]

_WHERE_GIVEN = ("budget", "confidence", "curvature")
"""What `settings_of` has only where it is given. What else one of two lacks is not compared: a
checkpoint is older, or a part that is told of does not act."""


def facts(recipe: Recipe) -> dict[str, str]:
    """What a recipe held a model by, on what, and how far it moved, once training has begun."""
    budgets, force = by_name(recipe.budget), recipe.force
    holds, sites = ([], []) if force is None else (force.holds, force.sites)
    per = "token" if force is None else predicts_per(force.model)
    measured = {hold.name for hold in holds if hold.probe is not None}
    none = "none, so nothing held" if recipe.outputs is None else "none"
    wrote = "rows that the base model wrote" if recipe.elsewhere else ""
    near = "the adapter that training began from" if recipe.from_adapter else "the base"
    found = {"Parts that acted": ", ".join(_parts(recipe)) or none}
    if recipe.unheld:
        found["Trained, and held by nothing"] = (
            f"{len(recipe.unheld)} weights, such as {', '.join(recipe.unheld[:3])}"
        )
    for name, curvature in by_name(recipe.curvature).items():
        found[_of("Source text", name)] = source_of(curvature.info)
    if recipe.from_adapter:
        found["Held to"] = "the adapter that training began from, which had learned before"
    if recipe.outputs is not None:
        found[f"KL on {wrote or 'source rows'}"] = (
            f"weight {recipe.kl.weight:g}, {recipe.kl.batch} of {len(recipe.outputs.rows)} rows "
            f"every {recipe.kl.every} steps"
        )
    if not budgets:
        found["Strength"] = f"{recipe.strength:g}"
    if recipe.update != "gradient":
        found["Update"] = recipe.update
    sure = "" if recipe.confidence is None else f", with {recipe.confidence:.4g} confidence"
    for name, nats in budgets.items():
        kl = "KL divergence" if name in measured else "predicted KL divergence"
        found[_of("Budget", name)] = f"{nats:g} nats per {per} of {kl} to {near}{sure}"
    for hold in holds:
        if hold.budget is not None:
            found[_of("Strength in the end", hold.name)] = f"{hold.budget.strength:.3g}"
        nats = hold.curvature.pulls(sites)[0]
        found[_of("Predicted forgetting", hold.name)] = f"{nats:.3g} nats per {per}"
        if hold.measured is not None:
            most = "" if hold.bound is None else f" (at most {hold.bound:.3g})"
            found[_of("Measured KL divergence", hold.name)] = (
                f"{hold.measured:.3g} nats per {per}{most}, on a few "
                f"{wrote or 'rows of source text'}"
            )
    if recipe.past is not None:
        found["Tasks before"] = f"{recipe.past.info.merged}, held too"
    return found


def trained(steps: int, rate: float, seed: int) -> str:
    """How long a model trained, for its card."""
    return f"{steps} steps at a learning rate of {rate:g}, seed {seed}"


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe holds by, as plain data that a checkpoint keeps; a curvature by a digest."""
    found: dict[str, Any] = {
        "strength": recipe.strength, "update": recipe.update, "kl": recipe.kl.weight,
        "parts": sorted(recipe.parts - {"head"}),  # which is fitted before a training
        "past": None if recipe.past is None else _digest(recipe.past),
    }  # fmt: skip
    found |= {_of("budget", name): nats for name, nats in by_name(recipe.budget).items()}
    if recipe.confidence is not None:
        found["confidence"] = recipe.confidence
    for name, curvature in by_name(recipe.curvature).items():
        found[_of("curvature", name)] = _digest(curvature)
    if "filter" in recipe.parts:
        found |= {f"filter.{name}": value for name, value in asdict(recipe.options).items()}
    if recipe.kl.weight:
        found |= {f"kl.{name}": value for name, value in asdict(recipe.kl).items()}
        del found["kl.weight"]  # which is there already
    return found


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In which of its `settings_of` a training that goes on differs; nothing where in none."""
    both = then.keys() & now.keys()
    told = [name for name in {**then, **now} if name in both or name.startswith(_WHERE_GIVEN)]
    names = [name for name in told if then.get(name) != now.get(name)]
    return ", ".join(f"{name} {then.get(name)} then, {now.get(name)} now" for name in names)


def source_of(info: CurvatureInfo) -> str:
    """What a curvature was fitted on, and how."""
    return (
        f"{texts_of(info)}: {info.sequences} rows, {info.tokens} tokens "
        f"({info.structure}, {info.fisher} Fisher)"
    )


def texts_of(info: CurvatureInfo) -> str:
    """The names of what a curvature was fitted on, without their folders."""
    return ", ".join(_text(note) for note in info.note.split(" + "))


def _digest(curvature: Curvature) -> str:
    told = curvature.info.to_dict() | {"versions": None}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _text(note: str) -> str:
    if note.startswith("self:"):
        return f"what the base model answers to general prompts ({note.partition(':')[2]})"
    own = {"self": "text that the base model wrote", "": "text without a name"}
    return own.get(note) or plain_name(note)


def _parts(recipe: Recipe) -> list[str]:
    """By name; a force of strength 0 pulls nothing."""
    force = recipe.force if recipe.weighs() else None
    acted = {"rows": recipe.frozen, "filter": recipe.filter, "force": force}
    return [name for name, part in acted.items() if part is not None]


def _of(what: str, name: str) -> str:
    return f"{what} of {name}" if name else what
