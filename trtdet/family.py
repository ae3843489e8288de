# SPDX-License-Identifier: Apache-2.0
"""The contract of a detector family: find the network in a trained model, and describe it.

A family is a module in `trtdet.families` with the three names of `Family`. It does not change the model: it says between which
tensors the network lies (`Reading`), and everything after that is common to all families.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trtdet.errors import GraphError
from trtdet.graph import NETWORK_INPUT
from trtdet.source import Source
from trtdet.spec import Layout, ModelSpec

#: Tensors that stage 1 writes in every form of NMS: [N, A, 4] and [N, A, C], before decoding and before the sigmoid.
RAW_BOXES, CLASS_LOGITS = "raw_boxes", "class_logits"
#: The constant [1, A, 4] beside them.
ANCHORS = "nms/anchors"


@dataclass(frozen=True)
class Note:
    """What cannot be carried over as it is, in one line.

    Attributes:
        option: name of the command-line option that settles it; with it given there is nothing to say.
    """

    text: str
    option: str


@dataclass(frozen=True)
class Reading:
    """What a family found in a source.

    Attributes:
        spec: the model as it stands: measured preprocessing, the NMS it was exported with, its classes.
        image_input: the source's input tensor, RGB 0-255, `image_layout`.
        network_input: the tensor that enters the first convolution: normalised pixels, `network_layout`.
        raw_boxes: tensor [n, a, 4], box regression before decoding.
        class_logits: tensor [n, a, c], before the sigmoid.
        anchors: (a, 4) float32, y x h w of the centre, pixels of the network input.
        batch: batch size the source was exported with, None where it is free.
        notes: what cannot be carried over as it is.
        decoded_boxes: the tensor of boxes that enters the source's NMS, a corners y1 x1 y2 x2 for the first image; None: hidden.
    """

    spec: ModelSpec
    image_input: str
    network_input: str
    network_layout: Layout
    raw_boxes: str
    class_logits: str
    anchors: NDArray[np.float32]
    batch: int | None
    notes: tuple[Note, ...] = ()
    decoded_boxes: str | None = None
    image_layout: Layout = "NHWC"


class Family(Protocol):
    """One kind of detector."""

    NAME: str

    def matches(self, source: Source) -> bool:
        """Whether the source looks like one of this family."""
        ...

    def read(self, source: Source) -> Reading:
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
    if len(hits) != 1:
        found = f"{[family.NAME for family in hits]} all match" if hits else "none matches"
        raise GraphError(
            f"{source.path}: expected a model of one of {[family.NAME for family in families]}, {found}; name it with --family"
        )
    return hits[0]


def read_converted(source: Source, spec: ModelSpec) -> Reading:
    """A model that stage 1 wrote before, to be given another input or NMS.

    Raises:
        GraphError: the tensors of stage 1 are not all there.
    """
    graph = source.graph
    missing = [
        name for name in (RAW_BOXES, CLASS_LOGITS, ANCHORS) if graph.maybe_producer(name) is None
    ]
    anchors = graph.maybe_constant(ANCHORS)
    if missing or anchors is None:
        raise GraphError(
            f"{source.path}: expected the tensors {RAW_BOXES}, {CLASS_LOGITS} and {ANCHORS} of a file by create_onnx.py, "
            f"missing: {missing}; convert from the SavedModel, or from a file with --nms plugin"
        )
    image_input = graph.inputs[0]
    inner = graph.maybe_producer(NETWORK_INPUT)
    return Reading(
        spec=spec,
        image_input=image_input,
        network_input=NETWORK_INPUT if inner else image_input,
        network_layout="NCHW",
        raw_boxes=RAW_BOXES,
        class_logits=CLASS_LOGITS,
        anchors=anchors.reshape(-1, 4),
        batch=graph.batch,
        image_layout=spec.preprocessing.layout,
    )
