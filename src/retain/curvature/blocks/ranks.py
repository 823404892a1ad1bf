"""Usual sizes: of sketches of a Kronecker product's wide sides, and of a source. Nothing heavy."""

from __future__ import annotations

from retain.errors import ConfigError
from retain.types import FactorRank

__all__ = [
    "PROBES",
    "RANKS",
    "SEQUENCE",
    "SOURCE",
    "USUAL_RANK",
    "WHOLE",
    "factor_rank_of",
    "sketch_columns",
    "sketch_rank",
]

USUAL_RANK, WHOLE = 256, 2048
"""Of ``auto``: the rank of a sketch, and the widest side that is kept whole (16 MiB)."""

RANKS = f"auto ({USUAL_RANK} for factors wider than {WHOLE}), or whole for none"
"""For the help of a command."""

PROBES = 8
"""Columns of a sketch in the making that only measure its error."""

SEQUENCE = 128
"""Tokens of a source sequence, T; ``retain fit`` cuts texts to so many by default."""

SOURCE = 128 * SEQUENCE
"""Tokens that ``retain fit`` reads by default at most."""


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


def sketch_columns(size: int, rank: int) -> int:
    """Columns that are held of a side of this size while it is streamed, `PROBES` among them.

    As many as twice the rank, and `PROBES` more than the rank at least beside the `PROBES`; but
    no more than the side is wide, of which all is known then.
    """
    return min(max(2 * rank - PROBES, rank + PROBES), size) + PROBES


def factor_rank_of(text: str) -> FactorRank:
    """A factor rank from the command line: ``auto``, ``whole`` or a number.

    Raises:
        ConfigError: something else.
    """
    if text in ("auto", "whole"):
        return "auto" if text == "auto" else None
    if text.isdecimal() and int(text):
        return int(text)
    raise ConfigError(
        "no such factor rank",
        got=repr(text),
        allowed="auto, whole, or a number from 1 on",
        fix="--factor-rank auto",
    )
