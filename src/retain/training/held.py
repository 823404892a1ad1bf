"""What holds LoRA's A while a training runs, and nothing of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from retain.models.sites import LoraSite
from retain.retention.blocks import Block
from retain.retention.filters import InputFilter
from retain.retention.hooks import GradientHooks

__all__ = ["Held", "release_left"]

_MARK = "_retain_held"
"""The attribute of an A that tells what holds it."""


class Held:
    """What A is held by during a run: its filter, or else it stays as it is.

    What stays is held by its gradient, which is dropped; what is trainable is left as it is. So
    nobody lets it go by making it trainable, as PEFT's ``disable_adapter`` does (TRL's trainers of
    preferences use it for their reference), and one that its user has frozen stays frozen.

    Args:
        sites: the layers.
        rows: of A that train, with their columns of B; all else stays.
        filtered: the filter of those rows, or None.
    """

    def __init__(
        self, sites: Sequence[LoraSite], rows: slice, filtered: InputFilter | None
    ) -> None:
        self.sites, self.rows, self.filter = list(sites), rows, filtered
        self.block = None if rows == slice(None) else Block(sites, rows)
        self._hooks = [held.hooks for held in (filtered, self.block) if held is not None]
        if filtered is None:
            self._hooks.append(GradientHooks([(site.a, None) for site in self.sites]))
        for site in self.sites:
            setattr(site.a, _MARK, self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a model that is pickled or copied whole, nothing goes along."""
        return type(None), ()

    def guard(self, live: Callable[[], bool]) -> None:
        """From now on the hooks act between `begin_step` and `end_step`, while `live` says so."""
        for hooks in self._hooks:
            hooks.live = live
            hooks.detach()

    def begin_step(self) -> None:
        """Before the first forward pass of a step."""
        for hooks in self._hooks:
            hooks.attach()

    def end_step(self) -> None:
        """After the last backward pass of a step, before the optimiser's."""
        for hooks in self._hooks:
            hooks.detach()
        if self.filter is None:
            for site in self.sites:
                site.a.grad = None  # that other processes have sent

    @contextmanager
    def still(self) -> Iterator[None]:
        """Inside it an A that stays is not trainable, so that no force moves it."""
        stay = [] if self.filter is not None else [site.a for site in self.sites]
        before = [a.requires_grad for a in stay]
        try:
            for a in stay:
                a.requires_grad_(False)
            yield
        finally:
            for a, flag in zip(stay, before, strict=True):
                a.requires_grad_(flag)

    def after_step(self) -> None:
        """After a step of the optimiser."""
        if self.filter is not None:
            self.filter.after_step()
        if self.block is not None:
            self.block.put_back()

    def renew(self) -> None:
        """The rows that are held stay where they are now."""
        if self.block is not None:
            self.block.renew()

    def release(self) -> None:
        """Lets A train freely again."""
        for hooks in self._hooks:
            hooks.detach()
        for site in self.sites:
            if getattr(site.a, _MARK, None) is self:
                delattr(site.a, _MARK)


def release_left(model: nn.Module, *, resuming: bool = False) -> None:
    """Releases what a training that broke off has left on A.

    Where it has learned nothing yet, A is what it was before its filter again.

    Args:
        model: with its adapter.
        resuming: A is from a checkpoint, and is right as it is.
    """
    for held in {id(h): h for p in model.parameters() if (h := getattr(p, _MARK, None))}.values():
        held.release()
        idle = not any(bool(site.b[:, held.rows].any()) for site in held.sites)
        if held.filter is not None and idle and not resuming:
            held.filter.undo()
