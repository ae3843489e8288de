# SPDX-License-Identifier: Apache-2.0
"""RetinaNet as ODTK exports it, axis-aligned or rotated: `odtk export model.pth model.onnx`.

Such a file is the network alone: normalised images in, and of five levels the scores (after the
sigmoid) and the box regression out. Anchors, decoding, thresholds and preprocessing are in ODTK's
code; the facts here are from NVIDIA/retinanet-examples odtk/box.py, odtk/model.py, odtk/data.py,
odtk/infer.py and csrc/cuda/decode*.cu, nms*.cu at 2021-12.

| | |
|---|---|
| `score_i` | [N, A * C, h, w], channel a * C + c |
| `box_i` | [N, A * K, h, w], channel a * K + k; K = 4: dx dy dw dh; K = 6, rotated: sin and cos of the angle too |
| anchors of a cell | A = 9: ratios 1, 2, 0.5 (fastest), scales 4 * 2**(i / 3); rotated A = 27: three angles (slowest), which decoding ignores |
| angle | absolute, atan2(sin, cos), clockwise on the screen |

A network of these alone is convolutional: its size may be made dynamic, although ODTK writes a
fixed one. The anchors then follow from the shapes of the maps.

ODTK counts pixels: a box from x1 to x2 covers x2 too and is x2 - x1 + 1 wide. Its overlap is
therefore that of the boxes x1 .. x2 + 1, and those are written here; `ModelSpec.inclusive_corners`
has the added pixel taken off before boxes go to the source image and added again there, as ODTK
does. Its rotated boxes are without the pixel in NMS and in the corners, and with it in `bbox`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.base import Heads, Hints, Note, Reading
from trtdet.families.evidence import Evidence
from trtdet.families.pixels import Normal
from trtdet.graph.builder import Builder
from trtdet.graph.map_op import inferred_shapes, unknown_ops
from trtdet.labels import COCO_80_IDS, COCO_80_LABELS, fit_labels, may_be_coco_80
from trtdet.nms.boxes import decode_boxes
from trtdet.sources.base import Source, SourceGraph
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import PREPROCESSORS, Fact, ModelSpec, Nms, Preprocessing

NAME = "retinanet"

LEVELS = range(1, 6)
SCORES = tuple(f"score_{level}" for level in LEVELS)
BOXES = tuple(f"box_{level}" for level in LEVELS)
HEADS = (*SCORES, *BOXES)
#: Nominal strides of P3 to P7. ODTK divides image by map sizes, which is the same at multiples of
#: 128 and wrong elsewhere.
STRIDES = (8, 16, 32, 64, 128)
RATIOS = (1.0, 2.0, 0.5)
SCALES = tuple(4 * 2 ** (i / 3) for i in range(3))
ANGLES = 3
#: Operators that work at any size; Resize does by scales, not to sizes.
ANY_SIZE = {"Add", "BatchNormalization", "Const", "Constant", "Conv", "Identity", "MaxPool", "Relu", "Resize", "Sigmoid"}  # fmt: skip
#: Channels of a box head -> (anchors per cell, values per box).
BOX_CHANNELS = {len(RATIOS) * len(SCALES) * 4: (9, 4), len(RATIOS) * len(SCALES) * ANGLES * 6: (27, 6)}  # fmt: skip

MEAN, STD = PREPROCESSORS["imagenet"]


def matches(source: Source) -> bool:
    """Whether the outputs have ODTK's names."""
    return all(source.graph.maybe_producer(name) for name in HEADS)


def read(source: Source, hints: Hints) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    graph = source.graph
    if not matches(source):
        raise GraphError(
            f"{source.path}: expected the outputs {SCORES[0]} to {SCORES[-1]} and {BOXES[0]} to {BOXES[-1]} of ODTK's export, found "
            f"{', '.join(graph.outputs)}; export it with `odtk export`, or add its family: docs/adding_a_family.md"
        )
    if len(graph.inputs) != 1:
        raise GraphError(f"{NAME}: expected one input, the images, found {list(graph.inputs)}")
    (image_input,) = graph.inputs
    size_hw = _input_size(graph, hints)
    layout = _read_heads(source, image_input, size_hw)
    odtk_overlap = layout.rotated and hints.rotated_nms == "odtk"
    return Reading(
        spec=_spec(layout, size_hw, hints),
        image_input=image_input,
        network_input=image_input,
        network_layout="NCHW",
        image_layout="NCHW",
        heads={name: name for name in HEADS},
        assemble=lambda build, spec: assemble(
            build,
            layout,
            with_length=odtk_overlap,
            dynamic_size=spec.preprocessing.size_range is not None,
        ),
        batch=graph.batch,
        size_multiple=_size_multiple(graph, size_hw, layout),
        notes=_notes(size_hw, unknown_ops(source, HEADS)),
        facts=_facts(graph, layout, size_hw, hints),
        takes=frozenset(["rotated_nms"] if layout.rotated else []),
    )


