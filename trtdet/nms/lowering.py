# SPDX-License-Identifier: Apache-2.0
"""EfficientNMS_TRT in ordinary ONNX operators, for runtimes and builders that lack the plugin."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from trtdet import checks
from trtdet.errors import GraphError
from trtdet.graph import deformable_attention
from trtdet.graph.builder import (
    PLUGIN_DOMAIN,
    Builder,
    Types,
    dims_text,
    forget_domain,
    known_types,
)
from trtdet.nms.reference import PLUGIN_CANDIDATES, score_limit
from trtdet.spec import Nms

Form = Literal["onnx", "graph"]

PLUGIN_OP = "EfficientNMS_TRT"

#: Candidates of an image in the graph form. Its IoU matrix takes N * 4 * candidates**2 bytes: 16
#: MiB per image.
GRAPH_CANDIDATES = 2048

#: Suppression rounds of the graph form; even, see `lower`. On EfficientDet-D0, photographs, score
#: threshold 0.001, the first 100 detections settle within 14 rounds and all 2048 candidates within
#: 19.
GRAPH_ROUNDS = 32

#: The largest K that TensorRT's TopK takes.
TENSORRT_TOPK = 3840

_LOWEST = np.float32(np.finfo(np.float32).min)


def has_plugin(model: onnx.ModelProto) -> bool:
    """Whether the model has a node that `lower` replaces, in whatever domain."""
    plugins = (PLUGIN_OP, deformable_attention.PLUGIN_OP)
    return any(node.op_type in plugins for node in model.graph.node)


def for_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with TensorRT's own plugins replaced by operators that ONNX Runtime knows;
    itself where it has none.
    """
    return lower(model, "onnx") if has_plugin(model) else model


def lower(
    model: onnx.ModelProto,
    form: Form,
    *,
    candidates: int | None = None,
    rounds: int = GRAPH_ROUNDS,
) -> onnx.ModelProto:
    """The model with every EfficientNMS_TRT node replaced by ordinary ONNX operators (opset 11 and
    later), in FP32.

    MultiscaleDeformableAttnPlugin_TRT is replaced too, as `trtdet.deformable_attention.lower` says.

    EfficientNMS_TRT(boxes, scores[, anchors])
        ->  TopK of the scores -> gather and decode those boxes -> which survive?
        ->  TopK of the survivors' ranks

    The forms differ in "which survive". Both take the candidates in the reference's order (ties by
    flat index, which is how ONNX's TopK breaks them; TensorRT does not promise it) and leave the
    batch open, and the number of anchors where it is.

    form "onnx": one NonMaxSuppression over all classes. It is given ranks for scores, so that it
    cannot reorder ties, and an IoU threshold one float below `iou_threshold`, for it suppresses
    above its threshold and the plugin from it on. Always exact.

    form "graph": S[j, i] = 1 where candidate j is better than candidate i and overlaps it too much.
    With x_0 = 1 a round is x_{t+1} = max(1 - x_t S, 0): a candidate stays if no better one
    suppresses it that stayed in the round before. Greedy NMS is the only fixed point. What r rounds
    guarantee:

    * Call a chain a row of candidates in descending score, each overlapping the next too much. A
      candidate is right if no chain of more than r + 1 ends in it, so the result is exact if there
      is no longer chain, and always with `candidates` - 1 rounds. That is the worst case, of boxes
      lined up like dominoes; in a cluster of boxes over one object the best settles all others in
      one round.
    * Where r rounds are too few, all candidates better than the first unsettled one are right; of
      the others an even r keeps every true survivor and some too many, an odd r only true survivors
      and some too few. Two successive rounds bracket the truth.
    * With fewer candidates than the plugin's 5000, detections are the plugin's as far as they go:
      an image that fills its `max_output_boxes` is exact, another may lack detections that rank
      behind the best `candidates` pairs.

    Args:
        model: not touched; the new model has its `metadata_props`.
        candidates: (anchor, class) pairs of an image that are looked at. None: `GRAPH_CANDIDATES`
            for "graph"; for "onnx" as many as reach the score threshold, in the image of the batch
            that has most of them, but no more than the plugin's 5000. TensorRT, whose TopK ends at
            3840 and wants a constant, needs a number.
        rounds: of the form "graph".

    Raises:
        GraphError: a node without a static number of classes, or without one of its attributes.
        ValueError: candidates or rounds out of range.
    """
    limit = (
        (GRAPH_CANDIDATES if form == "graph" else PLUGIN_CANDIDATES)
        if candidates is None
        else candidates
    )
    if limit < 1 or rounds < 1:
        raise ValueError(f"expected candidates and rounds of at least 1, got {limit} and {rounds}")
    if form == "graph" and limit > TENSORRT_TOPK:
        raise ValueError(
            f"candidates: expected at most {TENSORRT_TOPK}, where TensorRT's TopK ends, got {limit}"
        )
    model = deformable_attention.lower(model)
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    build = Builder(lowered, "nms/")
    build.takes_whole_rows = form == "onnx" and build.opset >= 12
    by_threshold = build.takes_whole_rows and candidates is None
    inputs = [name for node in model.graph.node if node.op_type == PLUGIN_OP for name in node.input]
    types = known_types(model, inputs)
    for node in model.graph.node:
        if node.op_type == PLUGIN_OP:
            _lower_node(build, node, types, form, limit, rounds, by_threshold=by_threshold)
        else:
            build.nodes.append(node)
    del lowered.graph.node[:]
    build.append_to(lowered)
    forget_domain(lowered, PLUGIN_DOMAIN)
    return lowered


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
            "Add", "corners", _in_order(build, "box", boxes), _in_order(build, "anchor", anchors)
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


