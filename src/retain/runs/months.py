"""``retain train --continue-from RUN``: what one run leaves for the next, and takes from the last.

A run with ``--keep-state`` leaves ``state/`` in its folder: ``source.safetensors`` (the curvature
of the source text around the base model, which never changes; with named budgets
``source-NAME.safetensors`` of each), ``past.safetensors`` (that of all
tasks so far, merged, around the weights that the run ended with), of a classifier
``head.safetensors`` (its head before any training, a part of the base) and ``state.json``, with
digests of these and of the adapter. The next run starts at the adapter, is held by both, and leaves
the same files: however many months, the memory is that of two curvatures. Where the base model and
the folders lie does not count: the base is told by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retain.config import RunConfig, read_config
from retain.errors import ConfigError, MismatchError
from retain.files import file_digest, whole_folder
from retain.models.saved import adapter_digest
from retain.runs.folders import STATE, by_file
from retain.runs.messages import Messages
from retain.runs.named import budget_names
from retain.runs.records import (
    RUN,
    TRAIN,
    Labels,
    Month,
    StateRecord,
    TrainRecord,
    read_record,
    why_unread,
    write_record,
)

__all__ = ["HELD", "Previous", "keep_state", "previous_run"]

HELD = (
    "method", "strength", "budget", "confidence", "training.update", "source", "parts", "kl",
    "gain", "weight", "max_rank",
)  # fmt: skip
"""What a run that continues another has from it; the source, which may be given where there was
none, is what a budget or a KL, which may be new, is measured on."""

_KEPT = "the --out of a run with --keep-state that has ended"


@dataclass(frozen=True)
class Previous:
    """What an earlier run has left.

    Attributes:
        folder: of the run.
        state: its record.
        settings: of the run.
    """

    folder: Path
    state: StateRecord
    settings: RunConfig

    @property
    def adapter(self) -> Path:
        """Its adapter."""
        return self.folder / "adapter"

    @property
    def sources(self) -> dict[str, Path]:
        """The files of the source texts' curvatures, by name; of one without names under ``""``."""
        place, names = self.folder / "state", budget_names(self.settings)
        return {name: place / by_file("source", name) for name in names}

    @property
    def past(self) -> Path:
        """The file of the earlier tasks' curvature."""
        return self.folder / "state" / "past.safetensors"

    @property
    def labels(self) -> Labels | None:
        """Of a classifier."""
        return self.state.labels

    def digest(self, path: Path) -> str:
        """Of one of the files above, which `previous_run` found to be what the run left."""
        return self.state.digests.get(path.name) or file_digest(path)

    def curvatures(self) -> tuple[dict[str, Any], Any]:
        """Those of the source texts, as in `sources`, and of the earlier tasks, read."""
        from retain.curvature.curvature import load_curvature

        found = {name: load_curvature(path) for name, path in self.sources.items()}
        return found, load_curvature(self.past)

    def restore_head(self, base: Any) -> None:
        """Puts the head that the first run began with into a classifier's base model."""
        import torch
        from safetensors.torch import load_file

        path = self.folder / "state" / "head.safetensors"
        tensors = load_file(path) if path.name in self.state.digests else {}
        parameters = dict(base.named_parameters())
        with torch.no_grad():
            for name, value in tensors.items():
                if name in parameters and parameters[name].shape == value.shape:
                    parameters[name].copy_(value)

    def check_base(self, base: Any, known: str, name: str) -> None:
        """Refuses another base model than that with the fingerprint `known`.

        Raises:
            MismatchError: it is another one.
        """
        from retain.models.fingerprint import fingerprint

        mine = fingerprint(base)
        if mine != known:
            raise MismatchError(
                "the model is not the base of the run to continue from",
                got=f"{name} with fingerprint {mine}",
                allowed=f"{known}, which {self.settings.model} had when {self.folder} was trained",
                fix="say with --model where that model lies now",
            )

    def check_adapter(self, model: Any, past: Any) -> None:
        """Refuses a state, with the curvature `past`, that is not of the adapter beside it.

        Raises:
            MismatchError: it was measured around other weights; or what `Curvature.bind` refuses.
        """
        if not past.at_anchor(past.bind(model)):
            raise MismatchError(
                "the state of the run to continue from is not that of its adapter",
                got=f"{self.past} around other weights than those in {self.adapter}",
                allowed="both of one run that ended",
                fix="train that run again with --keep-state",
            )


