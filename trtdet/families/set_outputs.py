# SPDX-License-Identifier: Apache-2.0
"""The outputs of a network that predicts a set (DETR and what followed it), found by shapes, values
and nodes, whatever they are called.

logits [N, Q, C] and boxes [N, Q, 4], cx cy w h, 0 to 1; or, where post-processing is in the export,
the two inner tensors that explain its labels, boxes and scores.

| kind | told by |
|---|---|
| softmax (DETR, YOLOS) | boxes are the sigmoid of a linear layer alone: no reference points; nothing that shows a sigmoid of the logits |
| rtdetr (RT-DETR, D-FINE, DEIM) | a convolutional backbone, and either convolutions behind attention (the hybrid encoder) or boxes from distributions |
| edge (EC, DEIMv2 on DINOv3) | a vision transformer, and boxes from distributions |
| rfdetr (RF-DETR, LW-DETR) | a vision transformer whose first convolution cuts patches, and convolutions behind it (the projector) |
| transformer | a vision transformer of another kind, and convolutions behind it: how its images come in is not known |
| sigmoid (Conditional, DAB, Deformable DETR) | reference points, or what shows a sigmoid of the logits, and none of these |

A vision transformer is attention upon attention, and convolutions behind; a hybrid encoder has one.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from trtdet.errors import GraphError
from trtdet.families.base import NO_HINTS, Found, Hints
from trtdet.families.box_corners import maybe_coded
from trtdet.families.outputs import Nodes, attribute, photographs, unexplained
from trtdet.families.pixels import declared_shapes, maybe_image
from trtdet.geometry import in_layout
from trtdet.graph.deformable_attention import PLUGIN_OP
from trtdet.sources.base import Source
from trtdet.sources.onnx_file import OnnxSource

Kind = Literal["softmax", "sigmoid", "rtdetr", "rfdetr", "edge", "transformer"]

#: Names by which the outputs are known where the model cannot be run to look at them.
LOGITS, BOXES = ("logits", "pred_logits", "labels"), ("pred_boxes", "dets")
#: Operators of deformable attention.
DEFORMABLE_OPS = frozenset(["GridSample", PLUGIN_OP])
#: Attention upon attention that a hybrid encoder has before its convolutions, at most.
MOST_HYBRID = 3
PRODUCTS = frozenset(["MatMul", "Einsum", "Gemm"])
#: Operators between a Softmax and the product that it weighs.
PASSING_ON = frozenset(["Cast", "Dropout", "Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "Where"])  # fmt: skip
#: Operators that leave the values of a tensor as they are.
SAME_VALUES = frozenset(["Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])
#: Nodes above the outputs that are looked at for the heads before post-processing.
NEAR = 250


@dataclass(frozen=True)
class SetOutputs:
    """Where the heads are.

    Attributes:
        logits, boxes: tensors [N, Q, C] and [N, Q, 4].
        activated: the "logits" are probabilities already.
        detections: (labels, boxes, scores) of post-processing in the export; None: it has none.
        sizes: the input [N, 2] that post-processing scales boxes by, and its order; "": none.
        kept: how many detections post-processing keeps; 0: there is none.
    """

    logits: str
    boxes: str
    activated: bool = False
    detections: tuple[str, str, str] | None = None
    sizes: str = ""
    sizes_hw: bool = False
    kept: int = 0


#: Source -> height and width of its input -> its outputs.
_probed: "weakref.WeakKeyDictionary[OnnxSource, dict[tuple[int, int], dict[str, NDArray[Any]]]]"
_probed = weakref.WeakKeyDictionary()


def other_feeds(source: OnnxSource, size_hw: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """Values for the inputs beside the image, one image that fills the network input: a mask of
    ones, its width and height.
    """
    image = maybe_image(source)
    feeds = {}
    for info in source.model.graph.input:
        name = info.name
        if name not in source.graph.inputs or (image and name == image[0]):
            continue
        shape = declared_shapes(source)[name]
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        if len(shape) == 3 and "mask" in name.lower():
            feeds[name] = np.ones((1, shape[1] or size_hw[0], shape[2] or size_hw[1]), dtype)
        elif len(shape) == 2 and shape[1] in (2, None):
            feeds[name] = np.array([size_hw[::-1]], dtype)
    return feeds


def probe(source: OnnxSource, hints: Hints) -> dict[str, NDArray[Any]]:
    """The outputs for one photograph as RGB 0-1, batch of one; empty where the model does not
    run so, or takes other inputs.
    """
    image = maybe_image(source)
    if image is None:
        return {}
    name, layout = image
    shape = declared_shapes(source)[name]
    dims = shape[2:] if layout == "NCHW" else shape[1:3]
    size_hw = (dims[0], dims[1]) if dims[0] and dims[1] else hints.size_hw
    if size_hw is None:
        return {}
    known = _probed.setdefault(source, {})
    if size_hw not in known:
        known[size_hw] = _run(source, name, layout, size_hw, shape[0] or 1)
    return known[size_hw]


def _run(
    source: OnnxSource, image: str, layout: Any, size_hw: tuple[int, int], batch: int
) -> dict[str, NDArray[Any]]:
    pictures = np.repeat(photographs(size_hw)[0][None], batch, axis=0)
    feeds = {name: np.repeat(v, batch, axis=0) for name, v in other_feeds(source, size_hw).items()}
    if {image, *feeds} != set(source.graph.inputs):
        return {}
    outputs = [info.name for info in source.model.graph.output]
    whole_numbers = source.dtype_of(image) != np.float32
    fed = in_layout(pictures if whole_numbers else pictures.astype(np.float32) / 255, layout)
    try:
        return dict(zip(outputs, source.run(outputs, {image: fed, **feeds}), strict=True))
    except GraphError:
        return {}


def maybe_outputs(source: Source, hints: Hints, *, trusted: bool = False) -> SetOutputs | None:
    """The heads of a set prediction.

    None where the outputs are something else, or leave an output unexplained.

    Args:
        trusted: boxes are told by their shape alone.
    """
    if not isinstance(source, OnnxSource) or source.spec:
        return None
    if not trusted and not has_attention(source):
        return None
    seen = probe(source, hints)
    if not seen:
        return _by_name(source)
    shapes = {name: value.shape for name, value in seen.items()}
    boxes = [
        n for n, s in shapes.items() if len(s) == 3 and s[2] == 4 and (trusted or _is_unit(seen[n]))
    ]
    pairs = [
        (other, box)
        for box in boxes
        for other, s in shapes.items()
        if other != box and len(s) == 3 and s[:2] == shapes[box][:2]
    ]
    if len(pairs) == 2 and len(boxes) == 2:  # four classes, sigmoid: boxes are called so
        pairs = [p for p in pairs if "box" in p[1].lower() or p[1] in BOXES]
    if len(pairs) == 1:
        logits, box = pairs[0]
        if unexplained(source, [logits, box], {n: [v] for n, v in seen.items()}):
            return None
        coded = maybe_coded(source, box, seen[box], lambda: _near(source, hints, [box]))
        if coded is None:
            return None
        activated = _are_probabilities(seen[logits])
        if activated and not _activation(Nodes(source.model), logits):
            return None  # of which a part is left out, such as the background
        return SetOutputs(logits, coded, activated=activated)
    if not pairs:
        return _before_post_processing(source, hints, seen)
    return None


def has_attention(source: OnnxSource) -> bool:
    """Whether a Softmax weighs something: its result goes into a matrix product, as it is or
    cast and reshaped (deformable attention: into a product or a sum).
    """
    reached: set[str] = set()
    for node in source.model.graph.node:
        follows = bool(reached.intersection(node.input))
        if node.op_type in DEFORMABLE_OPS or (follows and node.op_type in PRODUCTS):
            return True
        if node.op_type == "Softmax" or (follows and node.op_type in PASSING_ON):
            reached.update(node.output)
    return False


def _by_name(source: OnnxSource) -> SetOutputs | None:
    names = [info.name for info in source.model.graph.output]
    logits = next((n for n in names if n in LOGITS), None)
    boxes = next((n for n in names if n in BOXES), None)
    return SetOutputs(logits, boxes) if logits and boxes else None


def _is_unit(boxes: NDArray[Any]) -> bool:
    """cx cy w h of 0 to 1, some of them a little outside."""
    flat = boxes.reshape(-1, 4)
    inside = (flat > -0.5) & (flat < 2)
    return bool(inside.mean() > 0.98 and np.percentile(np.abs(flat), 75) <= 1.2)


def _are_probabilities(value: NDArray[Any]) -> bool:
    return bool(value.min() >= 0 and value.max() <= 1)


def _activation(nodes: Nodes, logits: str) -> str:
    """The operator that makes probabilities of logits; "": none does."""
    node = nodes.producer.get(logits)
    while node is not None and node.op_type in SAME_VALUES:
        node = nodes.producer.get(node.input[0])
    return node.op_type if node is not None and node.op_type in ("Sigmoid", "Softmax") else ""


# ---- post-processing in the export


def _before_post_processing(
    source: OnnxSource, hints: Hints, seen: Mapping[str, NDArray[Any]]
) -> SetOutputs | None:
    """The inner logits and boxes whose best K are the outputs labels, boxes and scores, number
    by number.
    """
    shapes = {name: value.shape for name, value in seen.items()}
    boxes = [n for n, s in shapes.items() if len(s) == 3 and s[2] == 4]
    flat = [n for n, s in shapes.items() if len(s) == 2 and boxes and s[1] == shapes[boxes[0]][1]]
    labels = [n for n in flat if (seen[n] == np.round(seen[n])).all()]
    scores = [n for n in flat if n not in labels]
    if not len(boxes) == len(labels) == len(scores) == 1:
        return None
    outputs = (labels[0], boxes[0], scores[0])
    if unexplained(source, list(outputs), {n: [v] for n, v in seen.items()}):
        return None
    image, (_, (height, width)) = maybe_image(source), _layout_and_size(source, hints)
    assert image is not None
    inner = _near(source, hints, outputs)
    extra = [n for n in source.graph.inputs if n != image[0]]
    explaining = [
        (name, found)
        for name, value in inner.items()
        if (found := _explains_scores(value, seen[scores[0]], seen[labels[0]])) is not None
    ]
    for name, (activated, rows) in sorted(explaining, key=lambda item: item[1][0]):  # logits first
        value = inner[name]
        for other, coded in inner.items():
            if coded.shape != (*value.shape[:2], 4) or not _is_unit(coded):
                continue
            if (
                orders := _explains_boxes(coded, rows, seen[boxes[0]], (height, width))
            ) is not None:
                return SetOutputs(
                    name, other, activated, outputs, extra[0] if extra else "", orders, seen[scores[0]].shape[1],
                )  # fmt: skip
    return None


def _layout_and_size(source: OnnxSource, hints: Hints) -> tuple[Any, tuple[int, int]]:
    image = maybe_image(source)
    assert image is not None
    declared = declared_shapes(source)[image[0]]
    dims = declared[2:] if image[1] == "NCHW" else declared[1:3]
    return image[1], (dims[0] or 0, dims[1] or 0) if all(dims) else hints.size_hw or (0, 0)


def _near(source: OnnxSource, hints: Hints, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Float tensors of three dimensions near the outputs, nearest first, for the photograph of
    `probe`.
    """
    (image, _), (layout, size_hw) = maybe_image(source) or ("", ""), _layout_and_size(source, hints)
    nodes = Nodes(source.model)
    names: list[str] = []
    for number, node in enumerate(nodes.above(list(outputs))):
        if number > NEAR:
            break
        names.extend(n for n in node.output if n and n not in outputs and not nodes.is_constant(n))
    batch = declared_shapes(source)[image][0] or 1
    picture = np.repeat(photographs(size_hw)[0][None], batch, axis=0)
    whole_numbers = source.dtype_of(image) != np.float32
    fed = in_layout(picture if whole_numbers else picture.astype(np.float32) / 255, layout)
    feeds = {n: np.repeat(v, batch, axis=0) for n, v in other_feeds(source, size_hw).items()}
    values = source.run(names, {image: fed, **feeds})
    return {
        n: v
        for n, v in zip(names, values, strict=True)
        if v.ndim == 3 and v.dtype == np.float32 and v.shape[1] > 1
    }


