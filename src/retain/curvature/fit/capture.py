"""Hooks that hand out each layer's inputs and output gradients, and nothing else.

No parameter gets a gradient: the graph begins at the outputs of the lowest hooked layers, so
the backward pass ends there, and the model's own ``.grad`` fields are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retain.data.batches import Batch
from retain.errors import ModelError
from retain.models.forward import first_readers, forward_body, inputs_of, no_autocast
from retain.models.names import unwrap
from retain.models.sites import LoraSite, Site

__all__ = ["capture", "shared_inputs", "split_idle", "watch"]

Receive = Callable[[str, Tensor, Tensor], None]


@contextmanager
def capture(model: nn.Module, layers: Mapping[str, nn.Module], receive: Receive) -> Iterator[None]:
    """Calls ``receive(name, x, g)`` for each layer in each backward pass.

    Works with gradient checkpointing of both kinds: a hook sits on the output tensor that the
    gradient really flows through, whichever of the two forward passes made it.

    Raises:
        ModelError: the model was made in inference mode, so that no gradient passes it.
    """
    if any(p.is_inference() for p in model.parameters()):
        raise ModelError(
            "no gradient passes a model that was made in torch.inference_mode()",
            got="weights that are inference tensors",
            allowed="ordinary weights",
            fix="load it outside of inference mode; torch.no_grad() does no harm",
        )

    def hook(name: str) -> Callable[..., Any]:
        def forward(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            x = args[0].detach()
            replaced = None
            if not output.requires_grad:
                # No leaf: the model may write into it, as Falcon adds attention to its MLP.
                output = replaced = output.detach() + output.new_zeros(()).requires_grad_()
            output.register_hook(lambda g: receive(name, x, g.detach()))
            return replaced

        return forward

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    if getattr(unwrap(model), "is_activation_checkpointing", False):
        # A reentrant checkpoint passes gradients on only where its inputs ask for them.
        embedding = unwrap(model).get_input_embeddings()  # type: ignore[operator]
        handles.append(
            embedding.register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())
        )
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


@contextmanager
def watch(_: nn.Module, layers: Mapping[str, nn.Module], receive: Receive) -> Iterator[None]:
    """Calls ``receive(name, x, y)`` for each layer in each forward pass, y being its output."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _m, args, y: receive(name, args[0].detach(), y.detach())

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def split_idle(sites: Sequence[Site], receive: Receive) -> Receive:
    """Takes whole layers whose B is zero, and passes on what their factors would have seen.

    With ``y = W x + s B A x`` and g the gradient at y, B reads ``A x`` and gets ``s g``, and A
    reads x and gets ``s B^T g = 0``.
    """
    found = {site.name: site for site in sites if isinstance(site, LoraSite)}

    @no_autocast()
    def whole(name: str, x: Tensor, g: Tensor) -> None:
        site = found[name]
        a = site.a.detach()
        inner = x.to(a.dtype) @ a.T
        receive(f"{name}.lora_A", x, torch.zeros_like(inner))
        receive(f"{name}.lora_B", inner, site.scaling * g)

    return whole


def shared_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch
) -> dict[str, str]:
    """Which layers read the same tensor: layer -> the first layer that reads it.

    One forward pass without gradients finds out.

    Raises:
        CurvatureError: a layer that runs not at all, or more than once, in one forward pass.
    """
    with torch.no_grad():
        return first_readers(inputs_of(layers, lambda: forward_body(model, batch)))
