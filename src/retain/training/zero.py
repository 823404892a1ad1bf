"""The recipe inside a step of DeepSpeed's ZeRO stages 1 and 2.

DeepSpeed steps its optimiser behind the last backward pass, before a trainer calls anybody. Each
process has the whole of A and B in the model's precision, and of their float32 masters and of the
averaged gradient a part, flat (Rajbhandari et al., arXiv 1910.02054). So the recipe acts at the two
places of that step where it does elsewhere: where gradients are clipped, and behind the optimiser's
own step. There A and B are whole in float32 for the while, gathered in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from retain.errors import ConfigError, ModelError
from retain.models.sites import lora_sites
from retain.retention.recipe import Recipe
from retain.retention.watch import Watched

__all__ = ["ZeroStep", "zero_of"]


def zero_of(optimizer: object) -> Any:
    """The optimiser of ZeRO-1 or ZeRO-2 behind a trainer's; None of any other."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    kind = type(inner)  # not one that is made of it, as ZenFlow's, which steps in other ways too
    name = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
    return inner if f"{kind.__module__}.{kind.__name__}" == name else None


class ZeroStep:
    """Lets a recipe act inside an optimiser's steps, until `release`.

    Args:
        zero: `zero_of` a trainer's optimiser.
        recipe: that holds the model; it begins and ends inside `whole`.
        model: with LoRA.
        watch: of the gradients, once a step, before anything is done to them.

    Attributes:
        nats: predicted at the last step; None without a force.

    Raises:
        ModelError: no LoRA, or none that trains.
        ConfigError: several groups of settings of the optimiser that A and B lie in, which it steps
            one after another.
    """

    def __init__(
        self, zero: Any, recipe: Recipe, model: nn.Module, watch: Callable[[], Watched | None]
    ) -> None:
        self.zero, self.recipe, self.watch = zero, recipe, watch
        self.weights = [w for s in lora_sites(model) for w in (s.a, s.b) if w.requires_grad]
        self.group, self._starts = _place_of(self.weights, zero)
        self.nats: float | None = None
        self._clip = zero.unscale_and_clip_grads
        zero.unscale_and_clip_grads = self._clipped
        self._handle = zero.optimizer.register_step_post_hook(self._stepped)

    def left_out(self) -> bool:
        """Whether DeepSpeed has left the last step out, for gradients that are not finite."""
        return bool(self.zero.overflow)

    def release(self) -> None:
        """DeepSpeed's step is its own again."""
        vars(self.zero).pop("unscale_and_clip_grads", None)
        self._handle.remove()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Between steps: A and B are their masters inside it, and both are what it leaves."""
        with torch.no_grad():
            full = self._gathered(self._master)
            with self._instead(self._views(full)):
                yield
            self._master.copy_(self._mine(full))
            for weight, master in zip(self.weights, self._views(full), strict=True):
                weight.copy_(master)

    @property
    def _master(self) -> Tensor:
        """This process's part of the float32 weights."""
        found: Tensor = self.zero.single_partition_of_fp32_groups[self.group].data
        return found

    @torch.no_grad()
    def _clipped(self, gradients: list[Any], norm: Any) -> None:
        """In place of DeepSpeed's clipping, where a part's gradient is ready, and still scaled."""
        part = gradients[0]
        if part is not self.zero.single_partition_of_fp32_groups[self.group].grad:
            self._clip(gradients, norm)
            return
        full = self._gathered(part)
        # A budget that is spent moves the weights themselves.
        moved = None if self.recipe.budget is None else self._gathered(self._master)
        values = [w.data.float() for w in self.weights] if moved is None else self._views(moved)
        with self._instead(values):
            for weight, gradient in zip(self.weights, self._views(full), strict=True):
                weight.grad = gradient
            watched = self.watch()
            before = self._squares()
            self.recipe.settle()
            if norm is not None:  # what is clipped is what the filter has left
                norm = torch.as_tensor(norm).to(before)
                norm = (norm**2 - before + self._squares()).clamp(min=0).sqrt()
                self.zero._global_grad_norm = norm / self.zero.loss_scale
                norm = norm.to(part.device)  # masters may be elsewhere
            scale = part.new_ones(1)
            part.copy_(self._mine(full))
            self._clip([part, scale], norm)
            full.mul_(scale.to(full.device))
            self.nats = self.recipe.before_optimizer(watched)
            part.copy_(self._mine(full))
        if moved is not None:
            self._master.copy_(self._mine(moved))

    @torch.no_grad()
    def _stepped(self, optimizer: Any, *_: Any) -> None:
        """Behind the optimiser's step, before the masters are rounded to the model's precision."""
        master = self.zero.single_partition_of_fp32_groups[self.group]
        if all(master is not each for g in optimizer.param_groups for each in g["params"]):
            return
        full = self._gathered(self._master)
        with self._instead(self._views(full)):
            nats = self.recipe.after_step(self._as_whole(optimizer))
        self.nats = self.nats if nats is None else nats
        self._master.copy_(self._mine(full))

    def _as_whole(self, optimizer: Any) -> Any:
        """What `retain.retention.optimizers` asks of an optimiser, of whole weights."""
        master = self.zero.single_partition_of_fp32_groups[self.group]
        state = dict(optimizer.state.get(master, {}))
        second = {"exp_avg_sq", "max_exp_avg_sq"}
        known: dict[str, Any] = {k: v for k, v in state.items() if k not in second}
        every = [known] * len(self.weights)
        for key in sorted(second & {*state}) if self.recipe.update == "proximal" else ():
            squares = self._views(self._gathered(state[key]))
            every = [each | {key: square} for each, square in zip(every, squares, strict=True)]
        groups = [{**optimizer.param_groups[0], "params": self.weights}]
        states = dict(zip(self.weights, every, strict=True))
        return SimpleNamespace(param_groups=groups, state=states, stands_for=type(optimizer))

    def _squares(self) -> Tensor:
        """The squared length of the gradients of A and B."""
        norms = torch._foreach_norm([w.grad for w in self.weights if w.grad is not None])
        return torch.stack(norms).square().sum()

    @contextmanager
    def _instead(self, values: list[Tensor]) -> Iterator[None]:
        """A and B are these inside it."""
        own = [weight.data for weight in self.weights]
        try:
            for weight, value in zip(self.weights, values, strict=True):
                weight.grad = None
                weight.data = value
            yield
        finally:
            for weight, value in zip(self.weights, own, strict=True):
                weight.grad = None
                weight.data = value

    def _views(self, full: Tensor) -> list[Tensor]:
        """Of A and B in a flat tensor of their group."""
        return [
            full[start : start + w.numel()].view(w.shape)
            for start, w in zip(self._starts, self.weights, strict=True)
        ]

    def _gathered(self, part: Tensor) -> Tensor:
        """All of what each process has a part of, flat, where the model is."""
        group = self.zero.real_dp_process_group[self.group]
        mine = part.detach().to(self.weights[0].device).reshape(-1).contiguous()
        count = distributed.get_world_size(group)
        full = mine.new_empty(mine.numel() * count)
        distributed.all_gather(list(full.chunk(count)), mine, group)
        return full

    def _mine(self, full: Tensor) -> Tensor:
        """This process's part of it."""
        rank = distributed.get_rank(self.zero.real_dp_process_group[self.group])
        size = int(self.zero.partition_size[self.group])
        return full[rank * size : (rank + 1) * size]


