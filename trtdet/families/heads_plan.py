# SPDX-License-Identifier: Apache-2.0
"""What the outputs of one file are (`Plan`), what is known of a framework's exports beside the
file (`Framework`), and how outputs are shown.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.families import evidence as ev
from trtdet.families.base import Declaration, Note
from trtdet.families.pixels import (
    Normal,
    declared_shapes,
    maybe_image,
)
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import (
    BoxFormat,
    Placement,
    ResizeMode,
    Rounding,
    Sampling,
)

#: Inputs of PaddleDetection's exports beside the images.
PADDLE_INPUTS = frozenset(("im_shape", "scale_factor"))
#: Columns of rows [n, width] without a batch axis, as PaddleDetection and DAMO-YOLO write them.
OF_ONE_PICTURE = {
    6: "label,score,x1,y1,x2,y2",
    7: "unused,x1,y1,x2,y2,label,score",
}
BOXES, SCORES, LABELS, ROWS = "foreign_boxes", "foreign_scores", "foreign_labels", "foreign_rows"


@dataclass(frozen=True)
class Framework:
    """What is known of a recognised framework's exports beside the file: the origin of a fact is
    its name.

    Attributes:
        normal, resize, placement, pad_rgb, rounding, antialias, sampling: how it prepares images.
        asks_sampling: its models differ in the interpolation, which its users know.
        rounds: a resized picture has whole levels, 0 to 255.
        declared: what it says of its outputs.
        labels: class names. kept: how many detections it keeps. iou_threshold, score_threshold: of
            its NMS.
        size_hw: of an input of any size.
        longest: where the longer side of a picture ends, in an input that is larger; None: at the
            input's.
        columns: of the only output, or of `rows`, where there are more. selected: it needs no NMS.
            best_class: a box counts for its best class alone.
        agnostic: boxes of different classes suppress each other.
        linear: scores are meant to be probabilities, but nothing holds them to 0..1.
        clipped: boxes are clipped to the picture before the NMS, and those of which nothing is left
            are dropped. cut_off: to the picture with what was cut off where its size became a whole
            number.
        shorter_side: of every picture, and the most that its longer side may have, where each is
            taken at a size of its own; both are padded to a multiple of `size_multiple`.
        own_size: pictures come as large as they are.
        first_id: category id of the first class.
        notes: what its users should know.
        is_read: no framework, but a node of the file says all this.
    """

    name: str
    normal: Normal | None = None
    resize: ResizeMode | None = None
    placement: Placement = "top_left"
    pad_rgb: tuple[float, float, float] = (114.0, 114.0, 114.0)
    rounding: Rounding = "round"
    antialias: bool = False
    sampling: Sampling = "half_pixel"
    asks_sampling: bool = False
    rounds: bool = True
    declared: Declaration = field(default_factory=Declaration)
    labels: tuple[str, ...] = ()
    kept: int | None = None
    iou_threshold: float | None = None
    score_threshold: float = 0.001
    size_hw: tuple[int, int] | None = None
    longest: int | None = None
    columns: tuple[str, ...] = ()
    rows: str = ""
    selected: bool | None = None
    best_class: bool = False
    agnostic: bool = False
    linear: bool = False
    clipped: bool = False
    cut_off: bool = True
    shorter_side: tuple[int, int] | None = None
    size_multiple: int | None = None
    own_size: bool = False
    first_id: int = 1
    notes: tuple[Note, ...] = ()
    is_read: bool = False

    @property
    def origin(self) -> str:
        """Of the facts that it says."""
        return (ev.READ if self.is_read else ev.CONVENTION) + self.name

    def with_changes(self, **changes: Any) -> "Framework":
        return dataclasses.replace(self, **changes)

    def declaration(self, outputs: Sequence[str]) -> Declaration:
        """What it says of the outputs of one file."""
        rows = self.rows or (outputs[0] if self.columns and len(outputs) == 1 else "")
        return dataclasses.replace(
            self.declared, rows=rows, columns=self.columns if rows else (), selected=self.selected
        )


@dataclass(frozen=True)
class Plan:
    """The outputs of one file, none of it open.

    Attributes:
        boxes, scores, labels: tensors; the first two may be one, `rows`, with columns of each.
        first_box: the first of the four columns of a box in `boxes`. objectness, first_score,
            label_column: columns in `rows`. num_scores: of a box.
        objectness_is_logit: it has no sigmoid yet.
        transposed: rows [N, M, A].
        is_padded: detections whose number follows the picture, padded to `count`.
    """

    boxes: str
    scores: str
    labels: str = ""
    rows: str = ""
    first_box: int = 0
    objectness: int | None = None
    objectness_is_logit: bool = False
    first_score: int = 0
    num_scores: int = 0
    label_column: int | None = None
    transposed: bool = False
    nca: bool = False
    box_format: BoxFormat = "xyxy"
    is_unit: bool = False
    activation: str = "none"
    background: str = "none"
    label_base: int = 0
    selected: bool = False
    num_classes: int = 0
    count: int = 0
    is_padded: bool = False

    @property
    def tensors(self) -> dict[str, str]:
        """Name in the converted file -> tensor of the source."""
        names = {ROWS: self.rows} if self.rows else {BOXES: self.boxes, SCORES: self.scores}
        return names | ({LABELS: self.labels} if self.labels else {})


def is_boxes(shape: tuple[int, ...]) -> bool:
    if len(shape) == 4:
        return shape[2] == 1 and shape[3] == 4
    return len(shape) == 3 and shape[2] == 4


def rows_in(shape: tuple[int, ...]) -> int:
    return shape[1]


def zeros(source: OnnxSource, image: str, size_hw: tuple[int, int]) -> NDArray[np.float32]:
    shape = declared_shapes(source)[image]
    channels_first = shape[1] == 3
    n = max(shape[0] or 1, 1)
    return np.zeros((n, 3, *size_hw) if channels_first else (n, *size_hw, 3), np.float32)


def image_hw(source: OnnxSource) -> tuple[int, int] | None:
    """Height and width of the images that it takes; None: any, or there is no one image input."""
    image = maybe_image(source)
    if image is None:
        return None
    name, layout = image
    dims = declared_shapes(source)[name]
    height, width = dims[2:] if layout == "NCHW" else dims[1:3]
    return (height, width) if height and width else None


def paddle_feeds(
    source: OnnxSource, size_hw: tuple[int, int] | None
) -> dict[str, NDArray[np.float32]]:
    """What inputs of PaddleDetection's exports beside the images are for a picture that fills the
    network input: its size and scale, so that boxes are in pixels of the input.
    """
    sides = image_hw(source) or size_hw or ()
    values = {"im_shape": sides, "scale_factor": (1.0, 1.0)}
    return {
        name: np.array([values[name]], np.float32)
        for name in source.graph.inputs
        if values.get(name)
    }


def describe_outputs(
    source: OnnxSource,
    seen: Mapping[str, Sequence[NDArray[Any]]] | None = None,
    *,
    declare: bool = True,
) -> str:
    """Inputs and outputs with their shapes, and the command line to start from.

    Args:
        declare: False leaves out that command line, where no option helps.
    """
    inputs = ", ".join(
        f"{i.name} {_dims(i)}" for i in source.model.graph.input if i.name in source.graph.inputs
    )
    shapes = {i.name: _dims(i) for i in source.model.graph.output}
    if seen:
        shapes = {name: str(list(seen[name][0].shape)) for name in shapes if name in seen}
    outputs = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:8])
    outputs += f" and {len(shapes) - 8} more" if len(shapes) > 8 else ""
    if _are_maps(source):
        return (
            f"its inputs: {inputs}; its outputs: {outputs}, the maps of the feature levels, of which nothing says how boxes are decoded; export the "
            "model with its decoding, so that boxes and scores come out"
        )
    described = f"its inputs: {inputs}; its outputs: {outputs}"
    return f"{described}. Declare them: {starting_line(source, seen)}" if declare else described


def _are_maps(source: OnnxSource) -> bool:
    """Whether all outputs are [N, C, H, W], such as a head has at each level."""
    infos = source.model.graph.output
    dims = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in infos]
    return len(dims) > 1 and all(len(d) == 4 and d[2] != 1 for d in dims)


def _rank(info: Any) -> int:
    return len(info.type.tensor_type.shape.dim)


def _dim(info: Any, axis: int) -> int | str:
    """One dimension as the file declares it; empty: it does not say."""
    dims = info.type.tensor_type.shape.dim
    return dims[axis].dim_value or dims[axis].dim_param if axis < len(dims) else ""


def starting_line(
    source: OnnxSource, seen: Mapping[str, Sequence[NDArray[Any]]] | None = None
) -> str:
    """Options to declare the outputs, with the names of the file."""
    names = [info.name for info in source.model.graph.output]
    ranks = {i.name: _rank(i) for i in source.model.graph.output}
    boxes = [n for n in names if _may_be_boxes(source, n, seen)]
    note = ""
    if boxes and len(names) > 1:
        others = [n for n in names if n != boxes[0]]
        scores = next(
            (
                n
                for n in others
                if "score" in n.lower() or "logit" in n.lower() or "cls" in n.lower()
            ),
            others[0],
        )
        labels = [n for n in others if n != scores and ("label" in n.lower() or ranks[n] == 1)]
        line = f"--boxes_output {boxes[0]} --scores_output {scores}" + (
            f" --labels_output {labels[0]}" if labels else ""
        )
    else:
        rows = next((n for n in names if ranks[n] in (2, 3)), names[0])
        width = _width(source, seen, rows)
        behind = {None: "score,label", 5: "score", 6: "score,label"}.get(width, "scores")
        columns = f"x1,y1,x2,y2,{behind}"
        if ranks[rows] == 2 and width in OF_ONE_PICTURE:
            columns = OF_ONE_PICTURE[width]
        line = f"--rows_output {rows} --columns {columns}"
        note = " (the columns in the order that the file has)" if behind == "score,label" else ""
    return f"{line} --box_format xyxy --preprocessor unit --resize_mode stretch{note}"


def _may_be_boxes(
    source: OnnxSource, name: str, seen: Mapping[str, Sequence[NDArray[Any]]] | None
) -> bool:
    """By its shape as seen, or its name, or as the only one declared [n, 4]."""
    shape = seen[name][0].shape if seen and name in seen else ()
    if is_boxes(shape) or (len(shape) == 2 and shape[1] == 4):
        return True
    infos = [i for i in source.model.graph.output if _rank(i) == 2 and _dim(i, 1) == 4]
    return "box" in name.lower() or (len(infos) == 1 and infos[0].name == name)


def _width(
    source: OnnxSource, seen: Mapping[str, Sequence[NDArray[Any]]] | None, rows: str
) -> int | None:
    """How many columns an output has, in the axis that is the shorter one."""
    info = next(i for i in source.model.graph.output if i.name == rows)
    dims: Sequence[int] = [d.dim_value for d in info.type.tensor_type.shape.dim]
    if seen and rows in seen:
        dims = seen[rows][0].shape
    known = [d for d in dims[1:] if d > 0]
    return min(known) if known else None


def _dims(info: Any) -> str:
    dims = info.type.tensor_type.shape.dim
    return (
        "["
        + ", ".join(str(d.dim_value) if d.dim_value > 0 else d.dim_param or "?" for d in dims)
        + "]"
    )
