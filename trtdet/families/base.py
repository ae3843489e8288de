# SPDX-License-Identifier: Apache-2.0
"""The contract of a detector family: find the network in a trained model, and describe it.

A family is a module in `trtdet.families` with the three names of `Family`. It says between which
tensors the network lies and how its outputs become boxes and scores (`Reading`); everything after
that is common to all families.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trtdet import reading
from trtdet.errors import GraphError
from trtdet.graph.builder import Builder
from trtdet.graph.tidy import NETWORK_INPUT
from trtdet.sources.base import Source
from trtdet.spec import (
    BoxFormat,
    Fact,
    Layout,
    ModelSpec,
    Placement,
    ResizeMode,
    RotatedMode,
    Rounding,
    Sampling,
)

logger = logging.getLogger(__name__)

#: Tensors that stage 1 writes whatever follows them: [N, A, 4] (rotated: 5) boxes in the coding of
#: `spec.nms`, and [N, A, C] logits, or probabilities where `spec.nms.score_activation` is off.
RAW_BOXES, CLASS_LOGITS = "raw_boxes", "class_logits"
#: The constant [1, A, 4] beside them, where boxes are coded relative to anchors.
ANCHORS = "nms/anchors"


@dataclass(frozen=True)
class Note:
    """What cannot be carried over as it is, in one line.

    Attributes:
        option: name of the command-line option that settles it; with it given there is nothing to
            say.
    """

    text: str
    option: str


@dataclass(frozen=True)
class Declaration:
    """What the command line says of a detector's outputs; None and "": not said.

    Attributes:
        boxes, scores, labels: names of outputs (or inner tensors).
        rows: name of one output that holds all of it. columns: what its columns are; "scores"
            stands for the rest, one for each class.
        box_format: corners, corner and size, or centre and size. box_units: of the network input,
            or 0 to 1.
        activation: what makes probabilities of the scores.
        background: which of the scores is for no object.
        scores_layout: boxes before classes, or after.
        label_base: number of the first class in `labels`.
        selected: detections that need no NMS.
    """

    boxes: str = ""
    scores: str = ""
    labels: str = ""
    rows: str = ""
    columns: tuple[str, ...] = ()
    box_format: BoxFormat | None = None
    box_units: Literal["pixels", "unit"] | None = None
    activation: Literal["none", "sigmoid", "softmax", "clip"] | None = None
    background: Literal["first", "last", "none"] | None = None
    scores_layout: Literal["NAC", "NCA"] | None = None
    label_base: Literal[0, 1] | None = None
    selected: bool | None = None


@dataclass(frozen=True)
class Hints:
    """What the command line says of a source, for families whose files cannot say it.

    None: not said.

    Attributes:
        size_hw: for a source whose input size is dynamic.
        preprocessor: name of a normalisation, for exports that have none inside.
        resize: how images come into the network's shape.
        rotated_nms: true polygon overlap, that of ODTK's own kernel, or that of Ultralytics.
        deformable_attention: how GridSample is written.
        channel_order: of the network's input. placement, pad_rgb, rounding: of a letterboxed image;
            rounding "none" is an affine warp. antialias: as images were resized in training.
        interpolation: between pixels, as OpenCV does it.
        longest: where the longer side of a letterboxed image ends, in an input that is larger.
        clipped: boxes are clipped to the picture before the NMS.
        num_classes: of a model that holds class ids alone.
        max_detections: of a model whose number of detections follows the picture.
        declared: what its outputs are.
        assume: take the usual choice for what nothing says.
    """

    size_hw: tuple[int, int] | None = None
    preprocessor: str | None = None
    resize: ResizeMode | None = None
    labels: tuple[str, ...] = ()
    rotated_nms: RotatedMode | None = None
    deformable_attention: Literal["keep", "plugin", "gather"] | None = None
    channel_order: Literal["rgb", "bgr"] | None = None
    placement: Placement | None = None
    pad_rgb: tuple[float, float, float] | None = None
    rounding: Rounding | None = None
    antialias: bool | None = None
    interpolation: Literal["linear", "cubic"] | None = None
    longest: int | None = None
    clipped: bool | None = None
    num_classes: int | None = None
    max_detections: int | None = None
    declared: "Declaration | None" = None
    assume: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What was said, JSON-ready; `from_dict` reads it."""
        said = {name: value for name, value in vars(self).items() if value not in (None, ())}
        if not self.assume:
            del said["assume"]
        if self.declared:
            declared = vars(self.declared).items()
            said["declared"] = {k: v for k, v in declared if v not in (None, "", ())}
        return said

    @classmethod
    def from_dict(cls, said: Mapping[str, Any], name: str) -> "Hints":
        """The inverse of `to_dict`.

        Raises:
            GraphError: something else.
        """
        remedy = "convert the model again with create_onnx.py"
        hints: Hints = reading.convert(said, cls, name=name, remedy=remedy, error=GraphError)
        return hints


