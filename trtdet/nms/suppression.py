# SPDX-License-Identifier: Apache-2.0
"""Which candidates survive an NMS, and the outputs of those that do, in the graph."""

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper

from trtdet.graph.builder import Builder, Types
from trtdet.nms.boxes import in_order
from trtdet.nms.candidates import Candidates, just_below
from trtdet.spec import Nms


def suppress_by_operator(build: Builder, corners: str, found: Candidates, nms: Nms) -> str:
    """[N, count] float32: 1 where the candidate survives, by ONNX's NonMaxSuppression."""
    rank = build.reshape("ranks_row", found.rank, [0, 1, -1])
    if not nms.class_agnostic:
        class_id = build.reshape("classes_row", found.class_id, [0, 1, -1])
        every_class = np.arange(found.num_classes, dtype=np.int64)[None, :, None]
        is_class = build.node("Equal", "is_class", class_id, every_class)
        rank = build.node("Where", "class_ranks", is_class, rank, np.float32(0))
    selected = build.node(
        "NonMaxSuppression",
        "selected",
        corners,
        rank,
        np.int64(nms.max_output_boxes),
        just_below(np.float32(nms.iou_threshold)),
        np.float32(0.5),  # between the rank of an absent candidate and that of the last
    )
    # [s, 3] image, class, candidate  ->  marks in [N, count]
    position = build.node("Gather", "selected_positions", selected, np.array([0, 2]), axis=1)
    image = build.node("Gather", "selected_images", selected, np.int64(0), axis=1)
    ones = _filled_like(build, "selected_ones", image, 1)
    zeros = _filled_like(build, "none_selected", found.score, 0)
    return build.node("ScatterND", "survivors", zeros, position, ones)


def pairwise(build: Builder, op: str, name: str, column: str) -> str:
    """op(x, y) of every pair, [N, count, count] of a column [N, count, 1]: x along axis 1, y
    along axis 2.
    """
    row = build.reshape(f"{name}/row", column, [0, 1, -1])
    return build.node(op, name, column, row)


def pairwise_iou(build: Builder, corners: str) -> str:
    """IoU [N, count, count] of corner boxes [N, count, 4]."""

    def side(name: str, low: str, high: str) -> str:
        return build.node("Relu", name, build.node("Sub", f"{name}_signed", high, low))

    boxes = in_order(build, "candidate", corners)
    top, left, bottom, right = (
        build.slice_last(f"{name}_edge", boxes, i, i + 1)
        for i, name in enumerate(("top", "left", "bottom", "right"))
    )
    area = build.node("Mul", "area", side("height", top, bottom), side("width", left, right))
    shared_height = side(
        "shared_height",
        pairwise(build, "Max", "shared_top", top),
        pairwise(build, "Min", "shared_bottom", bottom),
    )
    shared_width = side(
        "shared_width",
        pairwise(build, "Max", "shared_left", left),
        pairwise(build, "Min", "shared_right", right),
    )
    shared = build.node("Mul", "shared_area", shared_height, shared_width)
    return iou_of_areas(build, shared, area)


def iou_of_areas(build: Builder, shared: str, area: str) -> str:
    """IoU [N, count, count] from the shared area of every pair, and the area of each box [N,
    count, 1].
    """
    union = build.node("Sub", "union", pairwise(build, "Add", "area_sum", area), shared)
    union = build.node("Max", "union_not_0", union, np.float32(1e-37))  # 0 / 0 otherwise
    return build.node("Div", "iou", shared, union)


