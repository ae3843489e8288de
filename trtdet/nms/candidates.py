# SPDX-License-Identifier: Apache-2.0
"""The (anchor, class) pairs that an NMS looks at: the best of each image, in the graph."""

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from trtdet.graph.builder import Builder
from trtdet.nms.reference import score_limit
from trtdet.spec import Nms

#: The largest K that TensorRT's TopK takes.
TENSORRT_TOPK = 3840

_LOWEST = np.float32(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Candidates:
    """The best (anchor, class) pairs of each image, best first.

    The last four are names of tensors [N, count]; with `by_threshold` of `best_candidates` there
    are as few columns as the images need.
    """

    count: int
    num_classes: int
    score: str
    anchor: str  # int64
    class_id: str  # int64
    rank: str  # float32: count for the best, 1 for the last, 0 for those below the score threshold


def best_candidates(
    build: Builder,
    scores: str,
    num_anchors: int | None,
    num_classes: int,
    nms: Nms,
    limit: int,
    *,
    by_threshold: bool = False,
) -> Candidates:
    """
    Args:
        limit: candidates of an image, at most.
        by_threshold: leave out the columns in which every score of the batch is below the
            threshold, but keep `max_output_boxes` of them.
    """
    if 0 <= nms.background_class < num_classes:
        background = np.arange(num_classes)[None, None] == nms.background_class
        scores = build.node("Where", "scores_foreground", background, _LOWEST, scores)
    if num_anchors is None:  # so many rows more that there are enough in any case
        scores = pad_rows(build, "scores_padded", scores, limit, _LOWEST)
    shortlist = None
    if num_classes > 1 and (num_anchors is None or num_anchors > limit):
        # The best `limit` pairs belong to the best `limit` anchors, each judged by its best class,
        # so a TopK of the anchors first spares one of all pairs. Ties too: among equals the lower
        # anchor comes first either way. That is also why the short list goes back to the order of
        # the anchors; as float, which TopK takes in every release, and exact to 2**24.
        best_class = build.reduce("ReduceMax", "best_class_score", scores, 2, keepdims=False)
        some = _reaching(build, "anchors", best_class, nms, limit) if by_threshold else limit
        _, unordered = build.top_k("best_anchors", best_class, some)
        as_float = build.cast("best_anchors_float", unordered, TensorProto.FLOAT)
        ordered, _ = build.top_k("best_anchors_in_order", as_float, some, largest=False)
        shortlist = build.cast("best_anchors_int", ordered, TensorProto.INT64)
        scores = build.take_rows("best_anchor_scores", scores, shortlist, num_classes)
    count = limit if num_anchors is None else min(limit, num_anchors * num_classes)
    flat = build.reshape("scores_flat", scores, [0, -1])
    wanted = _reaching(build, "pairs", flat, nms, count) if by_threshold else count
    score, index = build.top_k("candidates", flat, wanted)
    row = build.node("Div", "candidate_rows", index, np.int64(num_classes))
    row_start = build.node("Mul", "candidate_row_starts", row, np.int64(num_classes))
    class_id = build.node("Sub", "candidate_classes", index, row_start)
    if shortlist is None:
        anchor = row
    else:
        anchor = build.node("GatherElements", "candidate_anchor_ids", shortlist, row, axis=1)
    valid = build.node("Greater", "candidate_valid", score, just_below(score_limit(nms)))
    ranks: str | np.ndarray = np.arange(count, 0, -1, dtype=np.float32)[None]
    if isinstance(wanted, str):
        start, axis = np.array([0], np.int64), np.array([1], np.int64)
        ranks = build.node("Slice", "best_ranks", ranks, start, wanted, axis)
    rank = build.node("Where", "candidate_ranks", valid, ranks, np.float32(0))
    return Candidates(count, num_classes, score, anchor, class_id, rank)


def _reaching(build: Builder, what: str, scores: str, nms: Nms, most: int) -> str:
    """How many of the scores [N, x] of an image reach the threshold, in the image that has most of
    them: [1] int64; at least `nms.max_output_boxes`, `most` at most.
    """
    reaches = build.node("Greater", f"{what}_reach", scores, just_below(score_limit(nms)))
    ones = build.cast(f"{what}_ones", reaches, TensorProto.FLOAT)
    each = build.reduce("ReduceSum", f"{what}_of_each", ones, 1, keepdims=False)
    largest = build.reduce("ReduceMax", f"{what}_of_one", each, 0, keepdims=True)
    number = build.cast(f"{what}_number", largest, TensorProto.INT64)
    least = np.array([min(nms.max_output_boxes, most)], np.int64)
    number = build.node("Max", f"{what}_at_least", number, least)
    return build.node("Min", f"{what}_at_most", number, np.array([most], np.int64))


def pad_rows(build: Builder, name: str, tensor: str, count: int, value: np.float32) -> str:
    """`count` more rows of `value` along axis 1 of [N, A, x]."""
    return build.node("Pad", name, tensor, np.array([0, 0, 0, 0, count, 0], np.int64), value)


def just_below(threshold: np.float32) -> np.float32:
    """x > just_below(t) is x >= t, for float32: ONNX's operators compare strictly, the plugin
    does not.
    """
    return np.nextafter(threshold, np.float32(-np.inf))
