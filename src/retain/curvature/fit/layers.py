"""Where a fit looks: the layers that a curvature is of, and the modules inside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retain.curvature.info import part
from retain.errors import CurvatureError
from retain.models.sites import LinearSite, LoraSite, Site, find_sites
from retain.types import Space

__all__ = ["adapters_of", "check_alive", "fit_sites", "hooked"]


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


def adapters_of(sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Layer -> (B, A, scaling), at least in float32."""
    found = {}
    for site in sites:
        assert isinstance(site, LoraSite)
        dtype = torch.promote_types(site.a.dtype, torch.float32)
        found[site.name] = (site.b.detach().to(dtype), site.a.detach().to(dtype), site.scaling)
    return found


def check_alive(dead: list[str], sites: Sequence[Site], space: Space) -> None:
    """An all-zero layer is an error unless theory says so (A's block while B = 0).

    Raises:
        CurvatureError: it is.
    """
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
            fix="check that the adapter is active, and the gradient checkpointing settings",
        )
