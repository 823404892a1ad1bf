"""Filters of like layers together: one batched product serves them all.

A model's layers repeat, and on a GPU a step's filter is bound by the number of its calls. Filters
of one make lie behind each other in one stack, of which each becomes a view, so nothing is stored
twice. The layers that read one input have their rows behind each other: its filter is read once.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from retain.models.sites import LoraSite
from retain.retention.hooks import Work

__all__ = ["Behind", "Group", "grouped"]


class Product(Protocol):
    """P, or a stack of them; see `retain.retention.wiener`."""

    dtype: torch.dtype

    def rows(self, a: Tensor) -> Tensor:
        """``a P``."""

    def back(self, g: Tensor) -> Tensor:
        """``g P^T``."""


class Part(NamedTuple):
    """Sites that are filtered at once.

    Attributes:
        places: of the sites, unit after unit.
        units: how many share a filter each.
        most: of rows, as many as one of them has.
        p: their filters, in a stack where there are several.
    """

    places: list[int]
    units: int
    most: int
    p: Any

    def lay(self, rows: Sequence[Tensor]) -> Tensor:
        """The rows of each site behind each other, [sites, most, size]."""
        if all(len(r) == self.most for r in rows):
            return torch.stack(list(rows))
        laid = rows[0].new_zeros(len(rows), self.most, rows[0].shape[1])
        torch._foreach_copy_([x[: len(r)] for x, r in zip(laid, rows, strict=True)], list(rows))
        return laid

    def rows(self, laid: Tensor) -> Tensor:
        """``a P`` of each, in the filter's precision."""
        found: Tensor = self.p.rows(self._wide(laid))
        return found.reshape(laid.shape)

    def back(self, laid: Tensor) -> Tensor:
        """``g P^T`` of each, in the filter's precision."""
        found: Tensor = self.p.back(self._wide(laid))
        return found.reshape(laid.shape)

    def _wide(self, laid: Tensor) -> Tensor:
        return laid.to(self.p.dtype).reshape(self.units, -1, laid.shape[-1])


class Group:
    """Sites whose filters lie in one stack.

    Args:
        units: places of the sites that read one filter; all units have as many.
        filters: those of the units, which become views of the stack.
        counts: rows of each site, by place.
    """

    def __init__(
        self, units: Sequence[Sequence[int]], filters: Sequence[Product], counts: Sequence[int]
    ) -> None:
        places = [place for unit in units for place in unit]
        most = max(counts[place] for place in places)
        self.whole = Part(places, len(units), most, _stacked(filters))
        self.single = {
            place: Part([place], 1, counts[place], p)
            for unit, p in zip(units, filters, strict=True)
            for place in unit
        }
        self.apart = False

    def parts(self, places: Collection[int]) -> list[Part]:
        """The whole where all its sites are among the places, else one part a site."""
        mine = [place for place in self.whole.places if place in places]
        self.apart = self.apart or 0 < len(mine) < len(self.single)
        if mine and not self.apart:
            return [self.whole]
        return [self.single[place] for place in mine]


def grouped(filters: Sequence[Product], rows: Sequence[Tensor]) -> list[Group]:
    """Groups of sites: each has a filter, one and the same for several, and rows of A."""
    units: dict[int, list[int]] = {}
    for place, p in enumerate(filters):
        units.setdefault(id(p), []).append(place)
    makes: dict[object, list[list[int]]] = {}
    for unit in units.values():
        of_rows = tuple((len(rows[place]), rows[place].dtype) for place in unit)
        makes.setdefault((_make(filters[unit[0]]), of_rows), []).append(unit)
    counts = [len(r) for r in rows]
    return [Group(found, [filters[u[0]] for u in found], counts) for found in makes.values()]


def _make(p: Product) -> object:
    shapes = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in _tensors(p))
    return type(p), shapes


def _tensors(p: Product) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in vars(p).items() if isinstance(t, Tensor)]


