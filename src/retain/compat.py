"""What has another name, or is not there, in older versions of transformers, PEFT and typer.

All that asks for a version asks here, and by the name itself rather than by a number.
docs/versions.md says which versions were tried.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from retain.errors import ModelError

__all__ = [
    "checkpointing",
    "config_class",
    "marked_off",
    "osf_config",
    "recomputes",
    "usage_error",
    "warmup",
]


def config_class() -> Any:
    """The base class of transformers' configurations; ``PretrainedConfig`` before 5."""
    import transformers as tf

    return getattr(tf, "PreTrainedConfig", None) or tf.PretrainedConfig


def checkpointing(on: bool) -> dict[str, Any]:
    """The trainer's argument that activations are computed again in the backward pass.

    It is ``gradient_checkpointing`` before transformers 5.20 or so.
    """
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    new = "activation_checkpointing"
    return {new if new in known else "gradient_checkpointing": on}


def warmup(steps: float) -> dict[str, Any]:
    """The trainer's argument for a warmup of so many steps, or of a share of all when below 1.

    The trainer rounds a share up, and the first step of any warmup is at a rate of 0.
    Before transformers 5 a share has an argument of its own.
    """
    from transformers import TrainingArguments

    kinds = {field.name: field.type for field in fields(TrainingArguments)}
    if kinds["warmup_steps"] not in (int, "int"):
        return {"warmup_steps": steps}
    return {"warmup_ratio": steps} if steps < 1 else {"warmup_steps": int(steps)}


def recomputes(model: object) -> bool:
    """Whether a model of transformers computes its activations again in the backward pass."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return False


@contextmanager
def marked_off(model: Any) -> Iterator[None]:
    """Inside it a `PeftModel` says that its adapter is off; before PEFT 0.18 it has no such word.

    The layers' own switches are left to the caller.
    """
    if "_adapters_disabled" not in vars(model):
        yield
        return
    was = model._adapters_disabled
    try:
        model._adapters_disabled = True
        yield
    finally:
        model._adapters_disabled = was


def osf_config() -> Any:
    """PEFT's options of OSF; raises `ModelError` for a PEFT that has none."""
    import peft

    found = getattr(peft, "OSFConfig", None)
    if found is None:
        raise ModelError(
            "this PEFT has no OSF",
            got=f"peft {peft.__version__}",
            allowed="peft 0.18 or later",
            fix="pip install -U peft, or another adapter",
        )
    return found


def usage_error() -> type[Exception]:
    """What typer raises for a mistake in the arguments; older ones leave that to click."""
    import typer

    found: Any = getattr(typer, "TyperException", None)
    if found is None:
        found = importlib.import_module("click").ClickException
    kind: type[Exception] = found
    return kind
