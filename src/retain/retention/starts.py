"""LoRA whose A and B begin at parts of the weights: methods that differ in which parts.

They are published for one fine-tuning: W is split into ``R + s B_0 A_0``, the residual R is
frozen, and A and B train from B_0 and A_0. Here the base stays as it is, and the adapter counts
from it: each task gets 2 r fresh rows, of which r hold ``-B_0 A_0`` and are frozen, and r begin at
``B_0 A_0`` and train. That is PEFT's own conversion of such adapters to plain LoRA, done at the
start. In a sequence W is the base with what was learned before, which stays as it is; what is to be
kept is what the layers read on the source text and on the rows of all tasks before, the second
moments S_old (the mean over the sets). Where there is nothing to keep yet (the first task of a
classifier), a task is learned by plain LoRA. The adapter's rank grows by 2 r a task, and is never
cut.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retain.curvature.blocks.factor import DenseFactor
from retain.data.batches import Example
from retain.models.lora import grow_lora
from retain.models.off import adapter_off
from retain.models.sites import LoraSite, lora_sites
from retain.retention.fresh_rows import FrozenRows, fresh_rows
from retain.retention.growing import Growing
from retain.retention.method import Context, Task
from retain.retention.moments import Moments, check_rows, input_moments
from retain.retention.state import choose

__all__ = ["Start", "split"]

Factors = tuple[Tensor, Tensor]
"""B, [d_out, r], and A, [r, d_in]."""


class Start(Growing):
    """See the module; a member says where A and B begin.

    Args:
        rows: of the source text, and of each task, whose activations are read.

    Raises:
        ConfigError: a value out of range.
    """

    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})
    why_not: ClassVar[dict[str, str]] = dict.fromkeys(
        ("full", "bottleneck", "prefix"), "it is a start of LoRA's A and B"
    )
    weighted: ClassVar[bool] = False
    reads_new: ClassVar[bool] = False
    """Whether it looks at the task's own rows."""

    def __init__(self, *, rows: int = 64) -> None:
        super().__init__()
        check_rows(rows)
        self.rows = rows
        self.old: Moments | None = None
        self.sets = 0
        self.frozen: FrozenRows | None = None

    @abstractmethod
    def starts(
        self, weights: dict[str, Tensor], rank: int, old: Moments, new: Moments | None
    ) -> dict[str, Factors]:
        """B_0 and A_0 of each layer, without the scaling, from its present weight."""

    def begin(self, context: Context) -> None:
        super().begin(context)
        self.old, self.sets = None, 0
        if context.source:
            with adapter_off(context.adapter.model):
                self._keep(context.source, context.seed)

    def before_task(self, task: Task) -> Sequence[Example]:
        self._release()
        if self.old is None:
            return task.examples
        sites, rank = lora_sites(self.context.adapter.model), self.rank
        new = self._read(task.examples, task.seed) if self.reads_new else None
        weights = {site.name: _present(site) for site in sites}
        found = self.starts(weights, rank, self.old, new)
        more = rank if fresh_rows(sites) == slice(None) else 2 * rank
        model: Any = self.context.adapter.model
        self.attach(grow_lora(model, more, seed=task.seed))
        sites = lora_sites(self.context.adapter.model)
        with torch.no_grad():
            for site in sites:
                b, a = found[site.name]
                for rows, sign in ((slice(-2 * rank, -rank), -1), (slice(-rank, None), 1)):
                    site.a[rows] = a.to(site.a)
                    site.b[:, rows] = sign * (b / site.scaling).to(site.b)
        self.frozen = FrozenRows(sites, slice(sites[0].rank - rank, None))
        return task.examples

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        if self.frozen is not None:
            self.frozen.after_step()
        return None

    def after_task(self, task: Task) -> None:
        self._release()
        if task.index + 1 < self.context.tasks:
            self._keep(task.examples, task.seed)

    def state(self) -> dict[str, Tensor]:
        if self.old is None:
            return {}
        about = json.dumps([self.sets, self.old.readers]).encode()
        kept = {f"old.{name}": self.old.of(name) for name in sorted(self.old.factors)}
        return {"about": torch.frombuffer(bytearray(about), dtype=torch.uint8)} | kept

    def restore(self, state: dict[str, Tensor]) -> None:
        self._release()
        if "about" not in state:
            return
        self.sets, readers = json.loads(bytes(np.asarray(state["about"])))
        kept = {n.removeprefix("old."): DenseFactor(t) for n, t in state.items() if n != "about"}
        self.old = Moments(kept, readers)

    def _read(self, rows: Sequence[Example], seed: int) -> Moments:
        model = self.context.adapter.model
        chosen = choose(rows, self.rows, seed)
        return input_moments(
            model, lora_sites(model), chosen, answers=0.0, batch_size=self.context.batch_size
        )

    def _keep(self, rows: Sequence[Example], seed: int) -> None:
        found, self.sets = self._read(rows, seed), self.sets + 1
        if self.old is not None:
            found = found.times(1 / self.sets).plus(self.old.times(1 - 1 / self.sets))
        self.old = found

    def _release(self) -> None:
        if self.frozen is not None:
            self.frozen.release()
        self.frozen = None


def split(product: Tensor, rank: int) -> Factors:
    """B and A of the first singular directions of a product, alike in size: ``B A = U S V^T``."""
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _present(site: LoraSite) -> Tensor:
    """The weight of a layer with what the adapter has learned, in float32 at least."""
    layer: Any = site.layer.get_base_layer()
    weight: Tensor = layer.weight.detach()
    kind = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(kind) + site.scaling * site.b.detach().to(kind) @ site.a.detach().to(kind)
