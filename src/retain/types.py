"""Names that are shared by several rooms of the house."""

from __future__ import annotations

from typing import Literal, get_args

Structure = str
"""How a curvature is stored: a name in `retain.curvature.blocks.registry`."""

Space = Literal["weight", "adapter"]
"""What a curvature is a function of: the update ``s B A`` of a weight, or ``(A, B)``."""

Fisher = Literal["mc", "empirical", "exact", "tempered", "reversed"]
"""Where the labels of a Fisher come from: see `retain.curvature.fit.labels`."""

Products = Literal["auto", "float32"]
"""Precision of the factors' products: the hardware's fast units where it has them, or float32."""

Update = Literal["gradient", "proximal"]
"""How the force is applied: added to the gradient, or as a proximal step after the optimiser's."""

HeadStart = Literal["drawn", "fitted"]
"""How a new classification head begins: at random, or fitted: see `retain.retention.head`."""

FactorRank = int | Literal["auto"] | None
"""What wide sides of Kronecker factors are cut to: see `retain.fit_curvature`."""

Gain = float | Literal["matched"]
"""How large a filtered A begins: see `retain.retention.filter.Filter`."""

STRENGTH = 100.0
"""The strength where none is said (docs/decisions.md)."""

STRONGEST = 1e12
"""The largest strength: more is no stronger, and would leave the range of float32 in products."""

SPACES: tuple[str, ...] = get_args(Space)
FISHERS: tuple[str, ...] = get_args(Fisher)
UPDATES: tuple[str, ...] = get_args(Update)
PRODUCTS: tuple[str, ...] = get_args(Products)
