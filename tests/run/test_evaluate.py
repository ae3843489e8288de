"""Annotations that contradict the pictures, or that nothing matches: said or refused, never an
AP that means nothing.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trtdet.results import coco
from trtdet.run.evaluate import Run, annotated_images, check_matches


def dataset(
    folder: Path,
    *,
    size_wh: tuple[int, int] = (40, 20),
    orientation: int = 1,
    said_wh: tuple[int, int] = (40, 20),
    box: list[float] | None = None,
    **more: Any,
) -> Path:
    """One picture and an annotation file."""
    image = Image.new("RGB", size_wh, (90, 120, 30))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(folder / "a.jpg", exif=exif)
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box or [1, 1, 10, 10]} | more
    entry = {k: v for k, v in entry.items() if v is not None}
    data = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": said_wh[0], "height": said_wh[1]}],
        "annotations": [entry],
        "categories": [{"id": 1, "name": "circle"}],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(data), encoding="utf-8-sig")
    return path


def matched(path: Path) -> dict[Path, int]:
    return annotated_images(path.parent, coco.read_annotations(path), recursive=False)


def test_sound_annotations_are_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(matched(dataset(tmp_path))) == 1
    assert not caplog.text


def test_labels_of_the_stored_pixels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A picture that EXIF turns by 90 degrees is 20 x 40; labels of 40 x 20 contradict it."""
    path = dataset(tmp_path, orientation=6, box=[25, 1, 10, 10])
    with pytest.raises(
        ValueError,
        match=r"a.jpg is 20x40 .* the file says 40x20: .* labels are of the stored pixels and lie outside",
    ):
        matched(path)
    path = dataset(tmp_path, orientation=6, box=[1, 1, 10, 10])
    with caplog.at_level(logging.WARNING):
        matched(path)
    assert "the labels may be of the stored pixels" in caplog.text and "a.jpg" in caplog.text
    caplog.clear()
    matched(dataset(tmp_path, orientation=6, said_wh=(20, 40)))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_labels_of_another_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        matched(dataset(tmp_path, said_wh=(80, 40)))
    assert "pictures of another size" in caplog.text


def test_files_of_a_kind_that_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = dataset(tmp_path)
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    data["images"].append({"id": 2, "file_name": "b.gif"})
    path.write_text(json.dumps(data))
    (tmp_path / "b.gif").write_bytes(b"GIF89a")
    with caplog.at_level(logging.WARNING):
        matched(path)
    assert "1 annotated files are of a kind that is not read, first b.gif" in caplog.text


@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([[2, 3, 12, 3, 12, 9], [1, 5, 4, 5, 4, 15]], [1, 3, 11, 12]),
        ({"size": [20, 40], "counts": [60, 5, 15, 5, 715]}, [3, 0, 2, 5]),
    ],
)
def test_a_box_from_the_segmentation(tmp_path: Path, segmentation: Any, box: list[float]) -> None:
    path = dataset(tmp_path, bbox=None, segmentation=segmentation)
    (entry,) = coco.read_annotations(path).objects
    assert entry["bbox"] == box


def test_the_box_of_a_compressed_mask_is_that_of_pycocotools() -> None:
    from pycocotools import mask

    from trtdet.results.coco_files import _box_of_mask

    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels = np.zeros((37, 53), np.uint8, order="F")
        y, x = rng.integers(0, 30), rng.integers(0, 45)
        pixels[y : y + rng.integers(1, 8), x : x + rng.integers(1, 8)] = 1
        pixels[rng.integers(0, 37), rng.integers(0, 53)] = 1
        encoded = mask.encode(pixels)
        found = _box_of_mask(encoded["counts"].decode(), *encoded["size"])
        assert found == mask.toBbox(encoded).tolist()


def test_an_ap_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Categories that the annotations do not have are an error; objects that a model misses are
    its AP.
    """
    annotations = coco.read_annotations(dataset(tmp_path))
    detection = {"image_id": 1, "category_id": 5, "bbox": [1, 1, 10, 10], "score": 0.9}
    with pytest.raises(
        ValueError,
        match=r"no detection is of the annotated categories: detections have 5, .* has 1",
    ):
        check_matches(Run([detection], [1], 0, {}), annotations, {"AP": 0.0})
    wrong = detection | {"category_id": 1}
    for found in ([wrong], [wrong | {"image_id": 9}], []):
        check_matches(Run(found, [1], 0, {}), annotations, {"AP": 0.0})
    assert not caplog.records
    check_matches(Run([detection], [1], 0, {}, (1, 5)), annotations, {"AP": 0.0})
    assert "no detection is of the categories of the objects in these images (1)" in caplog.text
    caplog.clear()
    more = dataclasses.replace(annotations, categories={**annotations.categories, 5: "x"})
    check_matches(Run([detection], [1], 0, {}), more, {"AP": 0.0})
    assert "no detection is of the categories of the objects in these images (1)" in caplog.text
