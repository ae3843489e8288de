# SPDX-License-Identifier: Apache-2.0


from pathlib import Path

import pytest

from trtdet import labels
from trtdet.labels import COCO_LABELS, label_of, read_labels


def test_coco_has_80_names_in_90_places() -> None:
    unused = [i + 1 for i, name in enumerate(COCO_LABELS) if name.startswith("unused")]
    assert unused == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert len(COCO_LABELS) == len(set(COCO_LABELS)) == 90


@pytest.mark.parametrize(
    ("category_id", "name"),
    [
        (1, "person"),
        (11, "fire hydrant"),  # the last one before the first gap
        (12, "unused 12"),
        (13, "stop sign"),
        (44, "bottle"),
        (67, "dining table"),  # alone between two gaps
        (90, "toothbrush"),
    ],
)
def test_coco_names_stand_at_category_id_minus_1(category_id: int, name: str) -> None:
    assert COCO_LABELS[category_id - 1] == name


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (b"circle\nsquare\ntriangle\n", ("circle", "square", "triangle")),
        (b"circle\nsquare", ("circle", "square")),  # no newline at the end
        (b"circle\r\nsquare\r\n\r\n\r\n", ("circle", "square")),  # Windows, empty lines at the end
        (b"\xef\xbb\xbfcircle\n  fire hydrant\t\n", ("circle", "fire hydrant")),  # BOM, spaces
        (b"\ncircle\n\nsquare\n", ("unused 1", "circle", "unused 3", "square")),  # gaps keep their place
        ("größe\n人\n".encode(), ("größe", "人")),
    ],
)  # fmt: skip
def test_read_labels(tmp_path: Path, data: bytes, labels: tuple[str, ...]) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(data)
    assert read_labels(path, num_classes=len(labels)) == labels


def test_coco_is_built_in() -> None:
    assert read_labels("coco", num_classes=90) is COCO_LABELS


def test_a_wrong_number_of_labels_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"labels\.txt: expected 3 labels.*found 2"):
        read_labels(path, num_classes=3)
    with pytest.raises(ValueError, match=r"coco: expected 3 labels.*found 90"):
        read_labels("coco", num_classes=3)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"expected at least one label.*found 0"):
        read_labels(path)
    with pytest.raises(FileNotFoundError):
        read_labels(tmp_path / "missing.txt")


def test_a_class_without_a_name_is_a_number() -> None:
    assert label_of(("circle",), 0) == "circle"
    assert label_of(("circle",), 1) == "class 1"
    assert label_of((), 7) == "class 7"
    assert label_of(("circle",), -1) == "class -1"  # never counted from the end


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.txt: expected class names in UTF-8"):
        read_labels(path)


@pytest.mark.parametrize(
    ("words", "ids"),
    [(["person"], (0,)), (["Traffic Light", "car"], (9, 2)), (["car", "2", "CAR"], (2,)), (["89"], (89,)), (["unused 12"], (11,))],
)  # fmt: skip
def test_classes_by_name_or_id(words: list[str], ids: tuple[int, ...]) -> None:
    assert labels.find_classes(words, labels.COCO_LABELS, 90) == ids


@pytest.mark.parametrize(
    ("word", "names", "message"),
    [
        ("preson", labels.COCO_LABELS, "there is no class 'preson'; did you mean person?"),
        ("90", labels.COCO_LABELS, "there is no class '90'; the model has person, bicycle, car"),
        ("xyz", ("a", "b"), "there is no class 'xyz'; the model has a, b"),
        ("person", (), "the model has no names; give ids, 0 to 2, or --labels"),
        ("\u0663", (), "the model has no names"),
        ("9" * 5000, (), "the model has no names"),
    ],
)
def test_classes_that_are_not_there(word: str, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        labels.find_classes([word], names, 3 if not names else 90)
    assert message in str(raised.value) and len(str(raised.value)) < 300


def test_one_name_may_stand_for_several_classes() -> None:
    assert labels.find_classes(["b"], ("a", "B", "b"), 3) == (1, 2)


def test_json_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text('{"images": []}')
    with pytest.raises(ValueError, match="expected class names, one per line, found JSON"):
        read_labels(path)
    path.write_text("[unknown]\ncircle\n")
    assert read_labels(path) == ("[unknown]", "circle")
