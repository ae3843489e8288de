# SPDX-License-Identifier: Apache-2.0
"""Which candidates survive an NMS, and the outputs of those that do, in the graph."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from onnx import TensorProto, helper

from trtdet.graph.builder import Builder, Types, value_info
from trtdet.nms.boxes import in_order
from trtdet.nms.candidates import Candidates, just_below
from trtdet.spec import Nms

#: Rounds between two looks at whether all is settled, each of which makes the host wait.
ROUNDS_AT_ONCE = 6
#: Pairs of candidates of a batch whose matrices, 256 MiB each, are made together.
MOST_PAIRS = np.int64(1 << 26)


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
    suppresses = _suppression_matrix(build, iou, found, nms)
    # Candidates below the score threshold need no mask: at rank 0 they suppress nothing, and `emit`
    # leaves them out.
    stays = build.constant("all_stay", np.ones((1, 1, found.count), np.float32))
    for i in range(1, rounds + 1):
        stays = _next_round(build, f"round_{i}", stays, suppresses)
    return build.reshape("survivors", stays, [0, -1])


def _next_round(build: Builder, name: str, stays: str, suppresses: str) -> str:
    suppressors = build.node("MatMul", f"{name}/suppressors", stays, suppresses)
    left = build.node("Sub", f"{name}/one_less_suppressors", np.float32(1), suppressors)
    return build.node("Relu", f"{name}/stays", left)


def _suppression_matrix(build: Builder, iou: str, found: Candidates, nms: Nms) -> str:
    """[N, count, count] float32: 1 where the candidate of axis 1 is better than that of axis 2 and
    overlaps it too much.
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
    return build.cast("suppression_matrix", suppresses, TensorProto.FLOAT)


def suppress_until_settled(build: Builder, corners: str, found: Candidates, nms: Nms) -> str:
    """[N, count] float32: 1 where the candidate survives, by rounds until nothing changes.

    For a GPU: the operator NonMaxSuppression waits for it several times per image and class. The
    images of a batch are looked at together, as far as their matrices are small, else one after the
    other.
    """
    shape = build.node("Shape", "candidates_shape", found.rank)
    images, count = (build.node("Gather", f"{name}_of_shape", shape, np.int64(axis)) for axis, name in enumerate(("images", "count")))  # fmt: skip
    pairs = build.node("Mul", "pairs_of_image", count, count)
    small = build.node("Less", "is_small", build.node("Mul", "pairs", pairs, images), MOST_PAIRS)
    with build.inner_graph("together") as together:
        settled = _settled(build, corners, found, nms)
        together.output.append(value_info(settled, TensorProto.FLOAT, [None, None]))
    with build.inner_graph("one_by_one") as one_by_one:
        settled = _settled_one_by_one(build, corners, found, nms, images)
        one_by_one.output.append(value_info(settled, TensorProto.FLOAT, [None, None]))
    return build.node("If", "survivors", small, then_branch=together, else_branch=one_by_one)


def _settled_one_by_one(
    build: Builder, corners: str, found: Candidates, nms: Nms, images: str
) -> str:
    """`_settled`, of one image after the other."""
    number = build.name("image_number")
    goes_on = build.name("image_goes_on")
    inputs = [value_info(number, TensorProto.INT64, []), value_info(goes_on, TensorProto.BOOL, [])]
    with build.inner_graph("of_image", inputs) as of_image:
        row = build.reshape("image_row", number, [1])
        its = {name: build.node("Gather", f"{name}_of_image", tensor, row, axis=0) for name, tensor in (("corners", corners), ("rank", found.rank), ("class_id", found.class_id))}  # fmt: skip
        one = replace(found, rank=its["rank"], class_id=its["class_id"])
        settled = build.reshape("image_survivors", _settled(build, its["corners"], one, nms), [-1])
        again = build.node("Identity", "next_image", goes_on)
        of_image.output.extend([value_info(again, TensorProto.BOOL, []), value_info(settled, TensorProto.FLOAT, [None])])  # fmt: skip
    return build.node("Loop", "survivors_of_each", images, np.array(True), body=of_image)


def _settled(build: Builder, corners: str, found: Candidates, nms: Nms) -> str:
    """The fixed point of `suppress_by_rounds`, [N, count]."""
    suppresses = _suppression_matrix(build, pairwise_iou(build, corners), found, nms)
    ranks = build.reshape("ranks_row", found.rank, [0, 1, -1])
    start = _filled_like(build, "all_stay", ranks, 1)
    names = [build.name(name) for name in ("round", "goes_on", "stays_before")]
    kinds = (TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT)
    inputs = [value_info(name, kind, [] if kind != TensorProto.FLOAT else [None, 1, None]) for name, kind in zip(names, kinds, strict=True)]  # fmt: skip
    with build.inner_graph("rounds", inputs) as rounds:
        before = stays = names[2]
        for number in range(ROUNDS_AT_ONCE):
            before, stays = stays, _next_round(build, f"settling_{number}", stays, suppresses)
        moved = build.node("Abs", "moved", build.node("Sub", "moves", stays, before))
        most = build.reduce("ReduceMax", "most_moved", build.reshape("moved_flat", moved, [-1]), 0, keepdims=False)  # fmt: skip
        again = build.node("Greater", "is_not_settled", most, np.float32(0))
        rounds.output.extend([value_info(again, TensorProto.BOOL, []), value_info(stays, TensorProto.FLOAT, [None, 1, None])])  # fmt: skip
    # Each round settles one more candidate, or all are.
    settled = build.node("Loop", "settled", np.int64(found.count), np.array(True), start, body=rounds)  # fmt: skip
    return build.reshape("settled_rows", settled, [0, -1])


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
