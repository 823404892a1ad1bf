"""Quadratic penalties: fit a curvature, hold the model with it, carry it on.

The online Laplace approximation (Ritter et al. 2018, arXiv 1805.07810): before the first task the
curvature F_0 of the source text is measured at the base model. While task t is learned, the force
is that of ``strength * 0.5 (w - w_{t-1})^T F (w - w_{t-1})``. After it, the curvature of the task's
own rows at the new weights joins, ``F <- F + F_t``, and the anchor moves there. Memory and the time
of a step do not grow with the tasks (see `retain.curvature.merge` for what that loses).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from retain.curvature.curvature import Curvature, reanchored
from retain.curvature.fit.settings import FitSettings
from retain.data.batches import Example
from retain.errors import check_number, unknown
from retain.retention.bounds import check_budget, check_strength, check_update
from retain.retention.force import Force
from retain.retention.method import Context, Method, Task
from retain.retention.state import choose, pack_curvature, unpack_curvature
from retain.types import Fisher, Space, Structure, Update

__all__ = [
    "KFAC", "Activation", "CurvatureMethod", "Diagonal", "FittedPenalty", "Penalty", "Tridiagonal",
]  # fmt: skip

KRONECKER = ("kfac", "shampoo", "ekfac")


class CurvatureMethod(Method):
    """A method that keeps one curvature between tasks: the bytes of its file, anchor included."""

    curvature: Curvature | None = None

    def state(self) -> dict[str, Tensor]:
        return {} if self.curvature is None else {"curvature": pack_curvature(self.curvature)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.curvature = unpack_curvature(state["curvature"]) if "curvature" in state else None

    def memory(self) -> int:
        return 0 if self.curvature is None else self.curvature.memory()


class Penalty(CurvatureMethod, ABC):
    """Holds the model with a quadratic. A member says where its curvature comes from.

    Args:
        strength: nats of task loss that one nat of predicted forgetting weighs; 0 is plain
            training, bit for bit.
        update: ``gradient`` or ``proximal``; see `retain.retention.force`.
        consolidate: after each task its curvature joins and the anchor moves; else the model is
            held at its start throughout.
        budget: in place of the strength, nats per token that each task may spend, as the curvature
            sees it; see `retain.retention.budget`. Source text, where there is any, corrects it.

    Raises:
        ConfigError: a value out of range.
    """

    adapters: ClassVar[frozenset[str]] = frozenset({"lora", "full"})
    why_not: ClassVar[dict[str, str]] = {
        "bottleneck": "its modules start as the identity, where the Fisher of the weights before "
        "the last of each is exactly zero, so that most of it would not be held",
        "prefix": "it trains keys and values that are read beside the model's own, and no weight "
        "of a layer that a curvature could hold",
    }

    def __init__(
        self,
        strength: float = 10.0,
        *,
        update: Update = "gradient",
        consolidate: bool = True,
        budget: float | None = None,
    ) -> None:
        super().__init__(strength)
        check_strength(strength)
        if budget is not None:
            check_budget(budget)
        check_update(update)
        self.update, self.consolidate, self.budget = update, consolidate, budget
        self.force: Force | None = None

    @abstractmethod
    def at_begin(self, context: Context) -> Curvature | None:
        """What holds the model while it learns the first task."""

    @abstractmethod
    def joined(self, curvature: Curvature | None, task: Task) -> Curvature | None:
        """What holds the model after a task, around its present weights."""

    def begin(self, context: Context) -> None:
        super().begin(context)
        self.curvature = self.at_begin(context)

    def before_task(self, task: Task) -> Sequence[Example]:
        context, self.force = self.context, None
        if self.curvature is not None:
            self.force = Force(
                context.adapter.model,
                self.curvature,
                self.strength,
                budget=self.budget,
                probe=context.probe(),
                update=self.update,
                resuming=True,  # of several tasks only the first starts at the anchor
            )
        return task.examples

    def before_step(self, model: nn.Module) -> float | None:
        if self.force is None or self.update != "gradient":
            return None
        return self.force.add_force()

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        if self.force is None or self.update != "proximal":
            return None
        return self.force.apply_proximal(optimizer)

    def after_task(self, task: Task) -> None:
        if self.force is not None:
            self.force.finish()
        self.force = None
        if self.consolidate:
            self.curvature = self.joined(self.curvature, task)


class FittedPenalty(Penalty):
    """The same with a curvature that is measured. Without source text nothing holds the first task.

    A member says the curvature's structure.

    Args:
        strength: see `Penalty`.
        space: ``weight`` or ``adapter``; see `retain.types.Space`.
        fisher: whose labels, of the source text and of the tasks alike (other Fishers do not add);
            see `retain.curvature.fit.labels`.
        samples: draws of each label.
        rows: rows of the source text, and of each task, that are read at most.
        rank: of sketched factors; see `retain.fit_curvature`.
        source_weight: of the source text's curvature; 0 leaves it out.
        task_weight: of each task's.
        **options: of `Penalty`.

    Raises:
        ConfigError: a value out of range.
    """

    structure: Structure

    def __init__(
        self,
        strength: float = 10.0,
        *,
        space: Space = "weight",
        fisher: Fisher = "mc",
        samples: int = 1,
        rows: int = 128,
        rank: int | None = None,
        source_weight: float = 1.0,
        task_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(strength, **options)
        for name, weight in (("source_weight", source_weight), ("task_weight", task_weight)):
            check_number(f"{name} is out of range", weight, f"{name}: 1")
        FitSettings(self.structure, space, fisher, samples=samples, rows=rows, rank=rank)
        self.rows, self.source_weight, self.task_weight = rows, source_weight, task_weight
        self.options = {"space": space, "fisher": fisher, "samples": samples, "rank": rank}

    def at_begin(self, context: Context) -> Curvature | None:
        if not context.source or not self.source_weight:
            return None
        rows, seed = choose(context.source, self.rows, context.seed), context.seed
        found = context.fit_source(rows, self.structure, seed=seed, **self.options)
        return self.source_weight * found

    def joined(self, curvature: Curvature | None, task: Task) -> Curvature | None:
        if curvature is not None:
            curvature = reanchored(curvature, self.context.adapter.model)
        if not self.task_weight:
            return curvature
        found = self.task_weight * self.fit(task.examples, task.columns, task.seed)
        return found if curvature is None else curvature + found

    def fit(self, examples: Sequence[Example], columns: slice | None, seed: int) -> Curvature:
        """The curvature of rows at the model's present weights.

        Args:
            examples: at most `rows` of them are read.
            columns: the outputs of a classifier that answer them; None for all of them.
            seed: of label draws.
        """
        rows = choose(examples, self.rows, seed)
        return self.context.fit(rows, self.structure, columns=columns, seed=seed, **self.options)


class Diagonal(FittedPenalty):
    """EWC: the diagonal of the Fisher (Kirkpatrick et al. 2017, arXiv 1612.00796).

    In weight space the diagonal is that of the update's Fisher, in adapter space that of A and B.
    """

    name = "diagonal"
    structure: Structure = "diagonal"


class Tridiagonal(FittedPenalty):
    """K-FAC with links between neighbouring layers, positive by construction (arXiv 2512.17720)."""

    name = "tridiagonal"
    structure: Structure = "tridiagonal"


class Activation(FittedPenalty):
    """The inputs' second moments alone; no label or gradient is read."""

    name = "activation"
    structure: Structure = "activation"


class KFAC(FittedPenalty):
    """Kronecker-factored Laplace, ``F = S (x) G`` a layer (Ritter et al. 2018, arXiv 1805.07810).

    Its `structure` is ``kfac``, ``shampoo`` or ``ekfac`` (docs/curvature.md), else a `ConfigError`;
    the other arguments are those of `FittedPenalty`.
    """

    name = "kfac"

    def __init__(
        self, strength: float = 10.0, *, structure: Structure = "kfac", **options: Any
    ) -> None:
        if structure not in KRONECKER:
            raise unknown("structure", structure, KRONECKER)
        self.structure = structure
        super().__init__(strength, **options)
