# SPDX-License-Identifier: Apache-2.0
"""RF-DETR (arXiv:2511.09554) and LW-DETR (arXiv:2406.03459): a vision transformer, a projector, a
deformable decoder.

`dets` [N, Q, 4] and `labels` [N, Q, C] of RF-DETR's own exporter, pred_boxes and logits of others.
Images are stretched and normalised with ImageNet's mean; a sigmoid over every class, the best 300
of all query and class pairs.
"""

from trtdet.families import detr
from trtdet.families.base import NO_HINTS, Hints, Reading
from trtdet.families.normalisation import Convention
from trtdet.sources.base import Source

NAME = "rfdetr"
MAX_DETECTIONS = 300


def matches(source: Source) -> bool:
    """Whether the outputs are a set prediction of a projected vision transformer."""
    return detr.kind_is(source, "rfdetr")


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    return detr.read_sigmoid(
        source,
        hints,
        family=NAME,
        convention=Convention("RF-DETR, LW-DETR", detr.IMAGENET),
        kept=MAX_DETECTIONS,
        how="read: a patch embedding, and convolutions behind its attention",
    )
