"""``retain train``: learn a task while the model is held near what it knew.

Its options are fields of `retain.config.RunConfig`, whose descriptions and defaults the help says.
"""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from retain.cli.options import AsJson, Quiet, Screen, name_list
from retain.config import RunConfig
from retain.errors import ConfigError, shown
from retain.runs.settings import OPTIONS, by_key
from retain.runs.train import RunResult, run_training

__all__ = ["EXAMPLE", "train"]

EXAMPLE = "Example: retain train --model smollm2-135m --data word-problems:500 --out runs/held"


def train(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A YAML file with the settings.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting, such as training.warmup=10. May be given again.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run's checkpoints in --out.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Learn a task with a LoRA adapter, and forget little of what the model knew."""
    if options["targets"] is not None:
        options["targets"] = name_list(options["targets"])
    given = by_key(options) | _settings(settings or [])
    screen = Screen(as_json, quiet)
    _tell(run_training(config, given, screen, resume=resume, overwrite=overwrite), screen)


def _options() -> list[inspect.Parameter]:
    """An option for each of `OPTIONS`; what is not given is None."""
    found = []
    for name, key in OPTIONS.items():
        model: Any = RunConfig
        *parents, leaf = key.split(".")
        for parent in parents:
            model = model.model_fields[parent].annotation
        field = model.model_fields[leaf]
        help_text = field.description
        if not field.is_required() and not any(field.default is v for v in (None, False, -1)):
            value = f"{field.default:g}" if isinstance(field.default, float) else field.default
            help_text += f" ({value})"
        flags = {"out": ["--out", "-o"], "keep_state": ["--keep-state"],
                 "trust_remote_code": ["--trust-remote-code"]}.get(name, [])  # fmt: skip
        option = typer.Option(*flags, help=f"{help_text}.", min=1 if name == "max_steps" else None)
        kind: Any = Annotated[_type(field.annotation) | None, option]
        found.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        )
    return found


def _type(annotation: Any) -> Any:
    """What the command line reads for a field: text, unless it can only be of one other type."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = {_type(part) for part in get_args(annotation)} - {type(None)}
        return kinds.pop() if len(kinds) == 1 else str
    return annotation if annotation in (int, float, bool, type(None)) else str


def _with_options() -> None:
    """Puts the options into the signature of `train`, which typer reads."""
    own = inspect.signature(train, eval_str=True).parameters
    named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values()][:-1]
    every = [named[0], *_options(), *named[1:]]
    train.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in every}


_with_options()


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


def _tell(done: RunResult, screen: Screen) -> None:
    """Prints how the run ended, and what to do next."""
    record = done.record
    losses = [step.loss for step in record.history if step.loss is not None]
    lines = [["steps", str(record.steps)], ["seconds", f"{record.seconds or 0:.1f}"]]
    if losses:
        lines.append(["loss, first to last step", f"{losses[0]:.3f} to {losses[-1]:.3f}"])
    if record.predicted_nats is not None:
        lines.append(["predicted forgetting", f"{record.predicted_nats:.3g} nats per token"])
    screen.table("trained", ["", ""], [*lines, ["adapter", str(done.adapter)]])
    if record.labels:
        screen.say("next: load it as docs/classifiers.md says")
    else:
        model, place = quote(record.config.model), quote(str(done.adapter))
        screen.say(f"next: retain eval --model {model} --adapter {place} --probe")
    found = {"adapter": done.adapter, "record": done.out / "train.json"}
    screen.emit(found | record.model_dump(mode="json", by_alias=True))
