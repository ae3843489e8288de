# SPDX-License-Identifier: Apache-2.0
"""What TensorFlow exports do behind their heads, in NumPy: the best candidates, hard or soft NMS,
per class or not.

Source of the facts: NonMaxSuppressionV5 and CombinedNonMaxSuppression of TensorFlow 2.21 (a
candidate needs more than the score threshold; boxes that overlap by more than the IoU threshold go;
where sigma is positive none goes, all are multiplied by exp(-overlap**2 / (2 sigma)));
google/automl tf2/postprocess.py; tensorflow/models core/post_processing.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtdet.families.base import Found
from trtdet.sources.base import SourceGraph

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class TfSelection:
    """How detections are selected.

    Attributes:
        per_class: boxes compete within their class alone.
        every_class: a box is a candidate for each of its classes; else for its best alone.
        candidates: best (box, class) pairs that go on; 0: all.
        sigma: TensorFlow's soft_nms_sigma; 0: hard.
        most_per_class: detections of a class. most: in total.
        clip: boxes end at the borders of the picture, (height, width); None: they do not.
        drops_outside: boxes of which the borders leave nothing are dropped, behind the NMS and
            before the best `most` are taken.
    """

    per_class: bool
    every_class: bool
    candidates: int
    iou_threshold: float
    score_threshold: float
    sigma: float
    most_per_class: int
    most: int
    clip: tuple[int, int] | None = None
    drops_outside: bool = False

    def __call__(self, boxes: FloatArray, scores: FloatArray) -> Found:
        """The detections of boxes (a, 4), x1 y1 x2 y2, with scores (a, c)."""
        rows, classes = self._candidates(scores)
        values = scores[rows, classes]
        kept: list[tuple[NDArray[np.int64], FloatArray]] = []
        groups = (
            [np.flatnonzero(classes == c) for c in np.unique(classes)]
            if self.per_class
            else [np.arange(len(rows))]
        )
        for group in groups:
            found, decayed = suppress(
                boxes[rows[group]], values[group], self.iou_threshold, self.score_threshold, self.sigma, self.most_per_class
            )  # fmt: skip
            kept.append((group[found], decayed))
        position = np.concatenate([p for p, _ in kept]) if kept else np.zeros(0, np.int64)
        score = np.concatenate([s for _, s in kept]) if kept else np.zeros(0, np.float32)
        order = np.argsort(-score, kind="stable")
        chosen = boxes[rows[position[order]]]
        if self.clip:
            height, width = self.clip
            chosen = np.clip(chosen, 0, np.array([width, height] * 2, np.float32))
        if self.drops_outside:
            left = np.flatnonzero(np.prod(chosen[:, 2:] - chosen[:, :2], axis=1) != 0)
            order, chosen = order[left], chosen[left]
        order, chosen = order[: self.most], chosen[: self.most]
        return Found(chosen, score[order], classes[position[order]])

    def _candidates(self, scores: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and classes of what enters the suppression."""
        count, num_classes = scores.shape
        if self.candidates:
            flat = np.argsort(-scores.reshape(-1), kind="stable")[: self.candidates]
            return np.divmod(flat, num_classes)
        if self.every_class:
            rows, classes = np.nonzero(scores > self.score_threshold)
            return rows.astype(np.int64), classes.astype(np.int64)
        return np.arange(count), scores.argmax(axis=1)

    @property
    def differs(self) -> str:
        """What TensorRT's NMS does otherwise; "" where it is the same."""
        changes = []
        if self.sigma > 0:
            changes.append(f"hard NMS in place of gaussian soft NMS (sigma {2 * self.sigma:g})")
        if self.candidates:
            changes.append(f"candidates by score threshold in place of the best {self.candidates}")
        if self.per_class and not self.every_class:
            changes.append("every class of a box in place of its best")
        if self.drops_outside:
            changes.append("boxes outside the picture stay, and take places among the best")
        return ", ".join(changes)


def suppress(
    boxes: FloatArray,
    scores: FloatArray,
    iou_threshold: float,
    score_threshold: float,
    sigma: float,
    most: int,
) -> tuple[NDArray[np.int64], FloatArray]:
    """NonMaxSuppressionV5: positions that stay, and their scores, best first."""
    alive = scores.astype(np.float32).copy()
    alive[~(alive > np.float32(score_threshold))] = -np.inf
    kept: list[int] = []
    values: list[float] = []
    for _ in range(min(most, len(alive))):
        best = int(alive.argmax())
        if alive[best] == -np.inf:
            break
        kept.append(best)
        values.append(float(alive[best]))
        alive[best] = -np.inf
        overlap = iou(boxes[best], boxes)
        gone = overlap > np.float32(iou_threshold) if sigma <= 0 else np.zeros(len(alive), bool)
        if sigma > 0:
            alive *= np.where(
                alive > -np.inf, np.exp(np.float32(-0.5 / sigma) * overlap**2), 1
            ).astype(np.float32)
            gone |= ~(alive > np.float32(score_threshold))
        alive[gone] = -np.inf
    return np.array(kept, np.int64), np.array(values, np.float32)


def iou(box: FloatArray, boxes: FloatArray) -> FloatArray:
    """Overlap of one box with many; 0 where one has no area."""
    first, second = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    one, two = np.minimum(box[:2], box[2:]), np.maximum(box[:2], box[2:])
    areas, area = np.prod(second - first, axis=1), np.prod(two - one)
    shared = np.prod(np.maximum(np.minimum(second, two) - np.maximum(first, one), 0), axis=1)
    union = areas + area - shared
    valid = (areas > 0) & (area > 0) & (union > 0)
    return np.divide(shared, union, out=np.zeros_like(shared), where=valid).astype(np.float32)


def candidates_before(graph: SourceGraph, nms_ops: tuple[str, ...]) -> int:
    """K of the TopK before the NMS; 0: there is none."""
    for node in {id(n): n for n in graph.nodes.values()}.values():
        if node.op not in ("TopK", "TopKV2") or len(node.inputs) < 2:
            continue
        if any(
            n.op in nms_ops or n.op in LOOPS
            for n in graph.ancestors(node).values()
            if n is not node
        ):
            continue
        k = graph.maybe_constant(node.inputs[1])
        if k is not None:
            return int(np.asarray(k).reshape(-1)[0])
    return 0


#: Operators whose bodies hold the NMS of every image in exports with a dynamic batch.
LOOPS = ("While", "StatelessWhile", "Loop", "PartitionedCall", "StatefulPartitionedCall")
