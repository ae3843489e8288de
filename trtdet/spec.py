# SPDX-License-Identifier: Apache-2.0
"""What a model is, in data: everything that stages 2 to 4 need to know about a detector.

Stage 1 writes a `ModelSpec` into the ONNX file's `metadata_props`; stage 2 copies it to the sidecar
`<engine>.json`; stages 3 and 4 read it. Families therefore differ in data after stage 1, not in
code.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trtdet import checks, reading
from trtdet.errors import GraphError

if TYPE_CHECKING:
    import onnx

#: Mean and standard deviation (RGB, 0-255) that --preprocessor knows, for models whose export lost
#: theirs.
PREPROCESSORS = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "scale_range": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "unit": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),  # 0 to 1
    "raw": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # 0 to 255
}

Triple = tuple[float, float, float]


def parse_preprocessor(text: str) -> tuple[Triple, Triple]:
    """Mean and standard deviation of a --preprocessor: a name, or MEAN/STD of three numbers each,
    RGB 0-255.

    Raises:
        ValueError: something else.
    """
    if text in PREPROCESSORS:
        return PREPROCESSORS[text]
    try:
        mean, std = (tuple(float(n) for n in part.split(",")) for part in text.split("/"))
    except ValueError:
        mean, std = (), ()
    if len(mean) != 3 or len(std) != 3 or not all(abs(n) < 1e6 for n in mean) or not all(1e-6 <= n < 1e6 for n in std):  # fmt: skip
        raise ValueError(
            f"expected {', '.join(sorted(PREPROCESSORS))}, or R,G,B/R,G,B, mean and standard deviation on the scale of 0 to 255, got {text[:60]!r}"
        )
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


#: The `metadata_props` key under which the JSON of a `ModelSpec` stands.
METADATA_KEY = "trtdet.model_spec"
#: What to do with a spec that cannot be read.
REMEDY = "convert the model again with create_onnx.py"

#: Bounds of what a spec may say: a damaged one must not ask for all memory.
LARGEST_SIDE = 32_768  # pixels of the network input
MOST_BOXES = 1_000_000  # per image
MOST_CLASSES = 1_000_000
LARGEST_ID = 2**31 - 1  # of a category, int32

Layout = Literal["NHWC", "NCHW"]
InputDtype = Literal["float32", "uint8"]
ResizeMode = Literal["letterbox", "stretch"]
Placement = Literal["top_left", "center"]
Rounding = Literal["floor", "floor64", "floor_axes", "round", "none"]
Sampling = Literal["half_pixel", "corner", "cubic"]
#: What follows the heads: EfficientNMS, NMS of rotated boxes, or the best K without suppression.
Selection = Literal["nms", "rotated_nms", "topk"]
#: What the four numbers of a box are: corners, corner and size, or centre and size.
BoxFormat = Literal["xyxy", "yxyx", "xywh", "cxcywh"]
#: How the overlap of rotated boxes is computed: `trtdet.nms.rotated_reference`.
RotatedMode = Literal["exact", "odtk", "probiou"]

#: Names of the columns of a box, in their order.
COLUMN_NAMES: dict[BoxFormat, tuple[str, ...]] = {
    "xyxy": ("x1", "y1", "x2", "y2"),
    "yxyx": ("y1", "x1", "y2", "x2"),
    "cxcywh": ("cx", "cy", "w", "h"),
    "xywh": ("x", "y", "w", "h"),
}

#: The four outputs of every model after stage 1, in this order: int32 [N,1], float32 [N,K,4],
#: float32 [N,K], int32 [N,K].
OUTPUT_NAMES = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")


@dataclass(frozen=True)
class Preprocessing:
    """How the host turns an image file into the network input.

    The host feeds RGB 0-255; `(x - mean) / std` is inside the graph, and so is the swap to BGR.

    Attributes:
        size_hw: height, width of the network input, pixels; where it is dynamic, what is taken
            unless asked otherwise.
        mean, std, pad_rgb: RGB, 0-255. AutoML pads with the mean.
        resize: "letterbox" keeps the aspect and pads the rest.
        placement: of the letterboxed picture in the network input.
        rounding: of its size. "floor" truncates in float32 (AutoML), "floor64" in float64 (ODTK);
            "floor_axes" as the latter, and each axis has the scale that this left it (torchvision);
            "round" (YOLO); "none": size and place are fractions of pixels, an affine warp does it
            (CenterNet).
        sampling: "half_pixel" is bilinear; "corner" TensorFlow 1's, without half pixels; "cubic"
            OpenCV's.
        antialias: averages over the area when shrinking (Pillow), or not (TensorFlow, OpenCV).
        bgr: the network was trained on BGR.
        longest: where the longer side of a letterboxed picture ends (YOLO-NAS: 636 of 640); None:
            at the input's.
        size_range: smallest and largest (height, width) of an input whose size is dynamic.
        size_multiple: what height and width must be a multiple of.
        shorter_side: of every picture, and the most that its longer side may have, where the size
            is dynamic (torchvision's detectors); None: pictures fill the network input.
        own_size: the size is dynamic, and every picture stays as large as it is.
    """

    size_hw: tuple[int, int]
    layout: Layout = "NHWC"
    dtype: InputDtype = "float32"
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    resize: ResizeMode = "letterbox"
    pad_rgb: Triple = (0.0, 0.0, 0.0)
    placement: Placement = "top_left"
    rounding: Rounding = "floor"
    sampling: Sampling = "half_pixel"
    antialias: bool = False
    bgr: bool = False
    longest: int | None = None
    size_range: tuple[tuple[int, int], tuple[int, int]] | None = None
    size_multiple: int = 1
    shorter_side: tuple[int, int] | None = None
    own_size: bool = False

    def __post_init__(self) -> None:
        sizes = {"size_hw": self.size_hw}
        if self.size_range:
            sizes |= {"size_range[0]": self.size_range[0], "size_range[1]": self.size_range[1]}
        for name, size in sizes.items():
            for side in size:
                checks.whole(name, side, 1, LARGEST_SIDE)
        for name, values in (("mean", self.mean), ("pad_rgb", self.pad_rgb)):
            for value in values:
                checks.finite(name, value)
        for value in self.std:
            checks.finite("std", value, 1e-6)
        checks.whole("size_multiple", self.size_multiple, 1, LARGEST_SIDE)
        if self.longest is not None:
            checks.whole("longest", self.longest, 1, LARGEST_SIDE)
        if self.shorter_side is not None:
            shorter, longer = self.shorter_side
            checks.whole("shorter_side[0]", shorter, 1, LARGEST_SIDE)
            checks.whole("shorter_side[1]", longer, shorter, LARGEST_SIDE)
            if self.size_range is None or self.resize != "letterbox":
                raise ValueError("shorter_side: expected size_range, and resize letterbox")
        if self.own_size and (self.size_range is None or self.resize != "letterbox"):
            raise ValueError("own_size: expected size_range, and resize letterbox")
        if self.sampling == "cubic" and (self.is_warped or self.antialias):
            raise ValueError(
                "sampling: expected no cubic where rounding is none, or antialias true"
            )
        if self.is_warped and self.antialias:
            raise ValueError("antialias: expected false where rounding is none")
        smallest, largest = self.size_range or (self.size_hw, self.size_hw)
        for low, side, high in zip(smallest, self.size_hw, largest, strict=True):
            if not low <= side <= high:
                raise ValueError(f"size_hw: expected {list(smallest)} to {list(largest)} (size_range), found {list(self.size_hw)}")  # fmt: skip

    @property
    def is_warped(self) -> bool:
        """Whether images lie at fractions of pixels, and their edges blend with the padding."""
        return self.resize == "letterbox" and self.rounding == "none"

    def at(self, size_hw: tuple[int, int]) -> Preprocessing:
        """The same for one size.

        Raises:
            ValueError: the network does not take it.
        """
        fixed = dataclasses.replace(
            self, size_hw=size_hw, size_range=None, shorter_side=None, own_size=False
        )
        if not self.takes(fixed.image_shape):
            smallest, largest = self.size_range or (self.size_hw, self.size_hw)
            said = "x".join(str(n) for n in smallest)
            if self.size_range:
                said += f" to {'x'.join(str(n) for n in largest)} in steps of {self.size_multiple}"
            asked = "x".join(str(n) for n in size_hw)
            raise ValueError(f"input size {asked} (height x width): the model takes {said}")
        return fixed

    def takes(self, image_shape: tuple[int, ...]) -> bool:
        """Whether one image may have this shape, in the network's layout."""
        if self.size_range is None or len(image_shape) != 3:
            return image_shape == self.image_shape
        size_hw = self.size_of(image_shape)
        smallest, largest = self.size_range
        return image_shape == self._shape(size_hw) and all(
            low <= n <= high and n % self.size_multiple == 0
            for low, n, high in zip(smallest, size_hw, largest, strict=True)
        )

    def size_of(self, image_shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of one image of this shape, in the network's layout."""
        height, width = image_shape[:2] if self.layout == "NHWC" else image_shape[1:]
        return height, width

    @property
    def image_dims(self) -> tuple[int | str, int | str, int | str]:
        """Dimensions of one image in the graph: `image_shape`, with names where the size is
        dynamic.
        """
        height, width = ("H", "W") if self.size_range else self.size_hw
        return (height, width, 3) if self.layout == "NHWC" else (3, height, width)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image in the network's layout."""
        return self._shape(self.size_hw)

    @property
    def image_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """The smallest shape of one image, the one taken unless asked otherwise, and the
        largest.
        """
        smallest, largest = self.size_range or (self.size_hw, self.size_hw)
        return self._shape(smallest), self.image_shape, self._shape(largest)

    def _shape(self, size_hw: tuple[int, int]) -> tuple[int, int, int]:
        height, width = size_hw
        return (height, width, 3) if self.layout == "NHWC" else (3, height, width)


@dataclass(frozen=True)
class Nms:
    """Parameters of the NMS node, under the attribute names of TensorRT's EfficientNMS_TRT
    plugin.

    Attributes:
        background_class: -1: none.
        score_activation: the scores are logits, a sigmoid is applied.
        box_coding: 0: corners, 1: centre and size.
    """

    score_threshold: float = 0.001
    iou_threshold: float = 0.5
    max_output_boxes: int = 100
    background_class: int = -1
    score_activation: bool = True
    class_agnostic: bool = False
    box_coding: Literal[0, 1] = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.score_threshold <= 1.0:
            raise ValueError(f"score_threshold: expected 0 to 1, got {self.score_threshold}")
        if not 0.0 < self.iou_threshold <= 1.0:  # the plugin refuses 0
            raise ValueError(f"iou_threshold: expected above 0, up to 1, got {self.iou_threshold}")
        checks.whole("max_output_boxes", self.max_output_boxes, 1, MOST_BOXES)
        checks.whole("background_class", self.background_class, -1, MOST_CLASSES)
        if self.box_coding not in (0, 1):
            raise ValueError(
                f"box_coding: expected 0 (corners) or 1 (centre and size), got {self.box_coding}"
            )


@dataclass(frozen=True)
class Fact:
    """One fact about a model, and what says it.

    Attributes:
        origin: starts with "read", "measured", "given" (an option), "convention" (of a recognised
            family), "default" (of stage 1, not a fact about the network), or "ASSUMED".
    """

    name: str
    value: str
    origin: str

    def __post_init__(self) -> None:
        for text in (self.name, self.value, self.origin):
            checks.text("evidence", text, checks.LONG_TEXT)


@dataclass(frozen=True)
class ModelSpec:
    """A detector, described so that no later stage asks which network it was.

    Its text reaches configurations, labels and web pages: it has no control characters.

    Attributes:
        category_ids: [class_id] -> the dataset's category id.
        labels: [class_id] -> text; empty: none known.
        boxes_normalized: boxes are 0 to 1, not pixels of the network input.
        rotated_mode: of the selection "rotated_nms".
        anchored: boxes of the heads are coded relative to anchors.
        inclusive_corners: a box contains its last pixel, in the source image too (ODTK).
        sensitive_nodes: patterns of the names of nodes that low precision hurts.
        source: provenance: file, hash, versions of tools.
        evidence: where each of these facts comes from.
        choices: what options said: `families.base.Hints.to_dict`.
    """

    SCHEMA: ClassVar[int] = 1

    family: str
    preprocessing: Preprocessing
    nms: Nms
    category_ids: tuple[int, ...]
    labels: tuple[str, ...] = ()
    box_order: Literal["yxyx", "xyxy"] = "yxyx"
    boxes_normalized: bool = False
    selection: Selection = "nms"
    rotated_mode: RotatedMode = "exact"
    anchored: bool = True
    inclusive_corners: bool = False
    sensitive_nodes: tuple[str, ...] = ()
    source: dict[str, str] = field(default_factory=dict)
    evidence: tuple[Fact, ...] = ()
    choices: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.text("family", self.family)
        checks.whole("category_ids", self.num_classes, 1, MOST_CLASSES)
        for category_id in self.category_ids:
            checks.whole("category_ids", category_id, -LARGEST_ID, LARGEST_ID)
        for number, label in enumerate(self.labels):
            checks.text(f"labels[{number}]", label, checks.LABEL)
        for text in (*self.sensitive_nodes, *self.source, *self.source.values()):
            checks.text("sensitive_nodes, source", text, checks.LONG_TEXT)
        if self.labels and len(self.labels) != self.num_classes:
            raise ValueError(
                f"labels: expected {self.num_classes} (one per class), got {len(self.labels)}"
            )

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    def replace(self, **changes: Any) -> ModelSpec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_json` reads its text."""
        return {"schema": self.SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, text: str, name: str = "model spec", remedy: str = REMEDY) -> ModelSpec:
        """The inverse of `to_dict`, of its text.

        Args:
            name: where it is from, for messages.

        Raises:
            GraphError: another schema, fields missing or of the wrong kind, or values that cannot
                be.
        """
        spec: ModelSpec = reading.parse(text, cls, name=name, remedy=remedy, error=GraphError)
        return spec

    def attach(self, model: onnx.ModelProto) -> None:
        """Write the spec into `model.metadata_props`, in place of one that is there."""
        from onnx import StringStringEntryProto

        kept = [p for p in model.metadata_props if p.key != METADATA_KEY]
        text = json.dumps(self.to_dict(), separators=(",", ":"))
        del model.metadata_props[:]
        model.metadata_props.extend([*kept, StringStringEntryProto(key=METADATA_KEY, value=text)])

    @classmethod
    def maybe_from_onnx(cls, model: onnx.ModelProto, name: str = "model spec") -> ModelSpec | None:
        """The spec in `metadata_props`, or None where the file carries none."""
        for prop in model.metadata_props:
            if prop.key == METADATA_KEY:
                return cls.from_json(prop.value, name)
        return None

    @classmethod
    def from_onnx(cls, model: onnx.ModelProto, path: Path | str = "model") -> ModelSpec:
        """The spec in `metadata_props`.

        Raises:
            GraphError: the model carries none.
        """
        spec = cls.maybe_from_onnx(model, f"{path}: model spec")
        if spec is None:
            raise GraphError(
                f"{path}: expected an ONNX file written by create_onnx.py (metadata '{METADATA_KEY}'), found none; "
                f"convert it with create_onnx.py --source_onnx {path}"
            )
        return spec
