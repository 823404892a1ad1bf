"""Seeded draws: which rows are read where fewer are wanted than there are.

Every row gets a random number by its place, and the rows with the smallest numbers are taken, in
the source's order. So one seed gives one draw, whether the rows come one after the other or can be
asked for by number, and whatever they are stored in; and a smaller draw is part of a larger one.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from torch import random as torch_random

from retain.errors import ConfigError

__all__ = ["HELD_OUT", "check_limit", "draw", "draw_from", "same_random", "sample"]

HELD_OUT = 1_000_000
"""Added to a seed for text that is to be another than what a curvature is measured on."""

T = TypeVar("T")

_BLOCK = 1 << 14


def check_limit(limit: int | None) -> None:
    """Raises `ConfigError` unless `limit` is None or a whole number above 0."""
    if limit is None or (isinstance(limit, int) and not isinstance(limit, bool) and limit > 0):
        return
    what, allowed = "a limit that is no number of rows", "1 or more, or None for all"
    raise ConfigError(what, got=repr(limit), allowed=allowed, fix="limit=128")


def draw(count: int, limit: int | None, seed: int) -> Sequence[int]:
    """The places of at most `limit` of `count` rows, sorted; all of them without a limit.

    Memory grows with `limit` alone.
    """
    if limit is None or limit >= count:
        return range(count)
    state = _numbers(seed)
    kept = np.empty(0)
    places = np.empty(0, dtype=np.int64)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        kept = np.concatenate([kept, state.random_sample(size)])
        places = np.concatenate([places, np.arange(start, start + size)])
        if len(kept) > limit:
            least = np.argpartition(kept, limit - 1)[:limit]
            kept, places = kept[least], places[least]
    return [int(place) for place in np.sort(places)]


def draw_from(items: Iterable[T], limit: int, seed: int) -> list[tuple[int, T]]:
    """At most `limit` items of a stream, each with its place: those that `draw` would name.

    All items are passed over; only `limit` of them are held.
    """
    least = heapq.nsmallest(limit, zip(_stream(seed), itertools.count(), items, strict=False))
    return sorted(((place, item) for _, place, item in least), key=lambda pair: pair[0])


def sample(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` of the items, in their order."""
    return [items[place] for place in draw(len(items), limit, seed)]


@contextmanager
def same_random() -> Iterator[None]:
    """Puts the random states of torch, NumPy and Python back, whoever draws inside it."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch_random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _numbers(seed: int) -> np.random.RandomState:
    # RandomState's numbers are the same in every version of NumPy; Generator's need not be.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed % 2**64)))


def _stream(seed: int) -> Iterable[float]:
    state = _numbers(seed)
    return itertools.chain.from_iterable(
        state.random_sample(_BLOCK).tolist() for _ in itertools.count()
    )
