"""``retain train`` from Python: `train_run`, `continue_run`, and what both do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retain.errors import ConfigError
from retain.files import check_folder, first_rank, locked
from retain.runs import checkpoints
from retain.runs.folders import by_file, check_run
from retain.runs.messages import Interrupted, Messages
from retain.runs.named import budget_names
from retain.runs.records import TRAIN
from retain.runs.settings import Settings, by_key, read_run
from retain.runs.training import RunResult, Training

__all__ = ["RunResult", "continue_run", "run_training", "train_run"]


def train_run(
    config: Settings = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    quiet: bool = False,
    **settings: Any,
) -> RunResult:
    """Learns a task with a LoRA adapter, and forgets little: ``retain train``, file for file.

    Writes ``adapter/`` (plain PEFT), ``run.json`` (the settings), ``train.json`` (the record), with
    ``save_steps`` ``checkpoints/``, and with ``keep_state`` ``state/`` into the output folder. Each
    of them is there whole or not at all.

    Args:
        config: a `RunConfig`, a mapping of its fields, a YAML file, or nothing.
        resume: go on from the last whole checkpoint in the output folder; a run without one that
            has ended is left as it is.
        overwrite: remove an earlier run's checkpoints there, and let its state be replaced.
        progress: show bars.
        quiet: print nothing.
        **settings: come before those of `config`: the options of ``retain train`` with underscores
            (``model``, ``data``, ``out``, ``budget`` in nats per source token, or by name
            as ``{"facts": 0.02}``, ``rank``, ``learning_rate``, ``seed``, ...), and the fields of
            `RunConfig`, such as ``training={"warmup": 10}``.

    Returns:
        The folder and the record. Under ``torchrun`` the first process alone writes.

    Raises:
        ConfigError: a setting that is unknown or not accepted; leftovers of an earlier run.
        SourceError: rows that cannot be read or learned.
        ModelError: a model that cannot be loaded.
        CurvatureError: a curvature that is damaged, or of another model or adapter.
        TrainingError: a loss that is not finite.
        OutputError: a folder that cannot be written, is locked, or holds what others wrote.
        KeyboardInterrupt: Ctrl-C; its text says what stays usable.
    """
    messages = Messages(quiet=quiet, progress=progress)
    with messages.listening():
        return run_training(config, by_key(settings), messages, resume=resume, overwrite=overwrite)


def continue_run(folder: str | Path, config: Settings = None, **settings: Any) -> RunResult:
    """Goes on with the adapter of an earlier run: ``retain train --continue-from``.

    The model, the adapter's settings and what holds it are those of the earlier run, whose tasks
    are kept too, within its budget. The earlier run must have kept its state (``keep_state=True``);
    this one keeps its own.

    Args:
        folder: of the earlier run.
        config: see `train_run`.
        **settings: see `train_run`; ``data`` and ``out`` at least.

    Raises:
        MismatchError: the earlier run has changed since it ended, or the base is another model.
        RetainError: see `train_run`.
    """
    return train_run(config, **{**settings, "continue_from": folder})


def run_training(
    config: Settings, given: dict[str, Any], messages: Messages, *, resume: bool, overwrite: bool
) -> RunResult:
    """`train_run` with settings by dotted key, and messages of the caller's."""
    if resume and overwrite:
        raise ConfigError(
            "--resume and --overwrite do not go together",
            got="both",
            allowed="one of them",
            fix="--resume goes on with a run, --overwrite starts it again",
        )
    settings = read_run(config, given, resume=resume)
    out = check_folder(Path(settings.out))
    before = settings.continue_from
    if before is not None and Path(before).expanduser().resolve() == out.resolve():
        raise ConfigError(
            "the run would take the place of the one that it continues from",
            got=f"--out {out}",
            allowed="another folder; a run that is stopped half-way would leave neither",
            fix="choose another --out",
        )
    kept = out / "checkpoints"
    own = settings.method != "none" and settings.curvature is None and before is None
    with locked(out):
        if first_rank():
            names = budget_names(settings) if own else ()
            check_run(out, curvatures=[by_file("curvature", name) for name in names])
        if not resume and not overwrite:
            checkpoints.refuse_leftovers(out, kept)
        if (out / TRAIN).is_file() and not resume:
            messages.say(f"{out} holds a finished run, whose place this one takes at its end")
        older = checkpoints.adapter_in(out)
        try:
            return Training(settings, messages, out, resume).run()
        except KeyboardInterrupt:
            raise Interrupted(checkpoints.usable(settings, kept, older)) from None
        finally:
            if first_rank():
                checkpoints.tidy(out, kept)
