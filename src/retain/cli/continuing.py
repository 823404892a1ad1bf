"""``retain train --continue-from RUN``: what one run leaves for the next.

A run with ``--keep-state`` leaves ``state/`` in its folder: ``source.safetensors`` (the curvature
of the source text around the base model, which never changes), ``past.safetensors`` (that of all
tasks so far, merged, around the weights that the run ended with) and ``state.json``. The next run
starts at the adapter, is held by both, and leaves the same three files: however many months, the
memory is that of two curvatures.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain.cli.common import Screen
from retain.config import RunConfig, read_config
from retain.errors import ConfigError, MismatchError, OutputError
from retain.files import write_json

__all__ = ["Chain", "check_state", "drop_state", "inherit", "keep_state", "read_chain"]

SCHEMA = "retain.state/1"
HELD = ("method", "strength", "budget", "start", "gain", "weight", "max_rank")
"""What a run that continues another has from it."""

ROWS = 128
"""Rows of the task on which its own curvature is measured."""


@dataclass(frozen=True)
class Chain:
    """What an earlier run has left.

    Attributes:
        folder: of the run.
        adapter: its adapter.
        source: the file of the source text's curvature.
        past: the file of the earlier tasks' curvature.
        runs: one entry for each run so far, the first one first.
    """

    folder: Path
    adapter: Path
    source: Path
    past: Path
    runs: list[dict[str, Any]]


def read_chain(folder: str | Path) -> Chain:
    """What the run in a folder has left.

    Raises:
        ConfigError: it left no state.
    """
    run = Path(folder).expanduser()
    state = run / "state"
    chain = Chain(
        run, run / "adapter", state / "source.safetensors", state / "past.safetensors", []
    )
    try:
        found = json.loads((state / "state.json").read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}")
        chain.runs.extend(found["runs"])
        missing = [p.name for p in (chain.adapter, chain.source, chain.past) if not p.exists()]
        if missing:
            raise ValueError(f"no {' and '.join(missing)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            "there is nothing to continue from",
            got=f"{run}: {reason}",
            allowed="the --out of a run with --keep-state that has ended",
            fix="train that run again with --keep-state",
        ) from error
    return chain


def check_state(past: Any, model: Any, chain: Chain) -> None:
    """Refuses a state that is not of the adapter beside it.

    Args:
        past: the curvature of the earlier tasks.
        model: with the adapter of the run.
        chain: of the run.

    Raises:
        MismatchError: it was measured around other weights; or what `Curvature.bind` refuses.
    """
    if not past.at_anchor(past.bind(model)):
        raise MismatchError(
            "the state of the run to continue from is not that of its adapter",
            got=f"{chain.past} around other weights than those in {chain.adapter}",
            allowed="both of one run that ended",
            fix="train that run again with --keep-state",
        )


def drop_state(out: Path) -> None:
    """Removes the state that an earlier run left in a folder whose adapter is a new one now."""
    shutil.rmtree(out / "state", ignore_errors=True)


def inherit(given: dict[str, Any], chain: Chain) -> dict[str, Any]:
    """The settings that are given, with the model and the adapter of the earlier run.

    How it was held (`HELD`) goes on too, unless something else is given: a strength takes the place
    of a budget.

    Raises:
        ConfigError: one is given that differs from it.
    """
    kept = read_config(chain.folder / "run.json", {"out": str(chain.folder)}, RunConfig)
    mine = {
        "model": kept.model,
        "dtype": kept.dtype,
        **{f"adapter.{name}": value for name, value in kept.adapter.model_dump().items()},
    }
    for name, value in mine.items():
        if given.get(name) not in (None, value):
            raise ConfigError(
                f"the run to continue from has another {name}",
                got=given[name],
                allowed=value,
                fix=f"leave {name} out",
            )
    if given.get("method") == "none":
        raise ConfigError(
            "a run that continues is held by what came before",
            got="method none",
            allowed="auto or laplace; --strength 0 holds nothing",
            fix="leave method out",
        )
    if given.get("curvature") is not None:
        raise ConfigError(
            "the run to continue from has a curvature of its own",
            got=f"curvature {given['curvature']}",
            allowed="none",
            fix="leave curvature out",
        )
    held = {name: getattr(kept, name) for name in HELD if kept.method != "none"}
    if given.get("strength") is not None:
        del held["budget"]
    return held | {name: value for name, value in given.items() if value is not None} | mine


def keep_state(
    model: Any,
    examples: Sequence[Any],
    source: Path,
    past: Any,
    out: Path,
    entry: dict[str, Any],
    before: Chain | None,
    screen: Screen,
) -> Path:
    """Measures the task's curvature, merges it into the past, and writes ``state/`` whole.

    Args:
        model: trained, with its adapter.
        examples: the rows that it learned.
        source: the file of the source text's curvature.
        past: the curvature of the tasks before, or None.
        out: the run's folder.
        entry: of this run, for ``state.json``.
        before: what the run continued from.
        screen: where to say what is done.

    Raises:
        OutputError: the folder cannot be written.
    """
    from retain.curvature.artifact import load_curvature
    from retain.curvature.estimate import fit_curvature
    from retain.curvature.merge import reanchored
    from retain.models.saved import whole_folder
    from retain.retention.rows import choose

    screen.say("measuring what the task relies on, for the runs that continue from this one")
    info = load_curvature(source).info
    rows = choose(examples, ROWS, entry["seed"])
    found = fit_curvature(
        model, rows, info.structure, space=info.space, fisher=info.fisher,
        rank=info.rank, samples=info.samples, temperature=info.temperature, rows=ROWS,
        max_length=max(len(e.tokens) for e in examples) + 1,
        batch_size=min(8, len(rows)), seed=entry["seed"], progress=screen.progress,
    )  # fmt: skip
    if past is not None:
        found = reanchored(past, model) + found
    with whole_folder(out / "state") as new:
        found.save(new / "past.safetensors")
        _same_file(source, new / "source.safetensors")
        runs = [*(before.runs if before else []), entry]
        write_json(new / "state.json", {"schema": SCHEMA, "runs": runs})
    return out / "state"


def _same_file(source: Path, target: Path) -> None:
    """A second name of a file where the disk allows it, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise OutputError(
                "the source's curvature cannot be kept",
                got=f"{target}: {error.strerror}",
                allowed="a folder that can be written, with room on the disk",
                fix="free some disk and train again",
            ) from error