def _facts(
    graph: SourceGraph, layout: "HeadLayout", size_hw: tuple[int, int], hints: Hints
) -> tuple[Fact, ...]:
    """Where all of it comes from: the file has the network alone, the rest is ODTK's."""
    evidence = Evidence(NAME)
    odtk = f"{ev.CONVENTION}ODTK"
    evidence.add(ev.FAMILY, NAME, f"read: the outputs {SCORES[0]} to {BOXES[-1]}")
    evidence.add(
        ev.INPUT,
        f"'{graph.inputs[0]}' NCHW {size_hw[0]}x{size_hw[1]}",
        "read: its shape, or --size",
    )
    evidence.add(ev.NORMALISATION, Normal(MEAN, STD), odtk)
    given = f"{ev.GIVEN}--resize_mode {hints.resize}" if hints.resize else odtk
    evidence.add(ev.RESIZE, hints.resize or "letterbox, top left on the mean", given)
    evidence.add(ev.BATCH, graph.batch or "dynamic", "read: the shape of its output")
    evidence.add(
        ev.BOXES,
        "rotated, relative to anchors" if layout.rotated else "xyxy, relative to anchors",
        f"read: the channels of {BOXES[0]}",
    )
    evidence.add(ev.SCORES, "probabilities", odtk)
    evidence.add(ev.BACKGROUND, "none", odtk)
    evidence.add(ev.CLASSES, layout.num_classes, f"read: the channels of {SCORES[0]}")
    evidence.add(
        ev.CATEGORY_IDS,
        "COCO's 80" if _is_coco(layout, hints) else f"1..{layout.num_classes}",
        odtk,
    )
    evidence.add(ev.SELECTION, "NMS of rotated boxes" if layout.rotated else "NMS per class", odtk)
    evidence.add(ev.KEPT, 100, odtk)
    return evidence.settle()


@dataclass(frozen=True)
class HeadLayout:
    """How the ten outputs are laid out.

    Attributes:
        maps_hw: height and width of each level.
        anchors: per cell.
        box_size: values per box: 4, or 6 for rotated ones.
    """

    maps_hw: tuple[tuple[int, int], ...]
    anchors: int
    box_size: int
    num_classes: int

    @property
    def rotated(self) -> bool:
        return self.box_size == 6


def _input_size(graph: SourceGraph, hints: Hints) -> tuple[int, int]:
    height, width = graph.image_shape[2:4] if len(graph.image_shape) == 4 else (None, None)
    if height and width:
        return height, width
    if hints.size_hw:
        return hints.size_hw
    raise GraphError(
        f"{NAME}: expected an input [N, 3, height, width] of fixed size, as ODTK exports it, found "
        f"{list(graph.image_shape)}; give --size H,W"
    )


def _size_multiple(graph: SourceGraph, size_hw: tuple[int, int], layout: HeadLayout) -> int | None:
    """What a dynamic size must be a multiple of; None where the size stays."""
    whole = not any(side % STRIDES[-1] for side in size_hw)
    works = all(node.op in ANY_SIZE for node in graph.nodes.values())
    if layout.rotated or not whole or not works:
        return None
    for node in graph.nodes.values():
        if node.op == "Resize":
            scales = graph.maybe_producer(node.inputs[-1])
            if scales is None or scales.value is None or scales.value.dtype.kind != "f":  # sizes
                return None
    return STRIDES[-1]


