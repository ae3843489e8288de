# SPDX-License-Identifier: Apache-2.0
"""The heads of YOLO: which tensor of an export holds the detections, and in which form."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.families.base import NO_HINTS, Hints
from trtdet.families.box_formats import Levels, measure_format
from trtdet.families.pixels import Pixels
from trtdet.families.yolo_metadata import LEFT_OUT, Metadata
from trtdet.graph.map_op import inferred_shapes
from trtdet.sources.base import Source, SourceGraph
from trtdet.sources.onnx_file import OnnxSource

Kind = Literal["raw", "objectness", "grid", "end_to_end"]

#: Strides of a model's levels: most; with a level for small objects, for large ones; v3-tiny.
LEVELS = ((8, 16, 32), (4, 8, 16, 32), (8, 16, 32, 64), (16, 32))
#: Boxes per cell: 1 where there are no anchors, 3 in v5 and v7.
BOXES_PER_CELL = (1, 3)

GREY = 114.0


def grid_of(levels: Levels) -> NDArray[np.float32]:
    """(A, 4) float32: x y of the cell's top left corner and its width and height, input pixels;
    one box per cell, row by row.
    """
    cells = dataclasses.replace(levels, boxes_per_cell=1).centres()
    sides = np.repeat(cells[:, 2:], 2, axis=1)
    return np.concatenate([cells[:, :2] - sides / 2, sides], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Head:
    """The tensor that holds the detections.

    Attributes:
        tensor: its name in the source.
        values: what it is for a grey image, float32 with three dimensions; NaN where ONNX Runtime
            cannot run the network.
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
        return is_seen(self.values)

    @property
    def rows(self) -> NDArray[np.float32]:
        """[A, values] of the first image."""
        return self.values[0].T if self.kind == "raw" else self.values[0]

    @property
    def has_corners(self) -> bool:
        """Whether a box is x1 y1 x2 y2 rather than cx cy w h, of which few are wider than they
        are far from the left edge.
        """
        if self.kind != "raw":
            return self.kind == "end_to_end"
        if self.levels is not None and self.is_seen:
            measured, _ = measure_format([self.rows[:, :4].astype(np.float64)], self.levels.size_hw)
            if measured in ("xyxy", "cxcywh"):
                return measured == "xyxy"
        return bool((self.rows[:, 2:4] >= self.rows[:, :2]).all(axis=1).mean() > 0.95)


def declared_outputs(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Output -> its shape, 0 where that is dynamic."""
    return {
        info.name: tuple(max(d.dim_value, 0) for d in info.type.tensor_type.shape.dim)
        for info in model.graph.output
    }


def look(
    source: OnnxSource, pixels: Pixels, size_hw: tuple[int, int], tensors: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Outputs or inner tensors for a grey image, of 0 to 1 where it enters the network."""
    level = GREY if pixels.kept and pixels.unit == 1.0 else GREY / 255
    n = pixels.batch or 1
    shape = (n, 3, *size_hw) if pixels.layout == "NCHW" else (n, *size_hw, 3)
    grey = np.full(shape, level, np.float32)
    return dict(zip(tensors, source.run(tensors, {pixels.tensor: grey}), strict=True))


def unseen(model: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, NDArray[Any]]:
    """In place of `look` where ONNX Runtime cannot run the network: the shapes alone, every
    value NaN.
    """
    return {
        name: np.broadcast_to(np.float32(np.nan), [max(size, 1) for size in shape])
        for name, shape in inferred_shapes(model, tensors).items()
    }


def is_seen(value: NDArray[Any]) -> bool:
    return not np.isnan(value).all()


def find_head(
    values: Mapping[str, NDArray[Any]],
    size_hw: tuple[int, int],
    metadata: Metadata,
    hints: Hints = NO_HINTS,
) -> Head:
    """The first output that is a head; others (masks, v5's levels before they are put together) are
    not looked at.

    Args:
        values: the outputs for some image.

    Raises:
        GraphError: none is, or its number of values does not fit the number of class names.
    """
    for name, value in values.items():
        if value.ndim != 3:
            continue
        levels = levels_of(value.shape, size_hw)
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


def levels_of(shape: tuple[int, ...], size_hw: tuple[int, int]) -> Levels | None:
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
    if kind == "objectness" and not is_decoded(value, levels):
        if levels.boxes_per_cell != 1:
            raise GraphError(
                f"yolo: expected boxes in pixels in '{name}', found values relative to anchors, which the file does not have; export "
                "the model with its decoding (YOLOv7: --grid)"
            )
        kind = "grid"
    return Head(kind, name, value, channels - fixed - others, levels)


def is_decoded(value: NDArray[Any], levels: Levels) -> bool:
    """Whether the centres of an output [N, A, 5+C] lie where their cells are, rather than being
    offsets to them.

    Unseen, one box per cell is taken for YOLOX, which exports offsets, three for v5 and v7.
    """
    if not is_seen(value):
        return levels.boxes_per_cell != 1
    expected = levels.centres(anchors_first=True)[
        :, 0
    ]  # v5 and v7 list a level's cells once per anchor
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
    """The head that an end-to-end model, or one with NMS inside, selects its detections from;
    `final` if there is none.

    Selecting is left to the product: its form is one for all families, rows need no order to be
    compared with the source's, and an NMS of the export's own is tied to the batch size and to its
    thresholds.

    Raises:
        GraphError: NMS inside, and nothing to be found before it.
    """
    producer = source.graph.maybe_producer(final.tensor)
    above = source.graph.ancestors(producer).values() if producer else ()
    concats = [node.outputs[0] for node in above if node.op == "Concat"]
    # A row of it has scores for all classes in place of one score and a class id.
    channels = final.values.shape[2] - 2 + final.num_classes
    for name, value in (look(concats) if concats else {}).items():
        levels = levels_of(value.shape, size_hw) if value.ndim == 3 else None
        if levels is None or value.shape[1:] != (channels, levels.count):
            continue
        head = _dense_head(name, value, levels, metadata)
        return dataclasses.replace(head, keeps=None if metadata.nms_inside else final.keeps)
    if metadata.nms_inside:
        raise no_head_before_nms(source)
    return final


def no_head_before_nms(source: Source) -> GraphError:
    return GraphError(
        f"{source.path}: expected the head [N, 4+C, A] before the NMS that the export has inside, found none; export it with nms=False"
    )


def check_scores(head: Head) -> None:
    """Refuse logits."""
    first = 4
    last = 5 if head.kind == "end_to_end" else first + head.num_classes + (head.kind != "raw")
    scores = head.rows[:, first:last]
    if not (scores.min() >= -1e-6 and scores.max() <= 1 + 1e-6):  # also where it is NaN
        raise GraphError(
            f"yolo: expected scores of 0 to 1 in '{head.tensor}', found {scores.min():.3g} to {scores.max():.3g}; export the model with its sigmoid"
        )


def find_dfl(graph: SourceGraph, head: str) -> tuple[str, ...]:
    """Names of the convolutions that compute a mean over bins, with the weights 0, 1, 2, ...:
    INT8 would move every side of a box.
    """
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
