# SPDX-License-Identifier: Apache-2.0
"""Detections of one image: thresholds, decoding of outputs, TSV files, COCO's results format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtdet.detections import (
    Detections,
    coco_text,
    decode,
    read_tsv,
    to_coco_results,
    tsv_text,
    write_tsv,
)
from trtdet.geometry import ResizeTransform
from trtdet.spec import ModelSpec, Nms, Preprocessing


def detections(angles=(0.5, -1.0)) -> Detections:
    return Detections(
        np.array([[10, 20, 50, 40], [60, 60, 90, 80]], np.float32),
        np.array([0.9, 0.4], np.float32),
        np.array([1, 0], np.int32),
        None if angles is None else np.array(angles, np.float32),
    )


def test_a_threshold_keeps_the_angles_of_what_it_keeps() -> None:
    kept = detections().above(0.5)
    assert len(kept) == 1 and kept.angles.tolist() == [0.5]
    assert detections(None).above(0.5).angles is None
    with pytest.raises(ValueError, match="expected 2 angles, got"):
        detections((0.5,))


def test_rotated_boxes_are_not_cut_to_the_image() -> None:
    """Cutting would move the centre. The scale is the same for both axes, so the angle stays."""
    spec = ModelSpec("retinanet", Preprocessing((64, 64)), Nms(), (1,), box_order="xyxy")
    outputs = {
        "num_detections": np.array([[1]], np.int32),
        "detection_boxes": np.array([[[-10, 0, 30, 20, 0.25]]], np.float32),
        "detection_scores": np.array([[0.9]], np.float32),
        "detection_classes": np.zeros((1, 1), np.int32),
    }
    (found,) = decode(outputs, spec, [ResizeTransform((100, 100), (0.5, 0.5))])
    assert found.boxes_xyxy.tolist() == [[-20, 0, 60, 40]] and found.angles.tolist() == [0.25]


@pytest.mark.parametrize(
    ("labels", "header", "columns"),
    [
        ((), False, 7),
        ((), True, 7),
        (("pear", "3"), True, 8),  # a label that reads like a number
    ],
)
def test_tsv_keeps_the_angle(tmp_path: Path, labels: tuple, header: bool, columns: int) -> None:
    path = tmp_path / "a.tsv"
    write_tsv(path, detections(), labels=labels, header=header)
    lines = path.read_text().splitlines()
    assert {len(line.split("\t")) for line in lines} == {columns}
    if header:
        assert lines[0].split("\t")[6] == "angle"
    back = read_tsv(path)
    np.testing.assert_allclose(back.angles, [0.5, -1.0], atol=1e-6)
    np.testing.assert_allclose(back.boxes_xyxy, detections().boxes_xyxy, atol=1e-3)


@pytest.mark.parametrize("header", [False, True])
def test_tsv_of_upright_boxes_has_no_angle(tmp_path: Path, header: bool) -> None:
    path = tmp_path / "a.tsv"
    write_tsv(path, detections(None), labels=("pear", "plum"), header=header)
    assert "angle" not in path.read_text() and read_tsv(path).angles is None


def test_json_has_odtks_form() -> None:
    first, second = to_coco_results(detections((0, np.pi / 2)), 7, (1, 5), inclusive_corners=True)
    assert first["bbox"] == [10, 20, 41, 21, 0] and first["category_id"] == 5  # the last pixel too
    assert first["segmentation"] == [[10, 20, 10, 40, 50, 40, 50, 20]]  # without it
    np.testing.assert_allclose(second["segmentation"], [[85, 55, 65, 55, 65, 85, 85, 85]], atol=1e-3)  # fmt: skip
    (plain, _) = to_coco_results(detections((0, 0)), 7, (1, 5))
    assert plain["bbox"] == [10, 20, 40, 20, 0]
    assert "segmentation" not in to_coco_results(detections(None), 7, (1, 5))[0]


#: Ties, numbers that float32 has no exact form of, and scores that are written with an exponent.
AWKWARD = [0.0625, 0.0005, 0.1875, 2.5e-6, 1e-7, 123456.789, 1e6, -3.0004999, 0.1, 99.9995]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("image_id", [7, 'a "%s" é.jpg'])
def test_text_of_many_is_that_of_each(rotated: bool, image_id: int | str) -> None:
    """Values are written as Python's own `round`, `repr` and formats write each of them."""
    random = np.random.default_rng(0)
    values = np.concatenate([AWKWARD, random.uniform(-9, 5000, 190)]).astype(np.float32)
    boxes, scores = values.reshape(-1, 4), np.float32(random.uniform(0, 1, 50) ** 9)
    angles = np.float32(random.uniform(-3, 3, 50)) if rotated else None
    many = Detections(boxes, scores, np.arange(50, dtype=np.int32) % 3, angles)
    results = to_coco_results(many, image_id, (1, 5, 90))
    for result, (x1, y1, x2, y2), score in zip(results, boxes, scores, strict=True):
        expected = [round(float(value), 3) for value in (x1, y1, x2 - x1, y2 - y1)]
        assert result["bbox"][:4] == expected
        assert result["score"] == round(float(score), 6)
    text = coco_text(many, image_id, (1, 5, 90))
    assert text == ",\n".join(json.dumps(result) for result in results)
    labels = ("100 %", "%s", "pear")
    lines = tsv_text(many, labels=labels).splitlines()
    for row, line in enumerate(lines):
        fields = [*(f"{x:.3f}" for x in boxes[row]), f"{scores[row]:.6f}", str(row % 3)]
        if angles is not None:
            fields.append(f"{angles[row]:.6f}")
        assert line == "\t".join([*fields, labels[row % 3]])