def _read_heads(source: Source, image_input: str, size_hw: tuple[int, int]) -> HeadLayout:
    """Run the network once for the shapes of its outputs, which exporters declare as they please.

    What ONNX Runtime cannot run is taken at its word.

    Raises:
        GraphError: channels that do not go with ODTK's anchors, or maps that do not go with the
            strides.
    """
    if isinstance(source, OnnxSource) and unknown_ops(source, HEADS):
        shapes = list(inferred_shapes(source.model, HEADS).values())
    else:
        images = np.zeros((source.graph.batch or 1, 3, *size_hw), np.float32)
        shapes = [value.shape for value in source.run(HEADS, {image_input: images})]
    channels = shapes[len(SCORES)][1]
    if channels not in BOX_CHANNELS:
        raise GraphError(
            f"{NAME}: expected box heads of {' or '.join(map(str, BOX_CHANNELS))} channels (9 anchors, or 27 rotated ones), found "
            f"{channels}; a model trained with ratios or scales of its own does not carry them in its ONNX: set RATIOS and SCALES "
            f"in trtdet/families/{NAME}.py"
        )
    anchors, box_size = BOX_CHANNELS[channels]
    classes, rest = divmod(shapes[0][1], anchors)
    maps = tuple((math.ceil(size_hw[0] / s), math.ceil(size_hw[1] / s)) for s in STRIDES)
    expected = [(anchors * classes, *hw) for hw in maps] + [(channels, *hw) for hw in maps]
    found = [shape[1:] for shape in shapes]
    if rest or not classes or found != expected:
        raise GraphError(
            f"{NAME}: expected scores and boxes of {anchors} anchors per cell on maps of strides {STRIDES}, {expected}, found {found}"
        )
    return HeadLayout(maps, anchors, box_size, classes)


def _is_coco(layout: "HeadLayout", hints: Hints) -> bool:
    """Whether there are 80 classes, and --labels does not say that they are others."""
    return may_be_coco_80(fit_labels(hints.labels, layout.num_classes), layout.num_classes)


def _spec(layout: HeadLayout, size_hw: tuple[int, int], hints: Hints) -> ModelSpec:
    # ODTK maps class i to the i-th category of the annotations: COCO's 80 with their gaps, or else
    # 1, 2, 3, ...
    coco = _is_coco(layout, hints)
    return ModelSpec(
        family=NAME,
        preprocessing=Preprocessing(
            size_hw=size_hw,
            layout="NCHW",
            mean=MEAN,
            std=STD,
            pad_rgb=MEAN,  # zeros after normalisation
            rounding="floor64",
            antialias=True,  # Pillow's BILINEAR
        ),
        nms=Nms(
            score_threshold=_above(0.05),
            iou_threshold=_above(0.5),
            max_output_boxes=100,
            score_activation=False,
            box_coding=0,
        ),
        category_ids=COCO_80_IDS if coco else tuple(range(1, layout.num_classes + 1)),
        labels=COCO_80_LABELS if coco else (),
        box_order="xyxy",
        selection="rotated_nms" if layout.rotated else "nms",
        rotated_mode=hints.rotated_nms or "exact",
        anchored=False,
        inclusive_corners=True,
    )


def _above(threshold: float) -> float:
    """x >= _above(t) is x > t, for float32: ODTK compares strictly, EfficientNMS does not."""
    return float(np.nextafter(np.float32(threshold), np.float32(np.inf)))


def _notes(size_hw: tuple[int, int], unknown: Sequence[str]) -> tuple[Note, ...]:
    notes = []
    if unknown:
        text = f"ONNX Runtime does not know {', '.join(unknown)}: the shapes of the heads are taken as the file declares them"
        notes.append(Note(text, ""))
    if not any(side % STRIDES[-1] for side in size_hw):
        return tuple(notes)
    better = "x".join(str(math.ceil(side / STRIDES[-1]) * STRIDES[-1]) for side in size_hw)
    text = (
        f"the input size {size_hw[0]}x{size_hw[1]} is not a multiple of {STRIDES[-1]}: ODTK's own decoder takes wrong strides for "
        f"the coarse levels there. This model decodes with the true ones, {', '.join(map(str, STRIDES))}, so large objects come "
        f"out elsewhere than with ODTK; export it at {better} to agree with ODTK"
    )
    return (*notes, Note(text, ""))


# ---- decoding


