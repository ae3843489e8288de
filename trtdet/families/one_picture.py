# SPDX-License-Identifier: Apache-2.0
"""Detectors that take one picture at a time and select what they find in it (`any_number`): what
their outputs say of the framework, how pictures come in, and the source's own detections.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.families import any_number
from trtdet.families import evidence as ev
from trtdet.families.any_number import Rows
from trtdet.families.base import Declaration, Final, Found, Hints
from trtdet.families.box_formats import to_xyxy
from trtdet.families.evidence import Evidence
from trtdet.families.heads_plan import BOXES, LABELS, ROWS, SCORES, Framework, Plan, image_hw
from trtdet.families.outputs import look, photographs, prepared
from trtdet.families.pixels import Normal, Pixels
from trtdet.nms.candidates import TENSORRT_TOPK
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import Preprocessing

#: Detections of a picture, where nothing says how many.
MAX_DETECTIONS = 300
#: At which a network that takes any size is looked at.
USUAL_SIZE = (384, 512)
UNIT = Normal((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))


def pad(
    source: OnnxSource, rows: Rows, known: Framework, hints: Hints, evidence: Evidence
) -> Framework:
    """Give outputs whose number of rows follows the picture a fixed one: the most that the model
    finds, or what is asked for.

    Returns:
        What is known of the framework, with what these outputs say.
    """
    kept = rows.most or hints.max_detections
    how = f"{ev.READ}its {rows.how}" if rows.most else f"{ev.GIVEN}--max_detections"
    if kept is None:
        evidence.ask(ev.KEPT, "--max_detections N, the most of one picture", MAX_DETECTIONS)
        kept, how = MAX_DETECTIONS, ""
    if kept > TENSORRT_TOPK:
        raise GraphError(
            f"{source.path}: --max_detections: expected at most {TENSORRT_TOPK}, where TensorRT's TopK ends, found {kept}; name fewer"
        )
    labels = any_number.undeclared_labels(source, rows)
    if labels and hints.num_classes != 1:
        raise GraphError(
            f"{source.path}: output '{labels}' has a whole number for each box, as labels are: add --labels_output {labels}, or --num_classes 1 where there is one class"
        )
    any_number.pad_rows(source, rows, kept)
    if how:
        evidence.add(ev.KEPT, kept, how)
    changes: dict[str, Any] = {}
    if rows.is_torchvision and not known.name:
        changes = {"name": "torchvision", "normal": UNIT, "first_id": 0}
        changes["declared"] = Declaration(box_format="xyxy", box_units="pixels")
        evidence.add(ev.FAMILY, "torchvision", f"{ev.READ}boxes [n, 4], int64 labels [n] and scores [n] behind its resize and NMS")  # fmt: skip
    if rows.resizes:
        changes |= {"own_size": True, "size_multiple": 1}
        changes["size_hw"] = known.size_hw or USUAL_SIZE
    if rows.columns == any_number.PADDLE_COLUMNS:
        changes |= {"name": known.name or "PaddleDetection", "rows": rows.boxes, "columns": rows.columns}  # fmt: skip
    return known.with_changes(**changes)


def mend(source: OnnxSource, pixels: Pixels, normal: Normal) -> None:
    """Let a picture be one without any proposal, in a model of two stages."""
    height, width = pixels.size_hw or USUAL_SIZE
    sizes = ((height, width), (height, width * 3 // 2))
    pictures = [
        {pixels.tensor: prepared(image, pixels.layout, normal, 1)}
        for size_hw in sizes
        for image in photographs(size_hw)[:2]
    ]
    any_number.mend_reshapes(source, pictures)


def check_scale(
    source: OnnxSource,
    pixels: Pixels,
    normal: Normal,
    plan: Plan,
    known: Framework,
    declared: Declaration,
    evidence: Evidence,
) -> None:
    """Of a network that resizes its pictures, whether its boxes are in pixels of the picture: they
    double where the picture is twice as large.

    Raises:
        GraphError: they do not.
    """
    if plan.is_unit or pixels.size_hw is None:
        return
    if image_hw(source) is not None:  # nothing to compare with
        if not known.name and not declared.box_units:
            evidence.ask(ev.BOXES, "--box_units pixels, if they are of the input", "of the input")
        return
    largest = []
    for times in (1, 2):
        size_hw = pixels.size_hw[0] * times, pixels.size_hw[1] * times
        seen = look(source, pixels, normal, [plan.rows or plan.boxes], {}, size_hw)
        values = [v[0] for found in seen.values() for v in found]
        boxes = [v[:, plan.first_box : plan.first_box + 4] if plan.rows else v for v in values]
        corners = to_xyxy(np.concatenate(boxes), plan.box_format)
        largest.append(float(np.abs(corners).max()))
    if min(largest) > 0 and not 1.6 < largest[1] / largest[0] < 2.5:
        raise GraphError(
            f"{source.path}: expected boxes in pixels of the picture, found up to {largest[0]:.4g}, and {largest[1]:.4g} in pictures twice as large: the "
            "network resizes them, and its boxes are of the resized ones; export it with boxes of the picture, or for one size"
        )


def has_final(plan: Plan) -> bool:
    """Whether the outputs are detections as they are: one score for each box, a probability."""
    return plan.selected and plan.num_scores == 1 and plan.activation == "none"


def final(plan: Plan, size_hw: tuple[int, int]) -> Final:
    """The detections that the source selects itself."""
    names = [*plan.tensors]
    height, width = size_hw
    unit = np.array([width, height] * 2 if plan.is_unit else [1] * 4, np.float32)

    def read_detections(values: Sequence[NDArray[Any]]) -> Found:
        by_name = {name: value[0] for name, value in zip(names, values, strict=True)}
        if plan.rows:
            rows = by_name[ROWS]
            boxes = rows[:, plan.first_box : plan.first_box + 4]
            scores = rows[:, plan.first_score]
            labels = by_name.get(LABELS, np.full(len(rows), plan.label_base))
            if plan.label_column is not None:
                labels = rows[:, plan.label_column]
        else:
            boxes, scores = by_name[BOXES], by_name[SCORES]
            labels = by_name.get(LABELS, np.full(len(boxes), plan.label_base))
        corners = to_xyxy(boxes, plan.box_format).astype(np.float32) * unit
        return Found(corners, scores, labels.astype(np.int64) - plan.label_base)

    return Final(tuple(plan.tensors.values()), read_detections)


def as_they_are(normal: Normal, size_hw: tuple[int, int]) -> Preprocessing:
    """Pictures at their own size; those of one batch would be padded to the largest."""
    return Preprocessing(
        size_hw,
        dtype="uint8",
        mean=normal.mean,
        std=normal.std,
        bgr=normal.bgr,
        rounding="round",
    )
