"""Names beside the marks of a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from retain.report.labels import Box, place
from retain.report.studies.intervals import Estimate

__all__ = ["Spot", "ends", "label_spots"]

_FAR = 20.0  # points between a mark and its name
_THIN = 0.4  # points of a whisker: a name may cross it where there is no better place
Ends = tuple[float, float] | None


def ends(found: Estimate, factor: float) -> Ends:
    """The ends of an interval in the units of an axis."""
    if found.low is None or found.high is None:
        return None
    return factor * found.low, factor * found.high


@dataclass(frozen=True)
class Spot:
    """A mark with its name and the ends of its whiskers, in the units of the axes."""

    name: str
    at: tuple[float, float]
    across: Ends
    upright: Ends


def label_spots(axes: Axes, spots: Sequence[Spot], colour: str) -> None:
    """Names beside the marks; where there is no room near one, the legend has to do."""
    figure = axes.get_figure()
    if figure is None or not spots:
        return
    scale = 72 / figure.dpi
    frame = axes.bbox
    bounds = Box(frame.x0 * scale, frame.y0 * scale, frame.width * scale, frame.height * scale)

    def point(x: float, y: float) -> tuple[float, float]:
        """In points, kept inside the frame; a logarithmic axis has no place for 0 and below."""
        log = axes.get_yscale() == "log"
        at = axes.transData.transform((x, max(y, 1e-12) if log else y)) * scale
        return (
            min(max(float(at[0]), bounds.x), bounds.x + bounds.w),
            min(max(float(at[1]), bounds.y), bounds.y + bounds.h),
        )

    anchors = [point(*spot.at) for spot in spots]
    taken = []
    for spot, (x, y) in zip(spots, anchors, strict=True):
        taken.append(Box(x - 6, y - 6, 12, 12))
        if spot.across and axes.get_xscale() != "log":
            tips = [point(end, spot.at[1])[0] for end in spot.across]
            taken.append(Box(tips[0], y - _THIN / 2, tips[1] - tips[0], _THIN))
        if spot.upright:
            tips = [point(spot.at[0], end)[1] for end in spot.upright]
            taken.append(Box(x - _THIN / 2, tips[0], _THIN, tips[1] - tips[0]))
    sizes = [(0.62 * 8.5 * len(spot.name) + 4, 11.5) for spot in spots]
    back = axes.transData.inverted()
    boxes = place(anchors, sizes, bounds, taken)
    for spot, start, box in zip(spots, anchors, boxes, strict=True):
        across = max(box.x - start[0], start[0] - box.x - box.w, 0.0)
        upright = max(box.y - start[1], start[1] - box.y - box.h, 0.0)
        if across + upright > _FAR:
            continue
        x, y = back.transform(((box.x + box.w / 2) / scale, (box.y + box.h / 2) / scale))
        axes.text(x, y, spot.name, ha="center", va="center", fontsize=8.5, color=colour, zorder=4)
