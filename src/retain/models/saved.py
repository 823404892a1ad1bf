"""Adapters on disk: folders laid out as PEFT's, read with safetensors only and written whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from retain.documents import read_json
from retain.errors import ModelError
from retain.files import file_digest, whole_files, whole_folder
from retain.models.cards import (
    CARD,
    fresh_card,
    or_warned,
    plain_name,
    read_card,
    section,
    with_base,
    with_section,
)
from retain.models.plain_lora import as_plain, cannot_repeat

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

__all__ = [
    "FILES",
    "HEAD",
    "adapter_digest",
    "check_adapter",
    "load_adapter",
    "misfit",
    "read_tensors",
    "refused",
    "save_adapter",
    "too_wide",
    "undone",
    "write_tensors",
]

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."

FILES = (_CONFIG, _WEIGHTS)
"""What an adapter's folder holds; anything else in it is somebody else's."""

_SERVED = (16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` may be from its default on."""

HEAD = "config.json"
"""Beside a classifier's adapter: the model's configuration, which names the classes of its head."""


def check_adapter(folder: Path, kind: str = "LORA") -> dict[str, Any]:
    """The configuration of the adapter in a folder; loads no weights.

    Args:
        folder: of the adapter.
        kind: its ``peft_type``.

    Raises:
        ModelError: there is none, it is damaged, of another kind, or its weights are a pickle.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise refused("no such adapter folder", folder, kind)
    for name in FILES:
        if (folder / name).is_file():
            if not os.access(folder / name, os.R_OK):  # safetensors would say that there is none
                raise refused(
                    "the adapter may not be read", folder / name, kind,
                    fix=f"chmod u+r {quote(str(folder / name))}, or ask its owner",
                )  # fmt: skip
            continue
        if name == _WEIGHTS and (folder / _PICKLE).is_file():
            raise ModelError(
                "the adapter's weights are a pickle, which can run code when it is read",
                got=folder / _PICKLE,
                allowed=_WEIGHTS,
                fix="save it again with safetensors, where you trust it",
            )
        inside = sorted(path.parent for path in folder.glob(f"[!.]*/{_CONFIG}"))
        fix = f"did you mean {inside[0]}?" if inside else None
        raise refused("the folder holds no adapter", f"{folder} without {name}", kind, fix)
    try:
        config = read_json(folder / _CONFIG)
        found = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise refused("the adapter is damaged", f"{folder / _CONFIG} ({reason})", kind) from error
    if config.get("megatron_config") is not None:  # PEFT would import whatever it names
        found = "megatron_config, for tensor parallelism"
    if found != kind:
        raise refused("the adapter is of another kind", found, kind)
    return dict(config)


def load_adapter(model: Any, folder: Path) -> PeftModel:
    """Puts the LoRA adapter of a folder on a base model; it is not trainable.

    Weights of the base that the adapter brings along (embeddings, biases) or changes (PiSSA) are
    kept as they were, for `retain.models.off.adapter_off`. A base model whose adapter is refused is
    what it was.

    Raises:
        ModelError: it is missing or damaged, or belongs to another model or vocabulary; or it began
            in the base's weights as it cannot be made again, or cuts them (KaSA).
    """
    folder = folder.expanduser()
    config = check_adapter(folder)
    if cannot_repeat(config.get("init_lora_weights")):
        raise ModelError(
            "the adapter's start in the base's weights cannot be made again",
            got=f"{folder} with init_lora_weights={config['init_lora_weights']!r}",
            allowed="an adapter that PEFT loads as it was trained, such as plain LoRA",
            fix="save it from memory with retain.save_adapter, which writes it as plain LoRA where "
            "its curvature was fitted before training; or train it with init_lora_weights='pissa'",
        )
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    from retain.models.names import canonical
    from retain.models.off import BESIDE

    if config.get("kasa_config"):
        raise ModelError(
            "the adapter cuts the base's weights as the model runs",
            got=f"{folder} with kasa_config",
            allowed="an adapter beside a base that stays as it is",
            fix="train LoRA without kasa_config",
        )
    with undone(model) as before:
        try:
            with safe_open(folder / _WEIGHTS, framework="pt") as file:
                rows = {key: file.get_slice(key).get_shape()[:1] for key in file.keys()}  # noqa: SIM118
            _check_vocabulary(model, rows, folder)
            brought = {canonical(key) for key in rows}
            in_place = str(config.get("init_lora_weights", True)).lower() not in BESIDE
            before |= {
                name: p.detach().clone()
                for name, p in model.named_parameters()
                if in_place or canonical(name) in brought
            }
            peft = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
            missing = set(get_peft_model_state_dict(peft, save_embedding_layers=False)) - set(rows)
        except (OSError, SafetensorError) as error:
            raise refused("the adapter is damaged", f"{folder} ({error})") from error
        except ModelError:
            raise
        except Exception as error:  # whatever PEFT makes of settings that others wrote
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise misfit(f"{folder} ({text})") from error
        if missing:
            raise misfit(f"{folder} without {len(missing)} weights, such as {min(missing)}")
    now = {canonical(name): p for name, p in peft.named_parameters()}
    if all(name in now and now[name].shape == value.shape for name, value in before.items()):
        peft.retain_originals = [  # type: ignore[assignment]
            (now[name], value)
            for name, value in before.items()
            if not torch.equal(now[name].data, value.to(now[name].data))
        ]  # (4-bit weights that were packed anew are not there any more)
    return peft


@contextmanager
def undone(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Where putting an adapter on a model fails, the model is what it was.

    Yields:
        An empty dictionary. Copies of weights that may be written over, put into it by their names,
        are written back.
    """
    tree = [(m, m.training, dict(m._modules), dict(m._parameters)) for m in model.modules()]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    known, values = set(vars(model)), dict[str, Any]()
    try:
        yield values
    except BaseException:
        for module, mode, children, parameters in tree:
            module.training = mode
            for now, was in ((module._modules, children), (module._parameters, parameters)):
                now.clear()
                now.update(was)  # type: ignore[arg-type]
        for parameter, mode in trained:
            if parameter.requires_grad != mode:
                parameter.requires_grad_(mode)
        for name in {"peft_config", "retain_adapter"} & (set(vars(model)) - known):
            delattr(model, name)
        own = dict(model.named_parameters())
        for name, value in values.items():
            own[name].data.copy_(value)
        raise


