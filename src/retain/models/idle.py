"""An adapter that changes nothing need not be run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from retain.models.adapter import LoraSite
from retain.models.sites import Site

__all__ = ["bypassed", "is_idle"]


def is_idle(sites: Sequence[Site]) -> bool:
    """Whether all layers carry plain LoRA whose B is zero, as a fresh adapter's is.

    The model's outputs and the gradients at its layers' outputs are then those of the base model.
    """
    return all(
        isinstance(site, LoraSite)
        and not site.layer.merged
        and not getattr(site.layer, "lora_variant", {})
        and not bool(site.b.any())
        and site.lora_b.bias is None
        for site in sites
    )


@contextmanager
def bypassed(sites: Sequence[Site]) -> Iterator[None]:
    """Runs the layers without their adapters. What is trainable stays so, unlike in PEFT's own."""
    layers = [site.layer for site in sites if isinstance(site, LoraSite)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
