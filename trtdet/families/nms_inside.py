# SPDX-License-Identifier: Apache-2.0
"""Exports that end in ONNX's NonMaxSuppression over several classes, as YOLO-NAS, YOLOX and
PP-YOLOE of super-gradients and DAMO-YOLO write them for ONNX Runtime.

| outputs | |
|---|---|
| count [N, 1], boxes [N, K, 4], scores [N, K], labels [N, K] | filled up with 0 or -1 |
| rows [n, 7]: the number of the image, a box, a score and a label, in any order | of all images |

The inputs of the NMS are the boxes and scores that are looked for. The detections of the export
are compared with what its own NMS finds in them, so what its nodes do behind the NMS is checked.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from trtdet.errors import GraphError
from trtdet.families import any_number
from trtdet.families.base import Declaration, Final, Found
from trtdet.families.box_formats import to_xyxy
from trtdet.families.heads_plan import Framework, Plan
from trtdet.families.outputs import Nodes, attribute, is_whole
from trtdet.geometry import box_iou
from trtdet.graph.builder import tensor_types, with_shapes
from trtdet.sources.onnx_file import OnnxSource

logger = logging.getLogger(__name__)

WHOLE = (TensorProto.INT32, TensorProto.INT64)
ROW_WIDTH = 7
NAME = "its NonMaxSuppression"


@dataclass(frozen=True)
class Inside:
    """An NMS whose inputs and thresholds are known.

    Attributes:
        boxes, scores: its inputs, scores as `layout` says.
        outputs: boxes, scores and labels; or rows alone.
        most_of_class: how many boxes of a class it keeps.
        most: how many detections of a picture follow from it: the best of them where `by_score`,
            else the first in the order of their classes.
    """

    boxes: str
    scores: str
    layout: Literal["NAC", "NCA"]
    outputs: tuple[str, ...]
    iou_threshold: float
    score_threshold: float
    most_of_class: int
    most: int | None
    by_score: bool
    is_centred: bool


def maybe_inside(source: OnnxSource, declared: Declaration | None = None) -> Inside | None:
    """The NMS that the outputs follow from; None where there is none, or not in such a form, or
    where other outputs are declared.
    """
    if declared and (declared.boxes or declared.rows or declared.selected):
        return None
    found = [node for node in source.model.graph.node if node.op_type == "NonMaxSuppression"]
    outputs = _outputs(source.model)
    if len(found) != 1 or not outputs or len(found[0].input) < 2:
        return None
    (node,), nodes = found, Nodes(source.model)
    if nodes.ops(outputs).isdisjoint(("NonMaxSuppression",)) or _is_one_class(source, node):
        return None
    limits = [nodes.value(name) if name else np.zeros(1) for name in node.input[2:]]
    if any(limit is None for limit in limits):
        return None
    values = [float(limit.reshape(-1)[0]) for limit in limits if limit is not None]
    most_of_class, iou, score = [*values, 0.0, 0.0, 0.0][:3]
    scores, layout = _with_rows(nodes, node.input[1])
    most, how = any_number.most_rows(source.model, outputs[0 if len(outputs) == 1 else 1])
    return Inside(
        node.input[0], scores, layout, outputs, iou, score, int(most_of_class), most, how.startswith("TopK"), bool(attribute(node, "center_point_box", 0)),
    )  # fmt: skip


def framework_of(inside: Inside, known: Framework) -> Framework:
    """What the NMS says of its inputs and of the selection, where the framework does not."""
    declared = Declaration(
        boxes=inside.boxes, scores=inside.scores, scores_layout=inside.layout, selected=False, activation="none",
        box_format="cxcywh" if inside.is_centred else None,
    )  # fmt: skip
    return known.with_changes(
        name=known.name or NAME, declared=declared, columns=(), rows="", selected=False, iou_threshold=inside.iou_threshold,
        score_threshold=inside.score_threshold, kept=inside.most, is_read=not known.name,
    )  # fmt: skip


def final(inside: Inside, plan: Plan, size_hw: tuple[int, int], path: str) -> Final:
    """The detections of the export, for a comparison with its own NMS applied to our heads."""
    unit = np.array([*size_hw[::-1]] * 2 if plan.is_unit else [1] * 4, np.float32)

    def read_detections(values: Sequence[NDArray[Any]]) -> Found:
        if len(values) == 1:
            boxes, scores, labels = _of_rows(np.asarray(values[0], np.float64), path)
        else:
            boxes, scores, labels = (np.asarray(value[0], np.float64) for value in values)
        box_format = "xyxy" if plan.box_format == "cxcywh" and _are_corners(boxes) else plan.box_format  # fmt: skip
        corners = to_xyxy(boxes, box_format).astype(np.float32) * unit
        ids = labels.reshape(-1).astype(np.int64) - (plan.background == "first")
        kept = (ids >= 0) & (ids < plan.num_classes) if plan.background != "none" else slice(None)
        return Found(corners[kept], scores.reshape(-1)[kept].astype(np.float32), ids[kept])

    limited: list[int] = []

    def select(boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> Found:
        kept = []
        for label in range(scores.shape[1]):
            found = _suppressed(boxes, scores[:, label], inside)
            if len(found) > inside.most_of_class and not limited:
                limited.append(label)
                logger.warning(
                    "%s: its NMS keeps at most %d boxes of a class, where a photograph has more; the converted file has no such limit",
                    path, inside.most_of_class,
                )  # fmt: skip
            kept += [(i, label) for i in found[: inside.most_of_class]]
        if inside.by_score:
            kept.sort(key=lambda pair: -scores[pair])
        kept = kept[: inside.most]
        at, labels = (np.array([pair[k] for pair in kept], np.int64) for k in (0, 1))
        return Found(boxes[at], scores[at, labels], labels)

    differs = "the best detections of all classes where there are more than are kept"
    if not inside.by_score:
        differs += ", not those of the first classes"
    remedy = f"declare what enters its NMS, --boxes_output {inside.boxes} --scores_output {inside.scores}"
    return Final(inside.outputs, read_detections, select, differs, remedy=remedy)


def _suppressed(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], inside: Inside
) -> list[int]:
    """ONNX's NMS of one class: positions, best first; one more than it keeps, where there are."""
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > inside.score_threshold]
    kept: list[int] = []
    while len(order) and len(kept) <= inside.most_of_class:
        best, order = order[0], order[1:]
        kept.append(int(best))
        order = order[box_iou(boxes[best : best + 1], boxes[order])[0] <= inside.iou_threshold]
    return kept


