# SPDX-License-Identifier: Apache-2.0
"""Google AutoML EfficientDet: D0-D7x, Lite, AdvProp; written by its TensorFlow 1 or Keras exporter, or converted to ONNX.

Nothing is assumed that the model can tell: structure gives the cut (the first convolution, the two concatenations of the
heads), constants give anchors and NMS, and test images sent through the model give size, normalisation and padding.

Source of the conventions: google/automl efficientdet, inference.py, dataloader.py, tf2/postprocess.py, tf2/anchors.py @6a54c874.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.family import Note, Reading
from trtdet.source import Source, SourceGraph, SourceNode
from trtdet.spec import Layout, ModelSpec, Nms, Preprocessing

NAME = "automl"

CLASS_SCOPE = "class_net/"
BOX_SCOPE = "box_net/"
DEFAULT_IOU_THRESHOLD = (
    0.5  # AutoML's for hard NMS; a gaussian export carries 1.0, which hard NMS cannot use
)
NMS_OPS = ("NonMaxSuppression", "CombinedNonMaxSuppression")


def matches(source: Source) -> bool:
    """Whether both head scopes are there."""
    names = [node.name for node in source.graph.nodes.values()]
    return all(any(scope in name for name in names) for scope in (CLASS_SCOPE, BOX_SCOPE))


def read(source: Source) -> Reading:
    """See `trtdet.family.Family.read`."""
    graph = source.graph
    logits, boxes = find_head(graph, CLASS_SCOPE), find_head(graph, BOX_SCOPE)
    if len(graph.inputs) != 1:
        raise GraphError(f"automl: expected one input, the images, found {list(graph.inputs)}")
    (image_input,) = graph.inputs
    network_input = find_stem(graph, logits).inputs[0]
    preprocessing, layout, notes = measure_preprocessing(source, image_input, network_input)
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
    decoded = nms_boxes(graph)
    measured = measure_anchors(source, decoded, {**feed, tensor(boxes): np.zeros_like(boxes_value)})
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
        raw_boxes=tensor(boxes),
        class_logits=tensor(logits),
        anchors=centre_size(find_anchors(graph, anchor_count, measured)),
        batch=batch,
        notes=(*notes, *nms_notes),
        decoded_boxes=decoded if measured is not None else None,
        image_layout=declared_layout(graph),
    )


def find_head(graph: SourceGraph, scope: str) -> SourceNode:
    """The Concat over pyramid levels of a head's reshaped predictions, as many levels as there are.

    Raises:
        GraphError: not exactly one.
    """
    found = []
    for node in _unique(graph):
        levels = [p for p in graph.parents(node) if p.value is None]
        if (
            node.op == "Concat"
            and len(levels) > 1
            and all(_is_level(graph, level, scope) for level in levels)
        ):
            found.append(node)
    if len(found) != 1:
        near = [
            n.name
            for n in _unique(graph)
            if n.op == "Concat" and any(scope in p.name for p in graph.parents(n))
        ]
        raise GraphError(
            f"automl: expected one Concat of reshaped predictions below '{scope}', found {len(found)}; nearest: {near[:3]}"
        )
    return found[0]


def _is_level(graph: SourceGraph, reshape: SourceNode, scope: str) -> bool:
    """Whether a node is a Reshape of a prediction in `scope`, a transpose allowed between."""
    if reshape.op != "Reshape":
        return False
    (before,) = [p for p in graph.parents(reshape)][:1] or [reshape]
    steps = [reshape, before, *graph.parents(before)]
    return any(scope in step.name for step in steps)


def find_stem(graph: SourceGraph, head: SourceNode) -> SourceNode:
    """The first convolution: upstream of the head, with no convolution upstream of itself.

    Raises:
        GraphError: no convolution upstream.
    """
    stem: SourceNode | None = None
    above = graph.ancestors(head)
    while convolutions := [n for n in above.values() if n.op == "Conv" and n is not stem]:
        stem = convolutions[-1]
        above = graph.ancestors(stem)
    if stem is None:
        raise GraphError(f"automl: expected a convolution upstream of '{head.name}', found none")
    return stem


def measure_preprocessing(
    source: Source, image_input: str, network_input: str
) -> tuple[Preprocessing, Layout, list[Note]]:
    """Send flat test images through the model's own preprocessing and read off what it does.

    A black and a white image give the affine normalisation; white on half of the width and on half of the height give
    placement and padding. A model whose input has a fixed size does no placing, and AutoML's is taken.

    Returns:
        The preprocessing, float32 NHWC; the layout of `network_input`; notes.

    Raises:
        GraphError: it is not an affine normalisation of an image at the top left.
    """
    graph = source.graph
    image_layout = declared_layout(graph)

    def entering(height: int, width: int, value: int) -> NDArray[Any]:
        """What reaches the first convolution of a flat image, in the layout it has there."""
        images = np.full((graph.batch or 1, height, width, 3), value, np.uint8)
        (result,) = source.run([network_input], {image_input: in_layout(images, image_layout)})
        if result.ndim != 4 or 3 not in (result.shape[1], result.shape[-1]):
            raise GraphError(
                f"automl: expected images of 3 channels to enter the first convolution, found {result.shape}"
            )
        return result[0]

    fixed = declared_size(graph)
    first = entering(*(fixed or (16, 16)), 0)
    layout: Layout = "NHWC" if first.shape[-1] == 3 else "NCHW"

    def see(height: int, width: int, value: int) -> NDArray[Any]:
        pixels = entering(height, width, value)
        return pixels if layout == "NHWC" else pixels.transpose(1, 2, 0)

    height, width = first.shape[:2] if layout == "NHWC" else first.shape[1:]
    black, white = see(height, width, 0), see(height, width, 255)
    flat = all(np.ptp(x, axis=(0, 1)).max() < 1e-4 for x in (black, white))
    low, high = (x[0, 0].astype(np.float64) for x in (black, white))
    if not flat or (high <= low).any():
        raise GraphError(
            "automl: expected (pixel - mean) / std before the first convolution; flat images of 0 and 255 became "
            f"{black.min():.4g}..{black.max():.4g} and {white.min():.4g}..{white.max():.4g}"
        )
    std = 255 / (high - low)
    mean = -low * std
    if fixed:
        padding = mean
    else:
        narrow, flat_wide = (
            see(height, width // 2, 255),
            see(height // 2, width, 255).transpose(1, 0, 2),
        )
        padding = _padding(narrow, high) * std + mean
        _padding(flat_wide, high)
    preprocessing = Preprocessing(
        size_hw=(height, width),
        mean=_rounded(mean),
        std=_rounded(std),
        resize="letterbox",
        pad_rgb=_rounded(padding),
    )
    notes = []
    if preprocessing.mean == (0, 0, 0) and preprocessing.std == (1, 1, 1):
        text = (
            "the model takes raw 0-255 pixels; AutoML's exporter drops the 'scale_range' of AdvProp models: "
            "give --preprocessor scale_range if it was trained with that"
        )
        notes.append(Note(text, "preprocessor"))
    return preprocessing, layout, notes


def _padding(seen: NDArray[Any], image: NDArray[Any]) -> NDArray[Any]:
    """The colour right of a flat image that was half as wide as the network input [h,w,3].

    Raises:
        GraphError: the left half is not the image, or the right half is not flat, or is the image too.
    """
    half = seen.shape[1] // 2
    inside, outside = seen[:, : half - 1], seen[:, half + 1 :]
    if (
        np.abs(inside - image).max() > 1e-4
        or np.ptp(outside, axis=(0, 1)).max() > 1e-4
        or np.abs(outside[0, 0] - image).max() < 1e-4
    ):
        raise GraphError(
            "automl: expected the image at the top left, its aspect kept, and flat padding beside it; found another placement"
        )
    return outside[0, 0]


def declared_layout(graph: SourceGraph) -> Layout:
    """Layout of the model's input: NCHW where its second dimension is declared as 3, else NHWC."""
    return "NCHW" if graph.image_shape[1:2] == (3,) else "NHWC"


