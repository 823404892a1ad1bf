"""Joint training, a bound and no method of its own: all tasks so far at once, from the start.

Before each task the adapter is put back to its start, and learns all rows of all tasks so far.
After the last task that is multi-task training; the rows of the matrix before it are the reference
of Chaudhry et al. 2018 (arXiv 1801.10112), section 3.2. It takes (T + 1) / 2 times as long as the
sequence. Full replay, the other bound, goes on from the adapter as it is (``replay``, share 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from retain.data.batches import Example
from retain.retention.method import Context, Task
from retain.retention.methods.replay import Replay

__all__ = ["Joint"]


class Joint(Replay):
    """All tasks at once; see the module."""

    name: ClassVar[str] = "joint"

    def __init__(self) -> None:
        super().__init__(share=1.0)
        self.fits_head = False  # the head begins again too
        self.start: dict[str, Tensor] = {}

    def begin(self, context: Context) -> None:
        super().begin(context)
        self.start = context.adapter.state()

    def before_task(self, task: Task) -> Sequence[Example]:
        self.context.adapter.restore(self.start)
        return super().before_task(task)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"start.{name}": t for name, t in sorted(self.start.items())}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        start = {n.removeprefix("start."): t for n, t in state.items() if n.startswith("start.")}
        self.start = start
