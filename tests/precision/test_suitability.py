# SPDX-License-Identifier: Apache-2.0
"""Calibration images that are not fit for it are said."""

import numpy as np
import pytest
from numpy.typing import NDArray

from trtdet.precision.suitability import Suitability

Image = NDArray[np.uint8]


def noise(count: int) -> list[Image]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(count)]


def padded(image: Image) -> Image:
    """On a canvas of the network's size, the rest of another colour."""
    canvas = np.full((64, 64, 3), 114, np.uint8)
    canvas[:48] = image
    return canvas


def flat(color: int) -> Image:
    return np.full((48, 64, 3), color, np.uint8)


@pytest.mark.parametrize(
    ("images", "wh", "expected"),
    [
        (noise(8), (640, 480), []),
        (list(map(padded, noise(8))), (640, 480), []),
        (noise(1), (640, 480), ["1 image: "]),
        (noise(7), (640, 480), ["7 images: "]),
        ([flat(30 * i) for i in range(8)], (640, 480), ["8 of 8 images are of one colour"]),
        ([padded(flat(30 * i)) for i in range(8)], (640, 480), ["8 of 8 images are of one colour"]),
        ([*noise(8), flat(0)], (640, 480), ["1 of 9 images are of one colour"]),
        (noise(1) * 9, (640, 480), ["only 1 of 9 images differ"]),
        (noise(4) * 2, (640, 480), ["only 4 of 8 images differ"]),
        (noise(5) + noise(5)[:3], (640, 480), []),
        (noise(8), (8, 8), ["8 of 8 images are far smaller than the network input (8x8 instead of 64x64)"]),
        (noise(8), (9, 8), []),
        ([flat(200)], (1, 1), ["1 image: ", "1 of 1 images are of one colour", "1 of 1 images are far smaller"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(images: list[Image], wh: tuple[int, int], expected: list[str]) -> None:  # fmt: skip
    suitability = Suitability((64, 64))
    for image in images:
        suitability.add(image, wh)
    found = suitability.warnings()
    assert len(found) == len(expected), found
    for line, beginning in zip(found, expected, strict=True):
        assert line.startswith(beginning)
