# SPDX-License-Identifier: Apache-2.0
"""EfficientDet D0-D7 and SSDs of the TensorFlow Object Detection API: a SavedModel of its exporter
(exporter_main_v2.py), or that converted to ONNX.

The exporter writes the decoded boxes and the converted scores of all anchors as outputs, so nothing
has to be read out of its postprocessing but the NMS thresholds: anchors, box coder, score converter
and background column are measured by sending chosen values for the heads through it.

Source of the conventions: tensorflow/models object_detection, meta_architectures/ssd_meta_arch.py,
core/post_processing.py, box_coders/faster_rcnn_box_coder.py, of tf-models-research-object-detection
2.8.0.
"""

import dataclasses
from collections.abc import Sequence
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
    Heads,
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
from trtdet.families.tf_selection import TfSelection
from trtdet.geometry import in_layout
from trtdet.graph.builder import Builder
from trtdet.graph.map_op import check_runs
from trtdet.nms import reference
from trtdet.sources.base import Source, SourceGraph, SourceNode
from trtdet.spec import Fact, ModelSpec, Nms, Preprocessing

NAME = "tfod"

#: Scopes of the class and box heads: one that all levels share, or one for each level, numbered.
SHARED = tuple(f"BoxPredictor/WeightSharedConvolutional{kind}Head/" for kind in ("Class", "Box"))
NUMBERED = tuple(f"BoxPredictor/Convolutional{kind}Head_" for kind in ("Class", "Box"))
OUTPUTS = ("detection_boxes", "raw_detection_boxes", "raw_detection_scores")


def matches(source: Source) -> bool:
    """Whether both heads and the exporter's outputs are there."""
    outputs = all(name in source.graph.outputs for name in OUTPUTS)
    return outputs and maybe_scopes(source.graph) is not None


def maybe_scopes(graph: SourceGraph) -> tuple[str, ...] | None:
    """The scopes of the class head and of the box head."""
    names = [node.name for node in graph.nodes.values()]
    found = (
        scopes
        for scopes in (SHARED, NUMBERED)
        if all(any(scope in name for name in names) for scope in scopes)
    )
    return next(found, None)


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    graph = source.graph
    missing = [name for name in OUTPUTS if name not in graph.outputs]
    if missing:
        raise GraphError(
            f"tfod: expected the outputs of exporter_main_v2.py, found {list(graph.outputs)} without {missing}; export the model with "
            "--input_type image_tensor"
        )
    scopes = maybe_scopes(graph) or SHARED
    logits, boxes = (find_head(graph, scope, NAME) for scope in scopes)
    detections, decoded, scores = (graph.outputs[name] for name in OUTPUTS)
    fetches = [tensor(boxes), tensor(logits), scores, detections]
    check_runs(source, NAME, fetches)
    (image_input,) = graph.inputs
    network_input = find_stem(graph, logits, NAME).inputs[0]
    preprocessing, layout = measure_preprocessing(source, image_input, network_input, NAME)
    batch = graph.batch or 1
    images = np.zeros((batch, *preprocessing.size_hw, 3), np.uint8)
    images[:, ::2, ::3] = 200  # any picture: logits that differ
    feed = {image_input: in_layout(images, declared_layout(graph))}
    raw_boxes, raw_logits, converted, found = source.run(fetches, feed)
    height, width = preprocessing.size_hw
    anchors, scale = measure_box_coder(source, {**feed, tensor(boxes): raw_boxes}, boxes, decoded)
    left_out, activation = score_converter(raw_logits, converted)
    background = left_out or counts_background(source, {**feed, tensor(boxes): raw_boxes}, logits, raw_logits)  # fmt: skip
    num_classes = raw_logits.shape[-1] - background
    nms, notes = read_nms(graph, num_classes, found.shape[1])
    plain = (
        raw_boxes.ndim == 3 and not background and activation == "Sigmoid" and (scale == 1).all()
    )
    nms = dataclasses.replace(nms, score_activation=activation == "Sigmoid")
    heads = {RAW_BOXES: tensor(boxes), CLASS_LOGITS: tensor(logits)}
    if not plain:
        heads = {"box_encodings": tensor(boxes), "class_predictions": tensor(logits)}

    def assemble(build: Builder, spec: ModelSpec) -> Heads:
        """Boxes without the coder's factors, scores without the background."""
        coded = build.reshape("box_encodings_rows", "box_encodings", [0, -1, 4])
        coded = build.node("Div", "boxes_unscaled", coded, scale)
        predictions = "class_predictions"
        if activation == "Softmax":
            predictions = build.node("Softmax", "probabilities", predictions, axis=2)
        if background:
            columns = raw_logits.shape[-1]
            predictions = build.slice_last("scores_foreground", predictions, 1, columns)
        return Heads(coded, predictions)

    return Reading(
        spec=ModelSpec(
            family=NAME,
            preprocessing=preprocessing,
            nms=nms,
            category_ids=tuple(range(1, num_classes + 1)),  # label maps count from 1
            box_order="yxyx",
        ),
        image_input=image_input,
        network_input=network_input,
        network_layout=layout,
        heads=heads,
        assemble=None if plain else assemble,
        anchors=centre_size(anchors * np.array([height, width] * 2, np.float32)),
        batch=graph.batch,
        notes=tuple(notes),
        decoded_boxes=decoded if plain else None,
        decoded_unit_yx=(height, width),
        image_layout=declared_layout(graph),
        facts=facts(
            graph,
            preprocessing,
            nms,
            image_input,
            scores=activation,
            background=background,
            num_classes=num_classes,
        ),
        final=maybe_final(graph, nms, (height, width)),
    )


