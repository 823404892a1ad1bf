"""``retain train --continue-from RUN``: what one run leaves for the next.

A run with ``--keep-state`` leaves ``state/`` in its folder: ``source.safetensors`` (the curvature
of the source text around the base model, which never changes), ``past.safetensors`` (that of all
tasks so far, merged, around the weights that the run ended with) and ``state.json``, with digests
of these and of the adapter. The next run starts at the adapter, is held by both, and leaves the
same three files: however many months, the memory is that of two curvatures. Where the base model
and the folders lie does not count: the base is told by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain.cli.common import Screen
from retain.cli.folders import STATE
from retain.config import RunConfig, read_config
from retain.documents import read_json, sealed
from retain.errors import ConfigError, MismatchError
from retain.files import file_digest, whole_folder, write_json
from retain.models.saved import adapter_digest

__all__ = ["Chain", "check_state", "inherit", "keep_state", "read_chain"]

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
        model: where its base model lay.
    """

    folder: Path
    adapter: Path
    source: Path
    past: Path
    runs: list[dict[str, Any]]
    model: str

    def check_base(self, mine: str, known: str, name: str) -> None:
        """Refuses another base model.

        Args:
            mine: the fingerprint of the model that was loaded.
            known: that of the base of the run.
            name: what was loaded.

        Raises:
            MismatchError: they differ.
        """
        if mine != known:
            raise MismatchError(
                "the model is not the base of the run to continue from",
                got=f"{name} with fingerprint {mine}",
                allowed=f"{known}, which {self.model} had when {self.folder} was trained",
                fix="say with --model where that model lies now",
            )


def read_chain(folder: str | Path) -> Chain:
    """What the run in a folder has left.

    Raises:
        ConfigError: it left no state.
    """
    run = Path(folder).expanduser()
    state = run / "state"
    chain = Chain(
        run, run / "adapter", state / "source.safetensors", state / "past.safetensors", [],
        str(_settings(run).model),
    )  # fmt: skip
    try:
        found = read_json(state / "state.json", sealed=True)
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}")
        chain.runs.extend(found["runs"])
        missing = [p.name for p in (chain.adapter, chain.source, chain.past) if not p.exists()]
        if missing:
            raise ValueError(f"no {' and '.join(missing)}")
        changed = _changed(chain, dict(found.get("digests") or {}))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{run}: {error}"
        if isinstance(error, OSError):
            what = f"{error.filename}: {error.strerror}"
        raise ConfigError(
            "there is nothing to continue from",
            got=what,
            allowed="the --out of a run with --keep-state that has ended",
            fix="train that run again with --keep-state",
        ) from error
    if changed:
        raise MismatchError(
            "the run to continue from has changed since it ended",
            got=f"{' and '.join(changed)} with other contents",
            allowed="adapter/ and state/ as one run left them",
            fix="put back what they were, or train that run again with --keep-state",
        )
    return chain


def _settings(run: Path) -> RunConfig:
    """The settings of an earlier run.

    Raises:
        ConfigError: there are none.
    """
    path = run / "run.json"
    if not path.is_file():
        raise ConfigError(
            "there is nothing to continue from",
            got=f"{run} without run.json",
            allowed="the --out of a run with --keep-state that has ended",
            fix="check --continue-from",
        )
    return read_config(path, {"out": str(run)}, RunConfig)


def _changed(chain: Chain, digests: dict[str, str]) -> list[str]:
    """What is not as the run left it. The states of earlier versions have no digests."""
    places = {
        chain.source.name: (chain.source, file_digest),
        chain.past.name: (chain.past, file_digest),
        "adapter": (chain.adapter, adapter_digest),
    }
    known = ((*places[name], digest) for name, digest in digests.items() if name in places)
    return [str(path) for path, digest_of, digest in known if digest_of(path) != digest]


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


def inherit(given: dict[str, Any], chain: Chain) -> dict[str, Any]:
    """The settings that are given, with the model and the adapter of the earlier run.

    How it was held (`HELD`) goes on too, unless something else is given: a strength takes the place
    of a budget. The model may lie elsewhere now; that it is the same is told by its fingerprint.

    Raises:
        ConfigError: one is given that differs from it.
    """
    kept = _settings(chain.folder)
    mine = {
        "dtype": kept.dtype,
        **{f"adapter.{name}": value for name, value in kept.adapter.model_dump().items()},
    }
    for name, value in mine.items():
        if given.get(name) not in (None, value):
            raise ConfigError(
                f"the run to continue from has another {name}",
                got=given[name],
                allowed="none" if value is None else value,
                fix=f"leave {name} out",
            )
    if given.get("method") == "none":
        raise ConfigError(
            "a run that continues is held by what came before",
            got="method none",
            allowed="auto or laplace; --strength 0 holds nothing",
            fix="leave method out",
        )
    for name in ("curvature", "source"):
        if given.get(name) is not None:
            raise ConfigError(
                "the run to continue from has a curvature of its own",
                got=f"{name} {given[name]}",
                allowed="none",
                fix=f"leave {name} out",
            )
    held = {name: getattr(kept, name) for name in HELD if kept.method != "none"}
    if given.get("strength") is not None:
        del held["budget"]
    held["model"] = kept.model
    return held | {name: value for name, value in given.items() if value is not None} | mine


def keep_state(
    model: Any,
    examples: Sequence[Any],
    source: Any,
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
        source: the source text's curvature.
        past: the curvature of the tasks before, or None.
        out: the run's folder.
        entry: of this run, for ``state.json``.
        before: what the run continued from.
        screen: where to say what is done.

    Raises:
        OutputError: the folder cannot be written.
    """
    from retain.curvature.fit.fit import fit_curvature
    from retain.curvature.merge import reanchored
    from retain.retention.state import choose

    screen.say("measuring what the task relies on, for the runs that continue from this one")
    info = source.info
    rows = choose(examples, ROWS, entry["seed"])
    found = fit_curvature(
        model, rows, info.structure, space=info.space, fisher=info.fisher,
        rank=info.rank, samples=info.samples, temperature=info.temperature, rows=ROWS,
        max_length=max(len(e.tokens) for e in examples) + 1,
        batch_size=min(8, len(rows)), seed=entry["seed"], progress=screen.progress,
    )  # fmt: skip
    if past is not None:
        found = reanchored(past, model) + found
    with whole_folder(out / "state", "the state of the run", STATE) as new:
        found.save(new / "past.safetensors")
        source.save(
            new / "source.safetensors"
        )  # what the run was held by, whatever its file is now
        runs = [*(before.runs if before else []), entry]
        digests = {path.name: file_digest(path) for path in sorted(new.glob("*.safetensors"))}
        digests["adapter"] = adapter_digest(out / "adapter")
        state = {"schema": SCHEMA, "runs": runs, "digests": digests}
        write_json(new / "state.json", sealed(state))
    return out / "state"