def suppress_by_rounds(build: Builder, iou: str, found: Candidates, nms: Nms, rounds: int) -> str:
    """[N, count] float32: 1 where the candidate survives, by `rounds` rounds; axis 1 of `iou`
    suppresses, axis 2 is suppressed.
    """
    suppresses = build.node("Greater", "overlaps", iou, just_below(np.float32(nms.iou_threshold)))
    # Of ranks that are data, not constants: a constant matrix of this size would land in the
    # engine.
    better = pairwise(
        build, "Greater", "better", build.reshape("ranks_column", found.rank, [0, -1, 1])
    )
    suppresses = build.node("And", "suppresses", better, suppresses)
    if not nms.class_agnostic:
        class_id = build.reshape("classes_column", found.class_id, [0, -1, 1])
        same_class = pairwise(build, "Equal", "same_class", class_id)
        suppresses = build.node("And", "suppresses_in_class", suppresses, same_class)
    suppresses = build.cast("suppression_matrix", suppresses, TensorProto.FLOAT)

    # Candidates below the score threshold need no mask: at rank 0 they suppress nothing, and `emit`
    # leaves them out.
    one = build.constant("one", np.float32(1))
    stays = build.constant("all_stay", np.ones((1, 1, found.count), np.float32))
    for i in range(1, rounds + 1):
        suppressors = build.node("MatMul", f"round_{i}/suppressors", stays, suppresses)
        left = build.node("Sub", f"round_{i}/one_less_suppressors", one, suppressors)
        stays = build.node("Relu", f"round_{i}/stays", left)
    return build.reshape("survivors", stays, [0, -1])


def emit(
    build: Builder,
    outputs: Sequence[str],
    types: Types,
    corners: str,
    survives: str,
    found: Candidates,
    nms: Nms,
    box_size: int = 4,
) -> None:
    """The four outputs from the survivors' marks [N, count]: the best K in order, zeros behind
    them.

    Args:
        outputs: their names, in the order of `OUTPUT_NAMES`; "" for one that is not wanted.
        types: an output that is float16 there becomes that.
        corners: [N, count, box_size].
    """
    k = min(nms.max_output_boxes, found.count)
    rank, index = build.top_k("kept", build.node("Mul", "survivor_ranks", survives, found.rank), k)
    is_kept = build.node("Greater", "is_kept", rank, np.float32(0))
    kept = build.cast("kept_ones", is_kept, TensorProto.FLOAT)
    num = build.reduce("ReduceSum", "num_kept", kept, 1, keepdims=True)

    boxes = build.take_rows("kept_boxes", corners, index, box_size)
    is_kept_box = build.reshape("is_kept_box", is_kept, [0, -1, 1])
    score = build.node("GatherElements", "kept_scores", found.score, index, axis=1)
    if nms.score_activation:
        score = build.node("Sigmoid", "kept_probabilities", score)
    class_id = build.node("GatherElements", "kept_classes", found.class_id, index, axis=1)
    class_id = build.cast("kept_classes_int32", class_id, TensorProto.INT32)

    zero = np.float32(0)
    results = [
        (build.cast("num_int32", num, TensorProto.INT32), 1),
        (build.node("Where", "boxes_or_0", is_kept_box, boxes, zero), 3),
        (build.node("Where", "scores_or_0", is_kept, score, zero), 2),
        (build.node("Where", "classes_or_0", is_kept, class_id, np.int32(0)), 2),
    ]
    missing = nms.max_output_boxes - k
    for (tensor, rank_), name in zip(results, outputs, strict=True):
        if rank_ > 1 and missing:
            ends = [0, missing, 0][:rank_]
            pads = np.array([0] * rank_ + ends, np.int64)
            tensor = build.node("Pad", f"{tensor.removeprefix(build.prefix)}/padded", tensor, pads)
        declared = types.get(name, (TensorProto.FLOAT, []))[0]
        if declared == TensorProto.FLOAT16:
            tensor = build.cast(f"{tensor.removeprefix(build.prefix)}/fp16", tensor, declared)
        if name:
            build.output(tensor, name)


def _filled_like(build: Builder, name: str, tensor: str, value: float) -> str:
    shape = build.node("Shape", f"{name}/shape", tensor)
    filling = helper.make_tensor("value", TensorProto.FLOAT, [1], [value])
    return build.node("ConstantOfShape", name, shape, value=filling)
