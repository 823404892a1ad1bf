"""Hooks on the gradients of weights, which act while their training runs and never after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from retain.models.forward import no_autocast
from retain.models.shards import gather_gradients, shard_of
from retain.retention.optimizers import steps_in_backward

__all__ = ["GradientHooks", "Work", "always", "check_backward"]

_AVERAGING = ("torch.", "transformers.trainer", "transformers.distributed.", "deepspeed.")
"""Where hooks come from that average gradients among processes, and step nothing."""

_LOCK = threading.RLock()
"""The gradients of several devices come in threads of their own."""


def check_backward(model: nn.Module) -> None:
    """Refuses a model whose weights are stepped inside the backward pass, as each gradient comes.

    That is done by post-accumulate-grad hooks: the gradient is gone when a force would be added.

    Raises:
        ModelError: a weight that trains has such a hook, or is of torch's
            ``_apply_optimizer_in_backward``.
    """
    for name, weight in model.named_parameters():
        hooks: Any = weight._post_accumulate_grad_hooks or {}
        odd = [hook for hook in hooks.values() if not _averages(hook)]
        if weight.requires_grad and (odd or hasattr(weight, "_in_backward_optimizers")):
            raise steps_in_backward(
                f"a post-accumulate-grad hook on {name}",
                "step after the backward pass; a hook that only reads: weight.register_hook",
            )


def _averages(hook: Any) -> bool:
    module = str(getattr(getattr(hook, "func", hook), "__module__", ""))
    return any(module == each or (each[-1] == "." and module.startswith(each))
               for each in _AVERAGING)  # fmt: skip


class Work:
    """What is made of gradients. A place is a weight's among those of its `GradientHooks`."""

    def ready(self, place: int) -> Iterable[int]:
        """Before a pass adds to a gradient that is as `change` has left it.

        Returns:
            The places that are ready now, this one among them.
        """
        return (place,)

    def change(self, places: Sequence[int]) -> None:
        """After a pass has added to these, in place. Some may have been made ready in vain."""
        raise NotImplementedError

    def forget(self) -> None:
        """No pass will add to the gradients that are there."""


class GradientHooks:
    """Changes gradients at the end of each backward pass, so that clipping sees what is left.

    The hook of a weight only says that a pass has reached it. What is done to the gradients is done
    to all at once when the pass has ended, and after `DistributedDataParallel` has averaged them,
    so it has to be linear. What `torch.autograd.grad` gives is left alone. Of a sharded weight the
    gradient is gathered for it.

    They can be taken off and put on again, as a trainer's callback does around each step: what
    breaks off between two steps leaves none behind. What breaks off inside one (Ctrl-C in a
    backward pass) leaves hooks that ask `live` first, and take themselves off.

    Args:
        weights: one that does not train is left alone.
        work: on their gradients.
    """

    def __init__(self, weights: Sequence[nn.Parameter], work: Work) -> None:
        self.weights, self.work = list(weights), work
        shards = {place: shard_of(weight) for place, weight in enumerate(self.weights)}
        self._sharded = {place: s for place, s in shards.items() if s is not None}
        self.live: Callable[[], bool] = always
        self.by_hand = False  # nothing hears a pass: `settle` changes what is there once a step
        self._due = False
        self._handles: list[Any] = []
        self._open: dict[int, int] = {}  # place -> the pass that has reached it
        self._passes: set[int] = set()
        self.attach()

    def attach(self) -> None:
        """Puts the hooks on, where they are not."""
        self._due = self.by_hand
        if self._handles or self.by_hand:
            return
        for place, weight in enumerate(self.weights):
            shard, hook = self._sharded.get(place), _Hook(self, place)
            if shard is not None and shard.sharded.requires_grad:
                self._handles.append(shard.on_backward(hook))
            elif weight.requires_grad:
                self._handles.append(weight.register_hook(hook))

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open, self._passes = [], {}, set()
        self._due = False
        self.work.forget()

    def settle(self) -> None:
        """Changes what a pass that broke off has left as it came; by hand, all that there is."""
        with _LOCK:
            if self._due:
                self.work.forget()
                self._open, self._due = dict.fromkeys(range(len(self.weights)), 0), False
            self._close(list(self._open))

    def _reached(self, place: int) -> None:
        """A pass is about to add to a gradient."""
        current = torch._C._current_graph_task_id()
        with _LOCK:
            if current not in self._passes:
                if not self.live():
                    self.detach()
                    return
                self._passes.add(current)
                _at_end(partial(self._ended, current, True))
            if place not in self._open:
                still = [p for p in self._sharded if p not in self._open]
                with no_autocast(), torch.no_grad(), self._whole(still):
                    ready = self.work.ready(place)
                for other in ready:
                    self._open.setdefault(other, current)
            self._open[place] = current

    def _ended(self, current: int, again: bool) -> None:
        if again:  # behind all that others have asked for
            _at_end(partial(self._ended, current, False))
            return
        with _LOCK:
            self._passes.discard(current)
            self._close([place for place, by in self._open.items() if by == current])

    def _close(self, places: Sequence[int]) -> None:
        for place in places:
            del self._open[place]
        with no_autocast(), torch.no_grad(), self._whole(places):
            held = [place for place in places if self.weights[place].grad is not None]
            if held:
                self.work.change(held)

    @contextmanager
    def _whole(self, places: Sequence[int]) -> Iterator[None]:
        """Inside it the gradients of those weights that are sharded are whole."""
        shards = [self._sharded[p] for p in places if p in self._sharded]
        gather_gradients(shards)
        yield
        for shard in shards:
            shard.scatter_gradient()


class _Hook:
    """A hook of one weight."""

    def __init__(self, owner: GradientHooks, place: int) -> None:
        self.owner, self.place = owner, place

    def __call__(self, gradient: Tensor) -> None:
        self.owner._reached(self.place)


def _at_end(call: Callable[[], None]) -> None:
    """Calls it when the present backward pass has ended."""
    Variable._execution_engine.queue_callback(call)


def always() -> bool:
    """For `GradientHooks.live` where the hooks are taken off when training ends: they act."""
    return True
