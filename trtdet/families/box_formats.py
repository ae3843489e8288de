# SPDX-License-Identifier: Apache-2.0
"""What four numbers of a box are: corners, or a centre and a size, in pixels or 0 to 1. Measured on
boxes for photographs, and by the cells of the pyramid that they belong to.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.spec import BoxFormat

#: Strides of a model's levels, and boxes of each cell.
LEVELS = ((8, 16, 32), (4, 8, 16, 32), (8, 16, 32, 64), (16, 32), (8, 16, 32, 64, 128), (4, 8, 16, 32, 64))  # fmt: skip
#: Strides from its cell within which a box belongs to it.
NEAR = 2.0
#: How many times nearer the boxes of the right format lie, where that alone tells it.
CLEARLY = 3.0
BOXES_PER_CELL = (1, 3, 5, 9)
FORMATS: tuple[BoxFormat, ...] = ("xyxy", "yxyx", "cxcywh", "xywh")


@dataclass(frozen=True)
class Levels:
    """The pyramid levels that give a head its number of boxes."""

    size_hw: tuple[int, int]
    strides: tuple[int, ...]
    boxes_per_cell: int = 1

    @property
    def count(self) -> int:
        height, width = self.size_hw
        return self.boxes_per_cell * sum(-(-height // s) * -(-width // s) for s in self.strides)

    def centres(self, *, anchors_first: bool = False) -> NDArray[np.float64]:
        """(A, 3): x y of a cell's centre in input pixels, and its stride, in the order of the rows.

        Args:
            anchors_first: a level lists all its cells once for each anchor, rather than all anchors
                of each cell.
        """
        rows = []
        for stride in self.strides:
            height, width = (-(-side // stride) for side in self.size_hw)
            y, x = (np.mgrid[:height, :width].reshape(2, -1) + 0.5) * stride
            cells = np.stack([x, y, np.full(x.size, stride)], axis=1)
            n = self.boxes_per_cell
            rows.append(np.tile(cells, (n, 1)) if anchors_first else np.repeat(cells, n, axis=0))
        return np.concatenate(rows)


def maybe_levels(count: int, size_hw: tuple[int, int]) -> Levels | None:
    """The levels whose cells add up to a number of boxes."""
    for per_cell in BOXES_PER_CELL:
        for strides in LEVELS:
            levels = Levels(size_hw, strides, per_cell)
            if levels.count == count and (len(strides) > 1 or per_cell == 1):
                return levels
    return None


def _levels_of(boxes: Sequence[NDArray[Any]], size_hw: tuple[int, int]) -> Levels | None:
    """The levels of boxes of several photographs; None: they have none, or not as many each."""
    counts = {len(b) for b in boxes}
    return maybe_levels(len(boxes[0]), size_hw) if len(counts) == 1 else None


def to_xyxy(boxes: NDArray[Any], box_format: BoxFormat) -> NDArray[np.float64]:
    """Boxes (..., 4) of any format as x1 y1 x2 y2."""
    a, b, c, d = np.moveaxis(np.asarray(boxes, np.float64), -1, 0)
    if box_format == "yxyx":
        a, b, c, d = b, a, d, c
    elif box_format == "xywh":
        c, d = a + c, b + d
    elif box_format == "cxcywh":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    return np.stack([a, b, c, d], axis=-1)


def measure_units(boxes: Sequence[NDArray[Any]]) -> str | None:
    """ "unit" or "pixels" of boxes [k, 4] for several photographs, k of each.

    None where it cannot be told.
    """
    largest = float(np.percentile(np.abs(np.concatenate(list(boxes))), 99))
    return "unit" if largest <= 1.5 else "pixels" if largest > 4 else None


def measure_format(
    boxes: Sequence[NDArray[Any]], size_hw: tuple[int, int], *, is_unit: bool = False
) -> tuple[BoxFormat | None, str]:
    """What four numbers are, from boxes (a, 4) for several photographs; and how that was seen.

    On a grid a box lies about its cell: of the formats that put boxes there, the nearest.
    Elsewhere, the only format whose boxes have positive sides and lie within the picture.

    Args:
        is_unit: boxes are 0 to 1; else in pixels.
    """
    levels = _levels_of(boxes, size_hw)
    if levels is not None and all(_third_follows_first(b) for b in boxes):
        sided = [f for f in ("xyxy", "yxyx") if _have_sides(boxes, f)]
        if not sided:  # corners in another order, or of boxes turned inside out
            return None, "the third number follows the first, and boxes have no positive sides"
    if levels is not None:
        distances = {f: _distance(_in_pixels(boxes, f, size_hw, is_unit), f, levels) for f in FORMATS}  # fmt: skip
        between = _centre_or_corner(_in_pixels(boxes, "xywh", size_hw, is_unit), levels, distances)
        if between is not None:
            return between
        best, second = sorted(FORMATS, key=lambda f: distances[f])[:2]
        if distances[best] < NEAR and distances[second] > max(
            1.5 * distances[best], distances[best] + 0.2
        ):
            return (
                best,
                f"boxes lie {distances[best]:.2f} strides from their cells, as {second} {distances[second]:.2f}",
            )
    valid = formats_that_fit(boxes, size_hw, is_unit=is_unit)
    if len(valid) == 1:
        return valid[0], "no other format has boxes with positive sides within the pictures"
    return None, f"{len(valid)} formats fit"


def _third_follows_first(boxes: NDArray[Any]) -> bool:
    """Whether the third and fourth number go with the first and second, as those of two corners
    do: the size of a box has nothing to do with where it is.
    """
    values = np.asarray(boxes, np.float64).T
    if np.ptp(values, axis=1).min() == 0:
        return False
    return bool(all(np.corrcoef(values[i], values[i + 2])[0, 1] > 0.9 for i in (0, 1)))


def _have_sides(boxes: Sequence[NDArray[Any]], box_format: BoxFormat) -> bool:
    corners = to_xyxy(np.concatenate(list(boxes)), box_format)
    return bool((corners[:, 2:] > corners[:, :2]).all(axis=1).mean() > 0.5)


def formats_that_fit(
    boxes: Sequence[NDArray[Any]], size_hw: tuple[int, int], *, is_unit: bool = False
) -> list[BoxFormat]:
    """The formats whose boxes have positive sides and lie within the picture; see
    `measure_format`.
    """
    return [f for f in FORMATS if _lies_within(_in_pixels(boxes, f, size_hw, is_unit), f, size_hw)]


def distance_from_cells(
    boxes: Sequence[NDArray[Any]],
    size_hw: tuple[int, int],
    box_format: BoxFormat,
    *,
    is_unit: bool,
) -> float | None:
    """Median distance of boxes from their cells, in strides; None: there is none for each."""
    levels = _levels_of(boxes, size_hw)
    if levels is None:
        return None
    return _distance(_in_pixels(boxes, box_format, size_hw, is_unit), box_format, levels)


def _centre_or_corner(
    boxes: Sequence[NDArray[Any]], levels: Levels, distances: Mapping[BoxFormat, float]
) -> tuple[BoxFormat | None, str] | None:
    """Whether the first two numbers are a centre or a corner, where both lie about the cells, as
    with boxes that are all small: a corner is half a size from the centre, so it follows the size.

    None where there is no such question.

    Args:
        boxes: in pixels.
    """
    centre, corner = distances["cxcywh"], distances["xywh"]
    nearer, farther = sorted((centre, corner))
    if farther >= min(NEAR, CLEARLY * nearer) or nearer > min(distances.values()):
        return None
    slopes = []
    values = np.concatenate(list(boxes))
    for strides in (levels.strides, levels.strides[::-1]):
        cells = dataclasses.replace(levels, strides=strides).centres()
        cells = np.tile(cells, (len(boxes), 1))
        offset, size = ((values[:, i : i + 2] - j) / cells[:, 2:3] for i, j in ((0, cells[:, :2]), (2, 0)))  # fmt: skip
        near = (np.abs(offset) < 2 * NEAR).all(axis=1) & (size < 4 * NEAR).all(axis=1)
        moved, spread = (x[near] - x[near].mean(axis=0) for x in (offset, size))
        if near.mean() > 0.5 and (spread**2).sum() > 1e-3 * near.sum():
            slopes.append((float((moved * spread).sum() / (spread**2).sum()), float(near.mean())))
    if not slopes:
        return None, "a centre and a corner both fit"
    slope, _ = max(slopes, key=lambda found: found[1])
    said = f"{slope:.2f} of their size"
    if abs(slope) < 0.2:
        return (
            "cxcywh",
            f"the first two numbers move from their cells by {said}; those of a corner by -0.5",
        )
    if -0.7 < slope < -0.3:
        return "xywh", f"the first two numbers move from their cells by {said}"
    return None, "a centre and a corner both fit"


def _in_pixels(
    boxes: Sequence[NDArray[Any]], box_format: BoxFormat, size_hw: tuple[int, int], is_unit: bool
) -> Sequence[NDArray[Any]]:
    """Boxes of 0 to 1 times the side that each number belongs to."""
    if not is_unit:
        return boxes
    sides = size_hw if box_format == "yxyx" else size_hw[::-1]
    return [b * np.array([*sides] * 2) for b in boxes]


def _distance(boxes: Sequence[NDArray[Any]], box_format: BoxFormat, levels: Levels) -> float:
    """Median distance of boxes from the centres of their cells, in strides; boxes without a
    positive size count as far.
    """
    nearest = []
    orders = (False, True) if levels.boxes_per_cell > 1 else (False,)
    for strides in (levels.strides, levels.strides[::-1]):
        for anchors_first in orders:
            cells = dataclasses.replace(levels, strides=strides).centres(
                anchors_first=anchors_first
            )
            gaps = []
            for value in boxes:
                corners = to_xyxy(value, box_format)
                centre = (corners[:, :2] + corners[:, 2:]) / 2
                gap = np.abs(centre - cells[:, :2]).max(axis=1) / cells[:, 2]
                gap[(corners[:, 2:] <= corners[:, :2]).any(axis=1)] = np.inf
                gaps.append(gap)
            nearest.append(float(np.median(np.concatenate(gaps))))
    return min(nearest)


def _lies_within(
    boxes: Sequence[NDArray[Any]], box_format: BoxFormat, size_hw: tuple[int, int]
) -> bool:
    corners = to_xyxy(np.concatenate(list(boxes)), box_format)
    limit = np.array([*size_hw[::-1]] * 2)
    ordered = (corners[:, 2:] >= corners[:, :2]).all(axis=1)
    inside = ((corners >= -0.1 * limit) & (corners <= 1.1 * limit)).all(axis=1)
    return bool(ordered.mean() > 0.98 and inside.mean() > 0.9)
