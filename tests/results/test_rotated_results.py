# SPDX-License-Identifier: Apache-2.0
"""What COCO's metric and pictures make of rotated boxes."""

import json
from pathlib import Path

import numpy as np
import pytest

from trtdet.commands import eval_coco
from trtdet.detections import Detections, to_coco_results
from trtdet.nms.rotated_reference import iou_exact
from trtdet.results import coco, draw


def annotation_file(tmp_path: Path, **changes) -> Path:
    """Two images with two objects each, in ODTK's form: rotated by 30 degrees, 80 x 24 pixels."""
    boxes = ([40, 60, 80, 24, np.pi / 6], [120, 140, 80, 24, np.pi / 6])
    objects = [{"image_id": i, "category_id": 1, "bbox": list(b)} for i in (1, 2) for b in boxes]
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 256, "width": 256} for i in (1, 2)],
        "categories": [{"id": 1, "name": "ship"}],
        "annotations": objects,
    } | changes
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(data))
    return path


def planted(turn=0.0, shift=0.0) -> list[dict]:
    """Detections of those objects, each rotated and moved by so much."""
    boxes = [[40, 60, 120, 84], [120, 140, 200, 164]]
    found = Detections(
        np.array(boxes, np.float32) - np.float32([0, 0, 1, 1]) + np.float32(shift),
        np.array([0.9, 0.8], np.float32),
        np.zeros(2, np.int32),
        np.full(2, np.pi / 6 + turn, np.float32),
    )
    return [r for i in (1, 2) for r in to_coco_results(found, i, (1,), inclusive_corners=True)]


def test_planted_detections_have_the_right_ap(tmp_path: Path) -> None:
    """True overlaps: 1 as planted; after a quarter turn 24 x 24 of the union, 576 / 3264 = 0.18."""
    annotations = coco.read_annotations(annotation_file(tmp_path))
    right = coco.evaluate(annotations, planted(), [1, 2])
    assert right.iou_type == "segm"
    assert right.metrics["AP"] == pytest.approx(1) and right.metrics["AR1"] == pytest.approx(0.5)
    assert coco.evaluate(annotations, planted(turn=np.pi / 2), [1, 2]).metrics["AP50"] == 0
    # Half a turn is the same rectangle.
    assert coco.evaluate(annotations, planted(turn=np.pi), [1, 2]).metrics["AP"] == pytest.approx(1)
    # One of two found, in one of two images: a quarter of the objects, at precision 1. 26 of 101
    # recalls.
    some = coco.evaluate(annotations, planted()[:1], [1, 2]).metrics
    assert some["AP"] == pytest.approx(26 / 101)


def test_a_turn_passes_the_thresholds_below_its_overlap(tmp_path: Path) -> None:
    """Rotated by 0.11, the rectangles share 0.82 of their union: seven of COCO's ten thresholds,
    0.5 to 0.8.
    """
    box = np.array([40, 60, 119, 83, np.pi / 6])
    iou = iou_exact(box, box[None] + [0, 0, 0, 0, 0.11]).item()
    assert 0.81 < iou < 0.84
    annotations = coco.read_annotations(annotation_file(tmp_path))
    metrics = coco.evaluate(annotations, planted(turn=0.11), [1, 2]).metrics
    assert metrics["AP"] == pytest.approx(0.7)
    assert metrics["AP50"] == pytest.approx(1) and metrics["AP75"] == pytest.approx(1)


def test_upright_detections_of_rotated_objects_are_judged_as_polygons(tmp_path: Path) -> None:
    annotations = coco.read_annotations(annotation_file(tmp_path))
    results = [{k: v for k, v in r.items() if k != "segmentation"} | {"bbox": r["bbox"][:4]} for r in planted()]  # fmt: skip
    evaluation = coco.evaluate(annotations, results, [1, 2])
    assert evaluation.iou_type == "segm" and evaluation.metrics["AP"] == 0


def test_rotated_boxes_need_the_size_of_the_images(tmp_path: Path) -> None:
    path = annotation_file(tmp_path, images=[{"id": i, "file_name": f"{i}.png"} for i in (1, 2)])
    with pytest.raises(ValueError, match="expected height and width of every image"):
        coco.evaluate(coco.read_annotations(path), planted(), [1, 2])


def test_eval_coco_reads_odtks_own_file(tmp_path: Path, capsys) -> None:
    """ODTK keeps detections under "annotations", beside images and categories."""
    found = tmp_path / "detections.json"
    found.write_text(json.dumps({"annotations": planted(), "images": [], "categories": []}))
    report = tmp_path / "metrics.json"
    arguments = ["--detections", str(found), "--annotations", str(annotation_file(tmp_path))]
    assert eval_coco.main([*arguments, "--json", str(report)]) == 0
    assert "rotated boxes" in capsys.readouterr().out
    assert json.loads(report.read_text())["AP"] == pytest.approx(1)


def test_a_rotated_box_is_drawn_along_its_sides() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    found = Detections(
        np.array([[20, 40, 80, 60]], np.float32),
        np.ones(1, np.float32),
        np.zeros(1, np.int32),
        np.array([np.pi / 4], np.float32),
    )
    drawn = draw.draw(image, found).any(axis=-1)
    corners = np.rint(found.corners[0]).astype(int)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        middle = (x0 + x1) // 2, (y0 + y1) // 2
        assert drawn[middle[1] - 1 : middle[1] + 2, middle[0] - 1 : middle[0] + 2].any()
    assert not drawn[50, 50]  # the inside is left free
    assert not drawn[75, 25]  # and so is where the box is not


def test_annotated_rotated_boxes_are_drawn_rotated(tmp_path: Path) -> None:
    annotations = coco.read_annotations(annotation_file(tmp_path))
    truth = coco.ground_truth(annotations, {1: 0})[1]
    np.testing.assert_allclose(truth.angles, np.pi / 6, rtol=1e-6)
    assert truth.boxes_xyxy[0].tolist() == [40, 60, 120, 84]