def _check_vocabulary(model: Any, rows: Mapping[str, list[int]], folder: Path) -> None:
    """Refuses an adapter with embeddings of another vocabulary."""
    from retain.models.names import canonical

    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    ids = {id(t) for t in tables if t is not None}
    names = {f"{name}.weight" for name, module in model.named_modules() if id(module) in ids}
    own = {name: len(p) for name, p in model.named_parameters(remove_duplicate=False)
           if name in names}  # fmt: skip
    for key, size in rows.items():
        name = canonical(key)
        if name in own and size != [own[name]]:
            raise ModelError(
                "the vocabulary was resized before the adapter was trained",
                got=f"{folder} with {size[0]} tokens, a base with {own[name]}",
                allowed="an adapter of the base's own vocabulary",
                fix=f"in Python: model.resize_token_embeddings({size[0]}), "
                "retain.models.saved.load_adapter(model, folder), retain.measure_forgetting",
            )


def check_peft(model: object) -> None:
    """Refuses a model whose adapter PEFT does not know of, such as the base inside of it.

    Raises:
        ModelError: it is no PeftModel.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ModelError(
            "the model is no peft.PeftModel",
            got=type(model).__name__,
            allowed="what get_peft_model, PeftModel.from_pretrained or retain.attach_lora returned",
            fix="give that, and not the model that was given to it",
        )


def save_adapter(
    model: PeftModel,
    folder: str | Path,
    base: str | Path,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Writes a plain PEFT adapter; an older one stays until the new one is whole on the disk.

    Of several adapters it is the active one, whatever its name. One that began in the base's
    weights as PEFT cannot make it again is written as plain LoRA (`retain.models.plain_lora`). A
    classifier's comes with its head, and with the configuration that names its classes. Beside it
    is a model card with PEFT's front matter and a section of ours, which alone is written anew in a
    card that is there. Other files in the folder stay, and so do modes. A kill just while the files
    of an adapter with other settings take their places leaves no adapter there, rather than one of
    two.

    Args:
        model: the model with its adapter.
        folder: where it is to be.
        base: the name of the base model that the adapter records, or its folder.
        facts: what the card says of how it was trained, line by line: ``{"Data": "96 rows"}``.

    Raises:
        ModelError: no PeftModel.
        OutputError: the place cannot be written, or the disk is full.
    """
    check_peft(model)
    folder, base = Path(folder).expanduser(), str(base)
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    head = any(config.task_type == "SEQ_CLS" for config in model.peft_config.values())
    with whole_files(folder, "the adapter", last=_CONFIG) as new:
        name = model.active_adapters[0]
        model.save_pretrained(str(new), selected_adapters=[name], save_embedding_layers=False)
        if name != "default":  # PEFT gives it a folder of its own
            for file in FILES:
                (new / name / file).replace(new / file)
            shutil.rmtree(new / name)
        plain = as_plain(model, name, new / _WEIGHTS)
        if head:
            inner: Any = model.get_base_model()
            inner.config.architectures = [type(inner).__name__]
            inner.config.to_json_file(new / HEAD)
        _write_card(new / CARD, folder / CARD, base, facts or {})
        written = read_json(new / _CONFIG) | plain
        for key in ("target_modules", "exclude_modules"):  # sets, which PEFT writes in any order
            if isinstance(written.get(key), list):
                written[key] = sorted(written[key])
        text = json.dumps(written, indent=2, sort_keys=True)
        (new / _CONFIG).write_text(text, encoding="utf-8")
    return folder


