# SPDX-License-Identifier: Apache-2.0
"""Google AutoML EfficientDet: D0-D7x, Lite, AdvProp; written by its TensorFlow 1 or Keras exporter,
or converted to ONNX.

Nothing is assumed that the model can tell: structure gives the cut (the first convolution, the two
concatenations of the heads), constants give anchors and NMS, and test images sent through the model
give size, normalisation and padding.

Source of the conventions: google/automl efficientdet, inference.py, dataloader.py,
tf2/postprocess.py, tf2/anchors.py @6a54c874.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.base import (
    CLASS_LOGITS,
    NO_HINTS,
    RAW_BOXES,
    Final,
    Found,
    Hints,
    Note,
    Reading,
)
from trtdet.families.measure import (
    centre_size,
    declared_layout,
    find_head,
    find_stem,
    measure_preprocessing,
    measured_facts,
    scalar,
    tensor,
)
from trtdet.families.tf_selection import TfSelection, candidates_before
from trtdet.geometry import in_layout
from trtdet.graph.map_op import check_runs
from trtdet.sources.base import Source, SourceGraph
from trtdet.spec import Fact, ModelSpec, Nms, Preprocessing

NAME = "automl"

CLASS_SCOPE = "class_net/"
BOX_SCOPE = "box_net/"
DEFAULT_IOU_THRESHOLD = (
    0.5  # AutoML's for hard NMS; a gaussian export carries 1.0, which hard NMS cannot use
)
#: torch numbers the modules of a list: class_net/conv_rep.0.
OF_TORCH = re.compile(r"(class|box)_net/\w+\.\d+(/|$)")
NMS_OPS = ("NonMaxSuppression", "CombinedNonMaxSuppression")


def matches(source: Source) -> bool:
    """Whether both heads are there, their levels put together; not those of a network in
    PyTorch, which are called the same and come with other images.
    """
    if any(OF_TORCH.search(node.name) for node in source.graph.nodes.values()):
        return False
    try:
        return all(find_head(source.graph, scope, NAME) for scope in (CLASS_SCOPE, BOX_SCOPE))
    except GraphError:
        return False


def why_not(source: Source) -> str:
    """What is missing of an EfficientDet's heads, where some of it is there."""
    names = [node.name for node in source.graph.nodes.values()]
    if not any(scope in name for name in names for scope in (CLASS_SCOPE, BOX_SCOPE)):
        return ""
    if any(OF_TORCH.search(name) for name in names):
        return "its heads are of an EfficientDet in PyTorch"
    return f"its levels are not put together below {CLASS_SCOPE} and {BOX_SCOPE}"


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    graph = source.graph
    logits, boxes = (find_head(graph, scope, NAME) for scope in (CLASS_SCOPE, BOX_SCOPE))
    if len(graph.inputs) != 1:
        raise GraphError(f"automl: expected one input, the images, found {list(graph.inputs)}")
    check_runs(source, NAME, [tensor(logits), tensor(boxes)])
    (image_input,) = graph.inputs
    network_input = find_stem(graph, logits, NAME).inputs[0]
    preprocessing, layout = measure_preprocessing(source, image_input, network_input, NAME)
    notes = []
    if preprocessing.mean == (0, 0, 0) and preprocessing.std == (1, 1, 1):
        text = (
            "the model takes raw 0-255 pixels; AutoML's exporter drops the 'scale_range' of AdvProp models: "
            "give --preprocessor scale_range if it was trained with that"
        )
        notes.append(Note(text, "preprocessor"))
    batch = graph.batch
    image = np.zeros((batch or 1, *preprocessing.size_hw, 3), np.uint8)
    feed = {image_input: in_layout(image, declared_layout(graph))}
    logits_value, boxes_value = source.run([tensor(logits), tensor(boxes)], feed)
    anchor_count, num_classes = logits_value.shape[1:]
    if boxes_value.shape[1:] != (anchor_count, 4):
        raise GraphError(
            f"automl: expected box regression [n, {anchor_count}, 4] to go with logits {logits_value.shape}, "
            f"found {boxes_value.shape} at '{boxes.name}'"
        )
    nms, nms_notes = read_nms(graph)
    candidates = candidates_before(graph, NMS_OPS)
    # Behind a TopK boxes come in the order of their scores.
    decoded = None if candidates else nms_boxes(graph)
    measured = measure_anchors(source, decoded, {**feed, tensor(boxes): np.zeros_like(boxes_value)})
    selection = read_selection(graph, nms, candidates, preprocessing.size_hw)
    final = maybe_final(source, feed, selection)
    return Reading(
        spec=ModelSpec(
            family=NAME,
            preprocessing=preprocessing,
            nms=nms,
            category_ids=tuple(range(1, num_classes + 1)),  # AutoML counts classes from 1
            box_order="yxyx",
        ),
        image_input=image_input,
        network_input=network_input,
        network_layout=layout,
        heads={RAW_BOXES: tensor(boxes), CLASS_LOGITS: tensor(logits)},
        anchors=centre_size(find_anchors(graph, anchor_count, measured)),
        batch=batch,
        notes=(*notes, *nms_notes),
        decoded_boxes=decoded if measured is not None else None,
        image_layout=declared_layout(graph),
        facts=facts(
            graph, preprocessing, nms, num_classes, image_input, has_final=final is not None
        ),
        final=final,
    )


