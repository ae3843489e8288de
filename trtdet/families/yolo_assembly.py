# SPDX-License-Identifier: Apache-2.0
"""From a head of YOLO to boxes and scores."""

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from trtdet.families.base import Heads, best_class_only
from trtdet.families.yolo_heads import Head
from trtdet.families.yolo_metadata import Metadata
from trtdet.graph.builder import Builder
from trtdet.spec import ModelSpec

#: The name of the head in the converted file: that of the exports.
HEAD = "output0"


def declare_head(graph: gs.Graph, head: Head) -> None:
    """Give the head the shape that it was seen to have; exports with a dynamic batch name its
    dimensions or leave them out.

    Where height and width of the input are free, so is the number of boxes.
    """
    shape: list[int | str | None] = ["N", *head.values.shape[1:]]
    if None in (graph.inputs[0].shape or ())[2:]:
        shape[2 if head.kind == "raw" else 1] = None
    graph.outputs[0].shape, graph.outputs[0].dtype = shape, np.dtype(np.float32)


def assembler(
    head: Head, metadata: Metadata, *, is_yolox: bool
) -> Callable[[Builder, ModelSpec], Heads]:
    if head.kind == "end_to_end":
        return partial(_assemble_end_to_end, is_rotated=metadata.is_rotated)
    if head.kind == "raw":
        return partial(_assemble_raw, is_rotated=metadata.is_rotated)
    return partial(_assemble_objectness, only_best=is_yolox)


def _assemble_raw(build: Builder, spec: ModelSpec, *, is_rotated: bool) -> Heads:
    """[N, 4+C(+1), A]  ->  boxes [N, A, 4 or 5], scores [N, A, C]"""
    rows = build.node("Transpose", "rows", HEAD, perm=[0, 2, 1])
    first, last = 4, 4 + spec.num_classes
    boxes = build.slice_last("boxes", rows, 0, 4)
    if is_rotated:
        boxes = _rotated(build, boxes, build.slice_last("angle", rows, last, last + 1))
    return Heads(boxes, build.slice_last("scores", rows, first, last))


def _assemble_objectness(build: Builder, spec: ModelSpec, *, only_best: bool) -> Heads:
    """[N, A, 5+C]  ->  boxes [N, A, 4], scores [N, A, C] = objectness x class score"""
    objectness = build.slice_last("objectness", HEAD, 4, 5)
    classes = build.slice_last("class_scores", HEAD, 5, 5 + spec.num_classes)
    scores = build.node("Mul", "scores", objectness, classes)
    if (
        only_best
    ):  # YOLOX counts a box once, also for mAP; v5 and v7 count it for each of its classes
        scores = best_class_only(build, scores)
    return Heads(build.slice_last("boxes", HEAD, 0, 4), scores)


def _assemble_end_to_end(build: Builder, spec: ModelSpec, *, is_rotated: bool) -> Heads:
    """[N, K, 6 or 7]  ->  boxes [N, K, 4 or 5], scores [N, K, C]: a row's score at its class, 0
    elsewhere
    """
    boxes = build.slice_last("boxes", HEAD, 0, 4)
    if is_rotated:
        boxes = _rotated(build, boxes, build.slice_last("angle", HEAD, 6, 7))
    score = build.slice_last("score", HEAD, 4, 5)
    class_id = build.slice_last("class_id", HEAD, 5, 6)
    every_class = np.arange(spec.num_classes, dtype=np.float32)[None, None]
    is_class = build.node("Equal", "is_class", class_id, every_class)
    return Heads(boxes, build.node("Where", "scores", is_class, score, np.float32(0)))


def _rotated(build: Builder, boxes: str, angle: str) -> str:
    """cx cy w h [N, A, 4] and an angle [N, A, 1]  ->  x1 y1 x2 y2 of the box before rotation and
    the angle [N, A, 5]
    """
    centre = build.slice_last("centre", boxes, 0, 2)
    half = build.node("Mul", "half_size", build.slice_last("size", boxes, 2, 4), np.float32(0.5))
    first = build.node("Sub", "first_corner", centre, half)
    second = build.node("Add", "second_corner", centre, half)
    return build.node("Concat", "rotated_boxes", first, second, angle, axis=-1)
