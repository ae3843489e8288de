# SPDX-License-Identifier: Apache-2.0
"""The NMS at the end of every model: how it is written into the file, and what it becomes where the
plugin is missing.

| form | function | written as | for |
|---|---|---|---|
| plugin | `insert_plugin` | one EfficientNMS_TRT node with its fused box decoder | the file on disk; TensorRT 8 to 11 |
| onnx | `lower(model, "onnx")` | NonMaxSuppression | ONNX Runtime, TensorRT's INMSLayer |
| graph | `lower(model, "graph")` | TopK, pairwise IoU, suppression rounds | TensorRT-RTX, any TensorRT without the plugin |
| settled | `lower(model, "settled")` | the same rounds until nothing changes | ONNX Runtime on a GPU, many classes |
| legacy | `insert_legacy` | decoded boxes, BatchedNMS_TRT | TensorRT before 8 |
| none | `insert_decoded` | decoded boxes and scores | an NMS of one's own |

The first four compute `reference`; `lower` says where graph may differ. All work on the exported
`ModelProto`, whose `metadata_props` onnx-graphsurgeon would drop. The three `insert_*` functions
share their arguments: `model` is edited in place, `boxes` and `scores` name its head tensors.

Domain of the plugin node: "trt.plugins". TensorRT's ONNX parser finds a plugin by op type alone
(7.0 to 10.1), or looks in the namespace of the attribute `plugin_namespace` first (default "",
where NVIDIA's plugins are) and in that of the domain after (newer; tried with TensorRT-RTX 1.7):
the domain never hides the plugin. ONNX's checker and shape inference accept an unknown operator in
a domain of its own but not in "", and ONNX Runtime's TensorRT provider registers the plugins under
this one.
"""

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto

from trtdet.errors import GraphError
from trtdet.geometry import FloatArray
from trtdet.graph.builder import (
    PLUGIN_DOMAIN,
    Builder,
    dims_text,
    import_domain,
    known_types,
    set_outputs,
    value_info,
)
from trtdet.nms.boxes import decode_boxes, head_sizes
from trtdet.nms.lowering import PLUGIN_OP
from trtdet.nms.outputs import declare_outputs
from trtdet.spec import OUTPUT_NAMES, Nms

#: Outputs of a model without NMS: float32 [N, A, 4] corners, float32 [N, A, C] probabilities.
DECODED_NAMES = ("boxes", "scores")

#: Candidates of each class that BatchedNMS_TRT looks at, as NVIDIA's samples had it; the plugin's
#: own limit is 4096.
LEGACY_CANDIDATES = 1024

Batch = int | str


def insert_plugin(
    model: onnx.ModelProto,
    *,
    boxes: str,
    scores: str,
    anchors: FloatArray | None,
    nms: Nms,
    batch: Batch = "N",
) -> None:
    """Put the EfficientNMS_TRT plugin behind the heads and make its four results the model's only
    outputs.

    boxes, scores  ->  EfficientNMS_TRT(boxes, scores, nms/anchors)

    Args:
        boxes: [N, A, 4] float32, coded as `nms.box_coding` says.
        scores: [N, A, C] float32, logits if `nms.score_activation`.
        anchors: (A, 4) or (1, A, 4) in the same coding; None: the boxes are decoded already
            (two-input form).
        batch: first dimension of the outputs: a number, or the name of a dynamic one.

    Raises:
        GraphError: heads that are missing, of another type or shape, or anchors that do not fit
            them.
    """
    num_anchors, _ = _check_heads(model, boxes, scores)
    build = Builder(model, "nms/")
    operands = [boxes, scores, *_anchor_constant(build, anchors, num_anchors)]
    build.node(
        PLUGIN_OP,
        "EfficientNMS",
        *operands,
        outputs=OUTPUT_NAMES,
        domain=PLUGIN_DOMAIN,
        plugin_version="1",
        score_threshold=float(nms.score_threshold),
        iou_threshold=float(nms.iou_threshold),
        max_output_boxes=nms.max_output_boxes,
        background_class=nms.background_class,
        score_activation=int(nms.score_activation),
        class_agnostic=int(nms.class_agnostic),
        box_coding=nms.box_coding,
    )
    _finish(model, build, batch, nms)


