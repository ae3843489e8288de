# SPDX-License-Identifier: Apache-2.0
"""The two heads that an NMS selects from: their sizes, and boxes decoded in the graph."""

import numpy as np

from trtdet.errors import GraphError
from trtdet.graph.builder import Builder, Types, dims_text


def head_sizes(types: Types, boxes: str, scores: str, values: int = 4) -> tuple[int | None, int]:
    """Numbers of anchors (None: it depends on the size of the input) and classes, from the shapes
    of the two tensors.

    Args:
        values: of a box; rotated ones have 5.

    Raises:
        GraphError: unknown shapes, or shapes that do not belong together.
    """
    box_dims, score_dims = (types[name][1] if name in types else [] for name in (boxes, scores))
    anchors, num_classes = score_dims[1:3] if len(score_dims) >= 3 else (None, None)
    known = {n for n in (anchors, *box_dims[1:2]) if isinstance(n, int)}
    if (
        box_dims[2:] not in ([values], [1, values])
        or len(known) > 1
        or not isinstance(num_classes, int)
    ):
        raise GraphError(
            f"NMS: expected boxes '{boxes}' [N, anchors, {values}] and scores '{scores}' [N, anchors, classes] with a known number of "
            f"classes, found {dims_text(box_dims)} and {dims_text(score_dims)}"
        )
    return next(iter(known), None), num_classes


def decode_boxes(build: Builder, boxes: str, anchors: str | None, box_coding: int) -> str:
    """`trtdet.nms.reference.decode_boxes` in the graph: boxes (..., 4) to corners, the same
    operations in the same order.
    """
    if box_coding == 0:
        if anchors is None:
            return boxes
        return build.node(
            "Add", "corners", in_order(build, "box", boxes), in_order(build, "anchor", anchors)
        )
    centre = build.slice_last("centre_raw", boxes, 0, 2)
    size = build.slice_last("size_raw", boxes, 2, 4)
    if anchors is not None:
        anchor_centre = build.slice_last("anchor_centre", anchors, 0, 2)
        anchor_size = build.slice_last("anchor_size", anchors, 2, 4)
        offset = build.node("Mul", "offset", centre, anchor_size)
        centre = build.node("Add", "centre", offset, anchor_centre)
        size = build.node("Mul", "size", anchor_size, build.node("Exp", "size_ratio", size))
    half = build.node("Mul", "half_size", size, np.float32(0.5))
    first = build.node("Sub", "first_corner", centre, half)
    second = build.node("Add", "second_corner", centre, half)
    return build.node("Concat", "corners", first, second, axis=-1)


def in_order(build: Builder, name: str, boxes: str) -> str:
    """Corner boxes (..., 4) with the smaller coordinates first, as the plugin orders them."""
    first = build.slice_last(f"{name}_first", boxes, 0, 2)
    second = build.slice_last(f"{name}_second", boxes, 2, 4)
    low = build.node("Min", f"{name}_low", first, second)
    high = build.node("Max", f"{name}_high", first, second)
    return build.node("Concat", f"{name}_in_order", low, high, axis=-1)
