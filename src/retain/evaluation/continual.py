"""What a sequence of tasks did, from its accuracy matrix.

``R[i][j]`` is the score of task j after learning task i, for tasks 1 .. T in the order in which
they were learned; ``b[j]`` is the score of task j before any was learned. More is better in every
score. With the sign as given, more is better in average, learning and both transfers, and less is
better in forgetting and intransigence.

    average            mean over j of R[T][j]: the score at the end (Lopez-Paz & Ranzato 2017,
                       arXiv 1706.08840, ACC in section 3)
    learning           mean over j of R[j][j]: the score right after learning (Riemer et al. 2019,
                       arXiv 1810.11910, learning accuracy)
    forgetting         mean over j < T of (max over i < T of R[i][j]) - R[T][j]: what was lost
                       since its best (Chaudhry et al. 2018, arXiv 1801.10112, section 3.2). As
                       there, the maximum is over every earlier row, also those from before task j
                       was learned. Negative where the end is the best.
    backward_transfer  mean over j < T of R[T][j] - R[j][j]: what later tasks did to a learned one
                       (Lopez-Paz & Ranzato 2017, BWT)
    forward_transfer   mean over j > 1 of R[j-1][j] - b[j]: what earlier tasks did to one that was
                       not yet learned (Lopez-Paz & Ranzato 2017, FWT; their b is a random
                       initialisation, here it is the pretrained model, untrained on any task)
    intransigence      mean over j of a[j] - R[j][j], with a[j] the score of a reference that
                       learned task j without the constraint: what holding on cost in learning
                       (Chaudhry et al. 2018, section 3.2, averaged over the tasks. Their reference
                       learns all tasks up to j at once; a model that learns task j alone is the
                       usual, cheaper one. Say which was used.)

Without a second task forgetting and both transfers are None; without b forward transfer is, and
without references intransigence. This module is plain Python and can be used on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from retain.errors import ConfigError

__all__ = ["METRICS", "OWN", "Continual", "continual_metrics"]

OWN = ("log_ratio", "first_word")
"""Of a run's own answers to general prompts; see `retain.evaluation.answers`."""

METRICS = (
    "average", "learning", "forgetting", "backward_transfer", "forward_transfer",
    "intransigence", "share_of_independent", "loss", "kl", "ppl_ratio", "flips", "general",
    "share", "update_size", *OWN,
)  # fmt: skip
"""What the tables of a study have of each cell, besides ``score:TASK``.

``share_of_independent`` is the average score over the mean score of one adapter a task, each
trained alone; ``general`` the mean change of the general tasks; ``share`` the trained parameters
over those of the base model; ``update_size`` the mean ``log ||dW x||`` of LoRA's layers at the end.
"""


@dataclass(frozen=True)
class Continual:
    """The metrics of a sequence; their definitions are the module's.

    Attributes:
        average: score at the end.
        learning: score right after learning.
        forgetting: lost since the best.
        backward_transfer: change since learning.
        forward_transfer: gain before learning.
        intransigence: below the reference right after learning.
    """

    average: float
    learning: float
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    intransigence: float | None

    def to_dict(self) -> dict[str, float | None]:
        """As plain data for JSON."""
        return asdict(self)


def continual_metrics(
    matrix: Sequence[Sequence[float]],
    before: Sequence[float] | None = None,
    references: Sequence[float] | None = None,
) -> Continual:
    """The metrics of an accuracy matrix.

    Args:
        matrix: ``R``, [tasks, tasks]; NaN, off the diagonal and before the last row, where a task
            was not scored. Forward transfer is None without the scores right above the diagonal.
        before: ``b``, [tasks].
        references: ``a``, [tasks].

    Raises:
        ConfigError: shapes that do not fit.
    """
    n = len(matrix)
    widths = {len(row) for row in matrix} | {len(v) for v in (before, references) if v is not None}
    if not n or widths != {n}:
        raise ConfigError(
            "an accuracy matrix that is not square",
            got=f"{n} rows, lengths {sorted(widths)}",
            allowed="as many scores in each row (and in before, and in references) as tasks",
            fix="score every task after each of them",
        )
    last, diagonal = matrix[-1], [matrix[j][j] for j in range(n)]
    ahead = [matrix[j - 1][j] for j in range(1, n)]
    best = [_best([row[j] for row in matrix[:-1]]) for j in range(n - 1)]
    return Continual(
        average=_mean(last),
        learning=_mean(diagonal),
        forgetting=_gap(best, last[:-1]),
        backward_transfer=_gap(last[:-1], diagonal[:-1]),
        forward_transfer=None
        if before is None or any(math.isnan(score) for score in ahead)
        else _gap(ahead, before[1:]),
        intransigence=None if references is None else _gap(references, diagonal),
    )


def _best(scores: Sequence[float]) -> float:
    """The largest of those that were measured."""
    return max((s for s in scores if not math.isnan(s)), default=math.nan)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _gap(values: Sequence[float], less: Sequence[float]) -> float | None:
    """Mean difference; None of nothing."""
    return _mean([v - w for v, w in zip(values, less, strict=True)]) if values else None