@dataclass(frozen=True)
class Candidates:
    """The best (anchor, class) pairs of each image, best first.

    The last four are names of tensors [N, count]; with `by_threshold` of `best_candidates` there
    are as few columns as the images need.
    """

    count: int
    num_classes: int
    score: str
    anchor: str  # int64
    class_id: str  # int64
    rank: str  # float32: count for the best, 1 for the last, 0 for those below the score threshold


def _lower_node(
    build: Builder,
    node: onnx.NodeProto,
    types: Types,
    form: Form,
    limit: int,
    rounds: int,
    *,
    by_threshold: bool,
) -> None:
    nms = _nms_of(node)
    names = list(node.input)
    num_anchors, num_classes = head_sizes(types, names[0], names[1])
    boxes, scores, *anchors = (_as_float(build, types, name) for name in names)
    boxes = build.reshape("boxes", boxes, [0, -1, 4])
    if num_anchors is None:
        boxes = _pad_rows(build, "boxes_padded", boxes, limit, np.float32(0))

    found = best_candidates(
        build, scores, num_anchors, num_classes, nms, limit, by_threshold=by_threshold
    )
    boxes = build.take_rows("candidate_boxes", boxes, found.anchor, 4)
    anchor = None
    if anchors:
        if types[names[2]][1][0] != 1:  # one set per image
            anchor = build.take_rows("candidate_anchors", anchors[0], found.anchor, 4)
        else:
            table = build.reshape("anchor_table", anchors[0], [-1, 4])
            anchor = build.node("Gather", "candidate_anchors", table, found.anchor, axis=0)
    corners = decode_boxes(build, boxes, anchor, nms.box_coding)
    if form == "onnx":
        survives = _suppress_by_operator(build, corners, found, nms)
    else:
        iou = pairwise_iou(build, corners)
        survives = suppress_by_rounds(build, iou, found, nms, rounds)
    emit(build, node.output, types, corners, survives, found, nms)


def best_candidates(
    build: Builder,
    scores: str,
    num_anchors: int | None,
    num_classes: int,
    nms: Nms,
    limit: int,
    *,
    by_threshold: bool = False,
) -> Candidates:
    """
    Args:
        limit: candidates of an image, at most.
        by_threshold: leave out the columns in which every score of the batch is below the
            threshold, but keep `max_output_boxes` of them.
    """
    if 0 <= nms.background_class < num_classes:
        background = np.arange(num_classes)[None, None] == nms.background_class
        scores = build.node("Where", "scores_foreground", background, _LOWEST, scores)
    if num_anchors is None:  # so many rows more that there are enough in any case
        scores = _pad_rows(build, "scores_padded", scores, limit, _LOWEST)
    shortlist = None
    if num_classes > 1 and (num_anchors is None or num_anchors > limit):
        # The best `limit` pairs belong to the best `limit` anchors, each judged by its best class,
        # so a TopK of the anchors first spares one of all pairs. Ties too: among equals the lower
        # anchor comes first either way. That is also why the short list goes back to the order of
        # the anchors; as float, which TopK takes in every release, and exact to 2**24.
        best_class = build.reduce("ReduceMax", "best_class_score", scores, 2, keepdims=False)
        some = _reaching(build, "anchors", best_class, nms, limit) if by_threshold else limit
        _, unordered = build.top_k("best_anchors", best_class, some)
        as_float = build.cast("best_anchors_float", unordered, TensorProto.FLOAT)
        ordered, _ = build.top_k("best_anchors_in_order", as_float, some, largest=False)
        shortlist = build.cast("best_anchors_int", ordered, TensorProto.INT64)
        scores = build.take_rows("best_anchor_scores", scores, shortlist, num_classes)
    count = limit if num_anchors is None else min(limit, num_anchors * num_classes)
    flat = build.reshape("scores_flat", scores, [0, -1])
    wanted = _reaching(build, "pairs", flat, nms, count) if by_threshold else count
    score, index = build.top_k("candidates", flat, wanted)
    row = build.node("Div", "candidate_rows", index, np.int64(num_classes))
    row_start = build.node("Mul", "candidate_row_starts", row, np.int64(num_classes))
    class_id = build.node("Sub", "candidate_classes", index, row_start)
    if shortlist is None:
        anchor = row
    else:
        anchor = build.node("GatherElements", "candidate_anchor_ids", shortlist, row, axis=1)
    valid = build.node("Greater", "candidate_valid", score, _just_below(score_limit(nms)))
    ranks: str | np.ndarray = np.arange(count, 0, -1, dtype=np.float32)[None]
    if isinstance(wanted, str):
        start, axis = np.array([0], np.int64), np.array([1], np.int64)
        ranks = build.node("Slice", "best_ranks", ranks, start, wanted, axis)
    rank = build.node("Where", "candidate_ranks", valid, ranks, np.float32(0))
    return Candidates(count, num_classes, score, anchor, class_id, rank)


