# SPDX-License-Identifier: Apache-2.0
"""RT-DETR (arXiv:2304.08069), RT-DETRv2 to v4, D-FINE (arXiv:2410.13842) and DEIM: raw outputs,
with their post-processing in the export, or as Ultralytics exports them, one output [N, Q, 4+C].

A hybrid encoder tells them from other DETRs: a convolutional backbone, attention on the last level,
and convolutions behind it; or boxes from distributions on a convolutional backbone. They take
RGB / 255, stretched, without ImageNet's normalisation; a sigmoid over every class; the best 300 of
all query and class pairs. On a vision transformer with boxes from distributions (EC, DEIMv2) images
have ImageNet's normalisation; on another one it is asked for.
"""

from collections.abc import Mapping

from trtdet.families import detr, heads, yolo
from trtdet.families.base import NO_HINTS, Declaration, Hints, Reading
from trtdet.families.heads_plan import Framework
from trtdet.families.normalisation import Convention
from trtdet.families.set_outputs import Kind
from trtdet.sources.base import Source
from trtdet.sources.onnx_file import OnnxSource

NAME = "rtdetr"
MAX_DETECTIONS = 300
#: Kind of network -> how its images come in, and what tells it.
KINDS: Mapping[Kind, tuple[Convention, str]] = {
    "rtdetr": (
        Convention("RT-DETR, D-FINE, DEIM"),
        "a hybrid encoder (convolutions behind attention) or boxes from distributions, on a convolutional backbone",
    ),
    "edge": (
        Convention("EC, DEIMv2 on a vision transformer", detr.IMAGENET),
        "a vision transformer, convolutions behind it, and boxes from distributions",
    ),
    "transformer": (
        Convention("DETRs on a vision transformer", is_known=False),
        "a vision transformer, and convolutions behind it",
    ),
}


def matches(source: Source) -> bool:
    """Whether the outputs are a set prediction behind a hybrid encoder, or rows of one with
    Ultralytics' metadata.
    """
    return yolo.is_set_prediction(source) or any(detr.kind_is(source, kind) for kind in KINDS)


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    if isinstance(source, OnnxSource) and yolo.is_set_prediction(source):
        return heads.read(source, hints, of_ultralytics(source))
    kind: Kind = next((k for k in KINDS if detr.kind_is(source, k)), "rtdetr")
    convention, how = KINDS[kind]
    return detr.read_sigmoid(
        source, hints, family=NAME, convention=convention, kept=MAX_DETECTIONS, how=f"read: {how}"
    )


def of_ultralytics(source: OnnxSource) -> Framework:
    """Ultralytics' export: rows [N, Q, 4+C], cx cy w h of 0 to 1 and probabilities; images
    stretched.
    """
    return Framework(
        "Ultralytics' RT-DETR",
        normal=Convention("").normal,
        resize="stretch",
        declared=Declaration(
            box_format="cxcywh", box_units="unit", activation="none", background="none"
        ),
        columns=("cx", "cy", "w", "h", "scores"),
        selected=True,
        kept=MAX_DETECTIONS,
        labels=yolo.read_metadata(source.model).names,
    )
