"""One way to keep a model from forgetting while it learns one task after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from retain.curvature.curvature import Curvature
from retain.data.batches import Batch, Example
from retain.errors import ConfigError, SourceError
from retain.models.adapters.base import Adapter
from retain.retention.budget import PROBE_ROWS
from retain.retention.state import choose
from retain.retention.task_curvature import fit_rows
from retain.types import HeadStart, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Context", "Method", "Task"]


@dataclass
class Task:
    """One task of a sequence, as a method sees it.

    Attributes:
        name: of the task.
        index: its place in the sequence, from 0.
        examples: its tokenised training rows.
        columns: outputs of a classifier that answer it (one: a regression); None for a decoder.
        seed: of everything random in this task's training.
    """

    name: str
    index: int
    examples: Sequence[Example]
    columns: slice | None = None
    seed: int = 0


@dataclass
class Context:
    """What every method may use.

    Attributes:
        adapter: what is trained.
        tokenizer: of its base model.
        source: tokenised source text, what the base model is to keep (maybe none).
        tasks: how many tasks the sequence has.
        batch_size: rows a pass.
        seed: of the run.
        progress: show bars.
        shared: lets runs of a study share a fit of the source. It is given the rows and settings
            that tell one fit from another, and a function that makes it (`retain.study.fits`).
    """

    adapter: Adapter
    tokenizer: PreTrainedTokenizerBase
    source: Sequence[Example] = field(default_factory=list)
    tasks: int = 1
    batch_size: int = 8
    seed: int = 0
    progress: bool = False
    shared: Callable[[Mapping[str, Any], Callable[[], Curvature]], Curvature] | None = None

    def fit(
        self, rows: Sequence[Example], structure: Structure = "kfac", **options: Any
    ) -> Curvature:
        """The curvature of rows at the present weights; see `fit_rows`."""
        return fit_rows(
            self.adapter.model, rows, structure, batch_size=self.batch_size,
            progress=self.progress, **options,
        )  # fmt: skip

    def fit_source(
        self, rows: Sequence[Example], structure: Structure = "kfac", **options: Any
    ) -> Curvature:
        """`fit` of source rows, before anything is learned; runs that want the same share one."""
        if self.shared is None:
            return self.fit(rows, structure, **options)
        about = {"rows": repr(rows), "structure": structure, "size": self.batch_size, **options}
        return self.shared(about, lambda: self.fit(rows, structure, **options))

    def probe(self) -> list[Example]:
        """Rows of the source text to measure a budget on; a classifier's is of predicted nats."""
        if not self.adapter.view.causal:
            return []
        return choose(self.source, PROBE_ROWS, self.seed)

    def check_source(self, what: str, fix: str) -> None:
        """Raises `SourceError` where there is no source text."""
        if not self.source:
            raise SourceError(what, got="none", allowed="at least one row", fix=fix)


class Method:
    """A retention method. Its defaults are plain training; a member overrides what it needs.

    Order of calls: `adapter_options`, `begin`, then for each task `before_task`, training (for
    each micro-batch `loss`; for each optimiser step, after accumulation and clipping,
    `before_step` and then `after_step`), `after_task`.

    Attributes:
        name: in a study.
        adapters: the kinds of adapter it composes with.
        stores_data: whether it keeps rows of earlier tasks (replay).
        why_not: for a kind of adapter that it does not compose with, the reason; under
            ``classifier``, why it needs a causal model, where it does.
        weighted: whether it has a `strength`; else it takes none.
        fits_head: whether a study's ``head: fitted`` is for it; where not, it is refused.
        head: how the outputs of a classifier's task begin: ``drawn`` at random, or ``fitted`` to
            the model as it is (`retain.retention.head`). What runs the method sees to it.
        later: options that came after runs had been kept, with what those had: runs with it are
            the same runs.
    """

    name: ClassVar[str]
    adapters: ClassVar[frozenset[str]] = frozenset({"lora", "full", "bottleneck", "prefix"})
    stores_data: ClassVar[bool] = False
    why_not: ClassVar[dict[str, str]] = {}
    weighted: ClassVar[bool] = True
    head: ClassVar[HeadStart] = "drawn"
    later: ClassVar[dict[str, Any]] = {}
    fits_head: bool = True

    def __init__(self, strength: float = 0.0) -> None:
        self.strength = strength

    @classmethod
    def check(cls, adapter: str, causal: bool = True) -> None:
        """Checks that the method composes with a kind of adapter, and with a decoder (`causal`).

        Raises:
            ConfigError: it does not; the error says why.
        """
        osf = "osf splits its weights anew before each task, which the method osf alone does"
        reasons = {"osf": osf} | cls.why_not
        if adapter not in cls.adapters:
            why = reasons.get(adapter, "nobody has derived it")
            raise ConfigError(
                f"the method {cls.name} does not compose with this adapter: {why}", got=adapter,
                allowed=", ".join(sorted(cls.adapters)),
                fix="choose another adapter or another method",
            )  # fmt: skip
        if not causal and "classifier" in reasons:
            raise ConfigError(
                f"the method {cls.name} needs a causal model: {reasons['classifier']}",
                got="a classifier", allowed="a decoder", fix="choose another method",
            )  # fmt: skip

    def adapter_options(self, options: dict[str, Any], tasks: int) -> dict[str, Any]:
        """Options of the adapter, before it is attached."""
        return options

    def trained(self, count: int, tasks: int) -> int:
        """Of the trainable parameters of the adapter as it is attached, those of the first task."""
        return count

    def begin(self, context: Context) -> None:
        """Once, with the adapter fresh: what the base model relies on is measured here.

        Raises:
            ConfigError: the method does not compose with the adapter or the model.
        """
        self.check(context.adapter.kind, context.adapter.view.causal)
        self.context = context

    def before_task(self, task: Task) -> Sequence[Example]:
        """Before a task is learned; returns the rows to train on (replay adds some)."""
        return task.examples

    def loss(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor | None:
        """A term of the loss of one micro-batch, in nats per prediction, with its graph.

        Its strength is in it. It is a mean over the batch's predictions, so that a step's term is
        the mean of its micro-batches', weighted by their predictions. The batch's ``rows`` number
        those that `before_task` gave; `logits` are [predictions, classes], all columns of a
        classifier.
        """
        return None

    def before_step(self, model: nn.Module) -> float | None:
        """Changes gradients; returns predicted nats, where the method predicts any."""
        return None

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        """Changes weights after the optimiser's step; returns predicted nats or None."""
        return None

    def after_task(self, task: Task) -> None:
        """After a task is learned: consolidation."""

    def state(self) -> dict[str, Tensor]:
        """What it has learned, besides `constant`, as tensors that `safetensors` can write."""
        return {}

    def constant(self) -> dict[str, Tensor]:
        """What it has learned that no task changes, likewise: written once a run."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts `state` and `constant` back: called in `begin`'s place in a resumed run.

        The context has been set (``self.context``); nothing is measured anew.
        """

    def fit_adapter(self, state: dict[str, Tensor]) -> None:
        """In a resumed run, before the adapter's `state` is put back: its size may have changed."""

    def memory(self) -> int:
        """Bytes that it keeps between tasks."""
        kept = [*self.state().values(), *self.constant().values()]
        return sum(t.numel() * t.element_size() for t in kept)