def _explains_scores(
    value: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any]
) -> tuple[bool, NDArray[np.int64]] | None:
    """Whether the best K of all pairs of `value` have these scores and labels: (are they
    probabilities already, their rows).
    """
    k = scores.shape[1]
    num_classes = value.shape[2]
    if value.shape[1] * num_classes < k or num_classes < 1:
        return None
    flat = value[0].reshape(-1).astype(np.float64)
    order = np.argsort(-flat, kind="stable")[:k]
    for activated in (False, True):
        best = flat[order] if activated else 1 / (1 + np.exp(-flat[order]))
        same = np.abs(best - scores[0]).max() < 1e-4
        agree = (order % num_classes == labels[0]).mean() > 0.9  # equal scores may swap
        if same and agree:
            return activated, order // num_classes
    return None


def _explains_boxes(
    coded: NDArray[Any], rows: NDArray[np.int64], boxes: NDArray[Any], size_hw: tuple[int, int]
) -> bool | None:
    """Whether `coded` boxes at `rows` come out as `boxes`: False scaled by (w, h), True by (h,
    w); None: neither.
    """
    cx, cy, w, h = coded[0, rows].astype(np.float64).T
    corners = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], axis=1)
    # `other_feeds` says width, height: an export that takes height, width multiplies x by what it
    # took for the width.
    for swapped in (False, True) if size_hw[0] != size_hw[1] else (False,):
        scale = np.array(size_hw if swapped else size_hw[::-1], np.float64)
        gaps = np.abs(corners * np.tile(scale, 2) - boxes[0]).max(axis=1)
        if (gaps < 0.05 + 1e-4 * scale.max()).mean() > 0.9:
            return swapped
    return None


