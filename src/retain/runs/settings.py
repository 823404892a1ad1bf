"""The settings of a run: new, resumed, or continuing another, from options and files."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from retain.config import RunConfig, names_of, read_config, read_settings, validate
from retain.errors import ConfigError, unknown
from retain.retention.bounds import check_confidence
from retain.runs.months import HELD, previous_run
from retain.runs.named import OWN, check_named, check_same_names
from retain.runs.records import RUN

__all__ = ["OPTIONS", "Settings", "by_key", "placed", "placed_model", "read_run", "unused"]

Settings = RunConfig | Mapping[str, Any] | str | Path | None
"""Settings of a run: themselves, a YAML file, or none."""

OPTIONS = {
    key.rpartition(".")[2] if key != "adapter.seed" else "adapter_seed": key
    for key in (
        "model", "data", "out", "curvature", "source", "factor_rank", "num_labels", "strength",
        "budget", "confidence", "training.update", "kl", "parts", "continue_from", "keep_state",
        "method", "training.learning_rate", "training.epochs", "training.max_steps",
        "training.batch_size", "training.max_length", "adapter.rank",
        "adapter.alpha", "adapter.targets", "adapter.seed", "training.seed", "dtype", "limit",
        "loss", "training.save_steps", "trust_remote_code",
    )
}  # fmt: skip
"""Options of ``retain train``, which are arguments of `retain.train_run` too, and their keys."""

_FREE = {"training.save_steps", "training.report_to", "out"}
"""May be others when a run is resumed."""

_NAMED = {"budget", "source"}
"""May be by name."""

_OF_METHODS = ("curvature", "source", "budget", "confidence", "parts", "kl")
"""Nothing without a method."""

_PLACES = {"model", "data", "curvature", "continue_from"}
"""May lie elsewhere when a run is resumed: the checkpoint's digests tell whether they changed."""


