"""What a recipe's filter is made of: second moments of what layers read.

S_new is of the training rows, S_old of the source text and of the tasks before; see
`retain.retention.filter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate

from torch import nn

from retain.curvature.curvature import Curvature
from retain.data.batches import Example
from retain.errors import SourceError, warn
from retain.models.off import adapter_off
from retain.models.sites import LoraSite
from retain.retention.cost import rows_rank
from retain.retention.filter import Filter
from retain.retention.loader import RowReader
from retain.retention.moments import Moments, input_moments, moments_of
from retain.retention.named import Curvatures, by_name

__all__ = ["new_moments", "old_moments"]


def new_moments(
    model: nn.Module,
    sites: Sequence[LoraSite],
    rows: RowReader,
    options: Filter,
    curvature: Curvatures | None,
    *,
    seed: int,
) -> Moments:
    """S_new: the second moments of the training rows, in the base model.

    Args:
        model: whose adapter is off while it reads.
        sites: the layers.
        rows: reads the training data.
        options: how many rows and tokens, and the share of answers.
        curvature: of the source; a sketch's rank is a sketch's here too.
        seed: of the choice of rows.

    Raises:
        SourceError: rows that hold no tokens.
    """
    asked = rows(options.rows, seed)
    if not asked:
        raise SourceError(
            "the training data hold no tokens for a filter to read",
            got="rows without input_ids, or of one token, which predicts nothing",
            allowed="rows of two tokens or more",
            fix="check the data, or leave the filter out",
        )
    examples = _within(asked, options.tokens)
    if sum(len(e.tokens) for e in examples) < sum(len(e.tokens) for e in asked):
        warn(
            f"the filter reads {len(examples)} of the {len(asked)} training rows that it was "
            f"to read, for it reads {options.tokens:,} tokens at most: Filter(tokens=...) for more"
        )
    ranks = {
        layer: rows_rank(k)
        for source in by_name(curvature).values()
        for layer, k in moments_of(source).ranks().items()
    }
    with adapter_off(model):
        return input_moments(
            model, sites, examples, answers=options.answers, first=False, ranks=ranks
        )


def old_moments(
    new: Moments, curvature: Curvatures | None, past: Curvature | None
) -> Moments | None:
    """S_old: each source weighs as much as the rows, and so does each task before."""
    every = [moments_of(each).sized_as(new) for each in by_name(curvature).values()]
    if past is not None:
        every.append(moments_of(past).sized_as(new).times(past.info.merged))
    return reduce(Moments.plus, every) if every else None


def _within(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The first rows that have no more tokens together; of a longer first one, its beginning."""
    totals = accumulate(len(e.tokens) for e in examples)
    found = [e for e, total in zip(examples, totals, strict=True) if total <= tokens]
    return found or [examples[0].cut(tokens)]
