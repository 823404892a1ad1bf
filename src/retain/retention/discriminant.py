"""A discriminant start: each task learns where its inputs are strong and those before are weak.

A layer's update ``s B A`` reads its input x through A alone. With S_new and S_old the second
moments of x on the new task's rows, and on the source text and all tasks before, A's rows are the
top generalised eigenvectors a of

    S_new a = mu (S_old + epsilon mean(diag S_old) I) a ,

the directions in which a unit of what the update reads of the old text buys most of the new
(Fisher's discriminant; Fukunaga, Introduction to Statistical Pattern Recognition, ch. 10). They
are scaled to the energy of PEFT's usual start, ``a^T S_new a = tr S_new / (3 d)``, and stay as they
are: B alone learns, so that a layer's update is linear in what is trained, and the penalty on B is
exact on A's side. S_new is measured once, before the task. Each task has a block of its own, see `retain.retention.blocks`; the adapter of
the tasks before is kept as it is. Stored are S_old and, for a penalty, the output sides: no data.

Related: InfLoRA (arXiv 2404.00228) and CorDA's knowledge-preserved mode (arXiv 2406.05223) leave
the old directions alone instead of weighing new against old (``start: null``: the strongest new
directions outside the span of 99 % of the old energy).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retain.curvature.curvature import Curvature
from retain.curvature.factor import Factor
from retain.curvature.merge import reanchored
from retain.curvature.spectral import eigh
from retain.data.batches import Example
from retain.errors import ConfigError, unknown
from retain.retention.blocks import Block, block_options
from retain.retention.curved import Fitted
from retain.retention.method import Task
from retain.retention.rows import choose
from retain.types import Structure

__all__ = ["Discriminant", "discriminants"]

STARTS = ("discriminant", "principal", "null", "random")
SIGNALS = ("inputs", "gradients")
STRUCTURES = ("activation", "kfac", "shampoo")

ROUNDS, SPARE = 12, 8
"""Of the subspace iteration, and the directions that it carries beside those wanted."""

SPANNED = 0.99
"""Of the old inputs' energy, which ``null`` stays out of."""


class Discriminant(Fitted):
    """LoRA from a discriminant start, with a penalty on B where `strength` is above 0.

    Args:
        strength: of the penalty, see `Fitted`. 0 holds nothing: the start alone is at work.
        structure: of the curvature that holds B, and gives S_old: ``activation``, ``kfac`` or
            ``shampoo``.
        start: ``discriminant``; ``principal`` (S_new alone), ``null`` (see the module) or
            ``random`` (PEFT's own draw).
        signal: what S_new is the second moment of: ``inputs``, or the rows of each sequence's loss
            ``gradients`` (E[J^T J] with the data's labels). S is then theirs in the scale too.
        epsilon: see the module.
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
        if not epsilon > 0:
            raise ConfigError(
                "epsilon is out of range", got=epsilon, allowed="above 0", fix="epsilon: 0.01"
            )
        self.structure, self.start, self.signal = structure, start, signal
        self.epsilon, self.train_a = epsilon, train_a
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
        span, new = self.block.span, self._new(task)
        if self.signal == "inputs" and self.structure == "activation":
            self._measured = new
        found: dict[int, Tensor] = {}  # layers that read one input have one start
        with torch.no_grad():
            for site in self.block.sites:
                near: Any = new.blocks[site.name]
                if id(near.inputs) not in found:
                    rows = self._rows(site.name, near.inputs, span.stop - span.start, task.seed)
                    found[id(near.inputs)] = _scaled(rows, near.inputs)
                site.a[span] = found[id(near.inputs)].to(site.a.dtype)

    def _rows(self, name: str, near: Factor, count: int, seed: int) -> Tensor:
        held: Any = None if self.curvature is None else self.curvature.blocks[name]
        new, old = near.dense(), None if held is None else held.inputs.dense()
        if self.start == "principal" or old is None:
            return discriminants(new, None, count, seed=seed)
        if self.start == "null":
            return discriminants(_outside(new, old), None, count, seed=seed)
        return discriminants(new, old, count, epsilon=self.epsilon, seed=seed)

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


def discriminants(
    new: Tensor, old: Tensor | None, count: int, *, epsilon: float = 0.01, seed: int = 0
) -> Tensor:
    """The top generalised eigenvectors of (new, old + epsilon mean(diag old) I), as rows.

    By subspace iteration, which finds the span of the top ones long before each of them.

    Args:
        new: [size, size], positive semi-definite.
        old: likewise; None stands for the identity.
        count: of them.
        epsilon: what the weakest directions of `old` count as, relative to its mean.
        seed: of the first guess.

    Returns:
        [count, size], orthonormal in the second matrix, the largest ratio first.
    """
    size = new.shape[0]
    wide = new.to(torch.promote_types(new.dtype, torch.float32))
    root = eye = torch.eye(size).to(wide)
    if old is not None:
        held = old.to(wide)
        root = torch.linalg.cholesky(held + epsilon * held.diagonal().mean() * eye)
    random = torch.Generator().manual_seed(seed)
    basis = torch.randn(size, min(size, count + SPARE), generator=random).to(wide)

    def through(x: Tensor) -> Tensor:
        x = wide @ torch.linalg.solve_triangular(root.T, x, upper=True)
        y: Tensor = torch.linalg.solve_triangular(root, x, upper=False)
        return y

    for _ in range(ROUNDS):
        basis = torch.linalg.qr(through(basis)).Q
    image = basis.T @ through(basis)
    turn = torch.linalg.eigh((image + image.T) / 2).eigenvectors.flip(1)
    rows: Tensor = torch.linalg.solve_triangular(root.T, basis @ turn[:, :count], upper=True).T
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows.mul_(largest.sign())  # an eigenvector has no sign of its own


def _outside(new: Tensor, old: Tensor) -> Tensor:
    """What is left of `new` outside the span of 99 % of the trace of `old`."""
    values, vectors = eigh(old)
    below = values.clamp(min=0).cumsum(0) < (1 - SPANNED) * values.clamp(min=0).sum()
    below[0] = True  # the weakest direction at least
    weak = vectors[:, below]
    left: Tensor = weak @ (weak.T @ new @ weak) @ weak.T
    return left


def _scaled(rows: Tensor, near: Factor) -> Tensor:
    """Rows a with ``a^T S a = tr S / (3 d)``: what PEFT's draw reads of the new inputs."""
    reads = (rows * near.matmul(rows.T).T).sum(1, keepdim=True)
    floor = reads.max() * 1e-6  # a direction without inputs stays weak
    return rows * (near.trace() / (3 * near.size) / reads.clamp(min=floor)).sqrt()