def insert_legacy(
    model: onnx.ModelProto,
    *,
    boxes: str,
    scores: str,
    anchors: FloatArray | None,
    nms: Nms,
    batch: Batch = "N",
) -> None:
    """Put box decoding and the BatchedNMS_TRT plugin behind the heads, for TensorRT before 8.

    Arguments as `insert_plugin`.

    boxes, scores  ->  BatchedNMS_TRT(decoded boxes [N, A, 1, 4], sigmoid(scores))

    Convert the rest of the model at opset 11, the last of TensorRT 7.0 and 7.1 (7.2 reads 13). A
    dynamic batch takes BatchedNMSDynamic_TRT (7.2), the same plugin for dynamic shapes. What
    differs from EfficientNMS_TRT:

    * `LEGACY_CANDIDATES` per class instead of 5000 per image; suppression above the IoU threshold,
      not from it on;
    * no class-agnostic mode: per class then;
    * classes come as float32 and -1 in unused slots; a Max and a Cast make them int32 and 0.

    `isNormalized` is set although boxes are pixels: with `clipBoxes` off it only keeps the plugin
    from adding a pixel to every side of a box, which EfficientNMS_TRT does not do either.

    Raises:
        GraphError: also where `max_output_boxes` exceeds the number of anchors; the plugin would
            return nothing.
    """
    num_anchors, num_classes = _check_heads(model, boxes, scores)
    if num_anchors is None:
        raise GraphError(
            "BatchedNMS_TRT: expected a fixed input size, found a dynamic one; give --input_shape"
        )
    if num_anchors < nms.max_output_boxes:
        raise GraphError(
            f"BatchedNMS_TRT: expected max_output_boxes of at most the number of anchors, {num_anchors}, found "
            f"{nms.max_output_boxes}; lower --max_detections"
        )
    build = Builder(model, "nms/")
    corners, probabilities = _decode_heads(build, boxes, scores, anchors, nms, num_anchors)
    outputs = [f"nms/{name}" for name in OUTPUT_NAMES]
    build.node(
        "BatchedNMS_TRT" if isinstance(batch, int) else "BatchedNMSDynamic_TRT",
        "BatchedNMS",
        build.reshape("boxes_shared", corners, [0, -1, 1, 4]),
        probabilities,
        outputs=outputs,
        domain=PLUGIN_DOMAIN,
        plugin_version="1",
        shareLocation=1,
        backgroundLabelId=nms.background_class,
        numClasses=num_classes,
        topK=max(nms.max_output_boxes, min(LEGACY_CANDIDATES, num_anchors)),
        keepTopK=nms.max_output_boxes,
        scoreThreshold=float(nms.score_threshold),
        iouThreshold=float(nms.iou_threshold),
        isNormalized=1,
        clipBoxes=0,
    )
    # Some releases of the static plugin return num_detections as [N].
    num_detections = build.reshape("num_detections_column", outputs[0], [-1, 1])
    class_ids = build.node("Max", "classes_not_negative", outputs[3], np.float32(0))
    class_ids = build.cast("classes_int32", class_ids, TensorProto.INT32)
    for tensor, name in zip((num_detections, *outputs[1:3], class_ids), OUTPUT_NAMES, strict=True):
        build.output(tensor, name)
    _finish(model, build, batch, nms)


