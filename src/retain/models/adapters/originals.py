"""The weights that a base model came with, kept beside those that training changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["Originals"]


class Originals:
    """Copies of some parameters of a model, which take their places for a while.

    No second module is held: the copies are swapped in as the parameters' data, so that whatever
    holds a parameter (an optimiser, a tied layer, a graph whose backward pass is still to come)
    goes on with it.

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
        trained = {n: found[n].data for n in self.kept}
        try:
            for name, kept in self.kept.items():
                found[name].data = kept
            yield
        finally:
            for name, data in trained.items():
                found[name].data = data
