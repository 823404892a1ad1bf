"""The structures by name; nothing heavy is imported before one is asked for.

A structure is one file: its block, its estimator and a `Structure` that says what both cost. One
that comes with the package has a line here; any other is added by `register`, before it is used::

    from retain.curvature.blocks.registry import register

    register("mine", Structure(MyBlock, MyEstimator, entries=True))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from retain.errors import ConfigError, unknown

if TYPE_CHECKING:
    from retain.curvature.blocks.structure import Structure

__all__ = ["names", "register", "structure_of"]

_STRUCTURES: dict[str, Structure | str] = {
    "identity": "retain.curvature.blocks.identity",
    "diagonal": "retain.curvature.blocks.diagonal",
    "kfac": "retain.curvature.blocks.kronecker",
    "shampoo": "retain.curvature.blocks.shampoo",
    "ekfac": "retain.curvature.blocks.eigen",
    "activation": "retain.curvature.blocks.activation",
    "tridiagonal": "retain.curvature.blocks.tridiagonal",
}
"""Name -> the structure, or the module whose ``STRUCTURE`` it is."""


def names() -> tuple[str, ...]:
    """All structures."""
    return tuple(_STRUCTURES)


def structure_of(name: str) -> Structure:
    """The structure of this name.

    Raises:
        ConfigError: there is none.
    """
    found = _STRUCTURES.get(name) if isinstance(name, str) else None
    if found is None:
        raise unknown("structure", str(name), names())
    if isinstance(found, str):
        made: Structure = importlib.import_module(found).STRUCTURE
        _STRUCTURES[name] = found = made
    return found


def register(name: str, structure: Structure) -> None:
    """Adds a structure: `retain.fit_curvature`, files, sums and plans then know it by its name.

    Raises:
        ConfigError: the name is taken.
    """
    if name in _STRUCTURES:
        raise ConfigError(
            "a structure of this name exists already",
            got=repr(name),
            allowed=f"a name other than {', '.join(names())}",
            fix=f"register('my-{name}', ...)",
        )
    _STRUCTURES[name] = structure