def assemble(
    build: Builder, layout: HeadLayout, *, with_length: bool = False, dynamic_size: bool = False
) -> Heads:
    """Append the decoding of the ten heads.

    boxes = min(max(0, anchor's decoding), feature map), [N, anchors, 4]; rotated [N, anchors, 5],
    or 6 with the length of the raw (sin, cos), which ODTK's own overlap depends on. scores [N,
    anchors, C]. Cells row by row, level after level, anchors of a cell together.
    """
    cells = [-1 if dynamic_size else height * width for height, width in layout.maps_hw]
    boxes = _flatten(build, "boxes_raw", BOXES, layout.box_size, layout.anchors, cells)
    scores = _flatten(build, "scores", SCORES, layout.num_classes, layout.anchors, cells)
    lowest: NDArray[np.float32]
    highest: NDArray[np.float32] | str
    lowest, highest = _limits(layout)
    if dynamic_size:
        anchors, highest = _anchors_in_graph(build, layout), _map_size_in_graph(build)
    else:
        anchors = build.constant("anchors", all_anchors(layout)[None])
    deltas = build.slice_last("deltas", boxes, 0, 4) if layout.rotated else boxes
    corners = decode_boxes(build, deltas, anchors, box_coding=1)
    corners = build.node("Max", "corners_not_before", corners, lowest)
    corners = build.node("Min", "corners_in_map", corners, highest)
    if not layout.rotated:
        return Heads(corners, scores)
    last_pixel = np.array([0, 0, 1, 1], np.float32)
    corners = build.node("Sub", "corners_inclusive", corners, last_pixel)
    sin, cos = (build.slice_last(name, boxes, i, i + 1) for name, i in (("sin", 4), ("cos", 5)))
    columns = [corners, _atan2(build, sin, cos)]
    if with_length:
        squares = [build.node("Mul", f"{n}_squared", x, x) for n, x in (("sin", sin), ("cos", cos))]
        columns.append(build.node("Sqrt", "length", build.node("Add", "length_squared", *squares)))
    return Heads(build.node("Concat", "boxes", *columns, axis=-1), scores)


def _flatten(
    build: Builder,
    name: str,
    levels: Sequence[str],
    size: int,
    anchors: int,
    cells: Sequence[int],
) -> str:
    """Per level [N, A * size, h, w]  ->  [N, h * w * A, size]; then one after the other.

    `cells`: h * w of each, -1 where it is dynamic.
    """
    parts = []
    for level, count in zip(levels, cells, strict=True):
        split = build.reshape(f"{level}/split", level, [0, anchors, size, count])
        last = build.node("Transpose", f"{level}/values_last", split, perm=[0, 3, 1, 2])
        rows = -1 if count < 0 else count * anchors
        parts.append(build.reshape(f"{level}/flat", last, [0, rows, size]))
    return build.node("Concat", name, *parts, axis=1)


def _atan2(build: Builder, sin: str, cos: str) -> str:
    """The angle of (sin, cos), of any length, by Atan of the smaller over the larger; ONNX has
    no Atan2. 0 for (0, 0).
    """
    steep = build.node(
        "Greater", "steep", build.node("Abs", "sin_abs", sin), build.node("Abs", "cos_abs", cos)
    )
    smaller = build.node("Where", "smaller", steep, cos, sin)
    larger = build.node("Where", "larger", steep, sin, cos)
    zero = np.float32(0)
    larger = build.node(
        "Where", "larger_not_0", build.node("Equal", "both_0", larger, zero), np.float32(1), larger
    )
    part = build.node("Atan", "part_of_angle", build.node("Div", "slope", smaller, larger))
    quarter = np.float32(np.pi / 2)
    quarter_turn = build.node(
        "Where", "quarter_turn", build.node("Less", "sin_negative", sin, zero), -quarter, quarter
    )
    half_turn = build.node("Add", "half_turn", quarter_turn, quarter_turn)
    beyond = build.node(
        "Where", "half_turn_or_0", build.node("Less", "cos_negative", cos, zero), half_turn, zero
    )
    return build.node(
        "Where",
        "angle",
        steep,
        build.node("Sub", "angle_steep", quarter_turn, part),
        build.node("Add", "angle_flat", beyond, part),
    )


