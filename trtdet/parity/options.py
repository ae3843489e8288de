# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a comparison. Standard library only: the command lines read it."""

from dataclasses import dataclass, field

from trtdet.run.options import MAX_AP_DROP, RunOptions

# ---- limits


@dataclass(frozen=True)
class Limits:
    """What passes. The defaults let FP16 pass; INT8 needs wider ones (docs/parity.md).

    Attributes:
        max_missing, max_extra, max_flips: shares of the reference's detections.
        max_score_diff: of 95 % of the matched pairs.
        max_box_diff: of 95 % of the matched pairs, pixels of the network input.
        max_angle_diff: of 95 % of the matched pairs of rotated boxes, radians.
        min_cosine: of the head tensors.
        max_ap_drop: reference's AP minus candidate's.
    """

    max_missing: float = 0.01
    max_extra: float = 0.01
    max_flips: float = 0.01
    max_score_diff: float = 0.02
    max_box_diff: float = 1.0
    max_angle_diff: float = 0.02
    min_cosine: float = 0.999
    max_ap_drop: float = MAX_AP_DROP


#: Images that tensors are compared on: all inner tensors of both models, unoptimised.
TENSOR_IMAGES = 2
WORST_IMAGES = 8
#: Detections from this score on need a partner in the other model.
MIN_SCORE = 0.1


# ---- the comparison


@dataclass(frozen=True)
class CompareOptions:
    """What the command line asks for."""

    limits: Limits = field(default_factory=Limits)
    score_threshold: float = MIN_SCORE
    iou: float = 0.5
    num_images: int | None = None
    tensor_images: int = TENSOR_IMAGES
    recursive: bool = False
    own_nms: bool = False
    run: RunOptions = field(default_factory=RunOptions)