def insert_decoded(
    model: onnx.ModelProto,
    *,
    boxes: str,
    scores: str,
    anchors: FloatArray | None,
    nms: Nms,
    batch: Batch = "N",
    rotated: bool = False,
) -> None:
    """Decode boxes and scores and end the model there, without NMS.

    Arguments and errors as `insert_plugin`.

    The outputs are `DECODED_NAMES`: every box as corners, axes in the order of the heads (y1 x1 y2
    x2 for EfficientDet), not clipped; every score after its activation, none left out. Rotated
    boxes, [N, A, 5], are decoded already; a sixth column, ODTK's length of the angle's vector, is
    left out.
    """
    values = 5 if rotated else 4
    columns = known_types(model, (boxes,)).get(boxes, (0, []))[1][-1:] if rotated else []
    more = columns == [values + 1]
    num_anchors, num_classes = _check_heads(model, boxes, scores, values + more)
    build = Builder(model, "nms/")
    if rotated:
        nms = dataclasses.replace(nms, box_coding=0)
    decoded = _decode_heads(build, boxes, scores, anchors, nms, num_anchors)
    if more:
        decoded = (build.slice_last("boxes_with_angle", boxes, 0, values), decoded[1])
    for tensor, head, name in zip(decoded, (boxes, scores), DECODED_NAMES, strict=True):
        # A head that needs no decoding belongs to another node: it is passed on rather than
        # renamed.
        build.output(build.node("Identity", name, tensor) if tensor == head else tensor, name)
    build.append_to(model)
    set_outputs(
        model,
        [
            value_info(DECODED_NAMES[0], TensorProto.FLOAT, [batch, num_anchors, values]),
            value_info(DECODED_NAMES[1], TensorProto.FLOAT, [batch, num_anchors, num_classes]),
        ],
    )


def _check_heads(
    model: onnx.ModelProto, boxes: str, scores: str, values: int = 4
) -> tuple[int | None, int]:
    """Numbers of anchors (None: it depends on the size of the input) and classes; what was
    inferred of the heads is kept in `value_info`, for `lower` to find.
    """
    types = known_types(model, (boxes, scores))
    sizes = head_sizes(types, boxes, scores, values)
    said = {
        info.name for info in [*model.graph.value_info, *model.graph.output, *model.graph.input]
    }
    for name in (boxes, scores):
        elem_type, dims = types[name]
        if elem_type != TensorProto.FLOAT:
            raise GraphError(
                f"NMS: expected float32 heads, found '{name}' of {TensorProto.DataType.Name(elem_type).lower()}; "
                "precision is chosen by build_engine.py, convert the model in FP32"
            )
        if name not in said:
            model.graph.value_info.append(value_info(name, elem_type, dims))
    return sizes


def _anchor_constant(
    build: Builder, anchors: FloatArray | None, num_anchors: int | None
) -> list[str]:
    """The anchors as a constant [1, A, 4], as a list of one; or an empty list."""
    if anchors is None:
        return []
    values = np.asarray(anchors, np.float32)
    values = values[None] if values.ndim == 2 else values
    if values.shape != (1, num_anchors, 4):
        raise GraphError(
            f"NMS: expected anchors {dims_text([1, num_anchors, 4])} to fit the heads, found {dims_text(list(values.shape))}"
        )
    return [build.constant("anchors", values)]


def _decode_heads(
    build: Builder,
    boxes: str,
    scores: str,
    anchors: FloatArray | None,
    nms: Nms,
    num_anchors: int | None,
) -> tuple[str, str]:
    """All boxes as corners and all scores as probabilities."""
    anchor_name = next(iter(_anchor_constant(build, anchors, num_anchors)), None)
    corners = decode_boxes(build, boxes, anchor_name, nms.box_coding)
    if nms.score_activation:
        scores = build.node("Sigmoid", "probabilities", scores)
    return corners, scores


def _finish(model: onnx.ModelProto, build: Builder, batch: Batch, nms: Nms) -> None:
    build.append_to(model)
    import_domain(model, PLUGIN_DOMAIN)
    declare_outputs(model, batch, nms.max_output_boxes)
