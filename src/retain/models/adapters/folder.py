"""Adapters that PEFT does not know, on disk: laid out as PEFT's, written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from retain.config import validate
from retain.documents import read_json
from retain.errors import ConfigError, ModelError
from retain.files import whole_folder
from retain.models.adapters.base import Options, new_heads
from retain.models.fingerprint import fingerprint
from retain.models.saved import FILES

__all__ = [
    "check_base",
    "read_config",
    "read_options",
    "read_tensors",
    "refused",
    "same_base",
    "write_adapter",
]

Kind = TypeVar("Kind", bound=Options)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def write_adapter(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes a configuration and tensors under the names that PEFT gives its own.

    Args:
        folder: where they are to be; an older one stays until the new one is whole.
        config: with ``peft_type`` and ``base_model_name_or_path``.
        tensors: by their names in the base model.

    Raises:
        OutputError: the place cannot be written.
    """
    from safetensors.torch import save_file

    named = {PREFIX + n: t.detach().contiguous() for n, t in tensors.items()}
    with whole_folder(folder, "the adapter", FILES) as new:
        save_file(named, new / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
        (new / CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """The configuration of an adapter on disk; reads no weights.

    Args:
        folder: of the adapter.
        kind: its ``peft_type``.

    Raises:
        ModelError: there is none, it is damaged, of another kind, or a pickle.
    """
    folder = folder.expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise refused("the folder holds no adapter", f"{folder} without {name}", kind)
    try:
        config = read_json(folder / CONFIG)
        found = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{folder / CONFIG} ({type(error).__name__}: {error})"
        raise refused("the adapter is damaged", why, kind) from error
    if found != kind:
        raise refused("the adapter is of another kind", found, kind)
    return dict(config)


def read_tensors(folder: Path, kind: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter on disk, by their names in the base model.

    Args:
        folder: of the adapter.
        kind: its ``peft_type``.
        wanted: what there must be, with its shapes.

    Raises:
        ModelError: they are damaged, or of other names or shapes than wanted.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded = load_file(folder.expanduser() / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise refused("the adapter is damaged", f"{folder} ({error})", kind) from error
    found = {n.removeprefix(PREFIX): t for n, t in loaded.items()}
    odd = sorted(
        n
        for n in {*found, *wanted}
        if n not in found or n not in wanted or found[n].shape != wanted[n].shape
    )
    if odd:
        what = f"{folder} ({len(odd)} weights differ, such as {odd[0]})"
        raise refused("the adapter does not fit the model", what, kind)
    return found


def read_options(config: dict[str, Any], schema: type[Kind], folder: Path) -> Kind:
    """The options that an adapter on disk was attached with.

    Raises:
        ModelError: they are damaged.
    """
    try:
        return validate({n: config[n] for n in schema.model_fields if n in config}, schema)
    except ConfigError as error:
        raise refused(
            "the adapter is damaged", f"{folder} ({error})", config["peft_type"]
        ) from error


def check_base(base: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Refuses an adapter on disk that was trained on another base model.

    Raises:
        ModelError: it was.
    """
    if config.get("base_fingerprint") != same_base(base):
        name = f"{folder}, trained on {config.get('base_model_name_or_path')}"
        raise refused("the adapter belongs to another base model", name, config["peft_type"])


def same_base(base: nn.Module) -> str:
    """The `fingerprint` of a base model without a new head, which each loading draws anew."""
    heads = new_heads(base)
    rest = {n: m for n, m in base.named_children() if n not in heads}
    return fingerprint(nn.ModuleDict(rest))


def refused(what: str, got: object, kind: str) -> ModelError:
    """The error of a folder that cannot be loaded."""
    return ModelError(
        what,
        got=got,
        allowed=f"an adapter of the kind {kind} for this base model: {CONFIG} and {WEIGHTS}",
        fix="give a folder that the same kind of adapter wrote for the same base model",
    )
