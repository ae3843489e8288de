# SPDX-License-Identifier: Apache-2.0
"""TensorRT's EfficientNMS_TRT plugin in NumPy: what every form of the NMS in `trtdet.nms` has to
equal.

Source: NVIDIA/TensorRT plugin/efficientNMSPlugin at release 11.1, plugin version 1, the only one;
the same since 8.2 but for `class_agnostic`, which came with 8.6.0 and is ignored before (the facts
below, not every line):

* A candidate is one (anchor, class) pair. Its score passes when `score >= score_threshold`; with
  `score_activation` the threshold is turned into a logit and raw logits are compared and sorted,
  the sigmoid is taken of what comes out.
* Candidates are sorted by score, best first. Equal scores: the plugin's order is that of the flat
  index anchor * C + class where it takes its dense path (score_threshold < 0.007) and not defined
  elsewhere (an atomic counter); here it is always the flat index.
* The best 5000 of an image go on (2000 on GPUs with less than 64 k registers per block; the 4096 of
  its README is an initial value that `initialize()` overwrites).
* Greedy hard NMS: a box goes when its IoU with a kept, better one is >= `iou_threshold`; only boxes
  of one class compete, unless `class_agnostic`. It stops at `max_output_boxes`.
* Boxes come out as corners, never clipped. Slots not used are zero in all outputs, classes too.

One thing the plugin does is left out: on its dense path, scores below the threshold are not dropped
but set to -32768, sort to the end, and fill slots that are still free (counted in num_detections,
with score 0 after the sigmoid, -32768 without). They never displace a real detection;
`trtdet.detections.decode` drops them.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from trtdet.geometry import FloatArray, box_iou
from trtdet.spec import OUTPUT_NAMES, Nms

#: Candidates of an image that the plugin lets into the suppression, on every GPU but the smallest.
PLUGIN_CANDIDATES = 5000

#: What the plugin takes for the logit of a score threshold of 0.
_LOGIT_OF_ZERO = -32768.0


def reference(
    boxes: FloatArray,
    scores: FloatArray,
    nms: Nms,
    anchors: FloatArray | None = None,
    *,
    candidates: int = PLUGIN_CANDIDATES,
) -> dict[str, NDArray[np.float32] | NDArray[np.int32]]:
    """Decode, threshold, sort and suppress, as the plugin does.

    Args:
        boxes: (N, A, 4) or (N, A, 1, 4), coded as `nms.box_coding` says: y1 x1 y2 x2, or centre and
            size y x h w; relative to the anchors where there are any. x before y works as well, it
            comes out as it went in.
        scores: (N, A, C), logits if `nms.score_activation`.
        anchors: (1, A, 4) or (N, A, 4), same coding; None: the boxes are decoded already.
        candidates: best (anchor, class) pairs of an image that are looked at.

    Returns:
        The four outputs by name: int32 (N, 1), float32 (N, K, 4) corners, float32 (N, K), int32 (N,
            K); K = max_output_boxes.
    """
    n, _, num_classes = scores.shape
    k = nms.max_output_boxes
    scores = scores.astype(np.float32)
    boxes = boxes.astype(np.float32).reshape(n, -1, 4)
    corners = decode_boxes(boxes, nms.box_coding, anchors)
    outputs = (
        np.zeros((n, 1), np.int32),
        np.zeros((n, k, 4), np.float32),
        np.zeros((n, k), np.float32),
        np.zeros((n, k), np.int32),
    )
    for image, (count, out_boxes, out_scores, out_classes) in enumerate(zip(*outputs, strict=True)):
        order = best_candidates(scores[image], nms, candidates)
        anchor, class_id = np.divmod(order, num_classes)
        ordered = in_order(corners[image, anchor])
        kept = greedy(class_id, nms, partial(_iou_behind, ordered))
        count[0] = m = len(kept)
        out_boxes[:m] = corners[image, anchor[kept]]
        out_scores[:m] = scores[image].reshape(-1)[order[kept]]
        if nms.score_activation:
            out_scores[:m] = 1 / (1 + np.exp(-out_scores[:m]))
        out_classes[:m] = class_id[kept]
    return dict(zip(OUTPUT_NAMES, outputs, strict=True))


def decode_boxes(
    boxes: FloatArray, box_coding: int, anchors: FloatArray | None = None
) -> FloatArray:
    """Boxes (..., 4) of either coding, relative to `anchors` or not, as corners.

    Float32 throughout, in the plugin's order.

    Centre and size: y = ty * ha + ya, h = ha * exp(th), y1 = y - h / 2; EfficientDet's and
    TensorFlow's coding without scale factors. Corners: anchor + box, each with its corners in order
    first.
    """
    boxes = boxes.astype(np.float32)
    if anchors is not None:
        anchors = anchors.astype(np.float32)
    if box_coding == 0:
        return boxes if anchors is None else in_order(boxes) + in_order(anchors)
    centre, size = boxes[..., :2], boxes[..., 2:]
    if anchors is not None:
        centre = centre * anchors[..., 2:] + anchors[..., :2]
        size = anchors[..., 2:] * np.exp(size)
    half = size * np.float32(0.5)
    return np.concatenate([centre - half, centre + half], axis=-1)


def in_order(boxes: FloatArray) -> FloatArray:
    """Corner boxes (..., 4) with the smaller coordinates first."""
    first, second = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=-1)


def score_limit(nms: Nms) -> np.float32:
    """The least score, on the scale of the plugin's input, that passes `nms.score_threshold`."""
    threshold = np.float32(nms.score_threshold)
    if not nms.score_activation:
        return threshold
    if threshold <= 0:
        return np.float32(_LOGIT_OF_ZERO)
    with np.errstate(divide="ignore"):  # a threshold of 1 is a logit of infinity
        return np.log(threshold / (np.float32(1) - threshold))


def best_candidates(scores: FloatArray, nms: Nms, limit: int) -> NDArray[np.int64]:
    """Flat indices into (A, C) of the best `limit` scores above the threshold, best first, equal
    ones by index.
    """
    passed = scores >= score_limit(nms)
    if 0 <= nms.background_class < scores.shape[1]:
        passed[:, nms.background_class] = False
    index = np.flatnonzero(passed)
    values = scores.reshape(-1)[index]
    if len(values) > limit:  # a full sort of all pairs would take most of the time
        enough = values >= np.partition(values, -limit)[-limit]
        index, values = index[enough], values[enough]
    return index[np.argsort(-values, kind="stable")[:limit]]


def _iou_behind(corners: FloatArray, i: int) -> FloatArray:
    return box_iou(corners[i : i + 1], corners[i + 1 :])[0]


def greedy(
    class_ids: NDArray[np.int64], nms: Nms, overlap: Callable[[int], FloatArray]
) -> list[int]:
    """Positions that survive, of boxes sorted best first; at most `max_output_boxes`.

    Args:
        overlap: position of a box -> its IoU with each of those behind it.
    """
    alive = np.ones(len(class_ids), bool)
    kept: list[int] = []
    for i in range(len(class_ids)):
        if not alive[i]:
            continue
        kept.append(i)
        if len(kept) == nms.max_output_boxes:
            break
        suppressed = overlap(i) >= np.float32(nms.iou_threshold)
        if not nms.class_agnostic:
            suppressed &= class_ids[i + 1 :] == class_ids[i]
        alive[i + 1 :] &= ~suppressed
    return kept
