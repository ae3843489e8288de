# SPDX-License-Identifier: Apache-2.0
"""The NumPy reference against results worked out by hand from the plugin's source."""

import numpy as np
import pytest

from trtdet.nms.reference import decode_boxes, reference, score_limit
from trtdet.spec import OUTPUT_NAMES, Nms

PLAIN = Nms(score_threshold=0.1, max_output_boxes=4, score_activation=False, box_coding=0)


def detect(boxes, scores, nms=PLAIN, **options):
    """One image: (boxes, scores, class ids) of its detections."""
    boxes = np.array([boxes], np.float32)
    scores = np.array([scores], np.float32)
    outputs = reference(boxes, scores, nms, **options)
    n = outputs["num_detections"][0, 0]
    return tuple(outputs[name][0, :n].tolist() for name in OUTPUT_NAMES[1:])


def with_(**changes):
    return Nms(**{**PLAIN.__dict__, **changes})


# y1 x1 y2 x2. HALF overlaps UNIT with an IoU of exactly 1/2, FAR overlaps nothing.
UNIT, HALF, FAR = [0, 0, 2, 2], [0, 0, 2, 1], [8, 8, 9, 9]


@pytest.mark.parametrize(
    ("boxes", "scores", "nms", "kept_boxes", "kept_scores", "kept_classes"),
    [
        # sorted by score
        ([FAR, UNIT], [[0.5], [0.75]], PLAIN, [UNIT, FAR], [0.75, 0.5], [0, 0]),
        # an IoU equal to the threshold suppresses
        ([UNIT, HALF], [[0.75], [0.5]], PLAIN, [UNIT], [0.75], [0]),
        # one just below does not
        ([UNIT, HALF], [[0.75], [0.5]], with_(iou_threshold=0.5001), [UNIT, HALF], [0.75, 0.5], [0, 0]),
        # a score equal to the threshold passes, a lower one does not
        ([UNIT, FAR], [[0.5], [0.4375]], with_(score_threshold=0.5), [UNIT], [0.5], [0]),
        # nothing passes
        ([UNIT, FAR], [[0.5], [0.4375]], with_(score_threshold=0.75), [], [], []),
        # every class of a box is a candidate, and classes do not suppress each other
        ([UNIT], [[0.5, 0.75]], PLAIN, [UNIT, UNIT], [0.75, 0.5], [1, 0]),
        # unless NMS is class-agnostic
        ([UNIT, HALF], [[0.5, 0.25], [0.125, 0.75]], with_(class_agnostic=True), [HALF], [0.75], [1]),
        # equal scores: by anchor, then by class
        ([FAR, UNIT], [[0.5, 0.5], [0.25, 0.5]], PLAIN, [FAR, FAR, UNIT, UNIT], [0.5, 0.5, 0.5, 0.25], [0, 1, 1, 0]),
        # equal scores: the lower index survives
        ([HALF, UNIT], [[0.5], [0.5]], PLAIN, [HALF], [0.5], [0]),
        # the background class is no candidate
        ([UNIT], [[0.5, 0.75]], with_(background_class=1), [UNIT], [0.5], [0]),
        # a suppressed box suppresses nothing: the third overlaps the second only
        ([[0, 0, 1, 4], [0, 1, 1, 5], [0, 2, 1, 6]], [[0.75], [0.5], [0.25]], PLAIN, [[0, 0, 1, 4], [0, 2, 1, 6]], [0.75, 0.25], [0, 0]),
        # max_output_boxes
        ([FAR, UNIT], [[0.5], [0.75]], with_(max_output_boxes=1), [UNIT], [0.75], [0]),
        # corners out of order count as the box they span, and come out as they are
        ([UNIT, [2, 1, 0, 0]], [[0.5], [0.75]], PLAIN, [[2, 1, 0, 0]], [0.75], [0]),
        # boxes outside the image are not clipped
        ([[-5, -5, -3, 900]], [[0.5]], PLAIN, [[-5, -5, -3, 900]], [0.5], [0]),
        # empty boxes overlap nothing, not even themselves
        ([[1, 1, 1, 1], [1, 1, 1, 1]], [[0.75], [0.5]], PLAIN, [[1, 1, 1, 1]] * 2, [0.75, 0.5], [0, 0]),
    ],
)  # fmt: skip
def test_detections(boxes, scores, nms, kept_boxes, kept_scores, kept_classes):
    assert detect(boxes, scores, nms) == (kept_boxes, kept_scores, kept_classes)