def read_selection(
    graph: SourceGraph, nms: Nms, candidates: int, size_hw: tuple[int, int]
) -> TfSelection | None:
    """What the export does behind its heads; None where it has no NMS."""
    nodes = [node for node in graph.all_nodes() if node.op in NMS_OPS]
    if not nodes:
        return None
    node = nodes[0]
    constants = [scalar(graph.maybe_constant(t, node.function)) for t in node.inputs[2:]]
    combined = node.op == "CombinedNonMaxSuppression"
    per_class = not nms.class_agnostic
    limits = constants[1:] if combined else constants
    _, iou, score, sigma = (*(x or 0.0 for x in limits), 0.0)[:4]
    return TfSelection(
        per_class=per_class,
        every_class=combined,
        candidates=0 if combined else candidates,
        iou_threshold=iou,
        score_threshold=score,
        sigma=0.0 if combined else sigma,
        most_per_class=nms.max_output_boxes,
        most=nms.max_output_boxes,
        clip=None if per_class and not combined else size_hw,
    )


def maybe_final(
    source: Source, feed: dict[str, NDArray[Any]], selection: TfSelection | None
) -> Final | None:
    """The source's own detections: rows image id, y1 x1 y2 x2, score, class from 1.

    None where it has none, or cannot run them.
    """
    if selection is None or len(source.graph.outputs) != 1:
        return None
    (output,) = source.graph.outputs.values()
    try:
        (value,) = source.run([output], feed)
    except GraphError:
        return None  # ONNX Runtime does not know all of TensorFlow's NMS
    if value.ndim != 3 or value.shape[2] != 7:
        return None
    return Final(
        (output,), partial(read_rows, columns=(2, 1, 4, 3)), selection, selection.differs,
        other_read=partial(read_rows, columns=(1, 2, 3, 4)),
    )  # fmt: skip


def read_rows(values: Sequence[NDArray[Any]], *, columns: tuple[int, ...]) -> Found:
    """Detections of the first image of rows [N, K, 7]."""
    rows = values[0][0].astype(np.float32)
    return Found(rows[:, list(columns)], rows[:, 5], np.round(rows[:, 6]).astype(np.int64) - 1)


def facts(
    graph: SourceGraph,
    preprocessing: Preprocessing,
    nms: Nms,
    num_classes: int,
    image_input: str,
    *,
    has_final: bool,
) -> tuple[Fact, ...]:
    """Where all of it comes from."""
    evidence = measured_facts(NAME, "AutoML", graph, preprocessing, image_input)
    evidence.add(ev.FAMILY, NAME, f"read: the heads below {CLASS_SCOPE} and {BOX_SCOPE}")
    compared = "; its detections are compared" if has_final else ""
    evidence.add(ev.BOXES, "yxyx, relative to anchors", f"read: the anchors in the file{compared}")
    evidence.add(ev.SCORES, "sigmoid", f"{ev.CONVENTION}AutoML{compared}")
    evidence.add(ev.BACKGROUND, "none", f"{ev.CONVENTION}AutoML{compared}")
    evidence.add(ev.CLASSES, num_classes, "read: the shape of the logits")
    evidence.add(
        ev.CATEGORY_IDS, f"1..{num_classes}", f"{ev.CONVENTION}AutoML counts classes from 1"
    )
    has_nms = any(node.op in NMS_OPS for node in graph.all_nodes())
    origin = "read: its NMS" if has_nms else "default: the file has no NMS"
    evidence.add(
        ev.SELECTION, "NMS across classes" if nms.class_agnostic else "NMS per class", origin
    )
    evidence.add(ev.KEPT, nms.max_output_boxes, origin)
    return evidence.settle()


