"""What a callback keeps in a checkpoint: in the trainer's own state, which the trainer reads back.

`transformers` keeps ``stateful_callbacks`` in ``trainer_state.json``, and loads it from the
checkpoint that is resumed, wherever that lies. A callback that is an ``ExportableState`` would be
made anew from it where ``restore_callback_states_from_checkpoint`` is set, without its curvature;
so this is an entry of our own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState

from retain.errors import RetainWarning, TrainingError
from retain.files import whole_file

__all__ = ["TENSORS", "keep", "keep_tensors", "kept_in", "kept_tensors"]

TENSORS = "filtered.safetensors"
"""What is kept beside a filtered A, by layer: in a checkpoint whose A is rounded (bfloat16), or
moved by proximal steps."""

_ENTRY = "retain"
_NUMBERS = ("first", "steps", "strength", "correction", "looks")


def keep(state: TrainerState, kept: dict[str, Any]) -> None:
    """Puts plain data into the trainer's state, with the step that they are of."""
    entries: Any = state.stateful_callbacks
    entries[_ENTRY] = {"step": state.global_step, **kept}


def keep_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes what a checkpoint keeps as tensors; nothing where there is none.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    if tensors and not folder.is_dir():  # of a trainer that saves at a place of its own
        warnings.warn(
            f"the checkpoint is not in {folder.parent}: what is kept beside a filtered A (bits that"
            " bfloat16 cannot hold, or what it was before a proximal step) is not written, so a"
            " training that is resumed from it goes on from A itself",
            RetainWarning,
            stacklevel=2,
        )
    elif tensors:
        with whole_file(folder / TENSORS, "a checkpoint") as scratch:
            save_file({name: t.detach().cpu() for name, t in tensors.items()}, scratch)


def kept_tensors(folder: Path | None) -> dict[str, Tensor]:
    """What `keep_tensors` wrote, nothing where there is none; `TrainingError` if it is damaged."""
    if folder is None or not (folder / TENSORS).is_file():
        return {}
    try:
        return load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            "the checkpoint is damaged",
            got=f"{folder / TENSORS} ({error})",
            allowed="as it was written",
            fix="resume from another one; or remove that file, to go on from the rounded adapter",
        ) from error


def kept_in(state: TrainerState, needed: bool) -> dict[str, Any]:
    """What the checkpoint that is resumed holds, which a run may have `needed` to go on.

    Raises:
        TrainingError: it holds nothing, or what is no state of ours, and it is needed.
    """
    entries: Any = state.stateful_callbacks
    found, where = entries.get(_ENTRY), "trainer_state.json"
    if found is None:
        why = f"nothing of it in {where}"
    elif found.get("step") != state.global_step:  # what it holds is of a checkpoint before
        why = f"steps {found.get('step')} to {state.global_step} were trained without the callback"
    elif not all(map(_sound, _parts(found))):
        why = f"damaged values in {where}"
    else:
        named = found.get("start")  # before 0.2
        return {"filter": named == "wiener"} | dict(found)
    if needed:
        raise TrainingError(
            "the checkpoint does not say how it was held",
            got=why,
            allowed="a checkpoint of a run with this callback, at any place",
            fix="resume from another one; parts=('force',) with a strength, and without a budget, "
            "goes on with the force alone",
        )
    return {}


def _parts(found: dict[str, Any]) -> list[object]:
    """What is kept, and of each named budget."""
    named = found.get("budgets", {})
    return [found, *(named.values() if isinstance(named, dict) else [named])]


def _sound(part: object) -> bool:
    return isinstance(part, dict) and all(_is_number(part.get(name, 0)) for name in _NUMBERS)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
