# SPDX-License-Identifier: Apache-2.0
"""The kernel that places images, compiled for the CPU, against `trtdet.images.preprocess`."""

import dataclasses
import itertools
from typing import Any

import kernel_on_cpu
import numpy as np
import PIL
import pytest
from numpy.typing import NDArray

from trtdet.images.preprocess import IMAGENET_MEAN, placement_of, preprocess
from trtdet.machine import parse_version
from trtdet.runtimes import place
from trtdet.spec import Preprocessing

SIZES = [(333, 500), (512, 413), (1, 1), (3, 190), (190, 2), (64, 64), (128, 256), (260, 380), (129, 255)]  # fmt: skip
INPUT = (96, 128)
LETTERBOX = Preprocessing(INPUT, "NHWC", "uint8", pad_rgb=IMAGENET_MEAN)


def picture(size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(size_hw).integers(0, 256, (*size_hw, 3), np.uint8)


def placed(images: list[NDArray[np.uint8]], preprocessing: Preprocessing) -> NDArray[Any]:
    """What the kernel makes of images."""
    out = np.full((len(images), *preprocessing.image_shape), 7, preprocessing.dtype)
    rows = np.zeros(len(images), place.ROW)
    for row, (image, target) in enumerate(zip(images, out, strict=True)):
        height, width, _ = image.shape
        placed_hw, transform = placement_of((height, width), preprocessing)
        left, top = map(int, transform.offset_xy)
        first = place.height_first((height, width), placed_hw)
        rows[row] = (image.ctypes.data, target.ctypes.data, height, width, image.strides[0], top, left, *placed_hw, first)  # fmt: skip
    kernel_on_cpu.launch(rows, place.Launch.of(preprocessing))
    return out


@pytest.mark.parametrize(
    ("changes", "largest", "mean"),
    [
        ({"dtype": "uint8"}, 0, 0),
        ({"dtype": "uint8", "antialias": True}, 0, 0),
        ({"dtype": "uint8", "sampling": "corner"}, 0, 0),
        ({"dtype": "float32"}, 1e-4, 1e-5),
        ({"dtype": "float32", "antialias": True}, 0, 0),
        ({"dtype": "float32", "sampling": "corner"}, 0, 0),
    ],
)
def test_pixels_are_those_of_the_cpu(changes: dict[str, Any], largest: float, mean: float) -> None:
    images = [picture(size) for size in SIZES]
    placements = (("letterbox", "top_left", "floor"), ("letterbox", "center", "round"), ("stretch", "top_left", "floor"))  # fmt: skip
    for layout, (resize, where, rounding) in itertools.product(("NHWC", "NCHW"), placements):
        preprocessing = dataclasses.replace(
            LETTERBOX, layout=layout, resize=resize, placement=where, rounding=rounding, **changes
        )
        for image, found in zip(images, placed(images, preprocessing), strict=True):
            wanted, _ = preprocess(image, preprocessing)
            apart = np.abs(wanted.astype(np.float64) - found)
            told = f"{image.shape} {layout} {resize} {where}"
            assert apart.max() <= largest, told
            assert apart.mean() <= mean, told


def test_rows_of_a_source_may_be_longer_than_its_pixels() -> None:
    wide = picture((40, 80))
    cut = wide[:, :50]
    np.testing.assert_array_equal(
        placed([cut], LETTERBOX)[0], preprocess(np.ascontiguousarray(cut), LETTERBOX)[0]
    )


def test_weights_beyond_those_that_are_kept() -> None:
    """More than 64 pixels of a row for one of the result."""
    preprocessing = dataclasses.replace(LETTERBOX, size_hw=(3, 4), antialias=True)
    image = picture((200, 300))
    np.testing.assert_array_equal(placed([image], preprocessing)[0], preprocess(image, preprocessing)[0])  # fmt: skip


@pytest.mark.skipif(parse_version(PIL.__version__) < (13,), reason="Pillow before 13 begins with the width")  # fmt: skip
def test_pillow_begins_with_the_height_where_that_loses_more() -> None:
    """Both orders differ by a level here and there: a wrong guess shows."""
    rng = np.random.default_rng(0)
    stretch = dataclasses.replace(LETTERBOX, resize="stretch", antialias=True)
    orders = set()
    for _ in range(60):
        height, width, rows, columns = (int(n) for n in rng.integers(8, 120, 4))
        preprocessing = dataclasses.replace(stretch, size_hw=(rows, columns))
        image = picture((height, width))
        orders.add(place.height_first((height, width), (rows, columns)))
        np.testing.assert_array_equal(placed([image], preprocessing)[0], preprocess(image, preprocessing)[0])  # fmt: skip
    assert orders == {True, False}
