# SPDX-License-Identifier: Apache-2.0
"""YOLO: what Ultralytics (v8, v11, v10, 26, their OBB, segment and pose models), YOLOv5, YOLOv7, YOLOv6 and YOLOX export.

| head | from | one row | what follows |
|---|---|---|---|
| raw [N, 4+C, A] | v8, v11 | cx cy w h in input pixels, class scores | NMS |
| raw [N, 4+C+1, A] | OBB | the same and an angle | NMS of rotated boxes |
| objectness [N, A, 5+C] | v5, v6, v7 | cx cy w h in input pixels, objectness, class scores | NMS |
| grid [N, A, 5+C] | YOLOX | offsets to a grid, objectness, class scores | NMS |
| end to end [N, K, 6], OBB [N, K, 7] | v10, 26, exports with NMS inside | x1 y1 x2 y2 (OBB: cx cy w h), score, class (, angle) | the best K |

All scores are behind their sigmoid. Ultralytics and YOLOv5 write names, stride and task into the file's metadata. The others write
nothing: three boxes in each cell are those of v5 and v7, an objectness of exactly 1 is v6's, offsets to a grid are YOLOX's. Any other
head without metadata is for `trtdet.families.heads`, which asks how images come in.
"""

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.families import evidence as ev
from trtdet.families.base import (
    IMAGE_HINTS,
    NO_HINTS,
    Final,
    Found,
    Heads,
    Hints,
    Note,
    Reading,
    best_class_only,
)
from trtdet.families.evidence import Evidence
from trtdet.families.outputs import batch_of, check_finite, measure_format, unexplained
from trtdet.families.pixels import (
    Convention,
    Normal,
    Pixels,
    decide_normalisation,
    find_pixels,
    maybe_image,
)
from trtdet.graph.builder import Builder
from trtdet.graph.map_op import inferred_shapes, unknown_ops
from trtdet.labels import COCO_80_IDS, COCO_80_LABELS
from trtdet.precision.graph_types import narrow_types
from trtdet.sources.base import Source, SourceGraph
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import ModelSpec, Nms, Preprocessing, Selection

NAME = "yolo"

#: The name of the head in the converted file: that of the exports.
HEAD = "output0"

Kind = Literal["raw", "objectness", "grid", "end_to_end"]

#: Strides of a model's levels: most; with a level for small objects, for large ones; v3-tiny.
LEVELS = ((8, 16, 32), (4, 8, 16, 32), (8, 16, 32, 64), (16, 32))
#: Boxes per cell: 1 where there are no anchors, 3 in v5 and v7.
BOXES_PER_CELL = (1, 3)

#: The least score that Ultralytics, YOLOv5 and YOLOX keep when they compute mAP; for pictures they take 0.25.
SCORE_THRESHOLD = 0.001
#: Ultralytics' default since v8; the default of v5, v7 and YOLOX.
IOU_THRESHOLD, IOU_THRESHOLD_OBJECTNESS = 0.7, 0.45
#: Ultralytics' default.
MAX_DETECTIONS = 300
GREY = 114.0
#: What YOLOX's networks take.
YOLOX_NORMAL = Normal((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), bgr=True)

#: Values of a row beside boxes and scores that are left out, by the task in the metadata.
LEFT_OUT = {"segment": "masks", "pose": "keypoints"}


@dataclass(frozen=True)
class Metadata:
    """What an exporter wrote into `metadata_props`; empty where it wrote nothing."""

    names: tuple[str, ...] = ()
    stride: int = 0
    task: str = "detect"
    size_hw: tuple[int, int] | None = None
    end_to_end: bool = False
    nms_inside: bool = False

    @property
    def is_rotated(self) -> bool:
        return self.task == "obb"


