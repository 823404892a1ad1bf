"""Where a curvature came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from retain.errors import shown
from retain.models.sites import Site
from retain.types import Fisher, Space

__all__ = ["CurvatureInfo", "describe", "part"]


def part(site: str, which: str) -> str:
    """Name of a block in adapter space; `which` is ``lora_A`` or ``lora_B``."""
    return f"{site}.{which}"


def describe(sites: Sequence[Site]) -> dict[str, list[float]]:
    """Layer -> [d_out, d_in, r, scaling]."""
    return {s.name: [*s.shape, s.rank, s.scaling] for s in sites}


def _check_sites(sites: dict[str, list[int | float]]) -> dict[str, list[int | float]]:
    if not sites:
        raise ValueError("no layers")
    for name, site in sites.items():
        whole = len(site) == 4 and all(math.isfinite(n) and n == int(n) for n in site[:3])
        if not whole or min(site[:2]) < 1 or site[2] < 0 or not math.isfinite(site[3]):
            raise ValueError(f"layer {shown(name)}: {shown(site)}")
    return sites


def _check_error(error: float) -> float:
    if error < 0 or math.isinf(error):
        raise ValueError("not a finite number from 0 on")
    return error


Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class CurvatureInfo:
    """Where a curvature came from.

    Attributes:
        structure: see `retain.curvature.blocks.registry`.
        space: weight or adapter.
        fisher: whose labels; see `retain.curvature.fit.labels`.
        tokens: source tokens that were read.
        predictions: predictions among them; the curvature is a mean over these.
        sequences: source rows.
        samples: label draws for each prediction.
        max_length: longest row, in tokens.
        seed: of the label draws.
        error: relative standard error of the whole trace, from text and label draws; NaN where one
            draw of one row cannot tell.
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
        weights: signature of the base model's linear layers, by which it is known when its weights
            are stored in another way; see `retain.models.fingerprint`.

    Raises:
        ValueError: a field of another type, or a number that no fit has.
    """

    structure: str
    space: Space
    fisher: Fisher
    tokens: Count
    predictions: Count
    sequences: Count
    samples: Count
    max_length: Count
    seed: int
    error: Annotated[float, AfterValidator(_check_error)]
    model: str
    sites: Annotated[dict[str, list[int | float]], AfterValidator(_check_sites)]
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""
    rank: int | None = None
    share: Amount = 1.0
    share_error: Amount = 0.0
    temperature: Amount = 1.0
    merged: Count = 1
    merge_loss: Amount = 0.0
    weights: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; an error that is not known is null."""
        return asdict(self) | {"error": None if math.isnan(self.error) else self.error}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> CurvatureInfo:
        """What `to_dict` gave.

        Raises:
            ValueError: see the class.
        """
        known = {**found} if found.get("error", 0) is not None else {**found, "error": math.nan}
        return cls(**known)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Block -> (d_out, d_in), for all layers."""
        found: dict[str, tuple[int, int]] = {}
        for name, (d_out, d_in, rank, _) in self.sites.items():
            if self.space == "adapter":
                found[part(name, "lora_A")] = (int(rank), int(d_in))
                found[part(name, "lora_B")] = (int(d_out), int(rank))
            else:
                found[name] = (int(d_out), int(d_in))
        return found
