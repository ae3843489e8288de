# SPDX-License-Identifier: Apache-2.0
"""What rounding does to detections: the loss of boxes and the error of scores, against the float32
model, without annotations.

Only anchors that matter count: those that the float32 model rates high, each with its score p as
weight.

    box loss   = sum p (1 - IoU(float32, rounded)) / sum p
    score loss = sum p |score - p| / sum p

Both have a smooth form, a power: the squared displacement of a box's edges in units of its size,
and the squared error of its score. Errors that different convolutions make are all but independent,
so their powers add up (D0: the powers of 182 convolutions, each alone in INT8, add up to within 4 %
of the power of all together), while their losses do not. So powers are what convolutions are
compared by, and losses what is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtdet.geometry import FloatArray
from trtdet.nms.reference import decode_boxes
from trtdet.spec import Nms

#: Anchors that float32 rates lower are background, whose boxes mean nothing.
LEAST_SCORE = 0.05
#: Of an image, the best so many: neighbours of one object err alike.
MOST_ANCHORS = 200


@dataclass(frozen=True, eq=False)
class Coding:
    """How a model's heads say boxes and scores.

    Attributes:
        boxes, scores: names of the heads, [N, A, 4] (rotated boxes: 5 or more, the angle fifth) and
            [N, A, C].
        nms: says whether scores are logits, and how boxes are coded.
        anchors: (A, 4) that boxes are relative to; None: they are not.
    """

    boxes: str
    scores: str
    nms: Nms
    anchors: FloatArray | None = None

    def decode(self, rows: FloatArray, anchors: NDArray[np.intp]) -> FloatArray:
        """Corner boxes of some anchors, (n, 4), or (n, 5) with the angle."""
        if rows.shape[1] > 4:  # rotated boxes: corners already
            return rows[:, :5]
        relative_to = None if self.anchors is None else self.anchors[anchors]
        return decode_boxes(rows, self.nms.box_coding, relative_to)

    def probability(self, scores: FloatArray) -> FloatArray:
        if not self.nms.score_activation:
            return scores
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-scores)), np.float32)


@dataclass(frozen=True, eq=False)
class Reference:
    """What the float32 model says at the anchors of one image that matter.

    Attributes:
        anchors, classes: (n,), of each its best class.
        boxes: (n, 4) or (n, 5), decoded.
        scores: (n,) probabilities.
    """

    anchors: NDArray[np.intp]
    classes: NDArray[np.intp]
    boxes: FloatArray
    scores: FloatArray

    @property
    def weight(self) -> float:
        return float(self.scores.sum(dtype=np.float64))


@dataclass(frozen=True)
class Damage:
    """Sums over anchors, each times its score in float32; they add up over images.

    Attributes:
        weight: of all anchors.
        box_power, score_power: the smooth forms.
        box_loss, score_loss: as above, before the division.
    """

    weight: float = 0.0
    box_power: float = 0.0
    score_power: float = 0.0
    box_loss: float = 0.0
    score_loss: float = 0.0

    def __add__(self, other: Damage) -> Damage:
        return Damage(
            self.weight + other.weight,
            self.box_power + other.box_power,
            self.score_power + other.score_power,
            self.box_loss + other.box_loss,
            self.score_loss + other.score_loss,
        )

    def mean(self) -> Damage:
        """Per unit of weight."""
        weight = self.weight or 1.0
        return Damage(
            1.0,
            self.box_power / weight,
            self.score_power / weight,
            self.box_loss / weight,
            self.score_loss / weight,
        )


def reference(
    coding: Coding,
    boxes: FloatArray,
    scores: FloatArray,
    *,
    least_score: float = LEAST_SCORE,
    most: int = MOST_ANCHORS,
) -> Reference:
    """The anchors of one image that matter, best first.

    Args:
        boxes, scores: the heads of the float32 model, (A, 4 or more) and (A, C).
    """
    background = coding.nms.background_class
    if 0 <= background < scores.shape[1]:
        scores = scores.copy()
        scores[:, background] = -np.inf
    best = scores.argmax(1)
    found = coding.probability(np.take_along_axis(scores, best[:, None], 1)[:, 0])
    order = np.argsort(-found, kind="stable")[:most]
    anchors = order[found[order] >= least_score]
    return Reference(anchors, best[anchors], coding.decode(boxes[anchors], anchors), found[anchors])


def damage(
    coding: Coding, expected: Reference, boxes: FloatArray | None, scores: FloatArray | None
) -> Damage:
    """What another model's heads make of the same anchors. A head that is None is as in float32."""
    weights = expected.scores.astype(np.float64)
    box_power = box_loss = score_power = score_loss = 0.0
    if boxes is not None:
        found = coding.decode(boxes[expected.anchors], expected.anchors)
        box_power = float((weights * displacement(expected.boxes, found)).sum())
        overlap = paired_iou(expected.boxes[:, :4], found[:, :4])
        box_loss = float((weights * (1 - overlap)).sum())
    if scores is not None:
        rated = coding.probability(scores[expected.anchors, expected.classes])
        errors = rated.astype(np.float64) - weights
        score_power = float((weights * errors**2).sum())
        score_loss = float((weights * np.abs(errors)).sum())
    return Damage(expected.weight, box_power, score_power, box_loss, score_loss)


def displacement(expected: FloatArray, found: FloatArray) -> NDArray[np.float64]:
    """Of each box, how far it is off, squared: 0 to 1, as 1 - IoU is.

    The sum u of its edges' squared displacements in units of its size along each axis, and of its
    angle's in radians, as u / (1 + u): boxes that float32 makes all but empty do not outweigh all
    others.
    """
    edges = (found[:, :4] - expected[:, :4]).astype(np.float64)
    size = np.abs(expected[:, 2:4] - expected[:, :2]).astype(np.float64)
    relative = edges / np.maximum(np.tile(size, 2), 1e-12)
    angles = (found[:, 4:] - expected[:, 4:]).astype(np.float64)
    total = (relative**2).sum(1) + (angles**2).sum(1)
    return total / (1 + total)


def paired_iou(a: FloatArray, b: FloatArray) -> NDArray[np.float64]:
    """Of box i of one with box i of the other; 0 where both are empty.

    Of rotated boxes, before rotation.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    lower, upper = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    shared = np.prod(np.maximum(upper - lower, 0), axis=1)
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1) for boxes in (a, b)]
    union = areas[0] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