def declared_size(graph: SourceGraph) -> tuple[int, int] | None:
    """Height and width that the model's input is declared with, None where they are free."""
    shape = graph.image_shape
    height, width = (shape[2:4] if declared_layout(graph) == "NCHW" else shape[1:3]) or (None, None)
    return (height, width) if height and width else None


def in_layout(images: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """NHWC images in another layout."""
    return np.ascontiguousarray(images if layout == "NHWC" else images.transpose(0, 3, 1, 2))


def _rounded(values: NDArray[Any]) -> tuple[float, float, float]:
    """To 4 decimals: float32 normalisation of 0-255 carries no more, and 123.675 comes back as it was written."""
    r, g, b = (round(float(value), 4) + 0.0 for value in values)
    return r, g, b


def read_nms(graph: SourceGraph) -> tuple[Nms, list[Note]]:
    """The NMS of the export, and notes on what EfficientNMS does otherwise.

    AutoML takes the best class of each anchor and suppresses across classes, or within each class ("per_class", one NMS
    operation per class). Score activation is a sigmoid, boxes are coded as centre and size.
    """
    nodes = [node for node in graph.all_nodes() if node.op in NMS_OPS]
    if not nodes:
        text = (
            "no NMS found in the model; taking score threshold 0.001, IoU 0.5, 100 detections: "
            "--score_threshold, --iou_threshold, --max_detections"
        )
        return Nms(), [Note(text, "score_threshold")]
    node = nodes[0]
    constants = [_scalar(graph.maybe_constant(t, node.function)) for t in node.inputs[2:]]
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
        text = f"{kind} becomes hard NMS at IoU {DEFAULT_IOU_THRESHOLD}, the only one TensorRT has: --iou_threshold"
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
    """What enters the NMS when the box regression in `feed` is zero: the anchors, corners (n, 4); None if it cannot be seen."""
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

    They stand in the model as a constant, unless a converter folded it into others; then the measured ones are taken.

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


def centre_size(corners: NDArray[np.float32]) -> NDArray[np.float32]:
    """Corners (n, 4) y1 x1 y2 x2 to centre and size y x h w, in the order of float32 operations of AutoML's decoding."""
    centre = (corners[:, :2] + corners[:, 2:]) / np.float32(2)
    return np.concatenate([centre, corners[:, 2:] - corners[:, :2]], axis=1)


def tensor(node: SourceNode) -> str:
    """The name of a node's (only) result."""
    return node.outputs[0]


def _scalar(value: NDArray[Any] | None) -> float | None:
    return None if value is None else float(np.asarray(value).reshape(-1)[0])


def _unique(graph: SourceGraph) -> Sequence[SourceNode]:
    """Nodes of the main graph, each once though ONNX lists one under each of its results."""
    return list({id(node): node for node in graph.nodes.values()}.values())
