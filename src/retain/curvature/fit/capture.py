"""Which layers a fit looks at, and hooks that hand out their inputs and output gradients.

No parameter gets a gradient: the graph begins at the outputs of the lowest hooked layers, so
the backward pass ends there, and the model's own ``.grad`` fields are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retain.compat import recomputes
from retain.curvature.info import part
from retain.data.batches import Batch
from retain.errors import CurvatureError, ModelError
from retain.models.forward import first_readers, forward_body, inputs_of
from retain.models.names import unwrap
from retain.models.sites import LinearSite, LoraSite, Site, find_sites
from retain.types import Space

__all__ = [
    "capture", "check_gradients", "fit_sites", "hooked", "lora_factors", "shared_inputs", "watch"
]  # fmt: skip

Receive = Callable[[str, Tensor, Tensor], None]


def fit_sites(model: nn.Module, space: Space) -> list[Site]:
    """The layers that a curvature of this space is of.

    Raises:
        CurvatureError: adapter space of anything but plain LoRA.
    """
    sites: list[Site] = list(find_sites(model))
    if space == "adapter" and (
        isinstance(sites[0], LinearSite) or any(s.dora for s in sites if isinstance(s, LoraSite))
    ):
        raise CurvatureError(
            "adapter space needs plain LoRA factors",
            got="a fully trained model" if isinstance(sites[0], LinearSite) else "DoRA",
            allowed="plain LoRA",
            fix="space='weight'",
        )
    return sites


def hooked(sites: Sequence[Site], space: Space) -> dict[str, nn.Module]:
    """The modules to hook: the whole layer, or A and B inside it."""
    if space == "weight":
        return {s.name: s.layer for s in sites}  # type: ignore[misc]
    layers: dict[str, nn.Module] = {}
    for site in sites:
        assert isinstance(site, LoraSite)
        layers[part(site.name, "lora_A")] = site.lora_a
        layers[part(site.name, "lora_B")] = site.lora_b
    return layers


def lora_factors(sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Layer -> (B, A, scaling), at least in float32."""
    found = {}
    for site in sites:
        assert isinstance(site, LoraSite)
        dtype = torch.promote_types(site.a.dtype, torch.float32)
        found[site.name] = (site.b.detach().to(dtype), site.a.detach().to(dtype), site.scaling)
    return found


def check_gradients(
    dead: list[str], sites: Sequence[Site], space: str, *, certain: bool = False
) -> None:
    """A layer without any gradient is an error unless theory says so (A's block while B = 0).

    Where the model is `certain` of its predictions, gradients of 0 came to each layer.

    Raises:
        CurvatureError: it is.
    """
    if certain and dead:
        raise CurvatureError(
            "the model is certain of each prediction, so that none relies on any weight",
            got=f"gradients of 0 at all {len(dead)} layers",
            allowed="text of which it is less sure",
            fix="give other text, or more of it; a classifier's new head that is too sure stays as "
            "it was drawn with parts that leave head out (--parts rows,filter,force)",
        )
    if space == "adapter":
        lora = [s for s in sites if isinstance(s, LoraSite)]
        expected = {part(s.name, "lora_A") for s in lora if not bool(s.b.any())}
        expected |= {part(s.name, "lora_B") for s in lora if not bool(s.a.any())}
        dead = [name for name in dead if name not in expected]
    if dead:
        raise CurvatureError(
            "layers got no gradient at all",
            got=f"{len(dead)} layers, such as {dead[0]}",
            allowed="a gradient at each layer that carries the adapter",
            fix="give rows of several tokens, since attention to a single one is fixed; leave out "
            "layers that the predictions do not read, such as an auxiliary head; or check that the "
            "adapter is active, and the gradient checkpointing settings",
        )


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
            output.register_hook(lambda g: receive(name, x, _arrived(name, g).detach()))
            return replaced

        return forward

    frozen = [p for p in model.parameters() if p.requires_grad]
    with _hooks(layers, hook) as handles:
        if recomputes(unwrap(model)):
            # A reentrant checkpoint passes gradients on only where its inputs ask for them.
            embedding = unwrap(model).get_input_embeddings()  # type: ignore[operator]
            handles.append(
                embedding.register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())
            )
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)


def _arrived(name: str, gradient: Tensor | None) -> Tensor:
    """The gradient that has come to a layer's output, or an error where there is none."""
    if gradient is None:
        raise CurvatureError(
            "no gradient passes the model",
            got=f"none at {name}",
            allowed="a gradient at each layer that carries the adapter",
            fix="load the model anew: on a CPU, 4-bit weights that were evaluated once pass none",
        )
    return gradient


@contextmanager
def watch(_: nn.Module, layers: Mapping[str, nn.Module], receive: Receive) -> Iterator[None]:
    """Calls ``receive(name, x, y)`` for each layer in each forward pass, y being its output."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _m, args, y: receive(name, args[0].detach(), y.detach())

    with _hooks(layers, hook):
        yield


@contextmanager
def _hooks(
    layers: Mapping[str, nn.Module], hook: Callable[[str], Callable[..., Any]]
) -> Iterator[list[Any]]:
    """One forward hook a layer, for the while."""
    handles: list[Any] = [m.register_forward_hook(hook(name)) for name, m in layers.items()]
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


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
