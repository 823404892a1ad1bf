"""Output KL: the model's predictions stay near those of a teacher (Li and Hoiem, arXiv 1606.09282).

A decoder's teacher is the base model, the adapter being off:

    strength * mean over predictions of  sum_v p(v) (log p(v) - log q(v)),

with p the base model's and q the tuned model's distribution over the vocabulary. On the task's own
inputs (``on="task"``) nothing is stored, but the term resists learning too; on the source text it
does not, and a row of the source is read beside each row of the task.

A classifier's head is new, so the base model has no answer to hold to. Its teacher is the model as
it was before the task, on the columns of the tasks learned so far (learning without forgetting
proper): the term is the sum over earlier tasks of the same KL over their columns, or of the squared
difference for a regression's single column. During the first task there is none.

Target-masked KL (arXiv 2605.29498) is what the base model thought of all tokens but the target. At
a prediction with target y, both distributions lose y and are normalised again,

    p'(v) = p(v) / (1 - p(y)),   q'(v) = q(v) / (1 - q(y))   for v != y,

and the term is ``strength * mean over predictions of sum_{v != y} p'(v) (log p'(v) - log q'(v))``.
Raising q(y) alone changes no q', so the term never speaks against learning the target. It is on the
task's own inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from retain.data.batches import Batch, Example, collate
from retain.errors import unknown
from retain.models.forward import evaluating, forward_logits, logit_divergence
from retain.retention.bounds import check_strength
from retain.retention.method import Context, Method, Task

__all__ = ["KL", "MaskedKL", "masked_divergence"]

ON = ("task", "source")


class KL(Method):
    """KL of the outputs; see the module.

    Args:
        strength: nats of task loss that one nat of KL weighs; 0 is plain training, bit for bit.
        on: which inputs: ``task`` or ``source``. The i-th row of a task is paired with the same row
            of the source in each epoch, whose mean KL counts as often as the row has predictions.

    Raises:
        ConfigError: another name or a strength out of range.
    """

    name: ClassVar[str] = "kl"

    def __init__(self, strength: float = 1.0, *, on: str = "task") -> None:
        super().__init__(strength)
        check_strength(strength)
        if on not in ON:
            raise unknown("on", on, ON)
        self.on = on
        self.seen: list[tuple[int, int]] = []
        self.inputs: Sequence[Example] = []
        self.teacher: Tensor | None = None

    def begin(self, context: Context) -> None:
        super().begin(context)
        if self.on == "source":
            fix = "give a source, or on: task"
            context.check_source("the KL on the source needs source text", fix)

    def before_task(self, task: Task) -> Sequence[Example]:
        self.inputs, self.teacher = task.examples, None
        if self.on == "source":  # another order for each task
            random = torch.Generator().manual_seed(task.seed)
            source = self.context.source
            order = torch.randperm(len(source), generator=random).tolist()
            self.inputs = [source[i] for i in order]
        if task.columns is not None and self.seen and self.strength:
            model, size = self.context.adapter.model, self.context.batch_size
            parts = [self.inputs[i : i + size] for i in range(0, len(self.inputs), size)]
            self.teacher = torch.cat([_said(model, self._batch(part)) for part in parts])
        return task.examples

    def loss(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor | None:
        if not self.strength or (batch.predict is None and self.teacher is None):
            return None
        rows, read = [i % len(self.inputs) for i in batch.rows], batch
        if self.on == "source":
            read = self._batch([self.inputs[i] for i in rows])
            logits = forward_logits(model, read)
        if self.teacher is not None:
            old = self.teacher[rows].to(logits.device)
            terms = [_apart(old[:, a:b], logits[:, a:b]) for a, b in self.seen]
            each = torch.stack(terms).sum(0)
        else:
            with self.context.adapter.off() as base:
                said = _said(base, read)
            each = self.compare(said, logits, read.targets)
        if self.on == "source":  # one mean for each row, which weighs as its partner does
            means = torch.stack([part.mean() for part in each.split(read.lengths)])
            weights = means.new_tensor(batch.lengths)
            return self.strength * (means * weights).sum() / weights.sum()
        return self.strength * each.mean()

    def compare(self, base: Tensor, tuned: Tensor, targets: Tensor) -> Tensor:
        """Nats for each prediction, from logits [predictions, vocabulary] and next tokens."""
        return logit_divergence(base, tuned)

    def after_task(self, task: Task) -> None:
        self.teacher, self.inputs = None, []
        if task.columns is not None:
            self.seen.append((task.columns.start, task.columns.stop))

    def state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(self.seen)} if self.seen else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        rows = state["seen"].tolist() if "seen" in state else []
        self.seen = [(start, stop) for start, stop in rows]

    def _batch(self, examples: Sequence[Example]) -> Batch:
        view = self.context.adapter.view
        return collate(examples, view.pad).to(view.device)


class MaskedKL(KL):
    """KL without the target, on the task's own inputs; see the module, and `KL` for `strength`."""

    name: ClassVar[str] = "masked_kl"
    why_not: ClassVar[dict[str, str]] = {
        "classifier": "a new head has nothing to hold to among a task's own classes, and without "
        "the target it is the same as kl among those of earlier tasks",
    }

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__(strength)

    def compare(self, base: Tensor, tuned: Tensor, targets: Tensor) -> Tensor:
        return masked_divergence(base, tuned, targets)


def masked_divergence(base: Tensor, tuned: Tensor, targets: Tensor) -> Tensor:
    """`logit_divergence` of [rows, classes] over all classes but each row's target."""
    keep = torch.ones_like(base, dtype=torch.bool).scatter_(1, targets[:, None], False)
    shape = (len(base), base.shape[1] - 1)
    return logit_divergence(base[keep].view(shape), tuned[keep].view(shape))


def _said(teacher: nn.Module, batch: Batch) -> Tensor:
    """A teacher's logits, all columns of them, without a graph and without dropout."""
    with evaluating(teacher), torch.no_grad():
        return forward_logits(teacher, batch)


def _apart(teacher: Tensor, logits: Tensor) -> Tensor:
    """The KL over an earlier task's columns, or the squared difference of its single one."""
    if teacher.shape[-1] > 1:
        return logit_divergence(teacher, logits)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(wide) - teacher.to(wide)).square()[:, 0]
