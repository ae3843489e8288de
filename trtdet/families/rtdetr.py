# SPDX-License-Identifier: Apache-2.0
"""RT-DETR (arXiv:2304.08069), RT-DETRv2 to v4, D-FINE (arXiv:2410.13842) and DEIM: raw outputs, or with their post-processing in the export.

A hybrid encoder tells them from other DETRs: a convolutional backbone, attention on the last level, and convolutions behind it. They take
RGB / 255, stretched, without ImageNet's normalisation; a sigmoid over every class; the best 300 of all query and class pairs.
"""

from trtdet.families import detr
from trtdet.families.base import NO_HINTS, Hints, Reading
from trtdet.families.pixels import Convention
from trtdet.sources.base import Source

NAME = "rtdetr"
MAX_DETECTIONS = 300


def matches(source: Source) -> bool:
    """Whether the outputs are a set prediction behind a hybrid encoder."""
    return detr.kind_is(source, "rtdetr")


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    return detr.read_sigmoid(
        source,
        hints,
        family=NAME,
        convention=Convention("RT-DETR, D-FINE, DEIM"),
        kept=MAX_DETECTIONS,
        how="read: a hybrid encoder (convolutions behind attention) on a convolutional backbone",
    )
