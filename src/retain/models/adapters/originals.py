"""The weights that a base model came with, kept beside those that training changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["Originals", "Swap", "swapped"]

Swap = tuple[nn.Parameter, Tensor]
"""A parameter, and what takes its place."""


@contextmanager
def swapped(pairs: Iterable[Swap]) -> Iterator[None]:
    """Puts other values in the places of parameters' own; afterwards they are what they were.

    No second module is held: they are swapped in as the parameters' data, so that whatever holds a
    parameter (an optimiser, a tied layer, a graph whose backward pass is still to come) goes on
    with it.
    """
    pairs = [(p, value.to(p.data)) for p, value in pairs]
    trained = [p.data for p, _ in pairs]
    try:
        for p, value in pairs:
            p.data = value
        yield
    finally:
        for (p, _), data in zip(pairs, trained, strict=True):
            p.data = data


class Originals:
    """Copies of some parameters of a model, which take their places for a while (`swapped`).

    Args:
        model: the model.
        names: of the parameters, as in ``named_parameters``.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        found = dict(model.named_parameters())
        self.kept = {n: found[n].detach().clone() for n in names}

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Puts the copies in place; afterwards the parameters are what they were before."""
        found = dict(model.named_parameters())
        for name, kept in self.kept.items():  # where the model has been moved since
            self.kept[name] = kept.to(found[name].device)
        with swapped([(found[name], kept) for name, kept in self.kept.items()]):
            yield
