"""What the program around us has switched on, switched off around our own arithmetic.

A trainer runs a model's forward pass under autocast (bf16 is TRL's default), and whatever a hook
multiplies there comes out in bfloat16. accelerate even puts autocast into ``model.forward``, so a
model that was trained so brings it along for ever. A notebook may stand in ``torch.autocast`` or in
``torch.inference_mode``. All that we measure is of the model as it is, in its weights' own
precision, and all that we compute from it in float32 at least: every measurement runs inside
`retain.models.modes.evaluating`, and every hook and product inside `no_autocast`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate.utils.operations import ConvertOutputsToFp32  # type: ignore[import-untyped]
from torch import nn

__all__ = ["no_autocast", "own_forwards"]

_KINDS = [
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "ipu", "privateuseone")
    if torch.amp.is_autocast_available(kind)
]
"""Kinds of device that autocast may be on for, each by itself."""


@contextmanager
def no_autocast() -> Iterator[None]:
    """Products in the tensors' own precision, whatever the host has switched on.

    Also leaves ``torch.inference_mode``, whose tensors nothing could be trained with later;
    gradients stay off then. It may be nested, and used as a decorator.
    """
    on = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
    for kind in on:
        torch.set_autocast_enabled(kind, False)
    try:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                yield
        else:
            yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, True)


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Takes autocast, and what turns its outputs into float32, out of the modules' ``forward``."""
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules():
            forward = module.forward
            plain = _without_autocast(forward)
            if plain is not forward:
                changed.append((module, vars(module).get("forward")))
                module.forward = plain
        yield
    finally:
        for module, before in changed:
            if before is None:
                del module.forward
            else:
                module.forward = before


def _without_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward under the wrappers of accelerate and ``torch.autocast``, which may be several."""
    whole: Any = forward
    found: Any = getattr(forward, "__func__", forward)
    function = found
    while _is_autocast(function):
        function = function.__wrapped__
    if function is found:
        return forward
    return MethodType(function, whole.__self__) if hasattr(whole, "__self__") else function


def _is_autocast(function: Any) -> bool:
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        return False
    if isinstance(function, ConvertOutputsToFp32) or isinstance(wrapped, ConvertOutputsToFp32):
        return True
    code = getattr(function, "__code__", None)  # of torch.autocast used as a decorator
    return code is not None and code.co_name == "decorate_autocast"