def maybe_final(graph: SourceGraph, nms: Nms, size_hw: tuple[int, int]) -> Final | None:
    """The exporter's own detections: boxes y1 x1 y2 x2 from 0 to 1, classes counted from 1.

    None where an output is missing.
    """
    names = ("detection_boxes", "detection_scores", "detection_classes", "num_detections")
    if any(name not in graph.outputs for name in names):
        return None
    node = next(node for node in graph.all_nodes() if node.op == "NonMaxSuppression")
    constants = [scalar(graph.maybe_constant(t, node.function)) for t in node.inputs[2:]]
    most, iou, score, sigma = (*constants, None)[:4]
    most = most_of_a_class(graph, node) if most is None else most
    selection = TfSelection(
        per_class=not nms.class_agnostic,
        every_class=not nms.class_agnostic,
        candidates=0,
        iou_threshold=iou or 0.0,
        score_threshold=score or 0.0,
        sigma=sigma or 0.0,
        most_per_class=nms.max_output_boxes if most is None else int(most),
        most=nms.max_output_boxes,
        clip=size_hw,
        drops_outside=True,
    )
    height, width = size_hw

    def read(values: Sequence[NDArray[Any]]) -> Found:
        boxes, scores, classes, count = (value[0] for value in values)
        n = int(np.asarray(count).reshape(-1)[0])
        pixels = boxes[:n, [1, 0, 3, 2]] * np.array([width, height] * 2, np.float32)
        return Found(
            pixels.astype(np.float32),
            scores[:n].astype(np.float32),
            np.round(classes[:n]).astype(np.int64) - 1,
        )

    return Final(tuple(graph.outputs[name] for name in names), read, selection, selection.differs)


def most_of_a_class(graph: SourceGraph, node: SourceNode) -> float | None:
    """The constant that the NMS's most detections are computed from: the least of it and the number
    of boxes, where that is not fixed.
    """
    producer = graph.maybe_producer(node.inputs[2], node.function)
    if producer is None or producer.op not in ("Minimum", "Min"):
        return None
    known = (scalar(graph.maybe_constant(name, node.function)) for name in producer.inputs)
    return min((value for value in known if value is not None), default=None)


def facts(
    graph: SourceGraph,
    preprocessing: Preprocessing,
    nms: Nms,
    image_input: str,
    *,
    scores: str,
    background: bool,
    num_classes: int,
) -> tuple[Fact, ...]:
    """Where all of it comes from."""
    evidence = measured_facts(NAME, "TFOD", graph, preprocessing, image_input)
    evidence.add(
        ev.FAMILY, NAME, f"read: the heads below {' and '.join(maybe_scopes(graph) or SHARED)}"
    )
    evidence.add(
        ev.BOXES,
        "yxyx, relative to anchors",
        f"{ev.MEASURED}chosen values sent through its decoding",
    )
    evidence.add(ev.SCORES, scores.lower(), f"{ev.MEASURED}raw_detection_scores from the logits")
    evidence.add(
        ev.BACKGROUND,
        "first" if background else "none",
        f"{ev.MEASURED}the class of a detection, for logits of one column",
    )
    evidence.add(
        ev.CLASSES,
        num_classes,
        "read: the shape of raw_detection_scores" + (", less the background" if background else ""),
    )
    evidence.add(ev.CATEGORY_IDS, f"1..{num_classes}", f"{ev.CONVENTION}TFOD counts classes from 1")
    evidence.add(
        ev.SELECTION,
        "NMS across classes" if nms.class_agnostic else "NMS per class",
        "read: its NMS",
    )
    evidence.add(ev.KEPT, nms.max_output_boxes, "read: the shape of detection_boxes")
    return evidence.settle()


