"""How large an update is, in what it does to what the layers read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from retain.data.batches import Example
from retain.errors import ModelError
from retain.models.sites import LoraSite, lora_sites
from retain.models.view import ModelView

__all__ = ["update_size"]


def update_size(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int = 8
) -> float | None:
    """The mean of ``log ||dW x||``, over all LoRA layers and all that they read in some rows.

    Two updates of one size move the layers' outputs as much, whatever their ranks and rates, so
    that methods can be compared at the same size of what they have written. Natural logarithm, of
    the outputs' own unit.

    Returns:
        None without LoRA, or where a layer's update is 0.
    """
    try:
        sites = lora_sites(model)
    except ModelError:
        return None
    view = ModelView.of(model)
    total, count = torch.zeros((), dtype=torch.float64), 0
    mask: list[Tensor] = []

    def hear(site: LoraSite) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal total, count
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            if len(x) == len(mask[0]):  # behind a classifier's pooling there is one place a row
                x = x[mask[0]]
            moved = site.scaling * (x @ site.a.detach().float().T @ site.b.detach().float().T)
            total = total + moved.norm(dim=-1).double().log().sum().cpu()
            count += len(x)

        return hook

    with view.evaluating(), torch.no_grad(), ExitStack() as hooks:
        for site in sites:
            layer: nn.Module = site.layer  # type: ignore[assignment]
            hooks.enter_context(layer.register_forward_pre_hook(hear(site)))
        for batch in view.batches(examples, batch_size):
            mask[:] = [batch.inputs["attention_mask"].reshape(-1).bool()]
            view.run(batch)
    found = float(total) / count
    return found if found > float("-inf") else None
