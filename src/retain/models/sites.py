"""The weights of a model that a curvature can be about: LoRA layers, or plain linear ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from retain.errors import ModelError
from retain.models.adapter import LoraSite, canonical, lora_sites, unwrap
from retain.models.names import of_head

__all__ = ["LinearSite", "Site", "check_held", "find_sites"]


@dataclass(frozen=True)
class LinearSite:
    """One linear layer whose own weight W is trained (full fine-tuning).

    Attributes:
        name: the layer's name.
        layer: the layer.
    """

    name: str
    layer: nn.Linear

    rank = 0
    scaling = 1.0

    @property
    def weight(self) -> nn.Parameter:
        """W, of the shape [d_out, d_in]."""
        weight: nn.Parameter = self.layer.weight  # type: ignore[assignment]
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.weight.shape[0], self.weight.shape[1]


Site = LoraSite | LinearSite


def find_sites(model: nn.Module) -> list[LoraSite] | list[LinearSite]:
    """The LoRA layers of a PEFT model, or the trainable linear layers of a plain one.

    A plain model's output head and classification head are left out, as PEFT's ``all-linear``
    does; embeddings, norms and biases have no curvature here.

    Raises:
        ModelError: neither; or what `lora_sites` refuses.
    """
    inner: Any = unwrap(model)
    if any(isinstance(m, LoraLayer) for m in inner.modules()) or hasattr(inner, "peft_config"):
        return lora_sites(inner)
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if find is not None else None
    sites = [
        LinearSite(canonical(name), layer)
        for name, layer in inner.named_modules()
        if isinstance(layer, nn.Linear)
        and layer is not head
        and not of_head(name)
        and layer.weight.requires_grad
    ]
    return sites or lora_sites(inner)  # which says what is missing


def check_held(model: nn.Module) -> None:
    """Refuses a LoRA model that also trains pre-trained weights which nothing would hold.

    A new classification head, new tokens and DoRA's magnitudes are free to learn.

    Raises:
        ModelError: such weights, as PEFT's ``modules_to_save``, ``bias`` and ``lora_bias`` make.
    """
    inner: Any = unwrap(model)
    free = (".lora_", "trainable_tokens")
    odd = [
        canonical(name)
        for name, p in inner.named_parameters()
        if p.requires_grad
        and not of_head(name)
        and (not any(part in f".{name}" for part in free) or _of_b(name))
    ]
    if odd:
        raise ModelError(
            "pre-trained weights are trained that no curvature holds",
            got=f"{len(odd)} of them, such as {odd[0]}",
            allowed="LoRA weights, new tokens and a new classification head",
            fix="leave them out of modules_to_save, and keep bias='none', lora_bias=False",
        )


def _of_b(name: str) -> bool:
    """Whether a parameter is a bias of LoRA's B, which moves outputs and is in no curvature."""
    return ".lora_B." in name and name.endswith(".bias")
