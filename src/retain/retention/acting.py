"""What of the recipe acts while a task is learned: from `Recipe.begin` to `Recipe.release`.

`retain.retention.recipe` says what its parts are and in which order they are called, and sets up
what is here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from retain.models.shards import gather, scatter
from retain.models.sites import LoraSite, check_active
from retain.retention.filter import InputFilter
from retain.retention.force import Force
from retain.retention.fresh_rows import FrozenRows
from retain.retention.holds import Spent
from retain.retention.hooks import GradientHooks
from retain.retention.marks import unmark
from retain.retention.output_kl import Outputs
from retain.retention.watch import Watched
from retain.types import Update

__all__ = ["Acting"]


class Acting:
    """See the module.

    Args:
        update: ``gradient`` or ``proximal``; see `retain.retention.force`.

    Attributes:
        why_no_filter: after `begin`, why the filter was left out; None where it acts, or where it
            is not among the parts.
        force: after `begin`, what pulls; None without that part or any curvature.
        filter: after `begin`, what filters; None without it.
        active: after `begin`, the rows of A and columns of B that train.
        outputs: after `begin`, what adds the divergence; None without it.
        elsewhere: after `begin`, whether divergences are measured on the model's own text, though
            the curvature is of other text.
        unheld: after `begin`, the weights that nothing holds: pre-trained ones of full
            fine-tuning, and those of ``trainable_token_indices``.
        from_adapter: after `begin`, whether the model is held to an adapter that had learned
            before, rather than to its base.
        texts: after `begin`, digests of the rows that a budget (``budget``, ``budget/facts``) and
            a KL (``kl``) are measured on.
        scaled_back: after `begin`, what is said where earlier training was scaled back to a budget.
    """

    def __init__(self, update: Update) -> None:
        self.update = update
        self._clear()

    def _clear(self) -> None:
        self.why_no_filter: str | None = None
        self.force: Force | None = None
        self.filter: InputFilter | None = None
        self.outputs: Outputs | None = None
        self.elsewhere = False
        self.frozen: FrozenRows | None = None
        self.active = slice(None)
        self.unheld: list[str] = []
        self.from_adapter = False
        self.texts: dict[str, str] = {}
        self.scaled_back: str | None = None
        self.sites: list[LoraSite] = []
        self._marked: list[nn.Parameter] = []
        self._held: weakref.ref[nn.Module] | None = None
        self._shards: list[Tensor] = []  # whole copies of weights that are divided
        self._guarded = False
        self._by_hand = False

    def is_on(self, model: nn.Module) -> bool:
        """Whether it is this model that is held, from `begin` to `release`."""
        return self._held is not None and self._held() is model

    def guard(self, live: Callable[[], bool]) -> None:
        """From now on hooks act from `before_step` to `before_optimizer`, while `live` says so."""
        self._guarded = True
        for hooks in self._hooks():
            hooks.live = live
            hooks.detach()

    def by_hand(self) -> None:
        """From now on whole gradients are there but once a step, and `settle` is called for it."""
        self._by_hand = True
        for hooks in self._hooks():
            hooks.detach()
            hooks.by_hand = True

    def _hooks(self) -> list[GradientHooks]:
        return [held.hooks for held in (self.filter, self.frozen) if held is not None]

    def before_step(self) -> None:
        """Before the first forward pass of a step."""
        for hooks in self._hooks():
            hooks.attach()

    def before_optimizer(self, watched: Watched | None = None) -> float | None:
        """After the last backward pass of a step, and clipping; returns predicted nats.

        Args:
            watched: a number that is judged before anything is done.

        Raises:
            ModelError: another adapter was made active.
        """
        check_active(self.sites if self.force is None else self.force.sites)
        self.settle()
        if self.outputs is not None:
            self.outputs.add(self._settle_anew, apart=self._by_hand)
        with self._whole(gradients=True):
            nats = self._add_force(watched)
        if self._guarded:
            for hooks in self._hooks():
                hooks.detach()
        return nats

    def settle(self) -> None:
        """Holds the gradients that are there, before clipping."""
        for hooks in self._hooks():
            hooks.settle()

    def _settle_anew(self) -> None:
        """`settle` for other gradients that have taken the place of a step's."""
        if self._by_hand:
            self.before_step()
        self.settle()

    def _add_force(self, watched: Watched | None) -> float | None:
        nats = None
        if self.force is not None and self.update == "gradient":
            nats = self.force.add_force(watched)
        elif watched is not None:
            watched.judge(float(watched.value))
        return nats

    @contextmanager
    def _whole(self, *, gradients: bool = False) -> Iterator[None]:
        """Inside it the copies of divided weights are what the weights are, and after it too."""
        gather(self._shards, gradients=gradients)
        yield
        scatter(self._shards, gradients=gradients)

    def after_step(self, *optimizers: Optimizer, skipped: bool = False) -> float | None:
        """After a step of the optimiser; returns predicted nats of a proximal one.

        Args:
            optimizers: whose step it was; of several all, in one call.
            skipped: whether a gradient scaler left the step out.
        """
        with self._whole():
            for held in (self.filter, self.frozen):
                if held is not None:
                    held.after_step()
            if self.force is None or self.update != "proximal" or skipped:
                return None
            return self.force.apply_proximal(*optimizers)

    def finish(self) -> None:
        """After the last step: takes back what is above the budget.

        Raises:
            ModelError: another adapter was made active.
        """
        if self.force is not None:
            if self.force.budget is not None:
                check_active(self.force.sites)
            with self._whole():
                self.force.finish()

    def end(self) -> None:
        """When training has ended: `finish`, and the model trains freely again.

        Where it has learned nothing, A is what it was before its filter again.
        """
        self.finish()
        if self._held is not None:
            self.undo_idle()
        self.release()

    def undo_idle(self) -> None:
        """Puts A back as it was before its filter, where nothing has been learned behind it.

        An A of a training that goes on was filtered before, and stays.
        """
        if self.filter is None:
            return
        gather(self._shards)
        if not any(bool(site.b[:, self.active].any()) for site in self.sites):
            self.filter.undo()
            scatter(self._shards)

    def release(self) -> None:
        """Lets the model train freely again."""
        self._held = None
        for hooks in self._hooks():
            hooks.detach()
        unmark(self._marked, self)

    # What is told of it.

    def predicted(self) -> float:
        """Predicted nats per source token at the present weights, of several sources their mean;
        0 without a force.
        """
        gather(self._shards)
        return 0.0 if self.force is None else self.force.predicted()

    def spent(self) -> dict[str, Spent]:
        """What each source's budget is, and what was spent of it; nothing without a force."""
        gather(self._shards)
        return {} if self.force is None else self.force.spent()

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of a training, as plain data for JSON."""
        found: dict[str, Any] = {"filter": self.filter is not None, "first": self.active.start or 0}
        if self._keeps():
            found["kept"] = True  # so that its lack is noticed
        if self.texts:
            found["texts"] = self.texts
        if self.why_no_filter is not None:
            found["why_no_filter"] = self.why_no_filter
        if self.scaled_back is not None:
            found["scaled_back"] = self.scaled_back
        if self.outputs is not None:
            found["steps"] = self.outputs.steps
        return found if self.force is None else found | self.force.state()

    def other_texts(self, then: Any) -> str:
        """What is measured on other rows than those of the `texts` of `then`, by name."""
        known = then if isinstance(then, Mapping) else {}
        return ", ".join(n for n, digest in self.texts.items() if known.get(n, digest) != digest)

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint keeps as tensors: A behind its filter, where A itself is rounded, or
        where a proximal step has moved it since.
        """
        return {} if self.filter is None or not self._keeps() else self.filter.state()

    def _keeps(self) -> bool:
        """Whether a checkpoint needs more of a filtered A than A itself."""
        return self.filter is not None and (self.filter.narrow or self.update == "proximal")
