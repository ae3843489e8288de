# SPDX-License-Identifier: Apache-2.0
"""The end of a detector that needs no NMS (DETR, YOLO end-to-end): the K best detections, in
ordinary ONNX operators.

What is selected, in this order and nothing else:

1. Candidates: every (box, class) pair; with `class_agnostic` every box, with its best class, the
   first among equals.
2. The K best candidates by score. Equal scores: the lower box index first, then the lower class id.
   ONNX defines TopK so and ONNX Runtime computes it so; TensorRT promises no order among equals.
3. Of these, the ones with probability > `score_threshold` are detections. TopK sorts, so they are
   the first `num_detections` slots; all other slots are 0.

Logits are compared as logits and the sigmoid is applied to the K kept ones: it is monotonic, and
scores that it would saturate to 1 keep their order. Boxes are decoded for the kept ones too.
Nothing is clipped, nothing suppressed.
"""

import numpy as np
import onnx
from onnx import TensorProto

from trtdet.errors import GraphError
from trtdet.graph.builder import Builder, dims_text, known_types
from trtdet.nms.boxes import decode_boxes, head_sizes
from trtdet.nms.candidates import TENSORRT_TOPK
from trtdet.nms.outputs import declare_outputs
from trtdet.spec import OUTPUT_NAMES, Nms


def insert_topk(
    model: onnx.ModelProto, *, boxes: str, scores: str, nms: Nms, batch: int | str = "N"
) -> None:
    """Put the selection behind the heads and make its four results the model's only outputs.

    boxes, scores  ->  num_detections, detection_boxes, detection_scores, detection_classes

    Args:
        boxes: [N, A, 4] float32, corners or centre and size as `nms.box_coding` says.
        scores: [N, A, C] float32, logits if `nms.score_activation`. `nms.background_class` is not a
            candidate.
        nms: `max_output_boxes` is K, at most TensorRT's TopK limit of 3840; `iou_threshold` has no
            meaning here.
        batch: first dimension of the outputs: a number, or the name of a dynamic one.

    Raises:
        GraphError: heads that are missing, of another type or shape; K beyond the limit.
    """
    k = nms.max_output_boxes
    if k > TENSORRT_TOPK:
        raise GraphError(
            f"TopK: expected max_output_boxes of at most {TENSORRT_TOPK}, where TensorRT's TopK ends, found {k}; lower --max_detections"
        )
    num_boxes, num_classes = _check_heads(model, boxes, scores)
    build = Builder(model, "nms/")  # the prefix that precision/floats.py leaves in float32
    score, box_index, class_id, count = _select(build, scores, num_boxes, num_classes, nms)
    corners = decode_boxes(
        build, build.take_rows("kept_boxes", boxes, box_index, 4), None, nms.box_coding
    )
    if nms.score_activation:
        score = build.node("Sigmoid", "kept_probabilities", score)
    _emit(build, score, corners, class_id, count, nms)
    build.append_to(model)
    declare_outputs(model, batch, k)


def _check_heads(model: onnx.ModelProto, boxes: str, scores: str) -> tuple[int, int]:
    """Numbers of boxes and classes."""
    types = known_types(model, (boxes, scores))
    num_boxes, num_classes = head_sizes(types, boxes, scores)
    if num_boxes is None:
        raise GraphError(
            f"TopK: expected a known number of boxes, found '{boxes}' {dims_text(types[boxes][1])}"
        )
    for name in (boxes, scores):
        elem_type, dims = types[name]
        if elem_type != TensorProto.FLOAT or len(dims) != 3:
            raise GraphError(
                f"TopK: expected float32 heads with three dimensions, found '{name}' "
                f"{TensorProto.DataType.Name(elem_type).lower()}{dims_text(dims)}; precision is chosen by build_engine.py"
            )
    return num_boxes, num_classes


def _select(
    build: Builder, scores: str, num_boxes: int, num_classes: int, nms: Nms
) -> tuple[str, str, str, int]:
    """Score, box index (int64) and class id (int64) of the best candidates, [N, count] each,
    best first; count.
    """
    if 0 <= nms.background_class < num_classes:
        background = np.arange(num_classes)[None, None] == nms.background_class
        lowest = np.float32(np.finfo(np.float32).min)
        scores = build.node("Where", "scores_foreground", background, lowest, scores)
    if nms.class_agnostic:
        best = build.reduce("ReduceMax", "best_class_score", scores, 2, keepdims=False)
        best_class = build.node("ArgMax", "best_class", scores, axis=2, keepdims=0)
        count = min(nms.max_output_boxes, num_boxes)
        score, box_index = build.top_k("kept", best, count)
        class_id = build.node("GatherElements", "kept_classes", best_class, box_index, axis=1)
        return score, box_index, class_id, count
    count = min(nms.max_output_boxes, num_boxes * num_classes)
    score, index = build.top_k("kept", build.reshape("scores_flat", scores, [0, -1]), count)
    box_index = build.node("Div", "kept_rows", index, np.int64(num_classes))
    row_start = build.node("Mul", "kept_row_starts", box_index, np.int64(num_classes))
    class_id = build.node("Sub", "kept_classes", index, row_start)
    return score, box_index, class_id, count


def _emit(build: Builder, score: str, corners: str, class_id: str, count: int, nms: Nms) -> None:
    """The four outputs: the candidates above the threshold, zeros behind them."""
    is_kept = build.node("Greater", "is_kept", score, np.float32(nms.score_threshold))
    num = build.reduce(
        "ReduceSum",
        "num_kept",
        build.cast("kept_ones", is_kept, TensorProto.FLOAT),
        1,
        keepdims=True,
    )
    class_id = build.cast("kept_classes_int32", class_id, TensorProto.INT32)
    is_kept_box = build.reshape("is_kept_box", is_kept, [0, -1, 1])
    results = [
        build.cast("num_int32", num, TensorProto.INT32),
        build.node("Where", "boxes_or_0", is_kept_box, corners, np.float32(0)),
        build.node("Where", "scores_or_0", is_kept, score, np.float32(0)),
        build.node("Where", "classes_or_0", is_kept, class_id, np.int32(0)),
    ]
    missing = nms.max_output_boxes - count
    for tensor, name, rank in zip(results, OUTPUT_NAMES, (1, 3, 2, 2), strict=True):
        if missing and rank > 1:
            pads = np.array([0] * rank + [0, missing, 0][:rank], np.int64)
            tensor = build.node("Pad", f"{name}_padded", tensor, pads)
        build.output(tensor, name)
