"""Names that are shared by several rooms of the house."""

from __future__ import annotations

from typing import Literal, get_args

Structure = Literal["identity", "diagonal", "kfac", "shampoo"]
"""How a curvature is stored: see `retain.curvature`."""

Space = Literal["weight", "adapter"]
"""What a curvature is a function of: the update ``s B A`` of a weight, or ``(A, B)``."""

Fisher = Literal["mc", "empirical", "exact"]
"""Where the labels of a Fisher come from: sampled from the model, the data, or all of them."""

Update = Literal["gradient", "proximal"]
"""How the force is applied: added to the gradient, or as a proximal step after the optimiser's."""

STRUCTURES: tuple[str, ...] = get_args(Structure)
SPACES: tuple[str, ...] = get_args(Space)
FISHERS: tuple[str, ...] = get_args(Fisher)
UPDATES: tuple[str, ...] = get_args(Update)
