# SPDX-License-Identifier: Apache-2.0
"""Boxes clipped to the picture within a letterbox, before the NMS, for frameworks that do so.

The graph has one input, the padded image. So the picture is measured in it: up to the last row and
column (centred: from the first ones) that are not of the padding colour alone. Of a picture whose
own last rows are exactly that colour, these count as padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from trtdet.graph.builder import Builder
from trtdet.graph.tidy import network_input
from trtdet.spec import LARGEST_SIDE, Preprocessing

#: Levels of 0-255 by which a pixel of the picture differs from the padding.
STEP = 0.5
#: Pixels of the input: what a framework cuts off where it makes a picture's size a whole number,
#: on average. What it was of one picture is not known in the graph.
CUT_OFF = np.float32(0.5)


@dataclass(frozen=True)
class Limits:
    """Where boxes end: the first and the last corner; tensors [N, 1, 2], or constants."""

    first: str | NDArray[np.float32]
    last: str | NDArray[np.float32]


def limits(
    build: Builder,
    preprocessing: Preprocessing,
    backwards: bool,
    *,
    is_unit: bool,
    cut_off: bool = True,
) -> Limits:
    """Where the picture lies: the input's size where it is stretched.

    Args:
        backwards: y before x.
        is_unit: as parts of the input's size, rather than in its pixels.
        cut_off: the picture includes what was cut off where its size became a whole number.
    """
    height, width = preprocessing.size_hw
    sides = [("columns", 1, width), ("rows", 2, height)]
    if backwards:
        sides.reverse()
    sizes: str | NDArray[np.float32] = np.array([size for *_, size in sides], np.float32)
    if preprocessing.size_range:
        sizes = _sizes(build, preprocessing, backwards=backwards)
    first: str | NDArray[np.float32] = np.zeros(2, np.float32)
    last: str | NDArray[np.float32] = sizes
    if preprocessing.resize == "letterbox":
        differs = _differs(build, preprocessing)
        masks = [_are_picture(build, name, differs, across) for name, across, _ in sides]
        ends = [
            _ends(build, preprocessing, name, mask, size)
            for mask, (name, _, size) in zip(masks, sides, strict=True)
        ]
        if preprocessing.placement == "center":
            first = _corner(build, "first", "ReduceMin", masks, ends, np.float32(LARGEST_SIDE))
            first = build.node("Sub", "picture/first_start", first, np.float32(1))
        last = _corner(build, "last", "ReduceMax", masks, ends, np.float32(0))
        if cut_off and preprocessing.rounding != "round":
            whole = build.node("Add", "picture/rounded_up", last, CUT_OFF)
            last = build.node("Min", "picture/last_within", whole, sizes)
    if not is_unit:
        return Limits(first, last)
    if isinstance(first, str):
        first = build.node("Div", "picture/first_part", first, sizes)
    last = build.node("Div", "picture/last_part", last, sizes)
    return Limits(first, last)


def clip(
    build: Builder, limits: Limits, boxes: str, scores: str, *, centred: bool
) -> tuple[str, str]:
    """Corners within the limits; the scores of boxes of which nothing is left become 0.

    Args:
        centred: boxes are centre and size, else corners.
    """
    first, second = build.slice_last("first", boxes, 0, 2), build.slice_last("second", boxes, 2, 4)
    if centred:
        half = build.node("Mul", "half_size", second, np.float32(0.5))
        first, second = (
            build.node("Sub", "first_corner", first, half),
            build.node("Add", "second_corner", first, half),
        )
    least, most = (
        build.node("Max", f"{name}_within", build.node("Min", f"{name}_below", x, limits.last), limits.first)
        for name, x in (("first", first), ("second", second))
    )  # fmt: skip
    sides = build.node("Sub", "sides", most, least)
    shortest = build.reduce("ReduceMin", "shortest_side", sides, 2, keepdims=True)
    is_left = build.node("Greater", "is_left", shortest, np.float32(0))
    return (
        build.node("Concat", "clipped_boxes", least, most, axis=-1),
        build.node("Where", "scores_of_boxes", is_left, scores, np.float32(0)),
    )


def _differs(build: Builder, preprocessing: Preprocessing) -> str:
    """[N, H, W]: by how many levels each pixel differs from the padding."""
    mean, std, pad = (
        np.array(values, np.float32)[:: -1 if preprocessing.bgr else 1].reshape(1, 3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std, preprocessing.pad_rgb)
    )
    if preprocessing.dtype == "uint8":
        pad = np.rint(pad)  # as the host pads
    gap = build.node("Sub", "picture/gap", network_input(preprocessing), (pad - mean) / std)
    levels = build.node("Mul", "picture/levels", build.node("Abs", "picture/size", gap), std)
    return build.reduce("ReduceMax", "picture/differs", levels, 1, keepdims=False)


def _are_picture(build: Builder, name: str, differs: str, across: int) -> str:
    """[N, size]: which rows (or columns) are not of the padding colour alone."""
    most = build.reduce("ReduceMax", f"picture/{name}/most", differs, across, keepdims=False)
    return build.node("Greater", f"picture/{name}/are_picture", most, np.float32(STEP))


def _sizes(build: Builder, preprocessing: Preprocessing, *, backwards: bool) -> str:
    """[2]: height and width of an input of dynamic size, width first unless `backwards`."""
    axes = np.array([2, 3] if backwards else [3, 2], np.int64)
    shape = build.node("Shape", "picture/input_shape", network_input(preprocessing))
    sizes = build.node("Gather", "picture/input_size", shape, axes)
    return build.cast("picture/sizes", sizes, TensorProto.FLOAT)


def _ends(
    build: Builder, preprocessing: Preprocessing, name: str, mask: str, size: int
) -> str | NDArray[np.float32]:
    """[size]: where each row or column ends, 1 to `size`, which is that of `mask`."""
    if preprocessing.size_range is None:
        return np.arange(1, size + 1, dtype=np.float32)
    shape = build.node("Shape", f"picture/{name}/shape", mask)
    count = build.node("Gather", f"picture/{name}/count", shape, np.int64(1))
    after = build.node("Add", f"picture/{name}/after", count, np.int64(1))
    ends = build.node("Range", f"picture/{name}/whole_ends", np.int64(1), after, np.int64(1))
    return build.cast(f"picture/{name}/ends", ends, TensorProto.FLOAT)


def _corner(
    build: Builder,
    name: str,
    op: str,
    are_picture: Sequence[str],
    positions: Sequence[str | NDArray[np.float32]],
    otherwise: np.float32,
) -> str:
    """[N, 1, 2]: the least or largest position in each direction, among those of the picture."""
    found = []
    for i, (mask, values) in enumerate(zip(are_picture, positions, strict=True)):
        counted = build.node("Where", f"picture/{name}/counted_{i}", mask, values, otherwise)
        found.append(build.reduce(op, f"picture/{name}/side_{i}", counted, 1, keepdims=True))
    both = build.node("Concat", f"picture/{name}/sides", *found, axis=1)
    return build.reshape(f"picture/{name}", both, [-1, 1, 2])
