# SPDX-License-Identifier: Apache-2.0
"""`trtdet.results.draw`: which pixels a box and its label take."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trtdet.detections import Detections
from trtdet.results import draw

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
