"""Checks of a fit's settings, before any work is done."""

from __future__ import annotations

from retain.errors import ConfigError, check_number, unknown
from retain.types import FISHERS, PRODUCTS, SPACES, STRUCTURES

__all__ = ["SKETCHES", "check_settings", "sketched"]

SKETCHES = ("kfac", "shampoo", "activation")
"""Structures whose factors can be sketched."""


def sketched(size: int, rank: int | None) -> bool:
    """Whether a side of this size is kept as a sketch: only where that is the smaller."""
    return rank is not None and 2 * rank <= size


def check_settings(
    structure: str,
    space: str,
    fisher: str,
    products: str,
    samples: int,
    rows: int,
    batch_size: int,
    rank: int | None,
    share: float,
    temperature: float,
    calibrate: bool,
) -> None:
    """See `retain.curvature.estimate.fit_curvature` for the names.

    Raises:
        ConfigError: an unknown name, a number out of range, or settings that exclude each other.
    """
    for kind, got, allowed in (
        ("structure", structure, STRUCTURES),
        ("space", space, SPACES),
        ("fisher", fisher, FISHERS),
        ("products", products, PRODUCTS),
    ):
        if got not in allowed:
            raise unknown(kind, got, allowed)
    for label, number in (
        ("samples", samples),
        ("rows", rows),
        ("batch_size", batch_size),
        ("rank", 1 if rank is None else rank),
    ):
        if number < 1:
            raise ConfigError(
                f"{label} is too small", got=number, allowed="1 or more", fix="raise it"
            )
    if not 0 < share <= 1:
        raise ConfigError(
            "the share is no share", got=share, allowed="above 0, at most 1", fix="share=0.25"
        )
    check_number("the temperature is no temperature", temperature, "temperature=2", positive=True)
    if rank is not None and structure not in SKETCHES:
        raise ConfigError(
            "this structure keeps no sketches",
            got=f"structure={structure!r} with rank={rank}",
            allowed=f"a rank with {', '.join(SKETCHES)}",
            fix="leave the rank out, or choose one of these",
        )
    if not calibrate and share < 1:
        raise ConfigError(
            "without calibration a share would have no true scale",
            got=f"calibrate=False with share={share:g}",
            allowed="one of the two",
            fix="share=1",
        )
