"""``retain train``: learn a task while the model is held near what it knew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retain.cli.common import AsJson, Quiet, Screen, name_list
from retain.errors import ConfigError, shown

if TYPE_CHECKING:
    from retain.config import RunConfig

__all__ = ["EXAMPLE", "train"]

EXAMPLE = "Example: retain train --model smollm2-135m --data word-problems:500 --out runs/held"

RUN = "run.json"
"""The settings of a run, in its output folder; --resume reads them."""

_FREE = {("training", "save_steps"), ("training", "report_to"), ("out",)}  # may change on --resume

_PLACES = {("model",), ("data",), ("curvature",), ("continue_from",)}
"""May lie elsewhere on --resume: that they are the same is told by the checkpoint's digests."""


def train(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A YAML file with the settings.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A built-in name, hub id, folder or .gguf file (smollm2-135m)."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="What to learn: word-problems[:N], or a file of rows."),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder of the results.")] = None,
    curvature: Annotated[
        str | None, typer.Option(help="A file of retain fit; made in --out by default.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Text to measure the curvature on, in place of the model's own: a file, as for "
            "retain fit."
        ),
    ] = None,
    num_labels: Annotated[
        str | None,
        typer.Option(
            help="Train a classifier of text and label: the number of classes, 1 for values, or "
            "auto (an encoder's default) to count the labels."
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much keeping weighs against learning, 0 or more (10)."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="In its place: nats per source token that may be spent, such as 0.05."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="LoRA's A, in place of the method's choice: wiener filters what it reads, "
            "discriminant chooses and holds it, random lets it be."
        ),
    ] = None,
    continue_from: Annotated[
        str | None,
        typer.Option(
            help="Folder of an earlier run: start at its adapter, keep its tasks too, within its "
            "budget. Implies --keep-state."
        ),
    ] = None,
    keep_state: Annotated[
        bool | None,
        typer.Option("--keep-state", help="Leave state/ in --out, so that a run can continue."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="auto filters and holds, laplace only holds, none is plain LoRA (auto)."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Step size (0.0005).")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data (1).")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step (16).")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Cut rows to so many tokens (256).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter (16).")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha (twice the rank).")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Layers: all-linear, or names with commas (all-linear).")
    ] = None,
    adapter_seed: Annotated[
        int | None, typer.Option(help="Seed of the adapter's start (0).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of the data (0).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (bfloat16).")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use at most so many rows, drawn from all.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="assistant: of a chat, the assistant's turns alone are learned; all."),
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Keep a checkpoint every so many steps (0: none).")
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option("--trust-remote-code", help="Run code that comes with the model."),
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
) -> None:
    """Learn a task with a LoRA adapter, and forget little of what the model knew."""
    given: dict[str, Any] = {
        "model": model, "data": data, "out": out, "curvature": curvature, "strength": strength,
        "source": source, "num_labels": num_labels,
        "budget": budget, "start": start, "continue_from": continue_from, "keep_state": keep_state,
        "method": method, "dtype": dtype, "limit": limit, "loss": loss,
        "trust_remote_code": trust_remote_code,
        "adapter.rank": rank, "adapter.alpha": alpha, "adapter.seed": adapter_seed,
        "adapter.targets": None if targets is None else name_list(targets),
        "training.learning_rate": learning_rate, "training.epochs": epochs,
        "training.max_steps": max_steps, "training.batch_size": batch_size,
        "training.max_length": max_length, "training.seed": seed,
        "training.save_steps": save_steps, **_settings(settings or []),
    }  # fmt: skip
    if resume and overwrite:
        raise ConfigError(
            "--resume and --overwrite do not go together",
            got="both",
            allowed="one of them",
            fix="--resume goes on with a run, --overwrite starts it again",
        )
    run = _resumed(config, given) if resume else _fresh(config, given)
    from retain.cli.run import run_training

    run_training(run, Screen(as_json, quiet), resume=resume, overwrite=overwrite)


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


def _read(path: Path | None, given: dict[str, Any]) -> RunConfig:
    from retain.config import RunConfig, read_config

    return read_config(path or "", given, RunConfig)


def _fresh(path: Path | None, given: dict[str, Any]) -> RunConfig:
    """The settings of a new run, with the model and adapter of the one that it continues from."""
    from retain.config import RunConfig, read_settings, validate

    found = read_settings(path or "", given)
    if found.get("continue_from") is None:
        return validate(found, RunConfig)
    from retain.cli.continuing import inherit, read_chain

    flat = {".".join(map(str, key)): value for key, value in _flat(found).items()}
    return _read(None, inherit(flat, read_chain(found["continue_from"])) | {"keep_state": True})


def _resumed(path: Path | None, given: dict[str, Any]) -> RunConfig:
    """The settings of the run to go on with; those that are given again must be the same."""
    from retain.config import RunConfig, read_config

    out = given["out"] if given["out"] is not None or path is None else _read(path, given).out
    if out is None:
        raise ConfigError(
            "nothing says which run to resume",
            got="no --out",
            allowed="the folder of a run",
            fix="retain train --resume --out runs/held",
        )
    kept = Path(out).expanduser() / RUN
    if not kept.is_file():
        raise ConfigError(
            "there is no run to resume",
            got=f"{out} without {RUN}",
            allowed="the --out of a run that began",
            fix="check --out, or leave --resume out",
        )
    before = read_config(kept, {"out": out}, RunConfig)
    now = read_config(path or kept, given | {"out": out}, RunConfig)
    was, new = _flat(before.model_dump()), _flat(now.model_dump())
    for key in sorted(was.keys() - _FREE):
        moved = key in _PLACES and None not in (was[key], new[key])
        if was[key] != new[key] and not moved:
            raise ConfigError(
                f"the run to resume has another {'.'.join(key)}",
                got="none" if new[key] is None else new[key],
                allowed="none" if was[key] is None else was[key],
                fix="leave it as it was, or start again with --overwrite",
            )
    return now


def _flat(tree: dict[str, Any], head: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, (*head, key))
        else:
            flat[(*head, key)] = value
    return flat
