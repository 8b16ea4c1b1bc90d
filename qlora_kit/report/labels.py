"""Labels beside the points of a plot, none on top of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Beside the point: its label's offset in points, and the corner that stands there.
_PLACES = (
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (8, 8, "left", "bottom"),
    (8, -8, "left", "top"),
    (-8, 8, "right", "bottom"),
    (-8, -8, "right", "top"),
    (8, 20, "left", "bottom"),
    (8, -20, "left", "top"),
    (-8, 20, "right", "bottom"),
    (-8, -20, "right", "top"),
    (8, 34, "left", "bottom"),
    (8, -34, "left", "top"),
)
_RADIUS = 7.0
# Above lines, which would strike it out, and below points.
_LOOK: dict[str, Any] = {
    "textcoords": "offset points",
    "fontsize": 8.5,
    "color": "#222222",
    "zorder": 2.5,
    "bbox": {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
}


def place_labels(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each text near its point (x, y, text), where it covers the fewest others and no other
    point is nearer to it, whose label one would take it for.

    The limits of the axis and the layout of the figure have to stand.
    """
    from matplotlib.transforms import Bbox

    scale = axis.figure.dpi / 72
    middles = [axis.transData.transform((x, y)) for x, y, _ in points]
    taken = [
        Bbox.from_extents(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y in middles
    ]
    inside = axis.get_window_extent()
    for (x, y, text), middle in zip(points, middles, strict=True):
        label = axis.annotate(text, (x, y), xytext=(0, 0), **_LOOK)
        best: tuple[float, int] | None = None
        boxes = []
        for number, (right, up, across, along) in enumerate(_PLACES):
            box = _box(label, middle, right * scale, up * scale, across, along)
            boxes.append(box)
            covered = sum(_overlap(box, other) for other in taken)
            outside = box.width * box.height - _overlap(box, inside)
            cost = covered + 3 * outside
            if _is_nearer_another(box, middle, middles):
                cost += box.width * box.height
            if best is None or cost < best[0] - 1:
                best = (cost, number)
        assert best is not None
        right, up, across, along = _PLACES[best[1]]
        label.set_position((right, up))
        label.set_horizontalalignment(across)
        label.set_verticalalignment(along)
        taken.append(boxes[best[1]])


def _box(label: Any, middle: Any, right: float, up: float, across: str, along: str) -> Any:
    from matplotlib.transforms import Bbox

    size = label.get_window_extent()
    left = {"left": 0.0, "center": -0.5, "right": -1.0}[across] * size.width
    low = {"bottom": 0.0, "center": -0.5, "top": -1.0}[along] * size.height
    return Bbox.from_bounds(middle[0] + right + left, middle[1] + up + low, size.width, size.height)


def _is_nearer_another(box: Any, middle: Any, middles: Sequence[Any]) -> bool:
    own = _distance(box, middle)
    return any(_distance(box, other) < own for other in middles if other is not middle)


def _distance(box: Any, point: Any) -> float:
    """From a point to the nearest edge of a box; 0 inside."""
    across = max(box.x0 - point[0], 0.0, point[0] - box.x1)
    along = max(box.y0 - point[1], 0.0, point[1] - box.y1)
    return float(math.hypot(across, along))


def _overlap(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0.0) * max(height, 0.0))
