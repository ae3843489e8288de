# SPDX-License-Identifier: Apache-2.0
"""Which detections of two models are the same, and how far these are apart.

Detections carry category ids here, not class ids: models that count classes differently can be
compared, and one that counts them wrongly is found out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.detections import Detections
from trtdet.geometry import FloatArray, box_iou
from trtdet.nms.rotated_reference import iou_exact

#: Share of the matched pairs that a limit on their differences holds for. The rest is where NMS
#: decides otherwise on a hair's breadth.
PERCENTILE = 95


@dataclass(frozen=True)
class Matching:
    """Which detections of one image are the same in both models: indices into them.

    Attributes:
        pairs: (n, 2) reference, candidate: same category.
        flips: (n, 2) reference, candidate: another category at the same place.
        missing: of the reference, without a partner.
        extra: of the candidate, without a partner.
    """

    pairs: NDArray[np.intp]
    flips: NDArray[np.intp]
    missing: NDArray[np.intp]
    extra: NDArray[np.intp]


def match(
    reference: Detections, candidate: Detections, *, min_iou: float, score_threshold: float
) -> Matching:
    """Pair the detections of one image.

    A detection needs `score_threshold` to count, its partner of the same category may be below: one
    that sank from 0.31 to 0.29 is a score difference, not a loss. Pairs of great overlap and little
    score difference come first; each detection is in one at most.
    """
    iou = overlap(reference, candidate)
    same = reference.class_ids[:, None] == candidate.class_ids[None]
    high_r, high_c = (x.scores >= score_threshold for x in (reference, candidate))
    gap = np.abs(reference.scores[:, None] - candidate.scores[None])
    fit = iou - gap
    pairs = _greedy(fit, (iou >= min_iou) & same & (high_r[:, None] | high_c[None]))
    free_r, free_c = high_r.copy(), high_c.copy()
    free_r[pairs[:, 0]] = free_c[pairs[:, 1]] = False
    flips = _greedy(fit, (iou >= min_iou) & free_r[:, None] & free_c[None])
    free_r[flips[:, 0]] = free_c[flips[:, 1]] = False
    return Matching(pairs, flips, np.flatnonzero(free_r), np.flatnonzero(free_c))


def overlap(reference: Detections, candidate: Detections) -> FloatArray:
    """(n, m) IoU of every pair, of rotated boxes that of their polygons.

    Boxes cut to (almost) nothing by the edge of the image have no IoU to speak of: of these, the
    ones less than a pixel apart are the same, IoU 1.
    """
    left, right = reference.boxes_xyxy, candidate.boxes_xyxy
    if reference.angles is None and candidate.angles is None:
        iou = box_iou(left, right)
    else:
        rotated = [np.concatenate([d.boxes_xyxy, _angles(d)[:, None]], 1) for d in (reference, candidate)]  # fmt: skip
        rows = [iou_exact(box, rotated[1]) for box in rotated[0]]
        iou = np.array(rows, np.float32).reshape(len(left), len(right))
    thin_left, thin_right = ((x[:, 2:] - x[:, :2]).min(1, initial=np.inf) < 1 for x in (left, right))  # fmt: skip
    gap = np.abs(left[:, None] - right[None]).max(axis=2, initial=0)
    iou[(gap < 1) & (thin_left[:, None] | thin_right[None])] = 1
    return iou


def _angles(detections: Detections) -> FloatArray:
    if detections.angles is None:
        return np.zeros(len(detections), np.float32)
    return detections.angles


def _greedy(fit: FloatArray, allowed: NDArray[np.bool_]) -> NDArray[np.intp]:
    """(n, 2) rows and columns, the best fit first, every row and every column once at most."""
    rows, columns = np.nonzero(allowed)
    chosen: list[tuple[int, int]] = []
    used_rows: set[int] = set()
    used_columns: set[int] = set()
    for i in np.argsort(-fit[rows, columns], kind="stable"):
        row, column = int(rows[i]), int(columns[i])
        if row not in used_rows and column not in used_columns:
            chosen.append((row, column))
            used_rows.add(row)
            used_columns.add(column)
    return np.array(chosen, np.intp).reshape(-1, 2)


@dataclass(frozen=True)
class ImageComparison:
    """One image by both models.

    Attributes:
        reference, candidate: source pixels; class_ids are category ids.
        scale_xy: pixels of the network input per source pixel.
    """

    path: Path
    reference: Detections
    candidate: Detections
    matching: Matching
    scale_xy: tuple[float, float]

    @property
    def score_differences(self) -> FloatArray:
        """(n,) candidate minus reference, one per pair."""
        r, c = self.matching.pairs.T
        return self.candidate.scores[c] - self.reference.scores[r]

    @property
    def box_differences(self) -> FloatArray:
        """(n,) largest of the four coordinate differences of each pair, in pixels of the network
        input.
        """
        r, c = self.matching.pairs.T
        gap = np.abs(self.candidate.boxes_xyxy[c] - self.reference.boxes_xyxy[r])
        return (gap * np.array([*self.scale_xy, *self.scale_xy], np.float32)).max(axis=1)

    @property
    def angle_differences(self) -> FloatArray:
        """(n,) candidate minus reference, radians, one per pair; none where boxes are not rotated.

        A box is the same after half a turn, and one whose sides differ by less than a pixel after a
        quarter.
        """
        if self.reference.angles is None and self.candidate.angles is None:
            return np.zeros(0, np.float32)
        r, c = self.matching.pairs.T
        square = np.ones(len(r), bool)
        for boxes in (self.reference.boxes_xyxy[r], self.candidate.boxes_xyxy[c]):
            square &= np.abs((boxes[:, 2] - boxes[:, 0]) - (boxes[:, 3] - boxes[:, 1])) < 1
        period = np.where(square, np.pi / 2, np.pi)
        gap = _angles(self.candidate)[c].astype(np.float64) - _angles(self.reference)[r]
        return (gap - period * np.round(gap / period)).astype(np.float32)

    @property
    def badness(self) -> tuple[int, float]:
        """To sort by, worst largest: detections that have no partner, then the largest
        difference of those that do.
        """
        m = self.matching
        worst = np.abs(self.score_differences).max(initial=0) + self.box_differences.max(initial=0) / 100  # fmt: skip
        return len(m.flips) + len(m.missing) + len(m.extra), float(worst)

    def to_dict(self) -> dict[str, Any]:
        m = self.matching
        return {
            "image": self.path.name,
            "matched": len(m.pairs),
            "missing": len(m.missing),
            "extra": len(m.extra),
            "class_flips": len(m.flips),
            "max_score_diff": float(np.abs(self.score_differences).max(initial=0)),
            "max_box_diff": float(self.box_differences.max(initial=0)),
            "max_angle_diff": float(np.abs(self.angle_differences).max(initial=0)),
        }


@dataclass(frozen=True)
class Spread:
    """Absolute differences over all matched pairs; zeros where there are none."""

    maximum: float
    percentile: float  # the 95th
    mean: float
    bias: float  # the mean with its sign

    @classmethod
    def of(cls, values: FloatArray) -> "Spread":
        if not len(values):
            return cls(0.0, 0.0, 0.0, 0.0)
        size = np.abs(values)
        return cls(
            float(size.max()), float(np.percentile(size, PERCENTILE)), float(size.mean()), float(values.mean())
        )  # fmt: skip


@dataclass(frozen=True)
class DetectionDifference:
    """All images together. Shares are of the reference's detections.

    Attributes:
        angle: None where boxes are not rotated.
    """

    reference: int
    candidate: int
    matched: int
    missing: int
    extra: int
    class_flips: int
    score: Spread
    box: Spread
    angle: Spread | None

    @classmethod
    def of(cls, images: Sequence[ImageComparison], score_threshold: float) -> "DetectionDifference":
        nothing = [np.zeros(0, np.float32)]
        angles = np.concatenate([i.angle_differences for i in images] or nothing)
        return cls(
            reference=sum(int((i.reference.scores >= score_threshold).sum()) for i in images),
            candidate=sum(int((i.candidate.scores >= score_threshold).sum()) for i in images),
            matched=sum(len(i.matching.pairs) for i in images),
            missing=sum(len(i.matching.missing) for i in images),
            extra=sum(len(i.matching.extra) for i in images),
            class_flips=sum(len(i.matching.flips) for i in images),
            score=Spread.of(np.concatenate([i.score_differences for i in images] or nothing)),
            box=Spread.of(np.concatenate([i.box_differences for i in images] or nothing)),
            angle=Spread.of(angles) if len(angles) else None,
        )

    def share(self, count: int) -> float:
        return count / max(1, self.reference)
