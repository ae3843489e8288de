# SPDX-License-Identifier: Apache-2.0
"""Whether calibration images are fit for it: enough of them, of something, different from each
other, of a size that says something.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Below this, scales and the choice of convolutions depend on which images they are (docs/int8.md).
FEW_IMAGES = 8
#: Points along each side at which images are looked at.
GRID = 16
#: Colours closer than this are taken for the same, in levels of 0 to 255.
ALIKE = 4.0
#: An image this many times smaller than the network input, both ways, is mostly interpolation.
SMALL = 8


class Suitability:
    """Looks at images one by one; keeps a few points of each.

    Args:
        size_hw: of the network input.
    """

    def __init__(self, size_hw: tuple[int, int]) -> None:
        self._size_hw = size_hw
        self._points: list[NDArray[np.float32]] = []
        self._small: list[tuple[int, int]] = []

    def add(self, image: NDArray[np.generic], source_wh: tuple[int, int]) -> None:
        """
        Args:
            image: (H, W, 3) of 0 to 255, as the network takes it.
            source_wh: of the file.
        """
        rows, columns = (np.linspace(0, n - 1, GRID).round().astype(int) for n in image.shape[:2])
        self._points.append(image[np.ix_(rows, columns)].astype(np.float32).reshape(-1, 3))
        height, width = self._size_hw
        if source_wh[0] * SMALL <= width and source_wh[1] * SMALL <= height:
            self._small.append(source_wh)

    def warnings(self) -> list[str]:
        """A sentence for each thing that is wrong."""
        count = len(self._points)
        found = []
        if count < FEW_IMAGES:
            found.append(
                f"{count} image{'s' * (count != 1)}: what 8 bits need is known from {FEW_IMAGES} on, 100 are better"
            )
        if plain := sum(map(_is_plain, self._points)):
            found.append(f"{plain} of {count} images are of one colour")
        different = _count_different(self._points)
        if count > 1 and different <= count / 2:
            found.append(f"only {different} of {count} images differ from each other")
        if self._small:
            (width, height), (rows, columns) = self._small[0], self._size_hw
            found.append(
                f"{len(self._small)} of {count} images are far smaller than the network input ({width}x{height} instead of {columns}x{rows})"
            )
        return found


def _is_plain(points: NDArray[np.float32]) -> bool:
    """Of one colour, beside that of the padding."""
    beside = points[np.abs(points - points[-1]).max(1) > ALIKE]
    return not len(beside) or float(np.ptp(beside, axis=0).max()) <= ALIKE


def _count_different(points: Sequence[NDArray[np.float32]]) -> int:
    """Images that are like none before them."""
    kept: list[NDArray[np.float32]] = []
    for image in points:
        if not any(float(np.abs(image - other).mean()) < ALIKE for other in kept):
            kept.append(image)
    return len(kept)
