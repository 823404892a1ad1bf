"""``retain train``: learn a task while the model is held near what it knew.

Its options are fields of `retain.config.RunConfig`; what is not given is left to the file.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from pydantic import Field

from retain.cli.options import COMMON, Screen, name_list, option, signed
from retain.config import Options, RunConfig
from retain.errors import ConfigError, shown
from retain.runs.records import HeldTo
from retain.runs.settings import OPTIONS, by_key
from retain.runs.train import RunResult, run_training

__all__ = ["EXAMPLE", "train"]

EXAMPLE = "Example: retain train --model smollm2-135m --data word-problems:500 --out runs/held"

FEW = 20
"""Steps; from as many on a run on real rows has learned something, as a rule."""


class _Given(Options):
    config: Path | None = Field(None, description="A YAML file with the settings")
    set: list[str] = Field(
        [], description="Any other setting: KEY=VALUE, such as training.warmup=10. May be repeated"
    )
    resume: bool = Field(False, description="Go on from the last checkpoint in --out")
    overwrite: bool = Field(False, description="Remove what an earlier run left in --out")


def _field(key: str) -> Any:
    model: Any = RunConfig
    *parents, leaf = key.split(".")
    for parent in parents:
        model = model.model_fields[parent].annotation
    return model.model_fields[leaf]


def train(*, as_json: bool, quiet: bool, **given: Any) -> None:
    """Learn a task with a LoRA adapter, and forget little of what the model knew."""
    own = _Given(**{name: given.pop(name) or field.default for name, field in _OWN.items()})
    for name in ("targets", "parts"):
        if given[name] is not None:
            given[name] = name_list(given[name])
    settings = by_key(given) | _settings(own.set)
    screen = Screen(as_json, quiet)
    done = run_training(own.config, settings, screen, resume=own.resume, overwrite=own.overwrite)
    _tell(done, screen)


_OWN = _Given.model_fields
_every = {name: option(name, field) for name, field in _OWN.items()}
_every |= {name: option(name, _field(key), unset=True) for name, key in OPTIONS.items()}
signed(train, train.__doc__, [*_every.values(), *COMMON])


def _settings(pairs: list[str]) -> dict[str, Any]:
    """``--set key=value`` as a dictionary, the values read as YAML."""
    from retain.documents import parse_yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            if not key.strip() or not equals:
                raise ValueError("no key=value")
            found[key.strip()] = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(
                "a --set is not accepted",
                got=f"{shown(pair)}: {error}",
                allowed="key=value",
                fix="--set training.warmup=10",
            ) from error
    return found


def _spent(name: str, held: HeldTo) -> list[str]:
    """What a named budget allowed, and what was spent of it; an en dash is nothing."""
    nats = (held.budget, held.predicted_nats, held.measured_nats, held.bound_nats)
    return [name, *("–" if value is None else f"{value:.3g}" for value in nats)]


def _tell(done: RunResult, screen: Screen) -> None:
    """Prints how the run ended, and what to do next."""
    record = done.record
    losses = [step.loss for step in record.history if step.loss is not None]
    lines = [["steps", str(record.steps)], ["seconds", f"{record.seconds or 0:.1f}"]]
    if losses:
        lines.append(["loss, first to last step", f"{losses[0]:.3f} to {losses[-1]:.3f}"])
    if record.predicted_nats is not None:
        per = "row" if record.labels else "token"
        lines.append(["predicted forgetting", f"{record.predicted_nats:.3g} nats per {per}"])
    budget = record.config.budget
    if record.measured_nats is not None and isinstance(budget, float):
        most = "" if record.bound_nats is None else f" (at most {record.bound_nats:.3g})"
        nats = f"{record.measured_nats:.3g} nats per token{most}, of a budget of {budget:g}"
        lines.append(["measured KL to the base", nats])
    screen.table("trained", ["", ""], [*lines, ["adapter", str(done.adapter)]])
    if record.held_to:
        head = ["nats per token", "budget", "predicted", "measured", "at most"]
        width = len(head) if record.config.confidence is not None else len(head) - 1
        rows = [_spent(*item)[:width] for item in record.held_to.items()]
        screen.table("held to", head[:width], rows)
    if record.steps < FEW and record.config.training.max_steps < 0:
        screen.say(f"{record.steps} steps are few: --epochs reads the rows more often, a smaller "
                   "--batch-size makes more steps of them")  # fmt: skip
    if record.labels:
        screen.say("next: load it as docs/classifiers.md says")
    else:
        model, place = quote(record.config.model), quote(str(done.adapter))
        asked = "--general knowledge --prompts general"
        screen.say(f"next: retain eval --model {model} --adapter {place} {asked}")
    found = {"adapter": done.adapter, "record": done.out / "train.json"}
    screen.emit(found | record.model_dump(mode="json", by_alias=True))
