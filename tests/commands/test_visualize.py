# SPDX-License-Identifier: Apache-2.0


import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trtdet.commands import visualize
from trtdet.detections import Detections, write_tsv
from trtdet.images.files import load_image
from trtdet.labels import COCO_LABELS
from trtdet.results import coco
from trtdet.results.coco import class_ids_of, ground_truth, labels_of
from trtdet.results.draw import class_color, draw, side_by_side, text_color

GREY = 90


def found(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    """Detections from rows of x1 y1 x2 y2 score class."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int32))


def grey(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), GREY, np.uint8)


def drawn(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where something was drawn on `grey`."""
    return (picture != GREY).any(axis=2)


def letters(picture: NDArray[np.uint8]) -> int:
    """How many pixels are black text: darker than `grey` and every class colour, even half
    covered.
    """
    return int((picture.max(axis=2) < 60).sum())


def extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x1 y1 x2 y2 of what is set, the last two inside."""
    y, x = np.nonzero(mask)
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """WCAG 2.1 contrast ratio, from its definition."""
    luminances = []
    for color in (a, b):
        x = np.array(color) / 255
        light = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        luminances.append(float(light @ (0.2126, 0.7152, 0.0722)))
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


# ---- colours


def test_class_colors_are_stable() -> None:
    # Pictures of today and of next year can be compared.
    assert [class_color(i) for i in range(4)] == [
        (255, 64, 38), (166, 181, 255), (119, 191, 57), (255, 38, 202)
    ]  # fmt: skip


def test_class_colors_are_distinct() -> None:
    colors = np.array([class_color(i) for i in range(90)], float)
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 5  # all of COCO's
    assert distance[:20, :20].min() > 50  # the first twenty, at a glance


def test_text_is_legible_on_every_class_color() -> None:
    for class_id in range(200):
        color = class_color(class_id)
        assert contrast(text_color(color), color) >= 4.5
        assert contrast(color, (0, 0, 0)) > 5  # thin lines on a dark photograph
    assert text_color((255, 255, 0)) == (0, 0, 0)
    assert text_color((0, 0, 160)) == (255, 255, 255)


# ---- draw


def test_a_box_is_drawn_where_it_is() -> None:
    image = grey(300, 400)
    picture = draw(image, found((100.4, 120, 200, 249.6, 0.87, 2)), ("a", "b", "c"))
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    assert (image == GREY).all()  # drawn into a copy
    mask = (picture == class_color(2)).all(axis=2)
    assert mask[120:251, 100].all()  # left side
    assert mask[120:251, 200].all()  # right side
    assert mask[250, 100:201].all()  # bottom
    assert mask[120, 100:201].all()  # top
    assert not drawn(picture)[125:245, 105:195].any()  # nothing inside
    x1, y1, x2, y2 = extent(drawn(picture)[:120])
    assert (x1, y2) == (100, 119)  # the label stands on top of the box
    assert 10 < 120 - y1 < 25
    assert 30 < x2 - x1 < 60  # "c 87%"


def test_the_threshold_leaves_out_weak_detections() -> None:
    both = found((20, 50, 60, 90, 0.9, 0), (120, 50, 160, 90, 0.2, 1))
    mask = drawn(draw(grey(100, 200), both, score_threshold=0.5))
    assert mask[:, :100].any()
    assert not mask[:, 118:].any()
    assert drawn(draw(grey(100, 200), both))[:, 118:].any()


def test_nothing_found_leaves_the_image_as_it_is() -> None:
    assert not drawn(draw(grey(50, 50), found())).any()


@pytest.mark.parametrize(
    ("size_hw", "line", "label_height"),
    [((76, 114), 1, (10, 16)), ((480, 640), 2, (15, 24)), ((3000, 4000), 8, (60, 100))],
)
def test_lines_and_letters_grow_with_the_image(
    size_hw: tuple[int, int], line: int, label_height: tuple[int, int]
) -> None:
    height, width = size_hw
    box = (width // 4, height // 2, width // 2, height * 3 // 4)
    mask = drawn(draw(grey(*size_hw), found((*box, 0.5, 0))))
    across = mask[(box[1] + box[3]) // 2]
    assert across.sum() == 2 * line
    _, top, _, _ = extent(mask)
    assert label_height[0] <= box[1] - top <= label_height[1]


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 40, 30),  # no room above
        (170, 40, 200, 90),  # no room to the right
        (0, 0, 200, 100),  # the whole image
        (199, 99, 200, 100),  # the last pixel
        (-20, -20, 230, 130),  # beyond the image
    ],
)
def test_labels_stay_inside_the_image(box: tuple[float, float, float, float]) -> None:
    def written(where: tuple[float, float, float, float]) -> int:
        return letters(draw(grey(100, 200), found((*where, 1.0, 1)), ("", "traffic light")))

    in_the_open = written((60, 40, 160, 90))  # the whole label
    assert in_the_open > 100
    assert written(box) == in_the_open


def test_labels_keep_out_of_each_others_way() -> None:
    labels = ("one", "two", "three")
    same = [(60, 60, 160, 120, score, class_id) for class_id, score in enumerate((0.9, 0.8, 0.7))]
    alone = [letters(draw(grey(200, 300), found(row), labels)) for row in same]
    assert min(alone) > 40
    assert letters(draw(grey(200, 300), found(*same), labels)) == sum(alone)  # none is hidden


def test_the_best_box_lies_on_top() -> None:
    weak, strong = (50, 60, 150, 120, 0.4, 0), (50, 60, 150, 180, 0.8, 1)
    for both in ((weak, strong), (strong, weak)):
        picture = draw(grey(200, 200), found(*both))
        assert (picture[90, 50] == class_color(1)).all()  # where both have their left side


def test_the_best_label_lies_on_top() -> None:
    many = [(0, 0, 40, 20, 0.5 + i / 100, i) for i in range(20)]  # more labels than places
    picture = draw(grey(20, 40), found(*many), ["x"] * 20)
    assert (picture == class_color(19)).all(axis=2).sum() > (picture == class_color(0)).all(axis=2).sum()  # fmt: skip
    in_other_order = draw(grey(20, 40), found(*many[::-1]), ["x"] * 20)
    np.testing.assert_array_equal(picture, in_other_order)


@pytest.mark.parametrize("size_hw", [(1, 1), (3, 900), (900, 3), (12, 12)])
def test_images_smaller_than_their_label(size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    labels = ["a label far too long for the image " * 10]
    picture = draw(grey(height, width), found((0, 0, width, height, 0.5, 0)), labels)
    assert picture.shape == (height, width, 3)
    assert drawn(picture).any()


def test_a_label_without_its_score_or_name() -> None:
    one = found((20, 40, 180, 90, 0.5, 3))
    named, numbered = (drawn(draw(grey(100, 200), one, labels)) for labels in (COCO_LABELS, ()))
    assert extent(named[:40])[2] > extent(numbered[:40])[2]  # "motorcycle 50%", "class 3 50%"
    bare = drawn(draw(grey(100, 200), one, COCO_LABELS, show_scores=False))
    assert extent(bare[:40])[2] < extent(named[:40])[2]


def test_letters_of_another_font(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        draw(grey(50, 50), found((0, 0, 9, 9, 1, 0)), font_path=tmp_path / "missing.ttf")


# ---- side by side


def test_side_by_side_keeps_both_pictures() -> None:
    left, right = grey(60, 100), np.full((40, 80, 3), 200, np.uint8)
    sheet = side_by_side(left, right, ("detections: 3", "ground truth: 2"))
    bar, gap = sheet.shape[0] - 60, sheet.shape[1] - 180
    assert 12 <= bar <= 24
    assert 2 <= gap <= 8
    np.testing.assert_array_equal(sheet[bar:, :100], left)
    np.testing.assert_array_equal(sheet[bar : bar + 40, 100 + gap :], right)
    assert (sheet[:bar, :100] > 180).sum() > 60  # both titles are there
    assert (sheet[:bar, 100 + gap :] > 180).sum() > 60


# ---- ground truth


ANNOTATIONS = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 60, "height": 50},
        {"id": 8, "file_name": "b.png", "width": 60, "height": 50},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 15], "area": 450, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0},
    ],
    "categories": [{"id": 1, "name": "circle"}, {"id": 3, "name": "triangle"}],
}  # fmt: skip


def write_annotations(folder: Path) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(ANNOTATIONS))
    return path


def test_ground_truth_is_detections_in_corners(tmp_path: Path) -> None:
    annotations = coco.read_annotations(write_annotations(tmp_path))
    truth = ground_truth(annotations, {1: 0, 3: 2})
    assert list(truth) == [7]  # 8 has no object
    np.testing.assert_array_equal(truth[7].boxes_xyxy, [[10, 20, 40, 35], [0, 0, 5, 5]])
    assert truth[7].class_ids.tolist() == [2, 0]
    assert truth[7].scores.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("categories", "labels", "class_ids"),
    [
        ({1: "circle", 3: "triangle"}, (), {1: 0, 3: 2}),  # AutoML: category id - 1
        ({1: "circle", 3: "triangle"}, ("triangle", "circle"), {1: 1, 3: 0}),  # by name
        ({90: "toothbrush", 1: "person"}, COCO_LABELS, {90: 89, 1: 0}),
    ],
)
def test_class_ids_of(
    categories: dict[int, str], labels: tuple[str, ...], class_ids: dict[int, int]
) -> None:
    assert class_ids_of(categories, labels) == class_ids


def test_labels_of_takes_no_memory_for_gaps_between_the_ids() -> None:
    assert labels_of({3: "triangle", 2**31 - 1: "circle"}) == {2: "triangle", 2**31 - 2: "circle"}
    assert labels_of({}) == {}


# ---- the command


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Any]:
    """Two images, their TSVs, annotations, and the arguments for them."""
    photos, tsvs, pictures = tmp_path / "photos", tmp_path / "tsvs", tmp_path / "pictures"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(grey(50, 60)).save(photos / name)
    write_tsv(tsvs / "a.tsv", found((10, 20, 40, 35, 0.9, 2), (0, 0, 5, 5, 0.1, 0)))
    write_tsv(tsvs / "b.tsv", found())
    arguments = ["--input", str(photos), "--detections", str(tsvs), "--output", str(pictures)]
    return {
        "photos": photos,
        "tsvs": tsvs,
        "pictures": pictures,
        "annotations": str(write_annotations(tmp_path)),
        "arguments": arguments,
    }


def test_main_draws_what_the_tsvs_say(
    case: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert visualize.main([*case["arguments"], "--draw_threshold", "0.5"]) == 0
    expected = draw(grey(50, 60), found((10, 20, 40, 35, 0.9, 2)))
    np.testing.assert_array_equal(load_image(case["pictures"] / "a.png"), expected)
    assert (load_image(case["pictures"] / "b.png") == GREY).all()
    assert capsys.readouterr().out == f"{case['pictures']}\n"


def test_main_draws_the_ground_truth_beside(case: dict[str, Any]) -> None:
    options = ["--annotations", case["annotations"], "--draw_threshold", "0"]
    assert visualize.main([*case["arguments"], *options]) == 0
    labels = ["circle", "class 1", "triangle"]  # names come from the annotations
    left = draw(grey(50, 60), found((10, 20, 40, 35, 0.9, 2), (0, 0, 5, 5, 0.1, 0)), labels)
    right = draw(
        grey(50, 60),
        found((10, 20, 40, 35, 1, 2), (0, 0, 5, 5, 1, 0)),
        labels,
        show_scores=False,
    )
    expected = side_by_side(left, right, ("detections: 2", "ground truth: 2"))
    np.testing.assert_array_equal(load_image(case["pictures"] / "a.png"), expected)


def test_main_skips_images_without_a_tsv(
    case: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (case["tsvs"] / "a.tsv").unlink()
    assert visualize.main(case["arguments"]) == 3
    assert [path.name for path in case["pictures"].iterdir()] == ["b.png"]
    (case["tsvs"] / "b.tsv").write_text("not a table\n")
    assert visualize.main(case["arguments"]) == 1


def test_labels_of_another_length_are_named(
    case: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (case["tsvs"] / "labels.txt").write_text("one\ntwo\nthree\n")
    (case["tsvs"].parent / "two.txt").write_text("one\ntwo\n")
    arguments = [*case["arguments"], "--labels", str(case["tsvs"].parent / "two.txt")]
    assert visualize.main(arguments) == 0
    assert "--labels has 2 names, the model 3" in capsys.readouterr().err


def test_main_does_not_overwrite_its_input(
    case: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*case["arguments"][:-1], str(case["photos"])]
    assert visualize.main(arguments) == 1
    assert "the next run would read its own drawings" in capsys.readouterr().err
    assert (load_image(case["photos"] / "a.png") == GREY).all()


def test_main_ends_where_it_cannot_write(
    case: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    case["pictures"].write_text("a file where the folder should be")
    assert visualize.main(case["arguments"]) == 1
    assert "pictures" in capsys.readouterr().err