def _place_of(weights: list[nn.Parameter], zero: Any) -> tuple[int, list[int]]:
    """Which of DeepSpeed's flat groups has the weights, and where each begins in it."""
    groups = [{id(p) for p in group} for group in zero.bit16_groups]
    found = [i for i, group in enumerate(groups) if any(id(w) in group for w in weights)]
    if len(found) != 1 or any(id(w) not in groups[found[0]] for w in weights):
        raise ConfigError(
            "DeepSpeed's optimiser steps A and B one after another",
            got=f"{len(found)} groups of settings that A and B lie in",
            allowed="one learning rate and weight decay for all of LoRA, all of which trains",
            fix="leave LoRA+ and the like out, or use DistributedDataParallel",
        )
    flat = zero.bit16_groups_flat[found[0]]
    storage = flat.untyped_storage().data_ptr()
    if any(w.untyped_storage().data_ptr() != storage for w in weights):
        raise ModelError(
            "DeepSpeed's weights lie in another way than any that was tried",
            got=f"{type(zero).__name__} of an unknown version",
            allowed="ZeRO stage 1 or 2 of DeepSpeed 0.16 or later",
            fix="another version of DeepSpeed, or DistributedDataParallel",
        )
    master = zero.single_partition_of_fp32_groups[found[0]]
    if master.dtype != torch.float32:
        raise ConfigError(
            "DeepSpeed's masters are not in float32", got=str(master.dtype).removeprefix("torch."),
            allowed="float32", fix="leave bf16_master_weights_and_grads and the like out",
        )  # fmt: skip
    return found[0], [w.storage_offset() - flat.storage_offset() for w in weights]
