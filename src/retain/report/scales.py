"""Axes shared by the SVG and the PNG figures: a map from values to pixels, and its ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Scale", "fit", "number", "short"]


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, without an exponent where it stays short."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def short(value: float) -> str:
    """A number as `number` has it, without zeros at its end."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


@dataclass(frozen=True)
class Scale:
    """A linear axis or, with a `bend`, one that is linear near 0 and logarithmic beyond.

    Attributes:
        lo, hi: the values at the two ends.
        start, end: the pixels of the two ends.
        bend: the value where the axis turns logarithmic; None for a linear axis.
    """

    lo: float
    hi: float
    start: float = 0.0
    end: float = 1.0
    bend: float | None = None

    def warp(self, value: float) -> float:
        """The value on the bent axis."""
        if self.bend is None:
            return value
        return math.copysign(math.log10(1.0 + abs(value) / self.bend), value)

    def unwarp(self, value: float) -> float:
        """The inverse of `warp`."""
        if self.bend is None:
            return value
        return math.copysign(self.bend * (10.0 ** abs(value) - 1.0), value)

    def __call__(self, value: float) -> float:
        """The pixel of a value; values off the axis stop at its ends."""
        lo, hi = self.warp(self.lo), self.warp(self.hi)
        share = (self.warp(value) - lo) / (hi - lo)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, gap: float) -> list[float]:
        """Round values at least `gap` pixels apart."""
        if self.bend is None:
            return self._linear(gap)
        kept: list[float] = []
        for tier in self._decades():
            for value in tier:
                inside = self.lo <= value <= self.hi * 1.0001
                if inside and all(abs(self(value) - self(other)) >= gap for other in kept):
                    kept.append(value)
        return sorted(kept)

    def _linear(self, gap: float) -> list[float]:
        most = max(2.0, abs(self.end - self.start) / gap)
        raw = (self.hi - self.lo) / most
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
        first = math.ceil(self.lo / step - 1e-6)
        last = math.floor(self.hi / step + 1e-6)
        return [round(k * step, 12) for k in range(first, last + 1)]

    def _decades(self) -> list[list[float]]:
        low = math.floor(math.log10(self.bend or 1.0))
        high = math.ceil(math.log10(max(self.hi, self.bend or 1.0)))
        tens = range(low, high + 1)
        return [[0.0], *([round(m * 10.0**k, 12) for k in tens] for m in (1, 2, 5))]


def fit(values: Sequence[float], *, bendable: bool = False, zero: bool = True) -> Scale:
    """A scale that holds the values with a small margin.

    Args:
        values: what must fit.
        bendable: use a logarithmic axis where the values span much.
        zero: begin at 0 where no value is below it.
    """
    lo, hi = (min(values), max(values)) if values else (0.0, 1.0)
    if zero:
        lo = min(0.0, lo)
    positive = sorted(value for value in values if value > 0)
    if bendable and lo >= 0 and positive and positive[-1] / positive[0] > 6:
        scale = Scale(lo, hi, bend=max(positive[0], positive[-1] * 1e-4))
        top = scale.unwarp(scale.warp(hi) * 1.06)
        return Scale(0.0, top, bend=scale.bend)
    span = (hi - lo) or abs(hi) or 1.0
    low = lo if zero and lo == 0 else lo - 0.06 * span
    return Scale(low, hi + 0.08 * span)
