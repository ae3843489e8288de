# SPDX-License-Identifier: Apache-2.0
"""From the outputs of a network of `trtdet.families.heads` to boxes and scores, in the graph."""

import numpy as np

from trtdet.families import picture
from trtdet.families.base import Heads, best_class_only
from trtdet.families.heads_plan import BOXES, LABELS, ROWS, SCORES, Framework, Plan
from trtdet.graph.builder import Builder
from trtdet.spec import ModelSpec


def assemble(
    build: Builder,
    spec: ModelSpec,
    *,
    plan: Plan,
    known: Framework,
    clips: bool = False,
) -> Heads:
    """boxes [N, A, 4] and scores [N, A, C] of the outputs, as the plan says.

    Args:
        clips: boxes are clipped to the picture; they become corners.
    """
    count = -1 if spec.preprocessing.size_range and not plan.is_padded else plan.count
    rows = build.node("Transpose", "rows", ROWS, perm=[0, 2, 1]) if plan.transposed else ROWS
    if plan.rows:
        boxes = build.slice_last("boxes", rows, plan.first_box, plan.first_box + 4)
        scores = build.slice_last(
            "row_scores", rows, plan.first_score, plan.first_score + plan.num_scores
        )
    else:
        boxes = build.reshape("boxes", BOXES, [0, count, 4])
        scores = (
            build.node("Transpose", "class_scores", SCORES, perm=[0, 2, 1]) if plan.nca else SCORES
        )
        if plan.labels or plan.num_scores == 1:
            scores = build.reshape("score", scores, [0, count, 1])
    if plan.box_format == "xywh":
        corner = build.slice_last("corner", boxes, 0, 2)
        size = build.slice_last("size", boxes, 2, 4)
        boxes = build.node(
            "Concat", "corners", corner, build.node("Add", "far_corner", corner, size), axis=-1
        )
    if plan.activation == "softmax":
        scores = build.node("Softmax", "probabilities", scores, axis=-1)
    elif plan.activation == "sigmoid" and plan.objectness is not None:  # else the NMS does it
        scores = build.node("Sigmoid", "probabilities", scores)
    if plan.background != "none":
        first = int(plan.background == "first")
        scores = build.slice_last("foreground", scores, first, first + spec.num_classes)
    if plan.objectness is not None:
        objectness = build.slice_last("objectness", rows, plan.objectness, plan.objectness + 1)
        if plan.objectness_is_logit:
            objectness = build.node("Sigmoid", "objectness_probability", objectness)
        scores = build.node("Mul", "joint_scores", objectness, scores)
    if plan.labels or plan.label_column is not None:
        scores = _one_hot(build, spec, plan, scores)
    if known.linear or plan.activation == "clip":
        scores = build.node("Clip", "scores_of_0_to_1", scores, np.float32(0), np.float32(1))
    if known.best_class or (known.agnostic and not plan.selected):
        scores = best_class_only(build, scores)
    if clips:
        limits = picture.limits(
            build,
            spec.preprocessing,
            plan.box_format == "yxyx",
            is_unit=plan.is_unit,
            cut_off=known.cut_off,
        )
        centred = plan.box_format == "cxcywh"
        return Heads(*picture.clip(build, limits, boxes, scores, centred=centred))
    return Heads(boxes, scores)


def _one_hot(build: Builder, spec: ModelSpec, plan: Plan, score: str) -> str:
    """scores [N, A, C] of a score [N, A, 1] and a label: the score at its class, 0 elsewhere."""
    if plan.label_column is not None:
        rows = (
            build.node("Transpose", "label_rows", ROWS, perm=[0, 2, 1]) if plan.transposed else ROWS
        )
        label = build.slice_last("label", rows, plan.label_column, plan.label_column + 1)
    else:
        label = build.reshape("label", LABELS, [0, plan.count, 1])
    every = np.arange(plan.label_base, plan.label_base + spec.num_classes, dtype=np.float32)[
        None, None
    ]
    return build.node(
        "Where", "scores", build.node("Equal", "is_class", label, every), score, np.float32(0)
    )
