# SPDX-License-Identifier: Apache-2.0
"""The objective: which anchors matter, and what errors of boxes and scores come to."""

import numpy as np
import pytest

from trtdet.precision.objective import (
    Coding,
    Damage,
    damage,
    displacement,
    paired_iou,
    reference,
)
from trtdet.spec import Nms

LOGITS = Nms(score_activation=True, box_coding=1)


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def test_anchors_that_matter_are_the_best_above_a_score() -> None:
    coding = Coding("b", "s", Nms(score_activation=False, box_coding=0, background_class=2))
    scores = np.array([[0.1, 0.2, 0.9], [0.6, 0.3, 0.0], [0.04, 0.01, 0.9], [0.1, 0.5, 0.0]], np.float32)  # fmt: skip
    boxes = np.arange(16, dtype=np.float32).reshape(4, 4)
    found = reference(coding, boxes, scores)
    assert found.anchors.tolist() == [1, 3, 0]  # 2 is background; so is 0, less than its class 1
    assert found.classes.tolist() == [0, 1, 1]
    assert found.scores == pytest.approx([0.6, 0.5, 0.2])
    assert found.weight == pytest.approx(1.3)
    assert np.array_equal(found.boxes, boxes[[1, 3, 0]])
    assert reference(coding, boxes, scores, most=2).anchors.tolist() == [1, 3]
    assert reference(coding, boxes, scores, least_score=0.55).anchors.tolist() == [1]
    assert not len(reference(coding, boxes, scores * 0).anchors)


def test_boxes_are_decoded_relative_to_anchors() -> None:
    anchors = np.array([[10, 20, 4, 8]], np.float32)  # y x h w
    coding = Coding("b", "s", LOGITS, anchors)
    boxes = np.array([[0.5, -0.25, np.log(2), 0]], np.float32)  # centre 12 18, size 8 8
    found = reference(coding, boxes, np.array([[logit(0.8)]], np.float32))
    assert found.boxes == pytest.approx(np.array([[8, 14, 16, 22]]))
    assert found.scores == pytest.approx([0.8])


def test_a_shifted_box_and_a_lower_score() -> None:
    """A box of 10 x 20 moved by 1 along its side of 10: IoU 9 / 11; edges by a tenth each."""
    coding = Coding("b", "s", Nms(score_activation=False, box_coding=0))
    boxes = np.array([[0, 0, 10, 20], [5, 5, 9, 9]], np.float32)
    scores = np.array([[0.5], [0.25]], np.float32)
    expected = reference(coding, boxes, scores)
    moved = boxes + np.array([[1, 0, 1, 0], [0, 0, 0, 0]], np.float32)
    found = damage(coding, expected, moved, scores - np.float32(0.1))
    assert found.weight == pytest.approx(0.75)
    assert found.box_loss == pytest.approx(0.5 * (1 - 9 / 11))
    assert found.box_power == pytest.approx(0.5 * 0.02 / 1.02)
    assert found.score_loss == pytest.approx(0.75 * 0.1)
    assert found.score_power == pytest.approx(0.75 * 0.01)
    mean = found.mean()
    assert mean.box_loss == pytest.approx(0.5 * (1 - 9 / 11) / 0.75) and mean.weight == 1


def test_a_head_that_is_as_it_was_does_no_damage() -> None:
    coding = Coding("b", "s", LOGITS)
    boxes, scores = np.array([[5, 5, 2, 2]], np.float32), np.array([[0.0]], np.float32)
    expected = reference(coding, boxes, scores)
    assert damage(coding, expected, None, None) == Damage(weight=0.5)
    assert damage(coding, expected, boxes, scores) == Damage(weight=0.5)


def test_damage_adds_up_over_images() -> None:
    one, two = Damage(1, 0.1, 0.2, 0.3, 0.4), Damage(3, 0.3, 0.2, 0.1, 0.0)
    assert (one + two).mean() == Damage(1.0, 0.1, 0.1, 0.1, 0.1)
    assert Damage().mean() == Damage(1.0)


def test_powers_of_independent_errors_add_up_and_losses_do_not() -> None:
    rng = np.random.default_rng(0)
    coding = Coding("b", "s", Nms(score_activation=True, box_coding=0))
    boxes = np.tile(np.array([[0, 0, 10, 20]], np.float32), (4000, 1))
    scores = rng.normal(size=(4000, 1)).astype(np.float32)
    expected = reference(coding, boxes, scores, most=4000, least_score=0)
    errors = [
        (
            rng.normal(0, 0.3, boxes.shape).astype(np.float32),
            rng.normal(0, 0.1, scores.shape).astype(np.float32),
        )
        for _ in range(4)
    ]
    alone = sum((damage(coding, expected, boxes + b, scores + s) for b, s in errors), Damage())
    together = damage(
        coding, expected, boxes + sum(b for b, _ in errors), scores + sum(s for _, s in errors)
    )
    assert together.box_power == pytest.approx(alone.box_power, rel=0.05)
    assert together.score_power == pytest.approx(alone.score_power, rel=0.05)
    assert together.box_loss == pytest.approx(alone.box_loss / 2, rel=0.05)  # sqrt(4) of 4
    assert together.score_loss == pytest.approx(alone.score_loss / 2, rel=0.05)


def test_rotated_boxes_count_their_angle() -> None:
    coding = Coding("b", "s", Nms(score_activation=False))
    boxes = np.array([[0, 0, 10, 20, 0.5, 1.0]], np.float32)  # ODTK's sixth column is not looked at
    expected = reference(coding, boxes, np.array([[1.0]], np.float32))
    rotated = boxes + np.array([[0, 0, 0, 0, 0.1, 3]], np.float32)
    found = damage(coding, expected, rotated, None)
    assert found.box_power == pytest.approx(
        0.01 / 1.01, rel=1e-5
    ) and found.box_loss == pytest.approx(0)


def test_empty_boxes_have_finite_displacements() -> None:
    empty = np.zeros((1, 4), np.float32)
    assert displacement(empty, empty).tolist() == [0]
    assert displacement(empty, empty + 1) == pytest.approx([1])
    assert paired_iou(empty, empty).tolist() == [0]
