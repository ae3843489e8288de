# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a comparison. Standard library only: the command lines read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trtdet.precision.options import QUANTIZED_PRECISIONS
from trtdet.run.options import MAX_AP_DROP, RunOptions

# ---- limits


@dataclass(frozen=True)
class Limits:
    """What passes. The defaults let FP16 pass; `limits_for` has those of 8 bits (docs/parity.md).

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


#: Of a candidate in INT8 or FP8, less `max_box_diff`, which grows with the input.
LIMITS_8_BITS = Limits(0.05, 0.05, 0.05, 0.15, 8.0, 0.1, 0.99, 0.01)
#: Part of the shorter side of the input: 8 pixels at 128x128, 32 at 512x512.
BOX_SHARE_8_BITS = 1 / 16


def limits_for(precision: str, size_hw: tuple[int, int], given: Mapping[str, float]) -> Limits:
    """The limits of a candidate.

    Args:
        precision: a name as in `trtdet.precision.options.PRECISIONS`.
        size_hw: of the candidate's input.
        given: field of `Limits` -> what the command line says.
    """
    limits = Limits()
    if precision in QUANTIZED_PRECISIONS:
        limits = replace(LIMITS_8_BITS, max_box_diff=min(size_hw) * BOX_SHARE_8_BITS)
    return replace(limits, **given)


#: Images that tensors are compared on: all inner tensors of both models, unoptimised.
TENSOR_IMAGES = 2
WORST_IMAGES = 8
#: Detections from this score on need a partner in the other model.
MIN_SCORE = 0.1


# ---- the comparison


@dataclass(frozen=True)
class CompareOptions:
    """What the command line asks for.

    Attributes:
        limits: field of `Limits` -> value, of those that are given; the others are those of
            `limits_for`.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    score_threshold: float = MIN_SCORE
    iou: float = 0.5
    num_images: int | None = None
    tensor_images: int = TENSOR_IMAGES
    recursive: bool = False
    own_nms: bool = False
    run: RunOptions = field(default_factory=RunOptions)