def previous_run(folder: str | Path) -> Previous:
    """What the run in a folder has left.

    Raises:
        ConfigError: it left no state.
        MismatchError: its state or its adapter has changed since.
    """
    run = Path(folder).expanduser()
    settings = _settings_of(run)
    try:
        found = Previous(run, read_record(run / "state" / "state.json", StateRecord), settings)
        parts = (found.adapter, *found.sources.values(), found.past)
        missing = [path.name for path in parts if not path.exists()]
        if missing:
            raise ValueError(f"no {' and '.join(missing)}")
        changed = _changed(found)
    except (OSError, ValueError, RecursionError) as error:
        what = f"{run}: {error}"
        if isinstance(error, OSError):
            what = f"{error.filename}: {error.strerror}"
        raise ConfigError(
            "there is nothing to continue from",
            got=what,
            allowed=_KEPT,
            fix="train that run again with --keep-state",
        ) from error
    if changed:
        raise MismatchError(
            "the run to continue from has changed since it ended",
            got=f"{' and '.join(changed)} with other contents",
            allowed="adapter/ and state/ as one run left them",
            fix="put back what they were, or train that run again with --keep-state",
        )
    return found


def _settings_of(run: Path) -> RunConfig:
    """The settings of an earlier run.

    Raises:
        ConfigError: there are none.
    """
    if not (run / RUN).is_file():
        around = (run.parent / RUN).is_file()
        raise ConfigError(
            "there is nothing to continue from",
            got=f"{run} without {RUN}",
            allowed=_KEPT,
            fix=f"did you mean {run.parent}?" if around else "check --continue-from",
        )
    # What takes this run's place writes its own settings when it begins, and may never end.
    ended = run / TRAIN
    if not ended.is_file():
        return read_config(run / RUN, {"out": str(run)}, RunConfig)
    try:
        told = read_record(ended, TrainRecord).config.model_dump(mode="json")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            "there is nothing to continue from", got=f"{ended}: {why_unread(error)}",
            allowed=_KEPT, fix="train that run again with --keep-state",
        ) from error  # fmt: skip
    return read_config(told, {"out": str(run)}, RunConfig)


def _changed(run: Previous) -> list[str]:
    """What is not as the run left it. The states of earlier versions have no digests."""
    found = []
    for name, digest in run.state.digests.items():
        path = run.adapter if name == "adapter" else run.folder / "state" / Path(name).name
        if (adapter_digest if name == "adapter" else file_digest)(path) != digest:
            found.append(str(path))
    return found


def keep_state(
    model: Any, examples: Sequence[Any], recipe: Any, out: Path, month: Month,
    before: Previous | None, labels: Labels | None, messages: Messages,
    write: Callable[[], None],
) -> Path:  # fmt: skip
    """Measures the task's curvature, merges it into the past, and writes ``state/`` whole.

    `write` writes the adapter and the record: at once, so that nothing which fails here loses them;
    but over an older state only when all that takes long is done, so that a stop leaves that state
    with its own adapter. Where a stop comes between, the state's digests tell.

    Raises:
        OutputError: the folder cannot be written.
    """
    from retain.retention.named import by_name

    over = (out / "state").exists()
    if not over:
        write()
    messages.say("measuring what the task relies on, for the runs that continue from this one")
    past = recipe.consolidate(model, examples, seed=month.seed, progress=messages.progress)
    with whole_folder(out / "state", "the state of the run", STATE) as new:
        past.save(new / "past.safetensors")
        for name, source in by_name(recipe.curvature).items():  # whatever their files are now
            source.save(new / by_file("source", name))
        _save_head(model, new / "head.safetensors")
        digests = {path.name: file_digest(path) for path in sorted(new.glob("*.safetensors"))}
        if over:
            write()
        digests["adapter"] = adapter_digest(out / "adapter")
        runs = [*(before.state.runs if before else []), month]
        record = StateRecord(runs=runs, digests=digests, labels=labels, texts=recipe.texts)
        write_record(new / "state.json", record, seal=True)
    return out / "state"


def _save_head(model: Any, path: Path) -> None:
    """The layers that PEFT trains whole, as they were in the base; no file where there are none."""
    from peft.utils.other import ModulesToSaveWrapper
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key, value in module.original_module.state_dict().items()
    }
    if tensors:
        save_file(tensors, path)