def measure_box_coder(
    source: Source, feed: dict[str, NDArray[Any]], head: Any, decoded: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The anchors (a, 4), corners y1 x1 y2 x2 from 0 to 1, and what box encodings are divided by,
    [4] float32 in y x h w.

    Decoding zeros gives the anchors, decoding ones the factors of the Faster R-CNN coder: y = ty /
    fy * ha + ya, h = ha * exp(th / fh).

    Raises:
        GraphError: it is another coder.
    """
    regression = feed[tensor(head)]

    def decode(value: float) -> NDArray[np.float32]:
        (boxes,) = source.run([decoded], {**feed, tensor(head): np.full_like(regression, value)})
        return np.asarray(boxes[0], np.float32)

    other = f"tfod: expected boxes coded as centre and size relative to anchors (faster_rcnn_box_coder), '{decoded}' answers otherwise"
    anchors, moved = decode(0), centre_size(decode(1)).astype(np.float64)
    centre = centre_size(anchors).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.concatenate(
            [
                centre[:, 2:] / (moved[:, :2] - centre[:, :2]),
                1 / np.log(moved[:, 2:] / centre[:, 2:]),
            ],
            axis=1,
        )
    scale = np.median(factors, axis=0)
    if not np.isfinite(scale).all() or np.abs(factors / scale - 1).max() > 1e-2:
        raise GraphError(other)
    scale = np.round(scale, 3)
    expected = reference.decode_boxes(
        (np.full_like(anchors, 0.5) / scale).astype(np.float32), 1, centre_size(anchors)
    )
    if np.abs(decode(0.5) - expected).max() > 1e-4 * max(1.0, float(np.abs(expected).max())):
        raise GraphError(other)
    return anchors, scale.astype(np.float32)


def score_converter(logits: NDArray[Any], scores: NDArray[Any]) -> tuple[bool, str]:
    """Whether the first column of the logits is the background, and what makes them scores: Sigmoid
    or Softmax.

    Raises:
        GraphError: neither explains the scores.
    """
    background = logits.shape[-1] == scores.shape[-1] + 1
    x = logits.astype(np.float64)
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    candidates = {"Sigmoid": 1 / (1 + np.exp(-x)), "Softmax": exp / exp.sum(axis=-1, keepdims=True)}
    for name, value in candidates.items():
        value = value[..., 1:] if background else value
        if value.shape == scores.shape and np.abs(value - scores).max() < 1e-4:
            return background, name
    raise GraphError(
        f"tfod: expected raw_detection_scores to be the sigmoid or softmax of the logits {logits.shape}, with or without a background "
        f"column, found {scores.shape} of other values"
    )


def counts_background(
    source: Source, feed: dict[str, NDArray[Any]], head: Any, logits: NDArray[Any]
) -> bool:
    """Whether the first column of the logits is a background that raw_detection_scores has too
    (add_background_class, as SSDs have it): all anchors get a high logit in the second column, and
    the class of the best detection is counted from 1 without the background.

    Raises:
        GraphError: the detection is of another class, or there is none.
    """
    graph, columns = source.graph, logits.shape[-1]
    if columns == 1:
        return False
    if not {"detection_classes", "detection_scores"} <= graph.outputs.keys():
        return sum(node.op == "NonMaxSuppression" for node in graph.all_nodes()) == columns - 1
    chosen = np.full_like(logits, -20)
    chosen.reshape(len(logits), -1, columns)[..., 1] = 10
    names = [graph.outputs[name] for name in ("detection_classes", "detection_scores")]
    values = source.run(names, {**feed, tensor(head): chosen})
    found, score = (float(np.asarray(value).reshape(len(logits), -1)[0, 0]) for value in values)
    if round(found) not in (1, 2) or score < 0.9:  # of padding: 0
        raise GraphError(
            f"tfod: expected a detection of class 1 or 2 for high logits in the second of {columns} columns, found {found:g} with a score of {score:.3g}; "
            "export the model with exporter_main_v2.py"
        )
    return round(found) == 1


def read_nms(graph: SourceGraph, num_classes: int, max_detections: int) -> tuple[Nms, list[Note]]:
    """The NMS of the export: one operation per class, or one across classes that keeps the best
    class of each anchor.
    """
    nodes = [node for node in graph.all_nodes() if node.op == "NonMaxSuppression"]
    if not nodes:
        raise GraphError("tfod: expected NonMaxSuppression in the model, found none")
    node = nodes[0]
    iou, score, sigma = (
        *(scalar(graph.maybe_constant(t, node.function)) for t in node.inputs[3:6]),
        *(None,) * 3,
    )[:3]
    if iou is None or score is None:
        raise GraphError(
            f"tfod: expected constant thresholds at '{node.name}', found them computed"
        )
    notes = []
    if sigma:
        text = f"soft NMS (sigma {2 * sigma:g}) is replaced by hard NMS, as TensorRT has no soft NMS; --iou_threshold sets another IoU"
        notes.append(Note(text, "iou_threshold"))
    if score > 0.01:
        text = f"the export keeps only scores of at least {score:g}, and so will this model; for mAP use --score_threshold 0.001"
        notes.append(Note(text, "score_threshold"))
    nms = Nms(
        score_threshold=round(max(score, 0.0), 8),
        iou_threshold=round(iou, 6),
        max_output_boxes=max_detections,
        class_agnostic=len(nodes) < num_classes,
    )
    return nms, notes
