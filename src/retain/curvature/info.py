"""Where a curvature came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from retain.models.sites import Site
from retain.types import Fisher, Space, Structure

__all__ = ["CurvatureInfo", "describe", "part"]


def part(site: str, which: str) -> str:
    """Name of a block in adapter space; `which` is ``lora_A`` or ``lora_B``."""
    return f"{site}.{which}"


@dataclass(frozen=True)
class CurvatureInfo:
    """Where a curvature came from.

    Attributes:
        structure: see `retain.types.Structure`.
        space: weight or adapter.
        fisher: whose labels; see `retain.curvature.fit.labels`.
        tokens: source tokens that were read.
        predictions: predictions among them; the curvature is a mean over these.
        sequences: source rows.
        samples: label draws for each prediction.
        max_length: longest row, in tokens.
        seed: of the label draws.
        error: relative standard error of the whole trace, from text and label draws.
        model: fingerprint of the base model.
        sites: layer -> [d_out, d_in, r, scaling].
        versions: of the libraries.
        note: free text, such as the source's name.
        rank: of sketched factors; None where all are whole.
        share: of the sequences that entered the products.
        share_error: relative standard error that the share adds to the trace of the products,
            before each block is scaled to its true trace, which all sequences make.
        temperature: of a tempered Fisher.
        merged: how many fits are in it.
        merge_loss: relative error, in the Frobenius norm of all blocks, of the last merge.
    """

    structure: Structure
    space: Space
    fisher: Fisher
    tokens: int
    predictions: int
    sequences: int
    samples: int
    max_length: int
    seed: int
    error: float
    model: str
    sites: dict[str, list[float]]
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""
    rank: int | None = None
    share: float = 1.0
    share_error: float = 0.0
    temperature: float = 1.0
    merged: int = 1
    merge_loss: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def describe(sites: Sequence[Site]) -> dict[str, list[float]]:
    """Layer -> [d_out, d_in, r, scaling]."""
    return {s.name: [*s.shape, s.rank, s.scaling] for s in sites}
