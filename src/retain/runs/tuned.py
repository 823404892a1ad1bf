"""What commands share that take a finished adapter: it on its base, and text to measure it on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from retain.config import Measured
from retain.documents import read_json
from retain.errors import ConfigError, MismatchError, ModelError
from retain.files import check_folder
from retain.runs.bases import load_base
from retain.runs.messages import Messages
from retain.runs.records import TRAIN, TrainRecord, read_record

__all__ = [
    "check_base", "check_finite", "load_tuned", "name_of", "own_text", "place_for", "source_rows",
    "text_rows",
]  # fmt: skip


def name_of(folder: Path) -> str:
    """What to call an adapter: its folder, or the folder above where that is ``adapter``."""
    place = folder.expanduser().resolve()
    return (place.parent.name if place.name == "adapter" else "") or place.name or "adapter"


def load_tuned(
    name: str, adapter: Path, config: Any, messages: Messages
) -> tuple[Any, Any, TrainRecord | None]:
    """An adapter on its base, the tokenizer, and what `check_base` says of them."""
    from retain.models.saved import load_adapter

    base, tokenizer, _ = load_base(
        name, None if config.model else "the adapter", dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    tuned = load_adapter(base, adapter)
    return tuned, tokenizer, check_base(tuned, adapter, messages)


def check_base(model: Any, adapter: Path, messages: Messages) -> TrainRecord | None:
    """Refuses a model under an adapter that is not its base, by the record beside the adapter.

    Returns:
        That record, where it is of a run of ``retain train``.

    Raises:
        MismatchError: it is another model.
    """
    from retain.models.fingerprint import fingerprint

    record, beside = None, adapter.expanduser().resolve().parent
    try:
        record = read_record(beside / TRAIN, TrainRecord)
        known: tuple[str, str] | None = (record.model.fingerprint, record.model.name)
    except (OSError, ValueError, RecursionError):
        known = _base_of_made(beside)
    if known is None:
        messages.note(
            "no train.json beside the adapter: that this is its base model is not checked"
        )
    elif (mine := fingerprint(model)) != known[0]:
        raise MismatchError(
            "the adapter was trained on another base model",
            got=f"a model with fingerprint {mine}",
            allowed=f"{known[0]} ({known[1]})",
            fix="give that model (--model; of retain fit the first argument)",
        )
    return record


def _base_of_made(folder: Path) -> tuple[str, str] | None:
    """The fingerprint and the name of the base of an adapter that was made of another one."""
    for command in ("soften", "compact"):
        try:
            found = read_json(folder / f"{command}.json")
            if found["schema"] == f"retain.{command}/1" and found["model"]["fingerprint"]:
                return str(found["model"]["fingerprint"]), str(found["model"]["name"])
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            continue
    return None


def place_for(config: Any, adapter: Path) -> Path:
    """The folder in which an adapter made of another one is to lie, beside what was measured.

    Raises:
        ConfigError: text to measure on and nothing measured, or the place of the adapter itself.
        OutputError: it is no folder, or cannot be written.
    """
    if config.source is not None and not config.measure:
        raise ConfigError(
            "--source is the text to measure on, and nothing is measured",
            got="--source without --measure", allowed="both or none", fix="add --measure",
        )  # fmt: skip
    out: Path = config.out.expanduser()
    if (out / "adapter").resolve() == adapter.resolve():
        raise ConfigError(
            "the output would take the place of the adapter",
            got=out, allowed="another folder", fix="choose another --out",
        )  # fmt: skip
    return check_folder(out)


def source_rows(config: Measured, source: str | None) -> Any:
    """Rows to measure on, as they are read before any model is loaded; None without a source."""
    from retain.data.draws import HELD_OUT
    from retain.data.sources import read_rows

    if source is None:
        return None
    seed = HELD_OUT + config.seed
    return read_rows(source, config.rows, seed=seed, max_length=config.max_length)


def own_text(model: Any, tokenizer: Any, config: Measured, messages: Messages) -> list[Any]:
    """Text that the base model writes, other than what ``retain fit`` reads with that seed."""
    from retain.data.draws import HELD_OUT
    from retain.models.generating import sample_rows

    messages.say("the base model writes the text that forgetting is measured on")
    return sample_rows(
        model, tokenizer, count=config.rows, max_length=config.max_length,
        seed=HELD_OUT + config.seed, half="held-out", progress=messages.progress,
    )  # fmt: skip


def text_rows(
    model: Any, tokenizer: Any, rows: Any, config: Measured, messages: Messages
) -> list[Any]:
    """Tokenised rows to measure on, as `retain.measure_forgetting` draws them; or `own_text`."""
    from retain.data.draws import HELD_OUT
    from retain.models.view import ModelView

    if rows is None:
        rows = own_text(model, tokenizer, config, messages)
    view, draw = ModelView(model, tokenizer), HELD_OUT + config.seed
    labels = not view.regression
    return view.read(rows, config.rows, max_length=config.max_length, seed=draw, labels=labels)


def check_finite(kl: float) -> None:
    """Raises `ModelError` unless a measured KL is a number that a report can show."""
    if not math.isfinite(kl):
        raise ModelError(
            "the model's predictions are not finite",
            got=f"a KL of {kl}",
            allowed="finite numbers",
            fix="check the adapter and the base, or use --dtype float32",
        )