def read_nms(graph: SourceGraph) -> tuple[Nms, list[Note]]:
    """The NMS of the export, and notes on what EfficientNMS does otherwise.

    AutoML takes the best class of each anchor and suppresses across classes, or within each class
    ("per_class", one NMS operation per class). Score activation is a sigmoid, boxes are coded as
    centre and size.
    """
    nodes = [node for node in graph.all_nodes() if node.op in NMS_OPS]
    if not nodes:
        text = (
            "no NMS found in the model; taking score threshold 0.001, IoU 0.5, 100 detections: "
            "--score_threshold, --iou_threshold, --max_detections"
        )
        return Nms(), [Note(text, "score_threshold")]
    node = nodes[0]
    constants = [scalar(graph.maybe_constant(t, node.function)) for t in node.inputs[2:]]
    combined = node.op == "CombinedNonMaxSuppression"
    if combined:
        constants = constants[1:]  # maximum per class, then in total
    if len(constants) < 3 or None in constants[:3]:
        raise GraphError(
            f"automl: expected constant limits at '{node.name}', found them computed or missing"
        )
    maximum, iou, score, sigma = (*(x or 0.0 for x in constants), 0.0)[:4]
    per_class = combined or len(nodes) > (graph.batch or 1)
    score = max(score, 0.0)  # AutoML writes "no threshold" as minus infinity
    notes = []
    if (sigma and not combined) or iou >= 1:
        kind = f"gaussian soft NMS (sigma {2 * sigma:g})" if sigma else f"soft NMS (IoU {iou:g})"
        text = f"{kind} is replaced by hard NMS at IoU {DEFAULT_IOU_THRESHOLD}, as TensorRT has no soft NMS; --iou_threshold sets another IoU"
        notes.append(Note(text, "iou_threshold"))
        iou = DEFAULT_IOU_THRESHOLD
    if score > 0.01:
        text = f"the export keeps only scores of at least {score:g}, and so will this model; for mAP use --score_threshold 0.001"
        notes.append(Note(text, "score_threshold"))
    if per_class and not combined:
        text = (
            "the export keeps the best class of each anchor, then suppresses per class; EfficientNMS keeps every class of an "
            "anchor: --nms_mode class_agnostic is the other choice"
        )
        notes.append(Note(text, "nms_mode"))
    return (
        Nms(
            score_threshold=round(score, 6),
            iou_threshold=round(iou, 6),
            max_output_boxes=int(maximum),
            class_agnostic=not per_class,
        ),
        notes,
    )


def nms_boxes(graph: SourceGraph) -> str | None:
    """The tensor of boxes that enters the (first image's) NMS; None where that is inside a loop."""
    nodes = [node for node in graph.nodes.values() if node.op in NMS_OPS]
    return nodes[0].inputs[0] if nodes else None


def measure_anchors(
    source: Source, decoded_boxes: str | None, feed: dict[str, NDArray[Any]]
) -> NDArray[np.float32] | None:
    """What enters the NMS when the box regression in `feed` is zero: the anchors, corners (n, 4).

    None if it cannot be seen.
    """
    if decoded_boxes is None:
        return None
    (regression,) = [value for value in feed.values() if value.ndim == 3]
    (boxes,) = source.run([decoded_boxes], feed)
    count = regression.shape[1]
    corners = boxes.reshape(-1, 4)[:count].astype(np.float32)
    return corners if len(corners) == count else None


def find_anchors(
    graph: SourceGraph, count: int, measured: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The anchors: (count, 4) float32, corners y1 x1 y2 x2, pixels of the network input.

    They stand in the model as a constant, unless a converter folded it into others; then the
    measured ones are taken.

    Raises:
        GraphError: there are none, or constant and measurement disagree.
    """
    shapes = set()
    for node in graph.all_nodes():
        value = node.value
        if value is None or value.dtype != np.float32 or value.ndim < 2 or value.shape[-1] != 4:
            continue
        shapes.add(value.shape)
        corners = value.reshape(-1, 4)
        if len(corners) != count or not (corners[:, 2:] > corners[:, :2]).all():
            continue
        if measured is not None and np.abs(corners - measured).max() > 0.05:
            raise GraphError(
                f"automl: the anchors in '{node.name}' are up to {np.abs(corners - measured).max():.3g} pixels from where the "
                "model's own decoding puts them; expected corners y1 x1 y2 x2"
            )
        return corners
    if measured is not None:
        return measured
    raise GraphError(
        f"automl: expected a constant of {count} anchors [{count}, 4], found shapes {sorted(shapes)}"
    )