def _write_card(card: Path, old: Path, base: str, facts: Mapping[str, str]) -> None:
    """Makes of PEFT's card, an empty form with paths of this machine, one that says something.

    One that cannot be extended stays as it is: it is no reason to lose an adapter.
    """
    with or_warned():
        form = read_card(card)
        card.unlink(missing_ok=True)
        text = with_base(read_card(old), base) or fresh_card(base, front=form)
        text = with_section(text, section({"Base model": plain_name(base), **facts}))
        card.write_text(text, encoding="utf-8", newline="")


def write_tensors(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], beside: Sequence[Path] = ()
) -> Path:
    """Writes an adapter from its tensors, under the names that PEFT gives its own.

    Args:
        folder: where it is to be; an older one stays until the new one is whole.
        config: with ``peft_type`` and ``base_model_name_or_path``.
        tensors: by their names in the base model.
        beside: files to copy along.

    Raises:
        OutputError: the place cannot be written.
    """
    from safetensors.torch import save_file

    named = {_PREFIX + n: t.detach().contiguous() for n, t in tensors.items()}
    with whole_folder(folder, "the adapter", (*FILES, *(path.name for path in beside))) as new:
        for path in beside:
            shutil.copyfile(path, new / path.name)
        save_file(named, new / _WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
        (new / _CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def read_tensors(folder: Path, kind: str) -> dict[str, Tensor]:
    """What `write_tensors` wrote, by names in the base model; `ModelError` if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded = load_file(folder.expanduser() / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise refused("the adapter is damaged", f"{folder} ({error})", kind) from error
    return {name.removeprefix(_PREFIX): tensor for name, tensor in loaded.items()}


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


def too_wide(rank: int, folder: Path) -> str | None:
    """What to say of an adapter that vLLM does not serve as it comes; None of one that it does."""
    if rank <= _SERVED[0]:
        return None
    most = next((n for n in _SERVED if n >= rank), None)
    there = f"give it --max-lora-rank {most}, or" if most else "which goes no further than 512:"
    return (
        f"rank {rank}: vLLM serves up to {_SERVED[0]} by default; {there} "
        f"retain compact {quote(str(folder))} --rank {_SERVED[0]}"
    )


def refused(what: str, got: object, kind: str = "LORA", fix: str | None = None) -> ModelError:
    """The error of a folder that cannot be loaded."""
    ours = "a LoRA adapter" if kind == "LORA" else f"an adapter of the kind {kind}"
    return ModelError(
        what,
        got=got,
        allowed=f"{ours} of this model: {_CONFIG} and {_WEIGHTS}",
        fix=fix or "give the folder that peft's save_pretrained wrote, or adapter/ of a run",
    )


def misfit(got: str, kind: str = "LORA") -> ModelError:
    """The error of an adapter of other layers or shapes than the model's."""
    fix = "give the base model that it was trained on (--model on the command line)"
    return refused("the adapter does not fit the model", got, kind, fix)
