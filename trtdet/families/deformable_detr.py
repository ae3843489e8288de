# SPDX-License-Identifier: Apache-2.0
"""DETRs with a sigmoid over every class: Conditional DETR (arXiv:2108.06152), DAB-DETR
(arXiv:2201.12329), Deformable DETR (arXiv:2010.04159) and what followed it, one and two stages,
with box refinement or without; as transformers exports them to ONNX.

logits [N, Q, C] for a sigmoid, boxes [N, Q, 4], cx cy w h, 0 to 1, about reference points. Their
own post-processing takes the best 100 of all query and class pairs; nothing is suppressed. So is
ours: `trtdet.nms.topk`. Images come as in `trtdet.families.detr`. `--deformable_attention` says how
that attention is written: `trtdet.graph.deformable_attention`.

"gather" is the default because it is right everywhere: GridSample is compiled wrongly by some
TensorRT versions, silently, and the plugin is not in TensorRT-RTX.
"""

from trtdet.families import detr
from trtdet.families.base import NO_HINTS, Hints, Reading
from trtdet.families.normalisation import Convention
from trtdet.sources.base import Source

NAME = "deformable_detr"


def matches(source: Source) -> bool:
    """Whether boxes are predicted about reference points, or the file shows a sigmoid of the
    logits, without a hybrid encoder or a projector.
    """
    return detr.kind_is(source, "sigmoid")


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    return detr.read_sigmoid(
        source,
        hints,
        family=NAME,
        convention=Convention("Conditional, DAB and Deformable DETR", detr.IMAGENET),
        kept=detr.MAX_DETECTIONS,
        how="read: boxes about reference points, or a sigmoid of the logits",
    )
