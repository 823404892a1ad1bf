"""Adapters on disk: plain PEFT folders, read with safetensors only and written whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.documents import read_json
from retain.errors import ModelError
from retain.files import file_digest, whole_folder

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["FILES", "adapter_digest", "check_adapter", "load_adapter", "save_adapter"]

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

FILES = (_CONFIG, _WEIGHTS)
"""What an adapter's folder holds; anything else in it is somebody else's."""

HEAD = "config.json"
"""Beside a classifier's adapter: the model's configuration, which names the classes of its head."""


def check_adapter(folder: Path) -> dict[str, Any]:
    """The configuration of the LoRA adapter in a folder; loads no weights.

    Raises:
        ModelError: there is none, it is damaged, or its weights are a pickle.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise _bad("no such adapter folder", folder)
    if not (folder / _CONFIG).is_file():
        inside = sorted(path.parent for path in folder.glob(f"*/{_CONFIG}"))
        raise _bad(
            "the folder holds no adapter", f"{folder} without {_CONFIG}", *map(str, inside[:1])
        )
    if not (folder / _WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise ModelError(
                "the adapter's weights are a pickle, which can run code when it is read",
                got=folder / _PICKLE,
                allowed=_WEIGHTS,
                fix="save it again with safetensors, where you trust it",
            )
        raise _bad("the folder holds no adapter", f"{folder} without {_WEIGHTS}")
    try:
        config = read_json(folder / _CONFIG)
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise _bad("the adapter is damaged", f"{folder / _CONFIG} ({reason})") from error
    if config.get("megatron_config") is not None:  # PEFT would import whatever it names
        raise _bad("the adapter is of another kind", "megatron_config, for tensor parallelism")
    if kind != "LORA":
        raise _bad("the adapter is of another kind", kind)
    return dict(config)


def load_adapter(model: Any, folder: Path) -> PeftModel:
    """Puts the adapter of a folder on a base model; it is not trainable.

    Weights of the base that the adapter brings along (embeddings, biases) or changes (PiSSA) are
    kept as they were, for `retain.models.off.adapter_off`.

    Raises:
        ModelError: it is missing or damaged, or belongs to another model or vocabulary.
    """
    folder = folder.expanduser()
    config = check_adapter(folder)
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    from retain.models.brought import check_vocabulary, keep_changed, weights_of

    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            found = set(file.keys())
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in found}
        check_vocabulary(model, shapes, folder)
        before = weights_of(model, found, config.get("init_lora_weights", True))
        peft = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
        missing = set(get_peft_model_state_dict(peft, save_embedding_layers=False)) - found
    except (OSError, SafetensorError) as error:
        raise _bad("the adapter is damaged", f"{folder} ({error})") from error
    except ModelError:
        raise
    except Exception as error:  # whatever PEFT makes of settings that others wrote
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise _misfit(f"{folder} ({text})") from error
    if missing:
        raise _misfit(f"{folder} without {len(missing)} weights, such as {min(missing)}")
    keep_changed(peft, before)
    return peft


def _bad(what: str, got: object, meant: str = "") -> ModelError:
    return ModelError(
        what,
        got=got,
        allowed=f"a LoRA adapter of this model: {_CONFIG} and {_WEIGHTS}",
        fix=f"did you mean {meant}?"
        if meant
        else "give the folder that peft's save_pretrained wrote, or adapter/ of a run",
    )


def _misfit(got: str) -> ModelError:
    return ModelError(
        "the adapter does not fit the model",
        got=got,
        allowed=f"a LoRA adapter of this model: {_CONFIG} and {_WEIGHTS}",
        fix="give the base model that it was trained on (--model on the command line)",
    )


def save_adapter(model: PeftModel, folder: Path, base: str) -> Path:
    """Writes a plain PEFT adapter; an older one stays until the new one is whole.

    A classifier's comes with its head, and with the configuration that names its classes.

    Other files in the folder stay.

    Args:
        model: the model with its adapter.
        folder: where it is to be.
        base: the name of the base model that the adapter records.

    Raises:
        OutputError: the place cannot be written, or the disk is full.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    head = any(config.task_type == "SEQ_CLS" for config in model.peft_config.values())
    with whole_folder(folder, "the adapter", (*FILES, *([HEAD] if head else []))) as new:
        model.save_pretrained(str(new), save_embedding_layers=False)
        if head:
            inner: Any = model.get_base_model()
            inner.config.architectures = [type(inner).__name__]
            inner.config.to_json_file(new / HEAD)
        (new / "README.md").unlink(missing_ok=True)  # PEFT's empty form, with paths of this machine
        _sort_sets(new / _CONFIG)
    return folder


def _sort_sets(path: Path) -> None:
    """Puts what PEFT holds as a set, and writes in any order, in one order: the same bytes."""
    config = read_json(path)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def adapter_digest(folder: Path) -> str:
    """What tells the adapter in a folder from another: its weights and its settings.

    The name of the base model is none of them: the base may have moved.

    Raises:
        OSError: a file cannot be read.
        ValueError: the configuration is damaged.
    """
    config = read_json(folder / _CONFIG)
    settings = {k: v for k, v in config.items() if k != "base_model_name_or_path"}
    text = json.dumps(settings, sort_keys=True) + file_digest(folder / _WEIGHTS)
    return hashlib.sha256(text.encode()).hexdigest()