def test_unused_slots_are_zero():
    boxes = np.array([[UNIT, FAR], [FAR, FAR]], np.float32)
    scores = np.array([[[0, 0.5], [0, 0.25]], [[0, 0], [0, 0]]], np.float32)
    outputs = reference(boxes, scores, PLAIN)
    assert outputs["num_detections"].tolist() == [[2], [0]]
    assert outputs["detection_boxes"].tolist() == [[UNIT, FAR, [0] * 4, [0] * 4], [[0] * 4] * 4]
    assert outputs["detection_scores"].tolist() == [[0.5, 0.25, 0, 0], [0] * 4]
    assert outputs["detection_classes"].tolist() == [[1, 1, 0, 0], [0] * 4]
    assert [outputs[name].dtype for name in OUTPUT_NAMES] == [np.int32, np.float32, np.float32, np.int32]  # fmt: skip


def test_candidate_limit_counts_pairs_before_suppression():
    boxes, scores = [UNIT, UNIT, FAR], [[0.75, 0.625], [0.5, 0], [0.25, 0]]
    assert detect(boxes, scores, candidates=3)[1] == [0.75, 0.625]  # the third is suppressed
    assert detect(boxes, scores, candidates=4)[1] == [0.75, 0.625, 0.25]


def test_candidate_limit_breaks_ties_by_index():
    boxes = [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]]
    assert detect(boxes, [[0.5], [0.5], [0.5]], candidates=2)[0] == boxes[:2]


def test_logits_are_compared_before_the_sigmoid():
    # Both sigmoids round to 1.0; the order is that of the logits.
    nms = with_(score_activation=True, score_threshold=0.5)
    boxes, scores, _ = detect([UNIT, FAR, HALF], [[30], [31], [-0.001]], nms)
    assert boxes == [FAR, UNIT]
    assert scores == [1.0, 1.0]


@pytest.mark.parametrize(
    ("threshold", "activation", "limit"),
    [
        (0.4, True, np.log(0.4 / 0.6)),
        (0.5, True, 0.0),
        (0.0, True, -32768.0),  # the plugin's stand-in for minus infinity
        (1.0, True, np.inf),
        (0.4, False, 0.4),
        (0.0, False, 0.0),
    ],
)
def test_score_limit(threshold, activation, limit):
    nms = Nms(score_threshold=threshold, score_activation=activation)
    assert score_limit(nms) == pytest.approx(limit, abs=1e-6)


@pytest.mark.parametrize(
    ("box", "coding", "anchor", "corners"),
    [
        # a zero offset is the anchor itself: y x h w -> y1 x1 y2 x2
        ([0, 0, 0, 0], 1, [10, 20, 4, 8], [8, 16, 12, 24]),
        # half an anchor down, a quarter to the left, twice as high
        ([0.5, -0.25, np.log(2), 0], 1, [10, 20, 4, 8], [8, 14, 16, 22]),
        # centre and size without anchors
        ([10, 20, 4, 8], 1, None, [8, 16, 12, 24]),
        # corners without anchors: as they are
        ([3, 4, 1, 2], 0, None, [3, 4, 1, 2]),
        # corners relative to an anchor: both in order, then added
        ([3, 4, 1, 2], 0, [10, 20, 30, 40], [11, 22, 33, 44]),
    ],
)
def test_decode_boxes(box, coding, anchor, corners):
    anchors = None if anchor is None else np.array([anchor], np.float32)
    decoded = decode_boxes(np.array([box], np.float32), coding, anchors)
    np.testing.assert_allclose(decoded, [corners], rtol=1e-6)
    assert decoded.dtype == np.float32


def test_anchors_are_shared_or_per_image():
    boxes = np.zeros((2, 1, 4), np.float32)
    scores = np.full((2, 1, 1), 0.5, np.float32)
    nms = with_(box_coding=1)
    anchors = np.array([[[10, 20, 4, 8]], [[30, 40, 4, 8]]], np.float32)
    per_image = reference(boxes, scores, nms, anchors)["detection_boxes"][:, 0].tolist()
    assert per_image == [[8, 16, 12, 24], [28, 36, 32, 44]]
    shared = reference(boxes, scores, nms, anchors[:1])["detection_boxes"][:, 0].tolist()
    assert shared == [[8, 16, 12, 24]] * 2