def test_text_of_none() -> None:
    none = detections(None).above(2)
    assert (tsv_text(none), coco_text(none, 1, (1, 5))) == ("", "")
    assert tsv_text(none, header=True) == "xmin\tymin\txmax\tymax\tscore\tclass\n"


# ---- outputs that are none of a detector's


def outputs_of(**changes: Any) -> dict[str, Any]:
    """Two detections of one image, with some outputs replaced."""
    sound = {
        "num_detections": np.array([[2]], np.int32),
        "detection_boxes": np.array([[[0, 0, 4, 4], [1, 1, 9, 9]]], np.float32),
        "detection_scores": np.array([[0.9, 0.8]], np.float32),
        "detection_classes": np.array([[0, 2]], np.int32),
    }
    return {**sound, **changes}


SPEC = ModelSpec("toy", Preprocessing((16, 16)), Nms(), (5, 6, 7), box_order="xyxy")
HERE = [ResizeTransform((16, 16), (1.0, 1.0))]


@pytest.mark.parametrize("classes", [[0, 3], [-1, 0], [0, 2**31 - 1]])
def test_a_class_that_the_model_does_not_have_is_an_error(classes: list[int]) -> None:
    outputs = outputs_of(detection_classes=np.array([classes], np.int32))
    wrong = next(c for c in classes if not 0 <= c < 3)
    with pytest.raises(ValueError, match=rf"^detection_classes: expected 0 to 2, found {wrong}; convert"):  # fmt: skip
        decode(outputs, SPEC, HERE)
    outputs["num_detections"][0] = classes.index(wrong)  # behind those that count
    assert len(decode(outputs, SPEC, HERE)[0]) == classes.index(wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["detection_boxes", "detection_scores"])
def test_what_is_not_finite_is_left_out_and_said(place: str, value: float, caplog: Any) -> None:
    outputs = outputs_of()
    outputs[place] = outputs[place].copy()
    outputs[place].flat[0] = value
    (found,) = decode(outputs, SPEC, HERE)
    assert found.boxes_xyxy.tolist() == [[1, 1, 9, 9]] and found.class_ids.tolist() == [2]
    json.loads(f"[{coco_text(found, 1, SPEC.category_ids)}]", parse_constant=pytest.fail)
    silent = place == "detection_scores" and not value > 0  # as a free slot
    said = "1 of 2 detections of an image are left out: their boxes or scores are not finite"
    assert [said in text for text in caplog.messages] == ([] if silent else [True])


@pytest.mark.parametrize(("count", "found"), [(-1, 0), (-(2**31), 0), (2**31 - 1, 2), (0, 0), (1, 1)])  # fmt: skip
def test_a_count_is_never_more_than_there_is(count: int, found: int) -> None:
    outputs = outputs_of(num_detections=np.array([[count]], np.int32))
    assert len(decode(outputs, SPEC, HERE)[0]) == found


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("detection_boxes", (1, 2, 3)), ("detection_boxes", (1, 1, 4)), ("detection_boxes", (2, 4)), ("detection_scores", (1, 3)), ("detection_scores", (2,)),
        ("detection_scores", ()), ("detection_classes", (1, 1)), ("num_detections", (2, 1)), ("num_detections", ()),
    ],
)  # fmt: skip
def test_outputs_that_do_not_fit_each_other_are_an_error(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^outputs: expected detections of 1 images"):
        decode(outputs_of(**{name: np.zeros(shape, np.float32)}), SPEC, HERE)
    with pytest.raises(ValueError, match=r"^outputs: expected detections of 2 images"):
        decode(outputs_of(), SPEC, HERE * 2)