def _are_corners(boxes: NDArray[np.float64]) -> bool:
    """Whether boxes behind an NMS of centres and sizes have become corners."""
    return bool((boxes[:, 2:] >= boxes[:, :2]).all())


def _of_rows(
    rows: NDArray[np.float64], path: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Boxes, scores and labels of the first image.

    Raises:
        GraphError: its columns are others.
    """
    if not len(rows):
        return np.zeros((0, 4)), np.zeros(0), np.zeros(0)
    rows = rows[rows[:, 0] == 0]
    first, last = (is_whole([rows[:, column]]) for column in (5, 6))
    if first == last:
        raise GraphError(
            f"{path}: expected rows of the number of the image, x1 y1 x2 y2, and a score and a label, one of them of whole numbers, found "
            f"{', '.join(f'{x:.4g}' for x in rows[0])}; declare them with --rows_output and --columns"
        )
    score, label = (6, 5) if first else (5, 6)
    return rows[:, 1:5], rows[:, score], rows[:, label]


def _outputs(model: onnx.ModelProto) -> tuple[str, ...]:
    """Boxes, scores and labels, or rows; () where the outputs are others."""
    infos = {info.name: info for info in model.graph.output}
    dims = {name: [d.dim_value for d in i.type.tensor_type.shape.dim] for name, i in infos.items()}
    whole = [n for n, i in infos.items() if i.type.tensor_type.elem_type in WHOLE]
    if len(infos) == 1:
        ((name, shape),) = dims.items()
        is_open = len(shape) == 2 and shape[1] == ROW_WIDTH and not shape[0]
        return (name,) if is_open and name not in whole else ()
    boxes = [n for n, d in dims.items() if len(d) == 3 and d[2] in (0, 4) and n not in whole]
    scores = [n for n, d in dims.items() if len(d) == 2 and n not in whole]
    labels = [n for n, d in dims.items() if len(d) == 2 and n in whole and d[1] != 1]
    counts = [n for n in whole if n not in labels]
    if len(boxes) == len(scores) == len(labels) == 1 and len(infos) == 3 + len(counts):
        return boxes[0], scores[0], labels[0]
    return ()


def _with_rows(nodes: Nodes, scores: str) -> tuple[str, Literal["NAC", "NCA"]]:
    """The scores [N, A, C] that were transposed for the NMS, so that a box and its scores are the
    same row; the scores themselves where they were not.
    """
    node = nodes.producer.get(scores)
    if node is not None and node.op_type == "Transpose" and attribute(node, "perm") == [0, 2, 1]:
        return node.input[0], "NAC"
    return scores, "NCA"


def _is_one_class(source: OnnxSource, node: onnx.NodeProto) -> bool:
    """Whether the NMS has, or may have, one class alone: boxes are then moved apart by their
    class, or their labels are elsewhere.
    """
    name = node.input[1]
    types = tensor_types(source.model)
    if name not in types:
        types = tensor_types(with_shapes(source.model))
    dims = types[name][1] if name in types else []
    classes = dims[1] if len(dims) == 3 else None
    return not isinstance(classes, int) or classes < 2