def _reaching(build: Builder, what: str, scores: str, nms: Nms, most: int) -> str:
    """How many of the scores [N, x] of an image reach the threshold, in the image that has most of
    them: [1] int64; at least `nms.max_output_boxes`, `most` at most.
    """
    reaches = build.node("Greater", f"{what}_reach", scores, _just_below(score_limit(nms)))
    ones = build.cast(f"{what}_ones", reaches, TensorProto.FLOAT)
    each = build.reduce("ReduceSum", f"{what}_of_each", ones, 1, keepdims=False)
    largest = build.reduce("ReduceMax", f"{what}_of_one", each, 0, keepdims=True)
    number = build.cast(f"{what}_number", largest, TensorProto.INT64)
    least = np.array([min(nms.max_output_boxes, most)], np.int64)
    number = build.node("Max", f"{what}_at_least", number, least)
    return build.node("Min", f"{what}_at_most", number, np.array([most], np.int64))


def _suppress_by_operator(build: Builder, corners: str, found: Candidates, nms: Nms) -> str:
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
        _just_below(np.float32(nms.iou_threshold)),
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

    boxes = _in_order(build, "candidate", corners)
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
    suppresses = build.node("Greater", "overlaps", iou, _just_below(np.float32(nms.iou_threshold)))
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


def _pad_rows(build: Builder, name: str, tensor: str, count: int, value: np.float32) -> str:
    """`count` more rows of `value` along axis 1 of [N, A, x]."""
    return build.node("Pad", name, tensor, np.array([0, 0, 0, 0, count, 0], np.int64), value)


def _nms_of(node: onnx.NodeProto) -> Nms:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    required = {
        "score_threshold",
        "iou_threshold",
        "max_output_boxes",
        "background_class",
        "score_activation",
        "box_coding",
    }
    if missing := sorted(required - attributes.keys()):
        raise GraphError(
            f"{PLUGIN_OP} '{node.name}': expected the attributes that the plugin requires, found no {', '.join(missing)}"
        )
    values = {name: attributes[name] for name in required}
    for name, value in (values | {"class_agnostic": attributes.get("class_agnostic", 0)}).items():
        kinds = (int, float) if name.endswith("threshold") else int
        if not isinstance(value, kinds):
            raise GraphError(
                f"{PLUGIN_OP} '{node.name}': expected a number as {name}, found {checks.shown(value)}"
            )
    values["score_activation"] = bool(values["score_activation"])
    values["class_agnostic"] = bool(attributes.get("class_agnostic", 0))
    try:
        return Nms(**values)
    except ValueError as error:
        raise GraphError(f"{PLUGIN_OP} '{node.name}': {error}") from error


def _as_float(build: Builder, types: Types, name: str) -> str:
    if types[name][0] == TensorProto.FLOAT:
        return name
    return build.cast(f"{name.removeprefix(build.prefix)}/fp32", name, TensorProto.FLOAT)


def _in_order(build: Builder, name: str, boxes: str) -> str:
    """Corner boxes (..., 4) with the smaller coordinates first, as the plugin orders them."""
    first = build.slice_last(f"{name}_first", boxes, 0, 2)
    second = build.slice_last(f"{name}_second", boxes, 2, 4)
    low = build.node("Min", f"{name}_low", first, second)
    high = build.node("Max", f"{name}_high", first, second)
    return build.node("Concat", f"{name}_in_order", low, high, axis=-1)


def _filled_like(build: Builder, name: str, tensor: str, value: float) -> str:
    shape = build.node("Shape", f"{name}/shape", tensor)
    filling = helper.make_tensor("value", TensorProto.FLOAT, [1], [value])
    return build.node("ConstantOfShape", name, shape, value=filling)


def _just_below(threshold: np.float32) -> np.float32:
    """x > _just_below(t) is x >= t, for float32: ONNX's operators compare strictly, the plugin
    does not.
    """
    return np.nextafter(threshold, np.float32(-np.inf))