@dataclass(frozen=True)
class Levels:
    """The pyramid levels that give a head its number of boxes."""

    size_hw: tuple[int, int]
    strides: tuple[int, ...]
    boxes_per_cell: int

    @property
    def count(self) -> int:
        """A, the number of boxes."""
        height, width = self.size_hw
        return self.boxes_per_cell * sum(-(-height // s) * -(-width // s) for s in self.strides)

    def grid(self) -> NDArray[np.float32]:
        """(A, 4) float32: x y of the cell's top left corner and its width and height, input pixels; one box per cell, row by row."""
        rows = []
        for stride in self.strides:
            height, width = (-(-side // stride) for side in self.size_hw)
            y, x = np.mgrid[:height, :width].reshape(2, -1) * stride
            rows.append(np.stack([x, y, *np.full((2, x.size), stride)], axis=1))
        return np.concatenate(rows).astype(np.float32)


@dataclass(frozen=True)
class Head:
    """The tensor that holds the detections.

    Attributes:
        tensor: its name in the source.
        values: what it is for a grey image, float32 with three dimensions; NaN where ONNX Runtime cannot run the network.
        num_classes: C.
        levels: where its rows come from; None for `end_to_end`, whose rows are sorted.
        keeps: K of a model that suppresses nothing. None: NMS follows.
    """

    kind: Kind
    tensor: str
    values: NDArray[np.float32]
    num_classes: int
    levels: Levels | None = None
    keeps: int | None = None

    @property
    def is_seen(self) -> bool:
        return _is_seen(self.values)

    @property
    def rows(self) -> NDArray[np.float32]:
        """[A, values] of the first image."""
        return self.values[0].T if self.kind == "raw" else self.values[0]

    @property
    def has_corners(self) -> bool:
        """Whether a box is x1 y1 x2 y2 rather than cx cy w h, of which few are wider than they are far from the left edge."""
        if self.kind != "raw":
            return self.kind == "end_to_end"
        if self.levels is not None and self.is_seen:
            measured, _ = measure_format([self.rows[:, :4].astype(np.float64)], self.levels.size_hw)
            if measured in ("xyxy", "cxcywh"):
                return measured == "xyxy"
        return bool((self.rows[:, 2:4] >= self.rows[:, :2]).all(axis=1).mean() > 0.95)


def matches(source: Source) -> bool:
    """Whether the metadata is that of a YOLO export, or without any, the outputs are what only v5, v6, v7 or YOLOX export."""
    if not isinstance(source, OnnxSource) or source.spec:
        return False
    keys = {prop.key for prop in source.model.metadata_props}
    if "libreyolo_version" in keys:
        return False
    if {"names", "stride"} <= keys:
        return not is_set_prediction(source)
    return "names" not in keys and maybe_without_metadata(source) is not None


def is_set_prediction(source: Source) -> bool:
    """Whether the rows are those of Ultralytics' RT-DETR: no grid has so many cells, and they are wider than detections."""
    if not isinstance(source, OnnxSource) or source.spec:
        return False
    keys = {prop.key for prop in source.model.metadata_props}
    if not {"names", "stride"} <= keys or "libreyolo_version" in keys:
        return False
    shapes = _declared_outputs(source.model)
    size_hw = _declared_size(source.graph)
    metadata = read_metadata(source.model)
    names = metadata.names
    return not metadata.is_rotated and len(shapes) == 1 and any(
        len(shape) == 3 and shape[2] == 4 + len(names) and shape[2] != 6
        and not (size_hw and _levels_of(shape, size_hw))
        for shape in shapes.values()
    )  # fmt: skip


def maybe_without_metadata(
    source: OnnxSource, size_hw: tuple[int, int] | None = None
) -> str | None:
    """Which YOLO a file without metadata is by its outputs: "YOLOv5 and v7", "YOLOv6", "YOLOX"; None: none of them, or not surely.

    Args:
        size_hw: where the size of the input is free.
    """
    size_hw = _declared_size(source.graph) or size_hw
    image = maybe_image(source)
    if size_hw is None or image is None or len(source.graph.inputs) != 1:
        return None
    shapes = _declared_outputs(source.model)
    outputs = list(shapes)
    if unknown_ops(source, outputs):
        values = _unseen(source.model, outputs)
    else:
        try:
            pixels = find_pixels(source, NO_HINTS, usual_size=size_hw)
            values = _look(source, pixels, size_hw, outputs)
        except GraphError:
            return None
    heads = [
        (name, value, levels)
        for name, value in values.items()
        if value.ndim == 3 and (levels := _levels_of(value.shape, size_hw)) is not None
        and value.shape[1] == levels.count
        and all(n in (0, m) for n, m in zip(shapes[name][1:], value.shape[1:], strict=False))
    ]  # fmt: skip
    if len(heads) != 1:
        return None
    name, value, levels = heads[0]
    if any(len(v.shape) == 3 and n != name for n, v in values.items()):
        return None  # boxes beside it
    if levels.boxes_per_cell == 3:
        return "YOLOv5 and v7"
    if not _is_seen(value):
        return "YOLOX"
    if (value[..., 4] == 1).all() and value.shape[2] > 5 and _is_decoded(value, levels):
        return "YOLOv6"
    offsets = not _is_decoded(value, levels) and not _is_decoded(value[..., 2:], levels)
    scores = value[..., 4:]
    if offsets and scores.min() >= 0 and scores.max() <= 1 and np.abs(value[..., :2]).max() < 64:
        return "YOLOX"
    return None


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    if not isinstance(source, OnnxSource):
        raise GraphError(
            f"{source.path}: expected a YOLO model in an ONNX file, found a SavedModel; export it to ONNX"
        )
    metadata = read_metadata(source.model)
    _check_source(source, metadata)
    size_hw = _size(source.graph, metadata, hints)
    evidence = Evidence(str(source.path), hints.assume)
    pixels = find_pixels(source, hints, usual_size=size_hw)
    look = partial(_look, source, pixels, size_hw)
    outputs = list(_declared_outputs(source.model))
    unknown = unknown_ops(source, outputs)
    values = _unseen(source.model, outputs) if unknown else look(outputs)
    for name, value in values.items():
        if not unknown:
            check_finite(source, name, value)
    head = find_head(values, size_hw, metadata, hints)
    final = head
    if head.kind == "end_to_end" and not unknown:
        head = before_selection(source, head, look, size_hw, metadata)
    elif metadata.nms_inside:
        raise _no_head_before_nms(source)
    if head.is_seen:
        _check_scores(head)
    _check_explained(source, head, final, values)
    is_yolox = _is_yolox(head, metadata)
    kind = "Ultralytics and YOLOv5" if metadata.names else maybe_without_metadata(source, size_hw)
    evidence.add(
        ev.FAMILY,
        f"{NAME} ({head.kind})",
        "read: metadata" if metadata.names else f"{ev.MEASURED}only {kind} exports such rows",
    )
    convention = None
    if kind:
        convention = Convention(kind, YOLOX_NORMAL if is_yolox else Convention("").normal)
    normal = decide_normalisation(evidence, pixels, hints, convention)
    preprocessing = _preprocessing(evidence, hints, normal, size_hw, kind, is_yolox=is_yolox)
    labels = metadata.names or (COCO_80_LABELS if head.num_classes == len(COCO_80_LABELS) else ())
    batch, said = pixels.batch, "read: the shape of the input"
    if not unknown:
        batch, said = batch_of(source, pixels, [head.tensor], size_hw)
    evidence.add(ev.BATCH, "dynamic" if batch is None else batch, said)
    _note_facts(evidence, source, pixels, head, metadata, kind or "", labels, size_hw)
    return Reading(
        spec=ModelSpec(
            family=NAME,
            preprocessing=preprocessing,
            nms=_nms(head, metadata),
            category_ids=_category_ids(labels, head.num_classes),
            labels=labels,
            box_order="xyxy",
            selection=_selection(head, metadata),
            rotated_mode="exact" if head.keeps else "probiou",
            anchored=head.kind == "grid",
            sensitive_nodes=find_dfl(source.graph, head.tensor),
        ),
        image_input=pixels.tensor,
        network_input=pixels.tensor,
        network_layout=pixels.layout,
        image_layout=pixels.layout,
        heads={HEAD: head.tensor},
        rewrite=partial(_declare_head, head=head),
        assemble=_assembler(head, metadata, is_yolox=is_yolox),
        anchors=head.levels.grid() if head.kind == "grid" and head.levels else None,
        batch=batch,
        notes=_notes(metadata, head, unknown),
        size_multiple=_size_multiple(source.graph, head),
        facts=evidence.settle(),
        final=_final(final, head, metadata) if not unknown else None,
        takes=IMAGE_HINTS | ({"rotated_nms"} if metadata.is_rotated else set()),
    )


def _check_explained(
    source: OnnxSource, head: Head, final: Head, values: Mapping[str, NDArray[Any]]
) -> None:
    """Refuse outputs beside the head that may hold boxes or scores; masks, and levels before they are put together, do not."""
    seen = {name: [value] for name, value in values.items()}
    used = [name for name in (final.tensor, head.tensor) if name in seen]
    left = (
        [n for n in unexplained(source, used, seen) if n in values and values[n].ndim == 3]
        if head.is_seen
        else []
    )
    if left:
        raise GraphError(
            f"yolo: '{head.tensor}' is read, but nothing explains the outputs {', '.join(left)} beside it; declare the outputs with --boxes_output "
            "and --scores_output"
        )


def _preprocessing(
    evidence: Evidence,
    hints: Hints,
    normal: Normal,
    size_hw: tuple[int, int],
    kind: str | None,
    *,
    is_yolox: bool,
) -> Preprocessing:
    base = _yolox_preprocessing(size_hw) if is_yolox else _ultralytics_preprocessing(size_hw)
    resize = hints.resize or base.resize
    placement = hints.placement or base.placement
    pad = hints.pad_rgb or base.pad_rgb
    given = [
        option
        for option, value in (
            ("--resize_mode", hints.resize),
            ("--placement", hints.placement),
            ("--pad_color", hints.pad_rgb),
        )
        if value
    ]
    text = (
        "stretch"
        if resize == "stretch"
        else f"letterbox, {placement.replace('_', ' ')} on {pad[0]:g}"
    )
    evidence.add(ev.RESIZE, text, ev.GIVEN + " ".join(given) if given else f"{ev.CONVENTION}{kind}")
    return dataclasses.replace(
        base,
        mean=normal.mean,
        std=normal.std,
        bgr=normal.bgr,
        resize=resize,
        placement=placement,
        pad_rgb=pad,
    )


def _note_facts(
    evidence: Evidence,
    source: OnnxSource,
    pixels: Pixels,
    head: Head,
    metadata: Metadata,
    kind: str,
    labels: tuple[str, ...],
    size_hw: tuple[int, int],
) -> None:
    evidence.add(
        ev.INPUT,
        f"'{pixels.image}' {pixels.image_layout} {size_hw[0]}x{size_hw[1]}",
        "read: its shape"
        if _declared_size(source.graph)
        else "read: metadata imgsz, or --input_size",
    )
    form = "xyxy" if head.has_corners and not metadata.is_rotated else "cxcywh"
    how = (
        "the rows of the export are compared to the end"
        if head.kind == "end_to_end"
        else "their distance from the cells of the grid"
    )
    evidence.add(
        ev.BOXES,
        f"{form}, pixels",
        f"{ev.MEASURED}{how}" if head.is_seen else f"{ev.CONVENTION}{kind}",
    )
    text = "objectness x class" if head.kind in ("objectness", "grid") else "probabilities"
    evidence.add(
        ev.SCORES,
        text,
        f"{ev.MEASURED}all are 0 to 1" if head.is_seen else f"{ev.CONVENTION}{kind}",
    )
    evidence.add(ev.BACKGROUND, "none", f"{ev.CONVENTION}{kind}")
    origin = "read: metadata names" if metadata.names else "read: the number of columns"
    evidence.add(ev.CLASSES, head.num_classes, origin)
    coco = labels == COCO_80_LABELS
    evidence.add(
        ev.CATEGORY_IDS,
        "COCO's 80" if coco else f"1..{head.num_classes}",
        "read: COCO's names"
        if coco and metadata.names
        else "convention: COCO's ids of its 80 classes"
        if coco
        else "convention: class index + 1",
    )
    selection = {
        "topk": "the best rows, no NMS",
        "nms": "NMS per class",
        "rotated_nms": "NMS of rotated boxes",
    }[_selection(head, metadata)]
    evidence.add(
        ev.SELECTION,
        selection,
        "read: the export selects" if head.keeps else f"{ev.CONVENTION}{kind}",
    )
    evidence.add(
        ev.KEPT,
        head.keeps or MAX_DETECTIONS,
        "read: rows of the export" if head.keeps else "default: --max_detections",
    )


def _final(final: Head, head: Head, metadata: Metadata) -> Final | None:
    """The rows of an end-to-end export, for the comparison to the end; of one with NMS inside, by its own thresholds."""
    if final.kind != "end_to_end" or metadata.is_rotated or metadata.nms_inside:
        return None

    def rows(values: Sequence[NDArray[Any]]) -> Found:
        found = values[0][0].astype(np.float32)
        return Found(found[:, :4], found[:, 4], np.round(found[:, 5]).astype(np.int64))

    return Final((final.tensor,), rows)


# ---- what the file says


def read_metadata(model: onnx.ModelProto) -> Metadata:
    """The metadata of an export.

    Raises:
        GraphError: names that are neither a list nor a dictionary of all class ids.
    """
    found = {prop.key: prop.value for prop in model.metadata_props}
    names = _literal(found, "names") or ()
    if isinstance(names, Mapping):
        names = {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in names.items()}
        if sorted(names) != list(range(len(names))):
            raise GraphError(
                f"metadata 'names': expected one name for each class id from 0, found the ids {sorted(names)[:5]}"
            )
        names = [names[i] for i in range(len(names))]
    size = _literal(found, "imgsz")
    arguments = _literal(found, "args")
    stride = _literal(found, "stride")
    return Metadata(
        names=tuple(str(name) for name in names),
        stride=int(max(np.ravel(stride))) if stride else 0,
        task=found.get("task", "detect"),
        size_hw=(int(size[0]), int(size[-1])) if isinstance(size, (list, tuple)) else None,
        end_to_end=_literal(found, "end2end") is True,
        nms_inside=isinstance(arguments, dict) and arguments.get("nms") is True,
    )


def _literal(found: Mapping[str, str], key: str) -> Any:
    """A value that was written as Python's `repr`; None where there is none.

    Raises:
        GraphError: it is not a literal.
    """
    if key not in found:
        return None
    try:
        return ast.literal_eval(found[key])
    except (ValueError, SyntaxError) as error:
        raise GraphError(
            f"metadata '{key}': expected a number, list or dictionary, found {found[key][:60]!r}; export the model again"
        ) from error


def _check_source(source: OnnxSource, metadata: Metadata) -> None:
    """Refuse what is not a detector of float32 images, channels first."""
    if metadata.task not in ("detect", "obb", *LEFT_OUT):
        raise GraphError(
            f"{source.path}: expected a detector, found a model for the task '{metadata.task}'"
        )
    if len(source.graph.inputs) != 1 or maybe_image(source) is None:
        raise GraphError(
            f"yolo: expected one input [N, 3, H, W], the images, found {list(source.graph.inputs)}, the first of shape "
            f"{list(source.graph.image_shape)}"
        )
    if narrow := narrow_types(source.model):
        raise GraphError(
            f"{source.path}: expected float32 weights, found {', '.join(sorted(narrow))}; export the model in float32 (half=False), "
            "precision is chosen by build_engine.py"
        )


def _declared_size(graph: SourceGraph) -> tuple[int, int] | None:
    """Height and width of the input, None where they are free."""
    shape = graph.image_shape
    if len(shape) != 4:
        return None
    height, width = shape[1:3] if shape[3] == 3 and shape[1] != 3 else shape[2:]
    return (height, width) if height and width else None


def _size(graph: SourceGraph, metadata: Metadata, hints: Hints) -> tuple[int, int]:
    """The input size: that of the file; where it is free, the one asked for, or the one it was exported with.

    Raises:
        GraphError: nothing says it.
    """
    size_hw = _declared_size(graph) or hints.size_hw or metadata.size_hw
    if size_hw is None:
        raise GraphError(
            "yolo: expected an input of fixed size, or 'imgsz' in the metadata, found neither; give --size H,W"
        )
    return size_hw


def _size_multiple(graph: SourceGraph, head: Head) -> int | None:
    """The largest stride where the export left the size free; not for a grid, whose cells become constants."""
    if _declared_size(graph) or head.kind == "grid" or head.levels is None:
        return None
    return head.levels.strides[-1]


def _declared_outputs(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Output -> its shape, 0 where that is free."""
    return {
        info.name: tuple(max(d.dim_value, 0) for d in info.type.tensor_type.shape.dim)
        for info in model.graph.output
    }


# ---- which head


def _look(
    source: OnnxSource, pixels: Pixels, size_hw: tuple[int, int], tensors: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Outputs or inner tensors for a grey image, of 0 to 1 where it enters the network."""
    level = GREY if pixels.kept and pixels.unit == 1.0 else GREY / 255
    n = pixels.batch or 1
    shape = (n, 3, *size_hw) if pixels.layout == "NCHW" else (n, *size_hw, 3)
    grey = np.full(shape, level, np.float32)
    return dict(zip(tensors, source.run(tensors, {pixels.tensor: grey}), strict=True))


def _unseen(model: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, NDArray[Any]]:
    """In place of `_look` where ONNX Runtime cannot run the network: the shapes alone, every value NaN."""
    return {
        name: np.broadcast_to(np.float32(np.nan), [max(size, 1) for size in shape])
        for name, shape in inferred_shapes(model, tensors).items()
    }


def _is_seen(value: NDArray[Any]) -> bool:
    return not np.isnan(value).all()


def find_head(
    values: Mapping[str, NDArray[Any]],
    size_hw: tuple[int, int],
    metadata: Metadata,
    hints: Hints = NO_HINTS,
) -> Head:
    """The first output that is a head; others (masks, v5's levels before they are put together) are not looked at.

    Args:
        values: the outputs for some image.

    Raises:
        GraphError: none is, or its number of values does not fit the number of class names.
    """
    for name, value in values.items():
        if value.ndim != 3:
            continue
        levels = _levels_of(value.shape, size_hw)
        if levels is not None and not (metadata.end_to_end or metadata.nms_inside):
            return _dense_head(name, value, levels, metadata)
        width = 6 + metadata.is_rotated
        if value.shape[2] == width or (value.shape[2] > width and metadata.task in LEFT_OUT):
            return _end_to_end_head(name, value, metadata, hints)
    shapes = {name: list(value.shape) for name, value in values.items()}
    raise GraphError(
        f"yolo: expected an output [N, 4+C, A], [N, A, 5+C] or [N, K, 6], A the number of cells of {size_hw[0]}x{size_hw[1]} at strides such as "
        f"8, 16, 32, found {shapes}; a model whose levels come out one by one must be exported with its decoding (YOLOv7: --grid)"
    )


def _levels_of(shape: tuple[int, ...], size_hw: tuple[int, int]) -> Levels | None:
    """The levels whose cells add up to the rows or columns of an output, None if none do."""
    rows, columns = shape[1:]
    for boxes_per_cell in BOXES_PER_CELL:
        for strides in LEVELS:
            levels = Levels(size_hw, strides, boxes_per_cell)
            if (rows == levels.count and columns > 5) or (columns == levels.count and rows > 4):
                return levels
    return None


def _dense_head(name: str, value: NDArray[Any], levels: Levels, metadata: Metadata) -> Head:
    """A head with a row for every cell."""
    is_raw = value.shape[2] == levels.count
    channels, fixed = (value.shape[1], 4) if is_raw else (value.shape[2], 5)
    known = len(metadata.names)
    others = channels - fixed - known if known else int(metadata.is_rotated)
    fits = others == 1 if metadata.is_rotated else others == 0 or metadata.task in LEFT_OUT
    if others < 0 or not fits or channels - fixed - others < 1:
        raise GraphError(
            f"yolo: expected {fixed} values and one score for each of the {known} class names at every cell of '{name}' {list(value.shape)} "
            f"(task '{metadata.task}'), found {channels} values"
        )
    kind: Kind = "raw" if is_raw else "objectness"
    if kind == "objectness" and not _is_decoded(value, levels):
        if levels.boxes_per_cell != 1:
            raise GraphError(
                f"yolo: expected boxes in pixels in '{name}', found values relative to anchors, which the file does not have; export "
                "the model with its decoding (YOLOv7: --grid)"
            )
        kind = "grid"
    return Head(kind, name, value, channels - fixed - others, levels)


def _is_decoded(value: NDArray[Any], levels: Levels) -> bool:
    """Whether the centres of an output [N, A, 5+C] lie where their cells are, rather than being offsets to them.

    Unseen, one box per cell is taken for YOLOX, which exports offsets, three for v5 and v7.
    """
    if not _is_seen(value):
        return levels.boxes_per_cell != 1
    cells = levels.grid()
    if levels.boxes_per_cell == 1:
        expected = cells[:, 0]
    else:  # v5 and v7 list a level's cells once per anchor
        parts = [cells[cells[:, 2] == s, 0] for s in levels.strides]
        expected = np.concatenate([np.tile(part, levels.boxes_per_cell) for part in parts])
    found = value[0, :, 0].astype(np.float64)
    return bool(np.ptp(found) > 0 and np.corrcoef(found, expected)[0, 1] > 0.9)


def _end_to_end_head(name: str, value: NDArray[Any], metadata: Metadata, hints: Hints) -> Head:
    num_classes = len(metadata.names) or len(hints.labels)
    if not num_classes:
        raise GraphError(
            f"yolo: expected class names for '{name}' {list(value.shape)}, which holds class ids, found none in the metadata; give --labels"
        )
    return Head("end_to_end", name, value, num_classes, keeps=value.shape[1])


def before_selection(
    source: OnnxSource,
    final: Head,
    look: Callable[[Sequence[str]], Mapping[str, NDArray[Any]]],
    size_hw: tuple[int, int],
    metadata: Metadata,
) -> Head:
    """The head that an end-to-end model, or one with NMS inside, selects its detections from; `final` if there is none.

    Selecting is left to the product: its form is one for all families, rows need no order to be compared with the source's, and an NMS of the
    export's own is tied to the batch size and to its thresholds.

    Raises:
        GraphError: NMS inside, and nothing to be found before it.
    """
    producer = source.graph.maybe_producer(final.tensor)
    above = source.graph.ancestors(producer).values() if producer else ()
    concats = [node.outputs[0] for node in above if node.op == "Concat"]
    # A row of it has scores for all classes in place of one score and a class id.
    channels = final.values.shape[2] - 2 + final.num_classes
    for name, value in look(concats).items():
        levels = _levels_of(value.shape, size_hw) if value.ndim == 3 else None
        if levels is None or value.shape[1:] != (channels, levels.count):
            continue
        head = _dense_head(name, value, levels, metadata)
        return dataclasses.replace(head, keeps=None if metadata.nms_inside else final.keeps)
    if metadata.nms_inside:
        raise _no_head_before_nms(source)
    return final


def _no_head_before_nms(source: Source) -> GraphError:
    return GraphError(
        f"{source.path}: expected the head [N, 4+C, A] before the NMS that the export has inside, found none; export it with nms=False"
    )


def _check_scores(head: Head) -> None:
    """Refuse logits."""
    first = 4
    last = 5 if head.kind == "end_to_end" else first + head.num_classes + (head.kind != "raw")
    scores = head.rows[:, first:last]
    if not (scores.min() >= -1e-6 and scores.max() <= 1 + 1e-6):  # also where it is NaN
        raise GraphError(
            f"yolo: expected scores of 0 to 1 in '{head.tensor}', found {scores.min():.3g} to {scores.max():.3g}; export the model with its sigmoid"
        )


def _is_yolox(head: Head, metadata: Metadata) -> bool:
    """Whether the network wants YOLOX's images: BGR 0-255, top left."""
    return head.kind == "grid" and not metadata.names


def find_dfl(graph: SourceGraph, head: str) -> tuple[str, ...]:
    """Names of the convolutions that compute a mean over bins, with the weights 0, 1, 2, ...: INT8 would move every side of a box."""
    producer = graph.maybe_producer(head)
    found = []
    for node in graph.ancestors(producer).values() if producer else ():
        weight = graph.maybe_constant(node.inputs[1]) if node.op == "Conv" else None
        if (
            weight is not None
            and weight.shape[0] == 1
            and weight.size > 1
            and np.array_equal(weight.ravel(), np.arange(weight.size))
        ):
            found.append(node.outputs[0])
    return tuple(found)


# ---- what it means


def _ultralytics_preprocessing(size_hw: tuple[int, int]) -> Preprocessing:
    """RGB / 255, centred on grey. Images are resized in 8 bits in training, so the input has them too."""
    return Preprocessing(
        size_hw,
        dtype="uint8",
        std=(255.0, 255.0, 255.0),
        pad_rgb=(GREY, GREY, GREY),
        placement="center",
        rounding="round",
    )


def _yolox_preprocessing(size_hw: tuple[int, int]) -> Preprocessing:
    """BGR 0-255, top left on grey."""
    return Preprocessing(size_hw, dtype="uint8", pad_rgb=(GREY, GREY, GREY), bgr=True)


def _selection(head: Head, metadata: Metadata) -> Selection:
    if metadata.is_rotated:
        return "rotated_nms"
    return "topk" if head.keeps else "nms"


def _nms(head: Head, metadata: Metadata) -> Nms:
    iou = IOU_THRESHOLD if head.kind == "raw" else IOU_THRESHOLD_OBJECTNESS
    return Nms(
        score_threshold=SCORE_THRESHOLD,
        iou_threshold=1.0 if head.keeps else iou,  # of rotated boxes: nothing is suppressed
        max_output_boxes=head.keeps or MAX_DETECTIONS,
        score_activation=False,
        class_agnostic=head.kind == "end_to_end",  # every row has one class
        box_coding=0 if head.has_corners or metadata.is_rotated else 1,
    )


def _category_ids(labels: tuple[str, ...], num_classes: int) -> tuple[int, ...]:
    """COCO's ids for COCO's classes, else 1, 2, 3, ..."""
    return COCO_80_IDS if labels == COCO_80_LABELS else tuple(range(1, num_classes + 1))


def _notes(metadata: Metadata, head: Head, unknown: Sequence[str]) -> tuple[Note, ...]:
    notes = []
    if unknown:
        text = (
            f"ONNX Runtime does not know {', '.join(unknown)}: '{head.tensor}' is taken by its shape {list(head.values.shape)} for "
            f"the head '{head.kind}', its values are not looked at"
        )
        notes.append(Note(text, ""))
    if left_out := LEFT_OUT.get(metadata.task):
        notes.append(
            Note(
                f"{left_out} of the '{metadata.task}' model are left out, its boxes are kept",
                "family",
            )
        )
    if metadata.nms_inside:
        text = (
            f"the NMS inside the export is replaced; its thresholds are not known: taking score {SCORE_THRESHOLD}, IoU {IOU_THRESHOLD}: "
            "--score_threshold, --iou_threshold"
        )
        notes.append(Note(text, "score_threshold"))
    return tuple(notes)


# ---- from the head to boxes and scores


def _declare_head(graph: gs.Graph, head: Head) -> None:
    """Give the head the shape that it was seen to have; exports with a dynamic batch name its dimensions or leave them out.

    Where height and width of the input are free, so is the number of boxes.
    """
    shape: list[int | str | None] = ["N", *head.values.shape[1:]]
    if None in (graph.inputs[0].shape or ())[2:]:
        shape[2 if head.kind == "raw" else 1] = None
    graph.outputs[0].shape, graph.outputs[0].dtype = shape, np.dtype(np.float32)


def _assembler(
    head: Head, metadata: Metadata, *, is_yolox: bool
) -> Callable[[Builder, ModelSpec], Heads]:
    if head.kind == "end_to_end":
        return partial(_assemble_end_to_end, is_rotated=metadata.is_rotated)
    if head.kind == "raw":
        return partial(_assemble_raw, is_rotated=metadata.is_rotated)
    return partial(_assemble_objectness, only_best=is_yolox)


def _assemble_raw(build: Builder, spec: ModelSpec, *, is_rotated: bool) -> Heads:
    """[N, 4+C(+1), A]  ->  boxes [N, A, 4 or 5], scores [N, A, C]"""
    rows = build.node("Transpose", "rows", HEAD, perm=[0, 2, 1])
    first, last = 4, 4 + spec.num_classes
    boxes = build.slice_last("boxes", rows, 0, 4)
    if is_rotated:
        boxes = _turned(build, boxes, build.slice_last("angle", rows, last, last + 1))
    return Heads(boxes, build.slice_last("scores", rows, first, last))


def _assemble_objectness(build: Builder, spec: ModelSpec, *, only_best: bool) -> Heads:
    """[N, A, 5+C]  ->  boxes [N, A, 4], scores [N, A, C] = objectness x class score"""
    objectness = build.slice_last("objectness", HEAD, 4, 5)
    classes = build.slice_last("class_scores", HEAD, 5, 5 + spec.num_classes)
    scores = build.node("Mul", "scores", objectness, classes)
    if (
        only_best
    ):  # YOLOX counts a box once, also for mAP; v5 and v7 count it for each of its classes
        scores = best_class_only(build, scores)
    return Heads(build.slice_last("boxes", HEAD, 0, 4), scores)


def _assemble_end_to_end(build: Builder, spec: ModelSpec, *, is_rotated: bool) -> Heads:
    """[N, K, 6 or 7]  ->  boxes [N, K, 4 or 5], scores [N, K, C]: a row's score at its class, 0 elsewhere"""
    boxes = build.slice_last("boxes", HEAD, 0, 4)
    if is_rotated:
        boxes = _turned(build, boxes, build.slice_last("angle", HEAD, 6, 7))
    score = build.slice_last("score", HEAD, 4, 5)
    class_id = build.slice_last("class_id", HEAD, 5, 6)
    every_class = np.arange(spec.num_classes, dtype=np.float32)[None, None]
    is_class = build.node("Equal", "is_class", class_id, every_class)
    return Heads(boxes, build.node("Where", "scores", is_class, score, np.float32(0)))


def _turned(build: Builder, boxes: str, angle: str) -> str:
    """cx cy w h [N, A, 4] and an angle [N, A, 1]  ->  x1 y1 x2 y2 of the box before rotation and the angle [N, A, 5]"""
    centre = build.slice_last("centre", boxes, 0, 2)
    half = build.node("Mul", "half_size", build.slice_last("size", boxes, 2, 4), np.float32(0.5))
    first = build.node("Sub", "first_corner", centre, half)
    second = build.node("Add", "second_corner", centre, half)
    return build.node("Concat", "turned_boxes", first, second, angle, axis=-1)