# ---- which kind


def kind_of(source: OnnxSource, outputs: SetOutputs) -> Kind:
    """See the module's docstring."""
    nodes = Nodes(source.model)
    if is_linear_sigmoid(nodes, outputs.boxes) and not _takes_sigmoid(source, nodes, outputs):
        return "softmax"
    depth, is_distributed = _attention_before_convolutions(source, nodes, outputs), _sums_distributions(nodes, outputs)  # fmt: skip
    if depth > MOST_HYBRID:
        if is_distributed:
            return "edge"
        return "rfdetr" if _embeds_patches(source) else "transformer"
    return "rtdetr" if depth or is_distributed else "sigmoid"


def _takes_sigmoid(source: OnnxSource, nodes: Nodes, outputs: SetOutputs) -> bool:
    """Whether the file shows that there is no softmax: a Sigmoid of the logits, post-processing
    that takes the best of all pairs, or one logit alone.
    """
    if outputs.activated or outputs.detections:
        return outputs.detections is not None or _activation(nodes, outputs.logits) == "Sigmoid"
    logits = probe(source, NO_HINTS).get(outputs.logits)
    return logits is not None and logits.shape[-1] == 1


def is_linear_sigmoid(nodes: Nodes, boxes: str) -> bool:
    """Whether boxes are sigmoid(x W + b) with nothing added: no reference points."""
    tensor = boxes
    for _ in range(12):
        node = nodes.producer.get(tensor)
        if node is None:
            return False
        if node.op_type in (
            "Identity",
            "Gather",
            "Slice",
            "Reshape",
            "Squeeze",
            "Unsqueeze",
            "Transpose",
            "Cast",
            "Split",
        ):
            tensor = node.input[0]
        elif node.op_type == "Sigmoid":
            tensor = node.input[0]
            break
        else:
            return False
    for _ in range(6):
        node = nodes.producer.get(tensor)
        if node is None:
            return False
        if node.op_type in ("Gemm", "MatMul"):
            return True
        if node.op_type == "Add":
            biases = [n for n in node.input if (v := nodes.value(n)) is not None and v.size <= 4]
            if len(biases) != 1:
                return False
            (tensor,) = [n for n in node.input if n not in biases]
        elif node.op_type in (
            "Identity",
            "Reshape",
            "Transpose",
            "Squeeze",
            "Unsqueeze",
            "Slice",
            "Gather",
        ):
            tensor = node.input[0]
        else:
            return False
    return False


