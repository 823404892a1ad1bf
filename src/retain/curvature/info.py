"""Where a curvature came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from retain.errors import shown
from retain.models.sites import Site
from retain.types import FISHERS, SPACES, Fisher, Space

__all__ = ["CurvatureInfo", "describe", "part"]


def part(site: str, which: str) -> str:
    """Name of a block in adapter space; `which` is ``lora_A`` or ``lora_B``."""
    return f"{site}.{which}"


def describe(sites: Sequence[Site]) -> dict[str, list[float]]:
    """Layer -> [d_out, d_in, r, scaling]."""
    return {s.name: [*s.shape, s.rank, s.scaling] for s in sites}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or isinstance(value, float)


_FIELDS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("a text", "structure model note weights", lambda v: isinstance(v, str)),
    (f"one of {', '.join(SPACES)}", "space", lambda v: v in SPACES),
    (f"one of {', '.join(FISHERS)}", "fisher", lambda v: v in FISHERS),
    (
        "a whole number from 0 to 2^63",
        "tokens predictions sequences samples max_length merged",
        lambda v: _whole(v) and 0 <= v < 1 << 63,
    ),
    ("a whole number", "seed", _whole),
    ("a whole number, or null", "rank", lambda v: v is None or _whole(v)),
    (
        "a finite number from 0 on",
        "share share_error temperature merge_loss",
        lambda v: _number(v) and v >= 0 and math.isfinite(v),
    ),
    (
        "a finite number from 0 on",
        "error",
        lambda v: _number(v) and not v < 0 and not math.isinf(v),
    ),
    (
        "texts by their names",
        "versions",
        lambda v: isinstance(v, dict) and all(isinstance(t, str) for t in (*v, *v.values())),
    ),
)
"""What a value is to be, in words, the fields of which this is asked, and whether it is."""


def _check_sites(sites: Any) -> None:
    if not isinstance(sites, dict) or not sites:
        raise ValueError(f"sites: {shown(sites, 60)}: no layers")
    for name, site in sites.items():
        found = isinstance(site, list) and len(site) == 4 and all(map(_number, site))
        whole = found and all(math.isfinite(n) and n == int(n) for n in site[:3])
        if not whole or min(site[:2]) < 1 or site[2] < 0 or not math.isfinite(site[3]):
            raise ValueError(f"sites: layer {shown(name)}: {shown(site)}")


@dataclass(frozen=True)
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
        error: relative standard error of the whole trace, from text and label draws; of a single
            row from label draws alone. NaN where it is not known: of one draw of one row, and of
            ``activation``, whose scale is measured on a few rows. Versions up to 0.2 wrote 0 for
            ``activation`` and ``exact``.
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
    tokens: int
    predictions: int
    sequences: int
    samples: int
    max_length: int
    seed: int
    error: float
    model: str
    sites: dict[str, list[int | float]]
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""
    rank: int | None = None
    share: float = 1.0
    share_error: float = 0.0
    temperature: float = 1.0
    merged: int = 1
    merge_loss: float = 0.0
    weights: str = ""

    def __post_init__(self) -> None:
        for allowed, names, fits in _FIELDS:
            for name in names.split():
                if not fits(value := getattr(self, name)):
                    raise ValueError(f"{name}: {shown(value, 60)}: not {allowed}")
        _check_sites(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; an error that is not known is null."""
        return asdict(self) | {"error": None if math.isnan(self.error) else self.error}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> CurvatureInfo:
        """What `to_dict` gave.

        Raises:
            ValueError: see the class; or a field that is not known, or one that is missing.
        """
        own = {f.name for f in fields(cls)}
        if strange := sorted(found.keys() - own, key=str):
            raise ValueError(f"{shown(strange[0])}: {shown(found[strange[0]], 60)}: not known")
        known = {**found} if found.get("error", 0) is not None else {**found, "error": math.nan}
        try:
            return cls(**known)
        except TypeError as error:  # a field is missing
            raise ValueError(str(error)) from None

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
