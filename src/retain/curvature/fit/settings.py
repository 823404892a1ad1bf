"""Checks of a fit's settings, before any work is done."""

from __future__ import annotations

from retain.errors import ConfigError, check_number, unknown
from retain.types import FISHERS, PRODUCTS, SPACES, STRUCTURES, FactorRank

__all__ = [
    "RANKS",
    "SKETCHES",
    "USUAL_RANK",
    "WHOLE",
    "check_settings",
    "factor_rank_of",
    "sketch_rank",
]

SKETCHES = ("kfac", "shampoo", "activation")
"""Structures whose factors can be sketched."""


USUAL_RANK, WHOLE = 256, 2048
"""Of ``auto``: the rank of a sketch, and the widest side that is kept whole (16 MiB)."""

RANKS = f"auto ({USUAL_RANK} for factors wider than {WHOLE}), or whole for none"
"""For the help of a command."""


def sketch_rank(size: int, rank: FactorRank) -> int | None:
    """How many directions are kept of a side of this size; None where it is kept whole.

    Args:
        size: of the side.
        rank: a number sketches each side that is at least twice as wide, ``auto`` each one wider
            than 2048, by 256 directions; None keeps all whole.
    """
    if rank == "auto":
        return USUAL_RANK if size > WHOLE else None
    return rank if rank is not None and 2 * rank <= size else None


def factor_rank_of(text: str) -> FactorRank:
    """A factor rank from the command line: ``auto``, ``whole`` or a number.

    Raises:
        ConfigError: something else.
    """
    if text == "auto":
        return "auto"
    if text == "whole":
        return None
    if text.isdecimal() and int(text):
        return int(text)
    raise ConfigError(
        "no such factor rank",
        got=repr(text),
        allowed="auto, whole, or a number from 1 on",
        fix="--factor-rank auto",
    )


def check_settings(
    structure: str,
    space: str,
    fisher: str,
    *,
    samples: int,
    rows: int,
    rank: FactorRank,
    products: str = "auto",
    batch_size: int = 1,
    share: float = 1.0,
    temperature: float = 1.0,
    calibrate: bool = True,
) -> None:
    """See `retain.curvature.fit.fit.fit_curvature` for the names.

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
    if isinstance(rank, str) and rank != "auto":
        raise unknown("rank", rank, ("auto",))
    for label, number in (
        ("samples", samples),
        ("rows", rows),
        ("batch_size", batch_size),
        ("rank", rank if isinstance(rank, int) else 1),
    ):
        if not isinstance(number, int) or number < 1:
            raise ConfigError(
                f"{label} is too small", got=number, allowed="1 or more", fix="raise it"
            )
    if not 0 < share <= 1:
        raise ConfigError(
            "the share is no share", got=share, allowed="above 0, at most 1", fix="share=0.25"
        )
    check_number("the temperature is no temperature", temperature, "temperature=2", positive=True)
    if isinstance(rank, int) and structure not in SKETCHES:
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
