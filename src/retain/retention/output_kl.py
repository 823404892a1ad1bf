"""The true divergence on rows of the source, now and then, beside the force.

The force is quadratic and factored, and where many layers and positions move one way it predicts
too little (docs/log.md, "Where the quadratic's missing factor is"). So every `every`-th step also
has the gradient of

    every * weight * KL(base || tuned),   the mean over the predictions of `batch` rows,

whose base is the model with its adapter off (Li and Hoiem, arXiv 1606.09282, on text that is not
the task's), or the adapter that a curvature is around, if that had learned before. On average a
step weighs one nat of it as `weight` nats of task loss. Like the force it is added after
accumulation and clipping, and made no longer than the gradient that it is added to: unbounded it
took the model further from its base than the plain force did (docs/log.md). Of chats, the
beginnings of their answers are read: there a model that learns a task first answers in the task's
form (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retain.data.batches import Example, collate
from retain.errors import ConfigError, ModelError, SourceError, check_number
from retain.models.forward import logit_divergence, no_autocast
from retain.models.generating import chat_form
from retain.models.shards import local, reshard, wholes
from retain.models.view import ModelView

__all__ = ["OutputKL", "Outputs", "beginnings"]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class OutputKL:
    """Options of the divergence that is trained against; see the module.

    Args:
        weight: nats of task loss that one nat of divergence weighs; 0 for none.
        every: steps from one to the next.
        batch: rows that are read in one.
        answers: tokens that are read of each answer, of rows that are chats, and rows that are none
            are left out where there are chats; 0 for all rows, whole.

    Raises:
        ConfigError: a value out of range.
    """

    weight: float = 1.0
    every: int = 4
    batch: int = 4
    answers: int = 8

    def __post_init__(self) -> None:
        check_number("the weight of the KL is out of range", self.weight, "kl=1")
        for name, value, least in (
            ("every", self.every, 1), ("batch", self.batch, 1), ("answers", self.answers, 0),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(
                    f"{name} is out of range", got=value, allowed=f"{least} or more",
                    fix=f"leave {name} out",
                )  # fmt: skip


class Outputs:
    """Adds the gradient of `OutputKL` to the weights' gradients.

    Args:
        view: of a causal model with an adapter that can be switched off. Without a tokenizer, rows
            are read whole.
        rows: tokenised source text.
        options: see `OutputKL`.
        seed: of the order of the rows.
        steps: that have been made before, of a training that goes on.
        base: inside what it gives the model is what it is to stay near; its adapter off by default.

    Attributes:
        steps: that have been made.
        last: the divergence where it was last measured, in nats a prediction; NaN before.

    Raises:
        ConfigError: a classifier, for whose new head the base has no answer.
        ModelError: a model whose base is not what it is with its adapter off, or without one.
        SourceError: no rows.
    """

    def __init__(
        self, view: ModelView, rows: Sequence[Example], options: OutputKL, *, seed: int = 0,
        steps: int = 0, base: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:  # fmt: skip
        if not view.causal:
            raise ConfigError(
                "a classifier's base has no answer that a new head could stay near",
                got=f"kl={options.weight:g}",
                allowed="a causal model, or kl=0",
                fix="leave kl out",
            )
        if not rows:
            raise SourceError(
                "the KL has no text to be measured on",
                got="no rows",
                allowed="1 row or more",
                fix="source='self' with the model's tokenizer, or rows of text",
            )
        self._base = view.off if base is None else base
        try:  # nothing else may train, wherever it is measured from
            with view.off():
                pass
        except ModelError as error:
            raise ModelError(
                f"the KL has no base to be measured from: {error.what}",
                got=error.got, allowed=error.allowed, fix=f"{error.fix}; or leave kl out",
            ) from error  # fmt: skip
        self.view, self.options, self.seed, self.steps = view, options, seed, steps
        self.rows = beginnings(view, rows, options.answers) if options.answers else list(rows)
        self.last = torch.tensor(float("nan"))

    def add(self, settle: Callable[[], None] = _nothing, *, apart: bool = False) -> None:
        """After a step's last backward pass: adds to the gradients, where the step is its turn.

        Args:
            settle: called behind the backward pass, when the gradients are those of the divergence
                alone; what else is to be done to them.
            apart: take the gradient with `torch.autograd.grad`, which no hook of DeepSpeed's hears
                as a backward pass would be heard.
        """
        step, self.steps = self.steps, self.steps + 1
        if step % self.options.every:
            return
        batch = collate(self._chosen(step // self.options.every), self.view.pad)
        batch = batch.to(self.view.device)
        reshard(self.view.model)  # of divided weights the gradient is that of this process's part
        weights = [w for w in self.view.model.parameters() if w.requires_grad]
        task = [w.grad for w in weights]
        for w in weights:
            w.grad = None
        with self.view.evaluating(), torch.enable_grad():
            with torch.no_grad(), self._base():
                base = self.view.logits(batch)
            kl = logit_divergence(base, self.view.logits(batch)).mean()
            weighed = self.options.every * self.options.weight * kl
            if apart:
                found = torch.autograd.grad(weighed, weights, allow_unused=True)
                for w, gradient in zip(weights, found, strict=True):
                    w.grad = gradient
            else:
                weighed.backward()
        settle()
        self.last = kl.detach()
        new = [w.grad for w in weights]
        with no_autocast(), torch.no_grad():
            length = _length([g for g in new if g is not None])
            share = _length([t for t in task if t is not None]) / length
            share = share.nan_to_num(0.0).clamp(max=1.0)
            for w, old, gradient in zip(weights, task, new, strict=True):
                w.grad = gradient if old is None else old
                if gradient is not None:
                    part = local(gradient)
                    part.mul_(share.to(part))
                    if old is not None:
                        local(old).add_(part)

    def _chosen(self, time: int) -> list[Example]:
        """Of the `time`-th time: all rows in an order by the seed, then all again in another."""
        size, count = self.options.batch, len(self.rows)
        places = (divmod(i, count) for i in range(time * size, (time + 1) * size))
        return [self.rows[self._order(epoch)[i]] for epoch, i in places]

    def _order(self, epoch: int) -> list[int]:
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=random).tolist()


def _length(gradients: list[Tensor]) -> Tensor:
    """Of all together, of divided ones that of all parts; on the first one's device."""
    every = wholes(gradients)
    if not every:
        return torch.zeros(())
    norms = [norm.to(every[0].device).float() for norm in torch._foreach_norm(every)]
    length: Tensor = torch.stack(norms).norm()
    return length


def beginnings(view: ModelView, rows: Sequence[Example], tokens: int) -> list[Example]:
    """Of rows that are chats, as far as the beginning of the first answer, which alone predicts.

    Args:
        view: with the tokenizer, whose chat form tells where answers begin.
        rows: tokenised text.
        tokens: of an answer at most.

    Returns:
        The chats among them; all rows as they are where none is one.
    """
    form = None if view.tokenizer is None else chat_form(view.tokenizer)
    tail = [] if form is None else form[1]
    found = []
    for row in rows if tail else ():
        text = [*row.tokens, row.targets[-1]]
        ends = (i + len(tail) for i in range(len(text)) if text[i : i + len(tail)] == tail)
        first = next(ends, len(text))  # the place of the answer's first token
        if first < len(text):
            cut = row.cut(first + tokens - 1)
            told = tuple(i >= first - 1 and p for i, p in enumerate(cut.predict))
            found.append(replace(cut, predict=told))
    return [row for row in found if any(row.predict)] or list(rows)
