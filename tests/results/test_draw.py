# SPDX-License-Identifier: Apache-2.0
"""`trtdet.results.draw`: which pixels a box and its label take."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from trtdet.detections import Detections
from trtdet.results import draw

Box = Sequence[float]
Size = tuple[int, int]

GREY = np.full((120, 160, 3), 128, np.uint8)


def found(*boxes: tuple[float, float, float, float], score: float = 0.5) -> Detections:
    scores = np.linspace(score, score / 2, len(boxes), dtype=np.float32)
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), scores, np.arange(len(boxes), dtype=np.int32))  # fmt: skip


@pytest.mark.parametrize("line", [1, 2, 5])
def test_outlines_are_those_that_pillow_draws(line: int) -> None:
    random = np.random.default_rng(line)
    for _ in range(50):
        x1, y1, x2, y2 = (int(n) for n in random.integers(0, 60, 4))
        x2, y2 = x1 + x2 + 2 * line, y1 + y2 + 2 * line  # at least as thick as its two lines
        expected = Image.fromarray(GREY)
        corners = (x1, y1, min(x2, 159), min(y2, 119))
        ImageDraw.Draw(expected).rectangle(corners, outline=(1, 2, 3), width=line)
        picture = GREY.copy()
        draw._draw_box(picture, corners, (1, 2, 3), line)
        np.testing.assert_array_equal(picture, np.asarray(expected))


def outline(corners: tuple[int, int, int, int], line: int) -> NDArray[np.bool_]:
    """The pixels of a box that are less than `line` from one of its sides."""
    x1, y1, x2, y2 = corners
    x2, y2 = max(x1, x2), max(y1, y2)
    rows, columns = np.mgrid[: GREY.shape[0], : GREY.shape[1]]
    inside = (x1 <= columns) & (columns <= x2) & (y1 <= rows) & (rows <= y2)
    near = np.minimum(np.minimum(columns - x1, x2 - columns), np.minimum(rows - y1, y2 - rows))
    return inside & (near < line)


@pytest.mark.parametrize("line", [1, 2, 3])
def test_outlines_are_those_that_numpy_draws(line: int) -> None:
    """Of boxes of any size, thin ones, those whose corners changed places, and at the edges."""
    random = np.random.default_rng(line)
    starts, sizes = random.integers(0, (160, 120), (200, 2)), random.integers(-2, 40, (200, 2))
    sizes[100:] = random.integers(-1, 7, (100, 2))
    ends = np.clip(starts + sizes, 0, (159, 119))
    edges = [(0, 0, 159, 119), (0, 0, 0, 119), (159, 119, 159, 119), (155, 0, 159, 3)]
    boxes = [*map(tuple, np.hstack([starts, ends]).tolist()), *edges]
    for corners in boxes:
        picture = GREY.copy()
        draw._draw_box(picture, corners, (1, 2, 3), line)
        expected = GREY.copy()
        expected[outline(corners, line)] = (1, 2, 3)
        np.testing.assert_array_equal(picture, expected, str(corners))


def place_plainly(box: Box, size_wh: Size, image_wh: Size, taken: Sequence[draw.Rect]) -> draw.Rect:
    """The first place that overlaps no label; where there is none, the first of all."""
    (width, height), (x1, y1, x2, y2) = size_wh, [round(n) for n in box]
    corners = [(x1, y1 - height), (x1, y1), (x2 - width, y1 - height), (x1, y2), (x1, y2 - height), (x2 - width, y2)]  # fmt: skip
    places = []
    for corner in corners:
        x, y = (max(0, min(n, most)) for n, most in zip(corner, np.subtract(image_wh, size_wh).tolist(), strict=True))  # fmt: skip
        places.append((x, y, x + width, y + height))
    free = [p for p in places if all(p[0] >= t[2] or t[0] >= p[2] or p[1] >= t[3] or t[1] >= p[3] for t in taken)]  # fmt: skip
    return (free or places)[0]


def test_labels_stay_inside_and_apart() -> None:
    """Wherever boxes are: half outside, beyond the picture, smaller than the label."""
    random = np.random.default_rng(0)
    moved = 0
    for _ in range(60):
        size, image = tuple(random.integers(5, 60, 2).tolist()), tuple(random.integers(60, 200, 2).tolist())  # fmt: skip
        taken: list[draw.Rect] = []
        for box in random.uniform(-80, 260, (12, 4)).tolist():
            box = [*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])]
            place = draw._place_label(box, size, image, taken)
            assert place == place_plainly(box, size, image, taken)
            assert min(place) >= 0 and place[2] <= image[0] and place[3] <= image[1]
            assert (place[2] - place[0], place[3] - place[1]) == size
            moved += place_plainly(box, size, image, []) != place
            taken.append(place)
    assert moved == 170  # of 720 that gave way to another


@pytest.mark.parametrize(
    ("size", "place"),
    [
        ((50, 40), (0, 0, 50, 40)),  # as large as the picture
        ((51, 10), (0, 20, 51, 30)),  # wider: begins at its left edge
        ((10, 41), (30, 0, 40, 41)),  # higher
    ],
)
def test_a_label_as_large_as_its_picture(size: Size, place: draw.Rect) -> None:
    assert draw._place_label((30, 30, 45, 35), size, (50, 40), []) == place


@pytest.mark.parametrize("corners", [(5, 5, 5, 5), (5, 5, 6, 90), (158, 118, 159, 119), (9, 9, 3, 3)])  # fmt: skip
def test_a_thin_box_is_filled_and_nothing_beside_it(corners: tuple[int, int, int, int]) -> None:
    picture = GREY.copy()
    draw._draw_box(picture, corners, (1, 2, 3), 3)
    x1, y1, x2, y2 = corners
    rows, columns = np.nonzero((picture != 128).any(axis=2))
    assert (rows.min(), columns.min()) == (y1, x1)
    assert (rows.max(), columns.max()) == (max(y1, y2), max(x1, x2))


def test_the_source_stays_as_it_is() -> None:
    source = GREY.copy()
    picture = draw.draw(source, found((20, 40, 90, 100)))
    assert (source == 128).all() and (picture != 128).any()


def test_a_label_drawn_again_is_the_same() -> None:
    detections = found((20, 40, 90, 100), (60, 60, 150, 110), (0, 0, 30, 118))
    labels = ["gypsy", "Åge", "queue"]
    draw._label.cache_clear()
    first = draw.draw(GREY, detections, labels)
    assert draw._label.cache_info().misses == 3
    np.testing.assert_array_equal(draw.draw(GREY, detections, labels), first)
    assert draw._label.cache_info() == (3, 3, 2048, 3)


@pytest.mark.parametrize("text", ["gjpqy", "Åg", "x"])
@pytest.mark.parametrize("size", [10, 14, 40])
def test_no_letter_is_cut(text: str, size: int) -> None:
    """As much ink as where there is more room."""
    font = draw._font(size, None)
    width, height = draw._text_size(text, font, 2)
    label = draw._label(text, (width, height), (255, 255, 255), font)
    room = draw._label(text, (width + 40, height + 40), (255, 255, 255), font)
    assert (255 - label).sum() == (255 - room).sum() > 0


def test_a_picture_smaller_than_its_label() -> None:
    tiny = np.zeros((4, 6, 3), np.uint8)
    assert draw.draw(tiny, found((0, 0, 5, 3))).shape == (4, 6, 3)
