"""Hooks on the gradients of weights, which act while their training runs and never after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retain.models.forward import no_autocast

__all__ = ["Change", "GradientHooks"]

Change = Callable[[Tensor], Tensor]


class GradientHooks:
    """Changes gradients at their birth, so that clipping sees what is left of them.

    They can be taken off and put on again, as a trainer's callback does around each step: what
    breaks off between two steps leaves none behind. What breaks off inside one (Ctrl-C in a
    backward pass) leaves hooks that ask `live` first, and take themselves off.

    Args:
        pairs: a weight, and what is made of its gradient; None drops it, so that no optimiser
            moves the weight. One that does not train is left alone.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Parameter, Change | None]]) -> None:
        self.pairs = list(pairs)
        self.live: Callable[[], bool] = _always
        self._handles: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Puts the hooks on, where they are not."""
        if self._handles:
            return
        for weight, change in self.pairs:
            if not weight.requires_grad:
                continue
            self._handles.append(weight.register_hook(_Hook(self, change)))
            if change is None:
                self._handles.append(weight.register_post_accumulate_grad_hook(_drop))

    @property
    def attached(self) -> bool:
        """Whether they are on."""
        return bool(self._handles)

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Hook:
    """A hook of one weight."""

    def __init__(self, owner: GradientHooks, change: Change | None) -> None:
        self.owner, self.change = owner, change

    def __call__(self, gradient: Tensor) -> Tensor | None:
        if not self.owner.live():
            self.owner.detach()
            return None
        if self.change is None:
            return torch.zeros_like(gradient)
        with no_autocast():
            return self.change(gradient)


def _always() -> bool:
    return True


def _drop(weight: Tensor) -> None:
    weight.grad = None
