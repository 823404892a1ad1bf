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
    """P, or a stack of them; see `retain.retention.filter`."""

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
    """Groups of sites.

    Args:
        filters: of each site; several may have one and the same.
        rows: of each site's A, those that are filtered.
    """
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


class Kept(NamedTuple):
    """What is known of a gradient that has been filtered.

    Attributes:
        came: its rows before the filter, all that has been added to them so far.
        left: its rows after it.
        base: what was in them before anything that is to be filtered; None for nothing.
    """

    came: Tensor
    left: Tensor
    base: Tensor | None


class Behind(Work):
    """The gradients of A behind its filter.

    While micro-batches add up, a gradient is what its filter leaves after each of them, and what
    came before it while the next one is added: so an average over processes is one of what came
    on each, and what is left of the sum is that of one pass with all rows, bit for bit.
    What others have written into a gradient in between stays as it is.

    Args:
        sites: the layers.
        groups: theirs.
        active: the rows of A that train.
    """

    def __init__(self, sites: Sequence[LoraSite], groups: Sequence[Group], active: slice) -> None:
        self.weights, self.groups, self.active = [s.a for s in sites], list(groups), active
        self._group = {place: group for group in groups for place in group.single}
        self._kept: dict[int, Kept] = {}
        self._base: dict[int, Tensor] = {}

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
            for each in part.places:
                self._kept.pop(each, None)
            return part.places
        rows = [self._rows(p) for p in part.places]
        now = part.lay(rows)
        kept = [self._kept.pop(p, None) for p in part.places]
        known = [k for k in kept if k is not None]
        if len(known) < len(kept):
            self._base |= zip(part.places, _each(now, rows), strict=True)
            return part.places
        # A row is as it was left, unless somebody has changed it.
        same = (now == part.lay([k.left for k in known])).all(-1, keepdim=True)
        base = _together(part, [k.base for k in known])
        before = now.new_zeros(()) if base is None else base
        base = before.where(same, now)
        self._base |= zip(part.places, _each(base, rows), strict=True)
        came = part.lay([k.came for k in known]).where(same, now)
        torch._foreach_copy_(rows, _each(came, rows))
        return part.places

    def change(self, places: Sequence[int]) -> None:
        chosen, rows, found = set(places), [], []
        for group in self.groups:
            for part in group.parts(chosen):
                mine = [self._rows(p) for p in part.places]
                came = part.lay(mine)
                base = _together(part, [self._base.pop(p, None) for p in part.places])
                left = part.back(came if base is None else came - base).to(came.dtype)
                left = left if base is None else left + base
                for i, (place, r) in enumerate(zip(part.places, mine, strict=True)):
                    own = None if base is None else base[i, : len(r)]
                    self._kept[place] = Kept(came[i, : len(r)], left[i, : len(r)], own)
                rows += mine
                found += _each(left, mine)
        torch._foreach_copy_(rows, found)

    def forget(self) -> None:
        self._kept, self._base = {}, {}
        for group in self.groups:
            group.apart = False


def _each(laid: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Of each site its own rows again."""
    return [x[: len(r)] for x, r in zip(laid, rows, strict=True)]


def _together(part: Part, bases: Sequence[Tensor | None]) -> Tensor | None:
    known = [base for base in bases if base is not None]
    if not known:
        return None
    like = known[0]
    return part.lay([like.new_zeros(like.shape) if base is None else base for base in bases])