def _stacked(filters: Sequence[Product]) -> Product:
    """One filter of all, each tensor of which has one dimension more; they become its views."""
    whole = copy.copy(filters[0])
    for name, first in _tensors(filters[0]):
        if len(filters) == 1:
            setattr(whole, name, first[None])
            continue
        together = torch.stack([getattr(p, name) for p in filters])
        setattr(whole, name, together)
        for p, one in zip(filters, together, strict=True):
            setattr(p, name, one)
    return whole


class Laid(NamedTuple):
    """Rows of some sites behind each other, and whose they are."""

    rows: Tensor
    places: list[int]


Store = dict[int, Laid]


class Behind(Work):
    """The gradients of A, of the rows that train, behind its filter.

    While micro-batches add up, a gradient is what its filter leaves after each of them, and what
    came before it while the next one is added: so an average over processes is one of what came on
    each, and what is left of the sum is that of one pass with all rows, bit for bit. What others
    have written into a gradient in between stays as it is.
    """

    def __init__(self, sites: Sequence[LoraSite], groups: Sequence[Group], active: slice) -> None:
        self.weights, self.groups, self.active = [s.a for s in sites], list(groups), active
        self._group = {place: group for group in groups for place in group.single}
        # What came before the filter, what it left, and what was there before anything came.
        self._came: Store = {}
        self._left: Store = {}
        self._base: Store = {}

    def _rows(self, place: int) -> Tensor:
        gradient = self.weights[place].grad
        assert gradient is not None
        return gradient[self.active]

    def ready(self, place: int) -> Iterable[int]:
        group = self._group[place]
        silent = [p for p in group.single if self.weights[p].grad is None]
        group.apart = group.apart or 0 < len(silent) < len(group.single)
        part = group.single[place] if group.apart else group.whole
        if self.weights[place].grad is None:
            for store in (self._came, self._left, self._base):
                self._take(store, part)
            return part.places
        rows = [self._rows(p) for p in part.places]
        now, known = part.lay(rows), all(p in self._left for p in part.places)
        left, came = self._take(self._left, part), self._take(self._came, part)
        base = self._take(self._base, part)
        if left is None or came is None or not known:
            self._put(self._base, part, now)
            return part.places
        # A row is as it was left, unless somebody has changed it.
        same = (now == left).all(-1, keepdim=True)
        before = now.masked_fill(same, 0) if base is None else base.where(same, now)
        self._put(self._base, part, before)
        torch._foreach_copy_(rows, _each(came.where(same, now), rows))
        return part.places

    def change(self, places: Sequence[int]) -> None:
        chosen, rows, found = set(places), [], []
        for group in self.groups:
            for part in group.parts(chosen):
                mine = [self._rows(p) for p in part.places]
                came = part.lay(mine)
                base = self._take(self._base, part)
                left = part.back(came if base is None else came - base).to(came.dtype)
                if base is not None:
                    left = left + base
                    self._put(self._base, part, base)
                self._put(self._came, part, came)
                self._put(self._left, part, left)
                rows += mine
                found += _each(left, mine)
        torch._foreach_copy_(rows, found)

    def _put(self, store: Store, part: Part, rows: Tensor) -> None:
        store |= dict.fromkeys(part.places, Laid(rows, part.places))

    def _take(self, store: Store, part: Part) -> Tensor | None:
        """What a part has in a store; 0 where it has nothing, None where none of it has."""
        found = {p: store.pop(p) for p in part.places if p in store}
        kept = list(found.values())
        if not kept:
            return None
        if kept[0].places == part.places and all(k is kept[0] for k in kept):
            return kept[0].rows
        rows = []
        for place in part.places:
            laid, places = found.get(place, kept[0])
            own = self._group[place].single[place].most if place in found else 0
            rows.append(laid[places.index(place) if own else 0][:own])
        return part.lay(rows)

    def forget(self) -> None:
        self._came, self._left, self._base = {}, {}, {}
        for group in self.groups:
            group.apart = False


def _each(laid: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Of each site its own rows again."""
    return [x[: len(r)] for x, r in zip(laid, rows, strict=True)]