def by_key(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, from those by option or by field of `RunConfig`.

    Raises:
        ConfigError: neither.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in OPTIONS and name not in RunConfig.model_fields:
            raise unknown("setting", name, OPTIONS.keys() | RunConfig.model_fields)
        key = OPTIONS.get(name, name)
        found |= flat({key: str(value) if isinstance(value, Path) else value})
    return found


def read_run(config: Settings, given: Mapping[str, Any], *, resume: bool = False) -> RunConfig:
    """The checked settings of a run; those in `given`, by dotted key, come first.

    With `resume` they must be those of the run in the output folder.

    Raises:
        ConfigError: they are not accepted, or not those of the run to resume or continue.
    """
    if isinstance(config, RunConfig):
        config = config.model_dump(exclude_unset=True)
    found = _read_run(config, given, resume)
    check_named(found)
    if found.method != "none":
        check_confidence(found.confidence, found.budget)
    return found


def _read_run(
    config: Mapping[str, Any] | str | Path | None, given: Mapping[str, Any], resume: bool
) -> RunConfig:
    if resume:
        return _resumed(config, given)
    found = read_settings(config or "", given)
    if found.get("continue_from") is None:
        return validate(found, RunConfig)
    return _continued(flat(found), str(found["continue_from"]))


def _resumed(config: Mapping[str, Any] | str | Path | None, given: Mapping[str, Any]) -> RunConfig:
    out = given.get("out")
    if out is None and config is not None:
        out = read_config(config, given, RunConfig).out
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
    now = read_config(config or kept, {**given, "out": out}, RunConfig)
    was, new = (flat(_with_sources(one).model_dump()) for one in (before, now))
    for key in sorted(was.keys() - _FREE):
        moved = key in _PLACES and None not in (was[key], new[key])
        moved = moved or (key == "source" and _same_sources(before, now))
        if was[key] != new[key] and not moved:
            raise ConfigError(
                f"the run to resume has another {key}",
                got="none" if new[key] is None else new[key],
                allowed="none" if was[key] is None else was[key],
                fix="leave it as it was, or start again with --overwrite",
            )
    return now.model_copy(update={"budget": before.budget})  # its names in their order


def _continued(given: dict[str, Any], folder: str) -> RunConfig:
    """The settings that are given, with the model and the adapter of the earlier run.

    How it was held (`HELD`) goes on too, unless something else is given: a strength and a budget
    take each other's place. The model may lie elsewhere now; that it is the same is told by its
    fingerprint. So may a source that is not at its place any more.
    """
    before = previous_run(folder).settings
    mine = {"dtype": before.dtype, **flat({"adapter": before.adapter.model_dump()})}
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
    held = {name: attrgetter(name)(before) for name in HELD if before.method != "none"}
    if given.get("strength") is not None:
        del held["budget"], held["confidence"]
    elif (given.get("budget") or before.budget) is not None:
        del held["strength"]
    if given.get("curvature") is not None:
        raise _of_its_own("curvature", given)
    held |= {"model": before.model, "num_labels": before.num_labels}
    said = {name: value for name, value in given.items() if value is not None}
    found = read_config("", held | said | mine | {"keep_state": True}, RunConfig)
    # Where none was told, a budget or a KL may be measured on one that is given now.
    measures = any(given.get(name) or held.get(name) for name in ("budget", "kl"))
    new = before.source is None and not names_of(before.budget)
    may = measures and (new or _same_sources(before, found))
    if given.get("source") is not None and not may:
        raise _of_its_own("source", given)
    check_same_names(before, found)
    return found


def _of_its_own(name: str, given: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        "the run to continue from has a curvature of its own",
        got=f"{name} {given[name]}",
        allowed="none",
        fix=f"leave {name} out",
    )


def _same_sources(before: RunConfig, now: RunConfig) -> bool:
    """Whether the sources are those of a run before, or lie elsewhere now.

    That is where nothing is at their place any more. What is measured on other text than it was is
    told of later (`Recipe.other_texts`), as of a file that was rewritten.
    """
    old, new = (_sources(_with_sources(one)) for one in (before, now))
    return old.keys() == new.keys() and all(
        text == new[name] or (new[name] != OWN and _is_gone(text)) for name, text in old.items()
    )


def _is_gone(text: str) -> bool:
    """Whether nothing is at a source's absolute path, as `placed` gives it."""
    path = Path(text)
    return path.is_absolute() and not path.exists() and not glob.glob(text, recursive=True)


def _sources(config: RunConfig) -> dict[str, str]:
    """Texts of sources by name; of one without names under ``""``."""
    source = {} if config.source is None else config.source
    return {"": source} if isinstance(source, str) else dict(source)


def placed(config: RunConfig) -> RunConfig:
    """The settings with absolute paths, so that they hold wherever a later command is started.

    A name that is no path here stays: of a built-in model, of the hub, or ``word-problems``.
    """
    found = {"model": placed_model(config.model)}
    for key in ("data", "curvature", "continue_from"):
        if (name := getattr(config, key)) is not None:
            found[key] = _place(name)
    return _with_sources(config.model_copy(update=found))


def placed_model(name: str) -> str:
    """A model's name as `placed` gives it."""
    from retain.models.builtin import BUILTIN

    return name if name in BUILTIN else _place(name)


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _with_sources(config: RunConfig) -> RunConfig:
    """The settings with absolute paths of sources, which later months read too."""
    if config.source is None:
        return config
    found = {n: text if text == OWN else _place(text) for n, text in _sources(config).items()}
    return config.model_copy(update={"source": found.get("", found)})


def unused(config: RunConfig) -> list[str]:
    """Lines for settings that a run of this kind does not read."""
    lines = []
    if config.method == "none":
        given = [n for n in _OF_METHODS if getattr(config, n)]
        lines += [f"method none holds nothing: not used: {', '.join(given)}"] if given else []
    acts = config.strength or config.budget is not None or config.kl
    if config.method != "none" and not acts and not {"rows", "filter"} & {*(config.parts or ())}:
        lines.append("strength 0 holds nothing: this is plain training")
    measures = config.budget is not None or bool(config.kl)
    if config.method != "none" and config.curvature and config.source and not measures:
        lines.append(f"a curvature is given: source {config.source} is not used")
    made = config.curvature is None and config.continue_from is None and config.method != "none"
    if config.factor_rank != RunConfig.model_fields["factor_rank"].default and not made:
        lines.append(
            f"no curvature of the source is measured: factor_rank {config.factor_rank} is not used"
        )
    return lines


def flat(tree: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; budgets and sources by name are one value each."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and key not in _NAMED
        found |= flat(value, f"{head}{key}.") if nested else {f"{head}{key}": value}
    return found
