"""What an adapter does to its base's own weights when it is loaded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from retain.errors import ModelError
from retain.models.taken import BESIDE
from retain.models.wrappers import canonical

__all__ = ["check_vocabulary", "keep_changed", "weights_of"]


def weights_of(model: nn.Module, keys: Collection[str], init: object) -> dict[str, Tensor]:
    """Copies of the base's parameters that loading an adapter may change, by name.

    Args:
        model: the base.
        keys: of the adapter's file.
        init: its ``init_lora_weights``; some change the base's weights, in place or not.
    """
    ours = {canonical(key) for key in keys}
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if canonical(name) in ours or str(init).lower() not in BESIDE
    }


def keep_changed(peft: PeftModel, before: dict[str, Tensor]) -> None:
    """Keeps what loading has changed, as ``retain_originals``, unless it is not there any more."""
    now = {canonical(name): p for name, p in peft.named_parameters()}
    if any(name not in now or now[name].shape != value.shape for name, value in before.items()):
        return  # 4-bit weights that were packed anew
    peft.retain_originals = [  # type: ignore[assignment]
        (now[name], value)
        for name, value in before.items()
        if not torch.equal(now[name].data, value.to(now[name].data))
    ]


def check_vocabulary(model: Any, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Refuses an adapter with embeddings of another vocabulary.

    Raises:
        ModelError: it is one.
    """
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    ids = {id(t) for t in tables if t is not None}
    names = [f"{name}.weight" for name, module in model.named_modules() if id(module) in ids]
    own = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for key, shape in shapes.items():
        name = canonical(key)
        if name in names and name in own and shape[0] != own[name][0]:
            raise ModelError(
                "the vocabulary was resized before the adapter was trained",
                got=f"{folder} with {shape[0]} tokens, a base with {own[name][0]}",
                allowed="an adapter of the base's own vocabulary",
                fix=f"in Python: model.resize_token_embeddings({shape[0]}), "
                "retain.models.saved.load_adapter(model, folder), retain.measure_forgetting",
            )
