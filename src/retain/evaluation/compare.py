"""A model and one or more tuned ones, compared item by item: shares, means, and differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from retain.intervals import bootstrap, paired_shares, wilson

__all__ = ["compared", "difference", "measured"]

Values = Sequence[float]


def measured(values: Values, sizes: Values | None = None, *, seed: int = 0) -> dict[str, Any]:
    """``sum(values) / sum(sizes)`` as the plain data of a `retain.records.Measure`.

    Args:
        values: one an item: nats, or whether it is a hit.
        sizes: one an item, such as its tokens; None counts items. The interval of a share of hits
            is Wilson's then, any other a bootstrap's over items: none of one item, or of items that
            are all alike.
        seed: of the bootstrap.
    """
    ones = sizes or [1] * len(values)
    n = int(sum(ones))
    if not n:
        return {"value": None, "interval": None, "n": 0}
    hits = sizes is None and set(values) <= {0, 1}
    spread = wilson(round(sum(values)), n) if hits else bootstrap(values, ones, seed=seed)
    return {"value": math.fsum(values) / n, "interval": spread and list(spread), "n": n}


def difference(
    ours: Values, theirs: Values, sizes: Values | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Ours less theirs of the same items, as `measured`; of shares of hits Newcombe's interval.

    What is 0 or 1 item by item is no share for that: so are the differences of one model to itself.
    """
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    if gaps and sizes is None and set(ours) | set(theirs) <= {0, 1}:
        pair = paired_shares([bool(v) for v in ours], [bool(v) for v in theirs])
        return {"value": math.fsum(gaps) / len(gaps), "interval": list(pair), "n": len(gaps)}
    return measured(gaps, sizes or [1] * len(gaps), seed=seed)


def compared(
    base: Values | None,
    tuned: Sequence[Values],
    sizes: Values | None = None,
    *,
    label: str,
    unit: str,
    better: int,
    seed: int = 0,
) -> dict[str, Any]:
    """One line of a comparison, as the plain data of a `retain.records.EvalScore`.

    Each model has a value an item, see `measured`; the base None where they are 0 by definition.
    """
    zero = {"value": 0.0, "interval": None, "n": int(sum(sizes)) if sizes else len(tuned[0])}
    return {
        "label": label, "unit": unit, "better": better,
        "base": zero if base is None else measured(base, sizes, seed=seed),
        "tuned": [measured(values, sizes, seed=seed) for values in tuned],
        "changes": [] if base is None else [
            difference(values, base, sizes, seed=seed) for values in tuned
        ],
        "between": [
            {"pair": [j, i], **difference(tuned[j], tuned[i], sizes, seed=seed)}
            for i, j in combinations(range(len(tuned)), 2)
        ],
    }  # fmt: skip
