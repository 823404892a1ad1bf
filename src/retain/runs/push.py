"""An adapter or a curvature to the hub: a list of what may leave, and nothing beside it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from retain.curvature.curvature import Curvature, load_curvature
from retain.documents import read_json
from retain.errors import ConfigError, ModelError, OutputError, shown
from retain.files import file_digest
from retain.models.builtin import BUILTIN, offline
from retain.models.cards import (
    CARD,
    fresh_card,
    hub_name,
    is_repo,
    plain_name,
    read_card,
    section,
    with_base,
    with_section,
)
from retain.models.saved import FILES, HEAD, check_adapter, refused
from retain.retention.facts import source_of

__all__ = ["CURVATURE", "LEAVES", "Pushed", "push_to_hub"]

CURVATURE = "curvature.safetensors"
"""What a curvature is called on the hub."""

LEAVES = (
    *FILES, CARD, HEAD, "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
"""Files of an adapter's folder that may leave."""

_BASE = "base_model_name_or_path"

_PLACES = (_BASE, "_name_or_path", "name_or_path", "tokenizer_file")
"""Keys of a configuration under which a path of this machine may stand."""


class Pushed(NamedTuple):
    """Where something was pushed to, and the files that left.

    Attributes:
        url: of the repository.
        files: their names there.
    """

    url: str
    files: tuple[str, ...]


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    base_model: str | None = None,
    leave_others: bool = False,
) -> Pushed:
    """Puts an adapter or a curvature into a repository of the Hugging Face hub, in one commit.

    Of an adapter's folder the files in `LEAVES` go: configuration, weights, model card, tokenizer.
    Of a curvature the file goes, with a card that says what it is of: means over its source text,
    no rows; around a later anchor those weights too. What goes names no path of this machine, and
    takes the place of files of the same name there.

    Args:
        path: the folder of a LoRA adapter, or the file of a curvature.
        repo_id: ``user/name``; it is made where there is none.
        private: of a repository that is made; one that is there stays as it is.
        token: of the hub; by default that of ``hf auth login`` or of ``HF_TOKEN``.
        base_model: what the hub calls the base model, where the adapter knows a folder alone.
        leave_others: other files of the folder stay here; by default a folder that holds any is
            refused: pickles, rows, records, checkpoints.

    Raises:
        ConfigError: the hub is switched off, no such name, other files in the folder, or a base
            model that nobody else has.
        ModelError, ArtifactError: no sound adapter or curvature.
        OutputError: the hub does not take it, or the model card is damaged.
    """
    if offline():
        raise ConfigError(
            "the hub is switched off", got="HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE or RETAIN_OFFLINE",
            allowed="a machine that may reach it", fix="unset it, where you mean to push",
        )  # fmt: skip
    for name in filter(None, (repo_id, base_model)):
        if not is_repo(name):
            raise ConfigError(
                "no name of a repository", got=shown(name), allowed="user/name",
                fix="push_to_hub(path, 'user/name', base_model='org/base')",
            )  # fmt: skip
    if base_model in BUILTIN:
        base_model = BUILTIN[base_model].hub
    path = Path(path).expanduser()
    with tempfile.TemporaryDirectory() as scratch:
        if path.is_dir():
            files = _adapter(path, base_model, leave_others)
        else:
            files = _curvature(path, base_model, Path(scratch))
        return _commit(files, repo_id, private, token)


def _adapter(folder: Path, base_model: str | None, leave_others: bool) -> dict[str, Any]:
    """What of an adapter leaves: name -> file, or bytes in its place."""
    config = check_adapter(folder)
    try:
        with safe_open(folder / FILES[1], framework="pt"):
            pass  # it is what its name says
    except (OSError, SafetensorError) as error:
        raise refused("the adapter is damaged", f"{folder} ({error})") from error
    others = sorted(
        p.name for p in folder.iterdir() if p.name not in LEAVES and not p.name.startswith(".")
    )
    if others and not leave_others:
        raise ConfigError(
            "the folder holds files that are not to leave", got=", ".join(others),
            allowed=", ".join(LEAVES), fix="leave_others=True pushes what is allowed alone",
        )  # fmt: skip
    given = str(config.get(_BASE) or "")
    base = base_model or hub_name(given)
    if base is None:
        raise ConfigError(
            "nobody else has the adapter's base model", got=f"a folder called {plain_name(given)}",
            allowed="a model of the hub", fix="push_to_hub(..., base_model='org/name')",
        )  # fmt: skip
    found: dict[str, Any] = {}
    for path in (folder / name for name in LEAVES if (folder / name).is_file()):
        found[path.name] = path
        if path.name.endswith("config.json"):
            found[path.name] = _placeless(path, base)
    card = with_base(read_card(folder / CARD), base) or fresh_card(base)
    return found | {CARD: card.encode()}


def _placeless(path: Path, base: str) -> Path | bytes:
    """A configuration without paths of this machine; that of an adapter names the base."""
    try:
        config = dict(read_json(path))
    except (TypeError, OSError, ValueError) as error:
        raise ModelError(
            "a configuration is damaged", got=f"{path}: {error}", allowed="an object of JSON",
            fix="save the adapter again",
        ) from error  # fmt: skip
    kept = {
        key: value for key, value in config.items()
        if not (key in _PLACES and isinstance(value, str) and hub_name(value) is None)
    }  # fmt: skip
    if path.name == FILES[0]:
        kept[_BASE] = base
    return path if kept == config else (json.dumps(kept, indent=2, sort_keys=True) + "\n").encode()


def _curvature(path: Path, base_model: str | None, scratch: Path) -> dict[str, Any]:
    """The same of a curvature; where that names its source's path, of a copy that does not."""
    found = load_curvature(path)
    info = found.info
    note = " + ".join(plain_name(part) if part else "" for part in info.note.split(" + "))
    if note != info.note:
        found = Curvature(found.blocks, found.anchor, replace(info, note=note), found.links)
        path = found.save(scratch / CURVATURE)
    facts = {
        "Base model": f"{base_model or 'not named'}, fingerprint `{info.model}`",
        "Source text": source_of(info),
        "Of": f"{len(info.sites)} layers, in {info.space} space"
        f"{', with the weights that it is around' if found.anchor else ''}",
        "Size": f"{found.memory() / 2**20:.1f} MiB",
        "SHA-256": f"`{file_digest(path)}`",
        "Read it": f'`retain.load_curvature(hf_hub_download(repo, "{CURVATURE}"))`',
    }
    card = fresh_card(base_model or "", library="retain")
    return {
        CURVATURE: path,
        CARD: with_section(card, section(facts, "What a model relies on: a curvature")).encode(),
    }


def _commit(files: dict[str, Any], repo_id: str, private: bool, token: str | None) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        added = [CommitOperationAdd(name, file) for name, file in sorted(files.items())]
        api.create_commit(repo.repo_id, added, commit_message="Pushed by retain")
    except Exception as error:  # of the hub's client, and of the one below it
        text = f"{type(error).__name__}: {error}"
        raise OutputError(
            "the hub does not take it", got=" ".join(text.split())[:300],
            allowed="a repository that you may write to",
            fix="hf auth login, or token=...; then push again",
        ) from error  # fmt: skip
    return Pushed(str(repo), tuple(sorted(files)))