NO_HINTS = Hints()
#: The fields of `Hints` that say how images come into a network.
IMAGE_HINTS = frozenset(
    ("channel_order", "placement", "pad_rgb", "rounding", "antialias", "interpolation", "longest")
)
#: --interpolation -> as a `Preprocessing` has it.
SAMPLINGS: Mapping[str | None, Sampling] = {"linear": "half_pixel", "cubic": "cubic"}


@dataclass(frozen=True)
class Heads:
    """Names of the two tensors that boxes are selected from.

    Attributes:
        boxes: [N, A, 4] float32 in the coding of `spec.nms.box_coding` and the order of
            `spec.box_order`; for "rotated_nms" [N, A, 5], the corners of the box before rotation,
            and its angle (radians, clockwise on the screen).
        scores: [N, A, C] float32, logits where `spec.nms.score_activation`, else probabilities.
    """

    boxes: str
    scores: str


@dataclass(frozen=True)
class Reading:
    """What a family found in a source.

    Attributes:
        spec: the model as it stands: its preprocessing, the NMS it was exported with, its classes.
        image_input: the source's input tensor, `image_layout`: RGB 0-255, or normalised pixels if
            it is `network_input` too.
        network_input: the tensor that enters the first convolution: normalised pixels,
            `network_layout`.
        heads: where the network ends: name in the converted file -> tensor of the source. Each is
            verified.
        assemble: appends the operators that make `Heads` of them; None: they are `RAW_BOXES` and
            `CLASS_LOGITS` already.
        anchors: (a, 4) float32 in the coding of the boxes, pixels of the network input; None: the
            boxes are decoded.
        batch: batch size the source was exported with, None where it is dynamic.
        notes: what cannot be carried over as it is.
        decoded_boxes: the tensor of boxes that enters the source's NMS, a corners y1 x1 y2 x2 for
            the first image; None: hidden.
        decoded_unit_yx: what one unit of them is in pixels of the network input, along y and x.
        rewrite: edits the cut network before it gets its input; removes the inputs named in
            `feeds`.
        feeds: further inputs of the source, and what they are for one image that fills the network
            input (batch of one).
        size_multiple: what height and width must be a multiple of, in a network that takes images
            of any size; None: its size is fixed.
        shorter_side: what the shorter side of every picture gets, and the longer at most, in a
            network that takes each at a size of its own: kept dynamic unless a size is asked for.
        own_size: the network takes each picture as large as it is: kept dynamic unless a size is
            asked for.
        one_by_one: it takes one picture at a time.
        facts: where all of it comes from.
        final: how the source's own detections are read; None: it has none.
        takes: the fields of `Hints` that say something of this model; the others are refused, so
            that nobody believes that they did something.
    """

    spec: ModelSpec
    image_input: str
    network_input: str
    network_layout: Layout
    heads: Mapping[str, str]
    assemble: Callable[[Builder, ModelSpec], Heads] | None = None
    anchors: NDArray[np.float32] | None = None
    batch: int | None = None
    notes: tuple[Note, ...] = ()
    decoded_boxes: str | None = None
    decoded_unit_yx: tuple[float, float] = (1.0, 1.0)
    image_layout: Layout = "NHWC"
    rewrite: Callable[[gs.Graph], None] | None = None
    feeds: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    size_multiple: int | None = None
    shorter_side: tuple[int, int] | None = None
    own_size: bool = False
    one_by_one: bool = False
    facts: tuple[Fact, ...] = ()
    final: "Final | None" = None
    takes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """Detections of one image: boxes (n, 4) x1 y1 x2 y2 in pixels of the network input, scores
    (n,) 0 to 1, class ids (n,).
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]


#: (boxes (a, 4), x1 y1 x2 y2 in pixels of the network input; probabilities (a, c)) of one image ->
#: what is selected of them.
Select = Callable[[NDArray[np.float32], NDArray[np.float32]], Found]


@dataclass(frozen=True)
class Final:
    """How the detections that the source itself selects are read, for an end-to-end comparison.

    Attributes:
        fetches: tensors of the source. feeds: further inputs, for one image that fills the network
            input.
        read: their values for a batch whose first image is looked at -> its detections. other_read:
            the same in another order of axes, for exports that do not say theirs: taken where it
            agrees better.
        select: the source's own selection in NumPy, soft NMS and padding rules included.
        differs: what the converted file does otherwise on purpose; "": nothing, it must give the
            source's detections too.
        remedy: what to do where they do not come out, or where there are none, and nothing else
            shows that the reading is right; "": detections that are missing prove nothing.
    """

    fetches: tuple[str, ...]
    read: Callable[[Sequence[NDArray[Any]]], Found]
    select: Select | None = None
    differs: str = ""
    feeds: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    other_read: Callable[[Sequence[NDArray[Any]]], Found] | None = None
    remedy: str = ""


def best_class_only(build: Builder, scores: str, *, lowest: float = 0.0) -> str:
    """scores [N, A, C] with `lowest` in place of all but the best of each box"""
    best = build.reduce("ReduceMax", "best_score", scores, 2, keepdims=True)
    is_best = build.node("Equal", "is_best", scores, best)
    return build.node("Where", "best_scores", is_best, scores, np.float32(lowest))


class Family(Protocol):
    """One kind of detector.

    A module may have three names more: `IS_GENERAL`, true for a family that is asked only where no
    other matches; `IS_NAMED`, true for one whose metadata in the file counts for more than what any
    other recognises; and `why_not(source) -> str`, the fact that keeps a source near to it from
    being one of it; "" where it is far from it.
    """

    NAME: str

    def matches(self, source: Source) -> bool:
        """Whether the source looks like one of this family."""
        ...

    def read(self, source: Source, hints: Hints) -> Reading:
        """Find the network in the source.

        Raises:
            GraphError: a landmark is missing; names what was expected, what was found.
        """
        ...


def pick_family(source: Source, families: Sequence[Family], name: str = "auto") -> Family:
    """The family called `name`, or with "auto" the one that recognises the source.

    Raises:
        GraphError: none or several recognise it.
    """
    if name != "auto":
        return next(family for family in families if name == family.NAME)
    hits = [family for family in families if family.matches(source)]
    logger.debug("families that match: %s", ", ".join(f.NAME for f in hits) or "none")
    if named := [family for family in hits if getattr(family, "IS_NAMED", False)]:
        hits = named
    if known := [family for family in hits if not getattr(family, "IS_GENERAL", False)]:
        hits = known
    names = [family.NAME for family in families]
    if len(hits) > 1:
        matching = [family.NAME for family in hits]
        raise GraphError(
            f"{source.path}: expected a model of one of {names}, {matching} all match; name it with --family"
        )
    if not hits:
        nearest = [
            f"{family.NAME}: {why}"
            for family in families
            if (tell := getattr(family, "why_not", None)) and (why := tell(source))
        ]
        raise GraphError(
            f"{source.path}: expected a model of one of {names}, none matches its outputs {_named(source.graph.outputs)}; "
            + (f"nearest are {'; '.join(nearest)}; " if nearest else "")
            + "name one with --family, or add one: --family FILE.py, docs/adding_a_family.md"
        )
    return hits[0]


def _named(outputs: Iterable[str], most: int = 12) -> str:
    names = list(outputs)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def read_converted(source: Source, spec: ModelSpec) -> Reading:
    """A model that stage 1 wrote before, to be given another input or NMS.

    Raises:
        GraphError: the tensors of stage 1 are not all there.
    """
    graph = source.graph
    anchors = graph.maybe_constant(ANCHORS)
    needed = [RAW_BOXES, CLASS_LOGITS]
    if spec.anchored:
        needed.append(ANCHORS)
    missing = [name for name in needed if graph.maybe_producer(name) is None]
    if missing or (spec.anchored and anchors is None):
        raise GraphError(
            f"{source.path}: expected the tensors {', '.join(needed)} of a file by create_onnx.py, "
            f"missing: {missing}; convert from the SavedModel, or from a file with --nms plugin"
        )
    image_input = graph.inputs[0]
    inner = graph.maybe_producer(NETWORK_INPUT)
    return Reading(
        spec=spec,
        image_input=image_input,
        network_input=NETWORK_INPUT if inner else image_input,
        network_layout="NCHW",
        heads={RAW_BOXES: RAW_BOXES, CLASS_LOGITS: CLASS_LOGITS},
        anchors=anchors.reshape(-1, 4) if anchors is not None else None,
        batch=graph.batch,
        image_layout=spec.preprocessing.layout,
    )