def is_deformable(source: Source) -> bool:
    return any(node.op in DEFORMABLE_OPS for node in source.graph.nodes.values())


def _attention_before_convolutions(source: OnnxSource, nodes: Nodes, outputs: SetOutputs) -> int:
    """How many Softmax follow one upon another before a convolution of maps: of a hybrid encoder,
    or of what gathers the maps of a vision transformer.
    """
    depths: dict[str, int] = {}
    relevant = {id(n) for n in nodes.above([outputs.logits, outputs.boxes])}
    deepest = 0
    for node in source.model.graph.node:
        if id(node) not in relevant:
            continue
        depth = max((depths.get(name, 0) for name in node.input), default=0)
        if node.op_type == "Conv":
            deepest = max(deepest, depth)
        depths.update(dict.fromkeys(node.output, depth + (node.op_type == "Softmax")))
    return deepest


def _sums_distributions(nodes: Nodes, outputs: SetOutputs) -> bool:
    """Whether boxes are sums over distributions, as D-FINE's: a Softmax meets constants in a
    matrix product.
    """
    reached: set[str] = set()
    for node in reversed(list(nodes.above([outputs.boxes]))):
        follows = reached.intersection(node.input)
        if follows and node.op_type == "MatMul":
            if any(nodes.value(name) is not None for name in node.input):
                return True
        elif node.op_type == "Softmax" or (follows and node.op_type in PASSING_ON):
            reached.update(node.output)
    return False


def _embeds_patches(source: OnnxSource) -> bool:
    """Whether the first convolution cuts the image into patches that do not overlap."""
    for node in source.model.graph.node:
        if node.op_type == "Conv":
            kernel, strides = (
                attribute(node, "kernel_shape", [0, 0]),
                attribute(node, "strides", [1, 1]),
            )
            if not kernel:
                return False
            return list(kernel) == list(strides) and kernel[0] >= 8
    return False


def read_detections(outputs: SetOutputs, values: Sequence[NDArray[Any]]) -> Found:
    """The detections of the first image of the outputs labels, boxes and scores."""
    labels, boxes, scores = (v[0] for v in values)
    return Found(boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int64))
