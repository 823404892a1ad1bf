"""The settings of a fit, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass

from retain.curvature.blocks.registry import names, structure_of
from retain.errors import ConfigError, check_number, shown, unknown
from retain.types import FISHERS, PRODUCTS, SPACES, FactorRank, Products

__all__ = ["FitSettings"]


@dataclass(frozen=True)
class FitSettings:
    """See `retain.fit_curvature` for the names.

    Raises:
        ConfigError: an unknown name, a number out of range, or settings that exclude each other.
    """

    structure: str = "kfac"
    space: str = "weight"
    fisher: str = "mc"
    samples: int = 1
    rows: int = 128
    max_length: int = 128
    batch_size: int = 8
    seed: int = 0
    rank: FactorRank = "auto"
    share: float = 1.0
    temperature: float = 2.0
    calibrate: bool = True
    products: Products = "auto"

    def __post_init__(self) -> None:
        for kind, got, allowed in (
            ("structure", self.structure, names()),
            ("space", self.space, SPACES),
            ("fisher", self.fisher, FISHERS),
            ("products", self.products, PRODUCTS),
        ):
            if got not in allowed:
                raise unknown(kind, str(got), allowed)
        if isinstance(self.rank, str) and self.rank != "auto":
            raise unknown("rank", self.rank, ("auto",))
        number = self.rank is not None and self.rank != "auto"
        for label in ("samples", "rows", "batch_size", *(["rank"] if number else [])):
            got = getattr(self, label)
            wrong = "too small" if isinstance(got, int) else "no whole number"
            check_number(f"{label} is {wrong}", got, f"{label}=8", least=1, whole=True)
        if not (isinstance(self.share, int | float) and 0 < self.share <= 1):
            raise ConfigError(
                "the share is no share",
                got=shown(self.share),
                allowed="above 0, at most 1",
                fix="share=0.25",
            )
        check_number(
            "the temperature is no temperature", self.temperature, "temperature=2", positive=True
        )
        if number and not self.sketchable:
            able = [name for name in names() if FitSettings(name).sketchable]
            raise ConfigError(
                "this structure keeps no sketches",
                got=f"structure={self.structure!r} with rank={self.rank}",
                allowed=f"a rank with {', '.join(able)}",
                fix="leave the rank out, or choose one of these",
            )
        if not self.calibrate and self.share < 1:
            raise ConfigError(
                "without calibration a share would have no true scale",
                got=f"calibrate=False with share={self.share:g}",
                allowed="one of the two",
                fix="share=1",
            )

    @property
    def sketchable(self) -> bool:
        """Whether the structure has factors that can be sketched."""
        found = structure_of(self.structure)
        return found.sketches and found.factors
