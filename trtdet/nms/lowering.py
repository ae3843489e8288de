# SPDX-License-Identifier: Apache-2.0
"""EfficientNMS_TRT in ordinary ONNX operators, for runtimes and builders that lack the plugin."""

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
    forget_domain,
    known_types,
)
from trtdet.nms.boxes import decode_boxes, head_sizes
from trtdet.nms.candidates import TENSORRT_TOPK, best_candidates, pad_rows
from trtdet.nms.reference import PLUGIN_CANDIDATES
from trtdet.nms.suppression import (
    emit,
    pairwise_iou,
    suppress_by_operator,
    suppress_by_rounds,
    suppress_until_settled,
)
from trtdet.spec import ModelSpec, Nms

Form = Literal["onnx", "settled", "graph"]

PLUGIN_OP = "EfficientNMS_TRT"

#: Classes up to which NonMaxSuppression is taken on CUDA. With 1 it is as fast at a score threshold
#: of 0.4, and twice as fast at 0.001; with 90 it is slower 6 to 25 times.
FEW_CLASSES = 8

#: Candidates of an image in the graph form. Its IoU matrix takes N * 4 * candidates**2 bytes: 16
#: MiB per image.
GRAPH_CANDIDATES = 2048

#: Suppression rounds of the graph form; even, see `lower`. On EfficientDet-D0, photographs, score
#: threshold 0.001, the first 100 detections settle within 14 rounds and all 2048 candidates within
#: 19.
GRAPH_ROUNDS = 32


def has_plugin(model: onnx.ModelProto) -> bool:
    """Whether the model has a node that `lower` replaces, in whatever domain."""
    plugins = (PLUGIN_OP, deformable_attention.PLUGIN_OP)
    return any(node.op_type in plugins for node in model.graph.node)


def fast_form(spec: ModelSpec, *, cuda: bool) -> Form:
    """The form that ONNX Runtime is fast with. Its NonMaxSuppression on CUDA waits for the GPU
    several times per image and class: with 90 classes it takes 46 ms for 8 images, and "settled"
    1.8.
    """
    many = spec.num_classes > FEW_CLASSES and not spec.nms.class_agnostic
    return "settled" if cuda and many else "onnx"


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

    MultiscaleDeformableAttnPlugin_TRT is replaced too, as
    `trtdet.graph.deformable_attention.lower` says.

    EfficientNMS_TRT(boxes, scores[, anchors])
        ->  TopK of the scores -> gather and decode those boxes -> which survive?
        ->  TopK of the survivors' ranks

    The forms differ in "which survive". All take the candidates in the reference's order (ties by
    flat index, which is how ONNX's TopK breaks them; TensorRT does not promise it) and leave the
    batch open, and the number of anchors where it is.

    form "onnx": one NonMaxSuppression over all classes. It is given ranks for scores, so that it
    cannot reorder ties, and an IoU threshold one float below `iou_threshold`, for it suppresses
    above its threshold and the plugin from it on. Always exact.

    form "settled": the rounds of "graph" until nothing changes, so always exact, with the
    candidates of "onnx". For ONNX Runtime on a GPU.

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
            for "graph"; for the others as many as reach the score threshold, in the image of the
            batch that has most of them, but no more than the plugin's 5000. TensorRT, whose TopK
            ends at 3840 and wants a constant, needs a number.
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
    build.takes_whole_rows = form != "graph" and build.opset >= 12
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
        boxes = pad_rows(build, "boxes_padded", boxes, limit, np.float32(0))

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
        survives = suppress_by_operator(build, corners, found, nms)
    elif form == "settled":
        survives = suppress_until_settled(build, corners, found, nms)
    else:
        iou = pairwise_iou(build, corners)
        survives = suppress_by_rounds(build, iou, found, nms, rounds)
    emit(build, node.output, types, corners, survives, found, nms)


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
