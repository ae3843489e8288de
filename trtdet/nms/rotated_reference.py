# SPDX-License-Identifier: Apache-2.0
"""NMS of rotated boxes in NumPy: what `trtdet.nms.rotated` has to equal.

Polygons are clipped edge by edge, in float64.

Three overlaps are known. "exact" is the intersection over union of the two rectangles. "odtk" is
what ODTK's kernel computes, so that a user can reproduce its numbers. Source:
NVIDIA/retinanet-examples csrc/cuda/nms_iou.cu (nms_rotate_kernel, its facts): BOTH boxes are
rotated by the angle of the one with the lower score, and both are scaled, each about its own
centre, by the length of that box's raw (sin, cos). Two boxes at one angle are axis-aligned in a
frame of that angle, where the scale only brings the centres closer.

"probiou" is what Ultralytics' OBB models use: boxes as Gaussian distributions, their overlap 1 -
the Hellinger distance (arXiv:2106.06072). It goes with a rule of suppression of its own: any better
box of the class that overlaps too much, one that is suppressed itself as well.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from trtdet.geometry import FloatArray, box_iou, rotated_corners
from trtdet.nms.reference import best_candidates, greedy
from trtdet.spec import OUTPUT_NAMES, Nms, RotatedMode

#: Candidates of an image. The pairwise tensors take N * 4 * candidates**2 bytes each: 4 MiB per
#: image.
ROTATED_CANDIDATES = 1024

#: Keeps boxes without width or height from dividing by 0, in pixels to the fourth.
GAUSSIAN_EPSILON = 1e-7


def reference(
    boxes: FloatArray,
    scores: FloatArray,
    nms: Nms,
    *,
    mode: RotatedMode = "exact",
    candidates: int = ROTATED_CANDIDATES,
) -> dict[str, NDArray[np.float32] | NDArray[np.int32]]:
    """Threshold, sort and suppress.

    Scores, order and suppression are those of `trtdet.nms.reference.reference`.

    Args:
        boxes: (N, A, 5) x1 y1 x2 y2 of the box before rotation, angle; or (N, A, 6), the length of
            the raw (sin, cos) behind them.
        scores: (N, A, C), logits if `nms.score_activation`.

    Returns:
        The four outputs by name; "detection_boxes" is float32 (N, K, 5).
    """
    n, _, num_classes = scores.shape
    k = nms.max_output_boxes
    outputs = (
        np.zeros((n, 1), np.int32),
        np.zeros((n, k, 5), np.float32),
        np.zeros((n, k), np.float32),
        np.zeros((n, k), np.int32),
    )
    iou = {"exact": iou_exact, "odtk": iou_odtk, "probiou": iou_gaussian}[mode]
    select = unrivalled if mode == "probiou" else greedy
    for image, (count, out_boxes, out_scores, out_classes) in enumerate(zip(*outputs, strict=True)):
        order = best_candidates(scores[image].astype(np.float32), nms, candidates)
        anchor, class_id = np.divmod(order, num_classes)
        found = boxes[image, anchor]
        kept = select(class_id, nms, partial(_iou_behind, found, iou))
        count[0] = m = len(kept)
        out_boxes[:m] = found[kept, :5]
        out_scores[:m] = scores[image].reshape(-1)[order[kept]]
        if nms.score_activation:
            out_scores[:m] = 1 / (1 + np.exp(-out_scores[:m]))
        out_classes[:m] = class_id[kept]
    return dict(zip(OUTPUT_NAMES, outputs, strict=True))


def unrivalled(
    class_ids: NDArray[np.int64], nms: Nms, overlap: Callable[[int], FloatArray]
) -> list[int]:
    """As `trtdet.nms.reference.greedy`, but that suppressed boxes suppress too."""
    alive = np.ones(len(class_ids), bool)
    for i in range(len(class_ids)):
        rivals = overlap(i) >= np.float32(nms.iou_threshold)
        alive[i + 1 :] &= ~(rivals & (nms.class_agnostic | (class_ids[i + 1 :] == class_ids[i])))
    return [int(i) for i in np.flatnonzero(alive)[: nms.max_output_boxes]]


def _iou_behind(
    boxes: FloatArray, iou: Callable[[FloatArray, FloatArray], FloatArray], i: int
) -> FloatArray:
    return iou(boxes[i], boxes[i + 1 :])


def iou_exact(better: FloatArray, others: FloatArray) -> FloatArray:
    """IoU of one rotated box (5,) with others (n, 5): (n,) float32.

    Sides of negative length count as 0.
    """
    boxes = np.concatenate([better[None, :5], others[:, :5]]).astype(np.float64)
    boxes[:, 2:4] = np.maximum(boxes[:, :2], boxes[:, 2:4])
    corners = rotated_corners(boxes[:, :4], boxes[:, 4])
    area = (boxes[:, 2:4] - boxes[:, :2]).prod(axis=1)
    centre, radius = corners.mean(axis=1), np.hypot(*(boxes[:, 2:4] - boxes[:, :2]).T) / 2
    near = np.hypot(*(centre[1:] - centre[0]).T) < radius[1:] + radius[0]
    shared = np.zeros(len(others))
    for i in np.flatnonzero(near & (area[0] * area[1:] > 0)):
        shared[i] = polygon_area(clip_polygon(corners[0], corners[i + 1]))
    union = area[0] + area[1:] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0).astype(np.float32)


def iou_odtk(better: FloatArray, others: FloatArray) -> FloatArray:
    """ODTK's overlap of one rotated box (5,) or (6,) with others (n, 5) or (n, 6) of lower
    score: (n,) float32.
    """
    size = np.abs(others[:, 2:4] - others[:, :2]).astype(np.float64)
    size_better = (better[2:4] - better[:2]).astype(np.float64)
    if size_better.prod() < 0:  # inside out, its outline the other way round: nothing is inside
        return np.zeros(len(others), np.float32)
    size_better = np.abs(size_better)
    between = (better[:2].astype(np.float64) + better[2:4] - others[:, :2] - others[:, 2:4]) / 2
    cos, sin = np.cos(others[:, 4], dtype=np.float64), np.sin(others[:, 4], dtype=np.float64)
    x, y = between[:, 0] * cos + between[:, 1] * sin, between[:, 1] * cos - between[:, 0] * sin
    centre = np.stack([x, y], axis=1)
    if others.shape[1] > 5:
        centre /= np.maximum(others[:, 5:6], 1e-6)
    pairs = zip(centre, size, strict=True)
    return np.array(
        [box_iou(_around(c, size_better), _around(np.zeros(2), s)).item() for c, s in pairs],
        np.float32,
    )


def iou_gaussian(better: FloatArray, others: FloatArray) -> FloatArray:
    """Overlap of one rotated box (5,) with others (n, 5) as Gaussians: (n,) float32."""
    boxes = np.concatenate([better[None, :5], others[:, :5]]).astype(np.float64)
    variance = np.maximum(boxes[:, 2:4] - boxes[:, :2], 0) ** 2 / 12  # of a uniform distribution
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    xx = variance[:, 0] * cos**2 + variance[:, 1] * sin**2
    yy = variance[:, 0] * sin**2 + variance[:, 1] * cos**2
    xy = (variance[:, 0] - variance[:, 1]) * cos * sin
    sum_xx, sum_yy, sum_xy = (v[0] + v[1:] for v in (xx, yy, xy))
    dx, dy = (boxes[0, :2] + boxes[0, 2:4] - boxes[1:, :2] - boxes[1:, 2:4]).T / 2
    determinant = sum_xx * sum_yy - sum_xy**2
    apart = (sum_yy * dx**2 + sum_xx * dy**2 - 2 * sum_xy * dx * dy) / (
        determinant + GAUSSIAN_EPSILON
    )
    deviation = np.sqrt(variance.prod(axis=1))
    ratio = determinant / (4 * deviation[0] * deviation[1:] + GAUSSIAN_EPSILON)
    distance = apart / 4 + np.log(np.maximum(ratio, 1)) / 2  # Bhattacharyya
    return (1 - np.sqrt(1 - np.exp(-distance))).astype(np.float32)


def _around(centre: NDArray[np.float64], size: NDArray[np.float64]) -> FloatArray:
    return np.concatenate([centre - size / 2, centre + size / 2])[None]


def clip_polygon(polygon: NDArray[np.float64], window: NDArray[np.float64]) -> NDArray[np.float64]:
    """The part of a convex polygon (n, 2) inside another (m, 2), which has an area: (k, 2).

    Source: Sutherland and Hodgman, "Reentrant polygon clipping", 1974.
    """
    sense = np.sign(polygon_area(window, signed=True))
    for start, end in zip(window, np.roll(window, -1, axis=0), strict=True):
        edge = end - start
        side = sense * (edge[0] * (polygon[:, 1] - start[1]) - edge[1] * (polygon[:, 0] - start[0]))
        kept = []
        for i in range(len(polygon)):
            j = (i + 1) % len(polygon)
            if side[i] >= 0:
                kept.append(polygon[i])
            if (side[i] >= 0) != (side[j] >= 0):
                share = side[i] / (side[i] - side[j])
                kept.append(polygon[i] + share * (polygon[j] - polygon[i]))
        polygon = np.array(kept).reshape(-1, 2)
    return polygon


def polygon_area(polygon: NDArray[np.float64], *, signed: bool = False) -> float:
    """Area of a polygon (n, 2) whose edges do not cross; signed: positive where its corners turn
    from x to y.
    """
    x, y = (polygon - polygon[:1]).T  # near the origin nothing cancels
    area = float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return area if signed else abs(area)
