# SPDX-License-Identifier: Apache-2.0
"""RoiAlign in ordinary operators: bilinear samples by GridSample, and their mean.

TensorRT has a plugin for RoiAlign, TensorRT-RTX none. ONNX's rules (torchvision's too): a sample
more than one pixel outside of the map counts 0, one nearer is moved to its border; a box has at
least one pixel unless its corners are half-pixel centres ("half_pixel").
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from trtdet.errors import GraphError
from trtdet.graph.builder import Builder

#: GridSample came with this opset.
OLDEST_OPSET = 16


def lower_node(
    build: Builder,
    node: onnx.NodeProto,
    inputs: Sequence[str],
    map_shape: tuple[int, ...],
    roi_shape: tuple[int, ...],
) -> str:
    """Append the operators; returns the tensor [n, C, output_height, output_width].

    Args:
        inputs: maps [1, C, H, W], boxes [n, 4], and numbers of pictures [n], which are all 0.

    Raises:
        GraphError: several pictures, a maximum in place of the mean, or as many samples as fit.
    """
    found: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    ratio = found.get("sampling_ratio", 0)
    if map_shape[0] != 1 or found.get("mode", b"avg") != b"avg" or ratio < 1:
        raise GraphError(
            f"RoiAlign '{node.name}': expected one picture, mode avg and a sampling_ratio of at least 1, found {map_shape[0]}, "
            f"{found.get('mode', b'avg').decode()} and {ratio}; export the model with these"
        )
    if build.opset < OLDEST_OPSET:
        raise GraphError(
            f"RoiAlign '{node.name}': expected opset {OLDEST_OPSET} or later, which has GridSample, found {build.opset}; convert with --opset 17"
        )
    default = b"half_pixel" if build.opset >= 16 else b"output_half_pixel"
    aligned = found.get("coordinate_transformation_mode", default) == b"half_pixel"
    scale, n = np.float32(found.get("spatial_scale", 1.0)), roi_shape[0]
    _, channels, *map_hw = map_shape
    sizes = [found.get("output_height", 1), found.get("output_width", 1)]
    maps, boxes, _ = inputs
    grids, insides = [], []
    for name, axis in (("y", 1), ("x", 0)):
        bins, side = sizes[1 - axis], map_hw[1 - axis]
        position = _positions(build, name, boxes, axis, scale, bins, ratio, aligned=aligned)
        above = build.node("Greater", f"{name}/above", position, np.nextafter(np.float32(-1), np.float32(-2)))  # fmt: skip
        below = build.node("Less", f"{name}/below", position, np.nextafter(np.float32(side), np.float32(np.inf)))  # fmt: skip
        insides.append(build.node("And", f"{name}/inside", above, below))
        within = build.node("Clip", f"{name}/within", position, np.float32(0), np.float32(side - 1))
        # From -1 at the first to 1 at the last pixel; a map of one pixel has only 0.
        factor = np.float32(2 / (side - 1)) if side > 1 else np.float32(0)
        scaled = build.node("Mul", f"{name}/scaled", within, factor)
        grids.append(build.node("Sub", f"{name}/grid", scaled, np.float32(side > 1)))
    rows, columns = (size * ratio for size in sizes)
    y = build.reshape("y/column", grids[0], [n, rows, 1, 1])
    x = build.reshape("x/row", grids[1], [n, 1, columns, 1])
    shape = np.array([n, rows, columns, 1], np.int64)
    wide = [build.node("Expand", f"{k}/wide", t, shape) for k, t in (("x", x), ("y", y))]
    grid = build.node("Concat", "grid", *wide, axis=-1)
    grid = build.reshape("grid_rows", grid, [1, n * rows, columns, 2])
    sampled = build.node("GridSample", "sampled", maps, grid, align_corners=1, mode="bilinear", padding_mode="border")  # fmt: skip
    is_inside = build.node(
        "And",
        "inside",
        build.reshape("y/inside_column", insides[0], [n, rows, 1]),
        build.reshape("x/inside_row", insides[1], [n, 1, columns]),
    )
    is_inside = build.reshape("inside_rows", is_inside, [1, 1, n * rows, columns])
    counted = build.node("Where", "counted", is_inside, sampled, np.float32(0))
    mean = build.node("AveragePool", "mean", counted, kernel_shape=[ratio, ratio], strides=[ratio, ratio])  # fmt: skip
    parts = build.reshape("parts", mean, [channels, n, *sizes])
    return build.node("Transpose", "aligned", parts, perm=[1, 0, 2, 3])


def _positions(
    build: Builder, name: str, boxes: str, axis: int, scale: np.float32, bins: int, ratio: int, *, aligned: bool
) -> str:  # fmt: skip
    """[n, bins * ratio]: where samples lie along one axis, in pixels of the map."""
    first, last = (
        build.node("Mul", f"{name}/{end}", build.slice_last(f"{name}/{end}_corner", boxes, i, i + 1), scale)
        for end, i in (("first", axis), ("last", axis + 2))
    )  # fmt: skip
    size = build.node("Sub", f"{name}/size", last, first)
    if aligned:
        first = build.node("Sub", f"{name}/first_shifted", first, np.float32(0.5))
    else:
        size = build.node("Max", f"{name}/size_of_1", size, np.float32(1))
    steps = ((np.arange(bins * ratio) + 0.5) / (ratio * bins)).astype(np.float32)[None]
    return build.node(
        "Add", f"{name}/positions", first, build.node("Mul", f"{name}/steps", size, steps)
    )
