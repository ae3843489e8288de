"""Which category of an annotation file is which class of a model."""

import logging
from pathlib import Path

import pytest

from trtdet.labels import (
    COCO_80_IDS,
    COCO_80_LABELS,
    COCO_LABELS,
    are_coco_80,
    fit_labels,
    parse_label_map,
    read_labels,
)
from trtdet.results.categories import match_categories

FILE = Path("a.json")
NAMES = ("circle", "square", "triangle")
#: COCO's classes, as darknet's coco.names spells them.
DARKNET_LABELS = tuple({"airplane": "aeroplane", "dining table": "diningtable", "motorcycle": "motorbike", "potted plant": "pottedplant", "couch": "sofa", "tv": "tvmonitor"}.get(name, name) for name in COCO_80_LABELS)  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "ids", "categories", "expected", "said"),
    [
        (NAMES, (1, 2, 3), {1: "circle", 2: "square", 3: "triangle"}, (1, 2, 3), ""),
        (NAMES, (1, 2, 3), {3: "circle", 1: "square", 2: "triangle"}, (3, 1, 2), "matched by name"),
        (NAMES, (1, 2, 3), {0: "Circle", 1: "SQUARE", 2: "triangle"}, (0, 1, 2), "matched by name"),
        (NAMES, (1, 2, 3), {7: "square"}, (-1, 7, -3), "matched by name"),
        (NAMES, (1, 2, 3), {1: "circle", 9: "star"}, (1, -2, -3), "does not know, all objects missed: 9 (star)"),
        ((), (1, 2, 3), {0: "a", 1: "b", 2: "c"}, (0, 1, 2), "counts categories from 0, the model from 1"),
        ((), (0, 1, 2), {1: "a", 2: "b", 3: "c"}, (1, 2, 3), "counts categories from 1, the model from 0"),
        ((), (1, 2, 3), {1: "a", 3: "c"}, (1, 2, 3), ""),
        (NAMES, (1, 2, 3), {1: "a", 2: "b", 3: "c"}, (1, 2, 3), "none of the model's class names"),
        ((), tuple(range(80)), dict(zip(COCO_80_IDS, COCO_80_LABELS, strict=True)), COCO_80_IDS, "in COCO's order"),
        ((), COCO_80_IDS, {i: f"part {i}" for i in range(1, 81)}, tuple(range(1, 81)), "the model has COCO's ids: matched in their order"),
        (COCO_80_LABELS, COCO_80_IDS, {i: f"part {i}" for i in range(80)}, tuple(range(80)), "the model has COCO's ids: matched in their order"),
        (DARKNET_LABELS, COCO_80_IDS, dict(zip(COCO_80_IDS, COCO_80_LABELS, strict=True)), COCO_80_IDS, ""),
        ((), COCO_80_IDS, {i: f"part {i}" for i in range(1, 80)}, COCO_80_IDS, "does not know, all objects missed"),
        ((), tuple(range(1, 81)), dict(zip(COCO_80_IDS, COCO_80_LABELS, strict=True)), COCO_80_IDS, "in COCO's order"),
    ],
)  # fmt: skip
def test_matching(
    labels: tuple[str, ...],
    ids: tuple[int, ...],
    categories: dict[int, str],
    expected: tuple[int, ...],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert match_categories(labels, ids, categories, FILE) == expected
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_cocos_classes_by_their_names() -> None:
    assert are_coco_80(COCO_80_LABELS) and are_coco_80(DARKNET_LABELS)
    translated = ("Mensch", *COCO_80_LABELS[1:60], *"abcdefghijklmnopqrst")
    assert are_coco_80(translated)
    assert not are_coco_80(COCO_80_LABELS[::-1]) and not are_coco_80(COCO_80_LABELS[:79])
    assert not are_coco_80(tuple(f"part {i}" for i in range(80))) and not are_coco_80(COCO_LABELS)


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(
        ValueError,
        match=r"expected categories of the model \(1, 2, 3\), a.json has 41, 42, and no name is the same",
    ):
        match_categories(NAMES, (1, 2, 3), {41: "dog", 42: "cat"}, FILE)


def test_label_maps(tmp_path: Path) -> None:
    path = tmp_path / "map.pbtxt"
    path.write_text(
        "item {\n  id: 1\n  name: '/m/01'\n  display_name: \"cat\"\n}\n# two\nitem { name: 'dog' id: 3 }\n"
    )
    assert read_labels(path) == ("cat", "unused 2", "dog")
    for text in (
        "item { name: 'x' }",
        "item { id: 1 }",
        "item { id: 1 name: 'a' } item { id: 1 name: 'b' }",
    ):
        with pytest.raises(ValueError, match="expected items of a label map"):
            parse_label_map(text, path)


def test_coco_has_80_names_or_90() -> None:
    assert len(read_labels("coco")) == 90
    assert read_labels("coco", num_classes=80) == COCO_80_LABELS
    assert fit_labels(COCO_LABELS, 80) == COCO_80_LABELS
    assert fit_labels(COCO_LABELS, 90) == COCO_LABELS
    assert fit_labels(NAMES, 80) == NAMES
