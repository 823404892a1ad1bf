"""A discriminant start for each task, which learns in a block of its own.

See `retain.retention.start` for what A becomes, and `retain.retention.blocks` for the blocks: the
adapter of the tasks before is kept as it is. A stays, B alone learns, so that a layer's update is
linear in what is trained, and a penalty on B is exact on A's side. Stored are S_old and, for a
penalty, the output sides: no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from retain.curvature.curvature import Curvature
from retain.curvature.merge import reanchored
from retain.data.batches import Example
from retain.errors import unknown
from retain.retention.blocks import Block, block_options
from retain.retention.curved import Fitted
from retain.retention.method import Task
from retain.retention.rows import choose
from retain.retention.start import STARTS, check_start, set_start
from retain.types import Structure

__all__ = ["Discriminant"]

SIGNALS = ("inputs", "gradients")
STRUCTURES = ("activation", "kfac", "shampoo")


class Discriminant(Fitted):
    """LoRA from a discriminant start, with a penalty on B where `strength` is above 0.

    Args:
        strength: of the penalty, see `Fitted`. 0 holds nothing: the start alone is at work.
        structure: of the curvature that holds B, and gives S_old: ``activation``, ``kfac`` or
            ``shampoo``.
        start: ``discriminant``, ``principal``, ``null`` or ``random``; see `set_start`.
        signal: what S_new is the second moment of: ``inputs``, or the rows of each sequence's loss
            ``gradients`` (E[J^T J] with the data's labels). S is then theirs in the scale too.
        epsilon: see `set_start`.
        gain: see `set_start`.
        train_a: let A's block learn too.
        **options: of `Fitted`.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "discriminant"
    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})
    why_not: ClassVar[dict[str, str]] = dict.fromkeys(
        ("full", "bottleneck", "prefix"), "what it chooses are the rows of LoRA's A"
    )

    def __init__(
        self,
        strength: float = 0.0,
        *,
        structure: Structure = "activation",
        start: str = "discriminant",
        signal: str = "inputs",
        epsilon: float = 0.01,
        gain: float = 1.0,
        train_a: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(strength, **options)
        for what, value, allowed in (
            ("structure", structure, STRUCTURES),
            ("start", start, STARTS),
            ("signal", signal, SIGNALS),
        ):
            if value not in allowed:
                raise unknown(what, value, allowed)
        check_start(epsilon, gain)
        self.structure, self.start, self.signal = structure, start, signal
        self.epsilon, self.gain, self.train_a = epsilon, gain, train_a
        self.block: Block | None = None
        self._measured: Curvature | None = None  # of the task that is being learned

    def adapter_options(self, options: dict[str, Any], tasks: int) -> dict[str, Any]:
        return block_options(options, tasks)

    def before_task(self, task: Task) -> Sequence[Example]:
        self._release()
        model = self.context.adapter.model
        self.block = Block(model, task.index, self.context.tasks, train_a=self.train_a)
        self._set_a(task)
        return super().before_task(task)

    def _set_a(self, task: Task) -> None:
        """Writes the start into the block's rows of A."""
        assert self.block is not None
        if self.start == "random":
            return
        new = self._new(task)
        if self.signal == "inputs" and self.structure == "activation":
            self._measured = new
        set_start(
            self.block.sites, new, self.curvature, kind=self.start, gain=self.gain,
            epsilon=self.epsilon, seed=task.seed, span=self.block.span,
        )  # fmt: skip

    def _new(self, task: Task) -> Curvature:
        """The curvature whose input sides are S_new."""
        rows = choose(task.examples, self.rows, task.seed)
        if self.signal == "inputs":
            return self.fit(rows, task.columns, task.seed, structure="activation")
        options = {"structure": "shampoo", "fisher": "empirical", "samples": 1}
        return self.fit(rows, task.columns, task.seed, **options)

    def before_step(self, model: nn.Module) -> float | None:
        if not self.strength and self.budget is None:
            return None
        nats = super().before_step(model)
        if self.block is not None:
            self.block.mask_gradients()
        return nats

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        assert self.block is not None
        nats = super().after_step(model, optimizer)
        self.block.put_back()
        return nats

    def after_task(self, task: Task) -> None:
        self._release()
        super().after_task(task)
        self._measured = None

    def joined(self, curvature: Curvature | None, task: Task) -> Curvature | None:
        """As in `Fitted`; an activation curvature is that of before the task, not measured anew."""
        new, self._measured = self._measured, None
        if new is None or not self.task_weight:
            return super().joined(curvature, task)
        new = self._weighted(self.task_weight, reanchored(new, self.context.adapter.model))
        if curvature is None:
            return new
        return reanchored(curvature, self.context.adapter.model) + new

    def restore(self, state: dict[str, Tensor]) -> None:
        self._release()
        super().restore(state)

    def _release(self) -> None:
        if self.block is not None:
            self.block.release()
        self.block = None
