"""A fit in several processes: each reads its own rows, and the sums of all are added up.

All that an estimator gathers is a sum over rows (a sketch too: it is ``S Omega`` for one fixed
Omega), so a division changes rounding alone. Label draws go by a row's number in the source. The
blocks that come out are the first process's everywhere, to the last bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, distributed

from retain.curvature.fit.accumulator import Accumulator
from retain.data.batches import Batch, Example, by_length, collate
from retain.errors import CurvatureError
from retain.models.processes import count, rank, share, told

__all__ = ["adding_up", "own_batches", "rows_of_first"]

_DTYPES = {str(t): t for t in (torch.float32, torch.float64, torch.int64)}
"""Of sums."""


def rows_of_first(examples: Sequence[Example], device: torch.device) -> list[Example]:
    """The rows that the first process has read: what others sample may differ."""
    mine = [[e.tokens, e.targets, e.predict, e.segments] for e in examples] if not rank() else []
    return [Example(*map(tuple, fields)) for fields in told(mine, device)[0]]


def own_batches(examples: Sequence[Example], size: int, pad: int) -> list[Batch]:
    """This process's batches of like length: as many in each, so that all run a model as often.

    Args:
        examples: no fewer than there are processes.
        size: rows a batch; one more where the rows do not divide otherwise.
        pad: the token.
    """
    order, others = by_length(examples), count()
    each = min(-(-len(order) // (others * size)), len(order) // others)
    cuts = [i * len(order) // (each * others) for i in range(each * others + 1)]
    parts = [order[a:b] for a, b in pairwise(cuts)]
    return [collate([examples[i] for i in part], pad, part) for part in parts[rank() :: others]]


@contextmanager
def adding_up(run: Accumulator, known: Collection[str], device: torch.device) -> Iterator[None]:
    """Around a pass: puts what all processes have gathered in the place of what this one has.

    Args:
        run: its sums.
        known: keys of the estimator's state that are the same in all already.
        device: where the processes can talk.

    Raises:
        CurvatureError: another process's pass broke off.
    """
    try:
        yield
    except Exception as error:  # the others wait for this one
        told({"failed": str(error)}, device)
        raise
    state = run.estimator.state
    mine = {k: [list(t.shape), str(t.dtype)] for k, t in state.items() if k not in known}
    of_all = told({"failed": None, "sums": mine}, device)
    for number, other in enumerate(of_all):
        if other["failed"] is not None:
            raise CurvatureError(
                "the fit broke off in another process",
                got=f"in process {number}: {other['failed']}",
                allowed="a fit that goes through in all",
                fix="see that process's own error",
            )
    sums = {key: made for other in of_all for key, made in other["sums"].items()}
    for key in sorted(sums):
        if key not in state:  # none of this process's rows entered it
            shape, dtype = sums[key]
            state[key] = torch.zeros(shape, dtype=_DTYPES[dtype], device=device)
        state[key] = _reduced(state[key], device, same=key.startswith(run.estimator.same))
    if run.passes == 0:
        _add_up_traces(run, device)


def _add_up_traces(run: Accumulator, device: torch.device) -> None:
    """What is gathered over sequences, in the first pass."""
    run.traces = {name: _reduced(t, device) for name, t in sorted(run.traces.items())}
    run.share = _reduced(run.share, device)
    of_all = told([run.predictions, run.moments], device)
    run.predictions = sum(predictions for predictions, _ in of_all)
    run.moments = [(draws, n) for _, moments in of_all for draws, n in moments]


def _reduced(t: Tensor, device: torch.device, *, same: bool = False) -> Tensor:
    """The sum over all processes, with the first one's bits; of what is the same in all, that."""
    found = t.detach().to(device).contiguous()
    operation = distributed.ReduceOp.MAX if same else distributed.ReduceOp.SUM
    distributed.all_reduce(found, operation)
    share([found])
    return found.to(t.device)
