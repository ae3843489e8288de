# SPDX-License-Identifier: Apache-2.0
"""Deformable DETR (arXiv:2010.04159) as transformers exports it to ONNX; one and two stages, with box refinement or without.

logits [N, Q, C] for a sigmoid, pred_boxes [N, Q, 4], cx cy w h, 0 to 1. Its own post-processing takes the best 100 of all query and class
pairs; nothing is suppressed. So is ours: `trtdet.nms.topk`. Images come as in `trtdet.families.detr`. `--deformable_attention` says how the
attention is written: `trtdet.deformable_attention`.

"gather" is the default because it is right everywhere: GridSample is compiled wrongly by some TensorRT versions, silently, and the
plugin is not in TensorRT-RTX.
"""

import dataclasses

from trtdet.families import detr
from trtdet.families.base import CLASS_LOGITS, NO_HINTS, RAW_BOXES, Hints, Reading
from trtdet.graph.deformable_attention import Mode
from trtdet.sources.base import Source
from trtdet.spec import Nms

NAME = "deformable_detr"

DEFAULT_ATTENTION: Mode = "gather"


def matches(source: Source) -> bool:
    """Whether the outputs are called as DETR's are, and an operator is Deformable DETR's."""
    return detr.has_outputs(source) and detr.is_deformable(source)


def read(source: Source, hints: Hints = NO_HINTS) -> Reading:
    """See `trtdet.families.base.Family.read`."""
    export = detr.read_export(source, hints)
    reading = detr.describe(
        source,
        export,
        hints,
        family=NAME,
        num_classes=export.num_logits,
        deformable_attention=hints.deformable_attention or DEFAULT_ATTENTION,
    )
    spec = reading.spec.replace(
        nms=Nms(
            score_threshold=0.0,
            max_output_boxes=min(detr.MAX_DETECTIONS, export.num_queries * export.num_logits),
            box_coding=1,
        )
    )
    return dataclasses.replace(
        reading, spec=spec, heads={RAW_BOXES: detr.BOXES, CLASS_LOGITS: export.logits}
    )