def _anchors_in_graph(build: Builder, layout: HeadLayout) -> str:
    """`all_anchors` for the maps as they come: [1, anchors, 4]."""
    levels = []
    for stride, score in zip(STRIDES, SCORES, strict=True):
        shape = build.node("Shape", f"{score}/shape", score)
        cells = []
        for axis, column, view in ((2, 1, [-1, 1, 1, 1]), (3, 0, [1, -1, 1, 1])):  # y, x
            name = f"{score}/{'xy'[column]}"
            count = build.node("Gather", f"{name}_count", shape, np.int64(axis))
            index = build.node("Range", f"{name}_index", np.int64(0), count, np.int64(1))
            index = build.cast(f"{name}_float", index, TensorProto.FLOAT)
            step = np.eye(4, dtype=np.float32)[column] * np.float32(stride)
            cells.append(
                build.node("Mul", name, build.reshape(f"{name}_column", index, view), step)
            )
        corner = build.node("Add", f"{score}/cells", *cells)
        anchors = build.node(
            "Add", f"{score}/anchors", corner, _level_anchors(stride, (1, 1), layout)
        )
        levels.append(build.reshape(f"{score}/anchors_flat", anchors, [1, -1, 4]))
    return build.node("Concat", "anchors", *levels, axis=1)


def _map_size_in_graph(build: Builder) -> str:
    """Width, height, width, height of the image, which at multiples of the largest stride is
    that of every map: float32 [4].
    """
    shape = build.node("Shape", "map_shape", SCORES[0])
    sides = build.node("Gather", "map_sides", shape, np.array([3, 2, 3, 2]))
    sides = build.cast("map_sides_float", sides, TensorProto.FLOAT)
    return build.node("Mul", "map_size", sides, np.float32(STRIDES[0]))


def all_anchors(layout: HeadLayout) -> NDArray[np.float32]:
    """(h * w * A of all levels, 4) float32: centre x y and size w h, which includes ODTK's
    pixel.
    """
    return np.concatenate(
        [
            _level_anchors(stride, hw, layout)
            for stride, hw in zip(STRIDES, layout.maps_hw, strict=True)
        ]
    )


def _level_anchors(stride: int, map_hw: tuple[int, int], layout: HeadLayout) -> NDArray[np.float32]:
    ratio, scale = np.array(RATIOS, np.float32), np.array(SCALES, np.float32)
    width = np.sqrt(np.float32(stride * stride) / ratio)
    if layout.rotated:
        width = np.round(width)
    height = np.round(width * ratio) if layout.rotated else width * ratio
    size = np.stack([width, height], axis=-1)[None] * scale[:, None, None]  # ratio fastest
    size = size.reshape(-1, 2)
    low = np.float32(0.5) * (np.float32(stride) - size)
    if layout.rotated:  # x2 - 1, and then + 1: the pixel is in already
        size = np.tile(size, (ANGLES, 1))
        low = np.tile(low, (ANGLES, 1))
    else:
        size = size + np.float32(1)
    centre = low + np.float32(0.5) * size
    y, x = np.mgrid[: map_hw[0], : map_hw[1]].astype(np.float32) * np.float32(stride)
    cells = np.stack([x, y], axis=-1).reshape(-1, 1, 2)
    anchors = np.empty((len(cells), len(size), 4), np.float32)
    anchors[..., :2], anchors[..., 2:] = cells + centre, size
    return anchors.reshape(-1, 4)


def _limits(layout: HeadLayout) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Least and largest x1 y1 x2 y2, the far side of the feature map: (4,), or (1, anchors, 4)
    where levels end elsewhere.

    ODTK limits x1 y1 from below and x2 y2 from above. Of a box outside the map that leaves x2 below
    x1, which its NMS takes for an area of 0; EfficientNMS would exchange the two, so upright boxes
    are limited on both ends. After clipping to the image there is no difference.
    """
    free = np.finfo(np.float32).max if layout.rotated else None
    limits = []
    for stride, (height, width) in zip(STRIDES, layout.maps_hw, strict=True):
        right, bottom = width * stride, height * stride
        limits.append((free or right, free or bottom, right, bottom))
    lowest = np.array([0, 0, -free, -free] if free else [0, 0, 0, 0], np.float32)
    if len(set(limits)) == 1:
        return lowest, np.array(limits[0], np.float32)
    counts = [height * width * layout.anchors for height, width in layout.maps_hw]
    return lowest, np.repeat(np.array(limits, np.float32), counts, axis=0)[None]
