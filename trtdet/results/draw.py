# SPDX-License-Identifier: Apache-2.0
"""Draw detections into images."""

import colorsys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trtdet import files
from trtdet.detections import Detections
from trtdet.images.files import ImageArray
from trtdet.labels import Labels, label_of

Color = tuple[int, int, int]
Rect = tuple[int, int, int, int]  # left, top, right, bottom; the last two are outside
AnyFont = ImageFont.FreeTypeFont | ImageFont.ImageFont

_BACKGROUND: Color = (24, 24, 24)
_MIN_LUMINANCE = 0.22  # of class colours; 0 black, 1 white
_MIN_FONT = 10  # pixels; below, letters run together
#: Letters of a label that are looked at: more fit into no picture.
LONGEST_LABEL = 4096


# ---- drawing


def draw(
    image: ImageArray,
    detections: Detections,
    labels: Labels = (),
    *,
    score_threshold: float = 0.0,
    show_scores: bool = True,
    font_path: Path | None = None,
) -> ImageArray:
    """Draw boxes and labels into a copy of an image.

    Lines and letters grow with the image, so a picture of 100 pixels and one of 4000 look alike on
    a screen. Labels stay inside the image and out of each other's way where there is room; the best
    detections choose first and lie on top.

    Args:
        image: (h, w, 3) uint8 RGB.
        detections: boxes in pixels of `image`, in any order.
        labels: [class_id] -> text; a class beyond them is written "class 7".
        score_threshold: detections below are left out.
        show_scores: write the score behind the label, in per cent.
        font_path: a TrueType font; None is Pillow's own, which has Latin letters only.
    """
    height, width = image.shape[:2]
    line, font = _line_width(width, height), _font(_font_size(width, height), font_path)
    shown = detections.above(score_threshold)
    best_first = np.argsort(-shown.scores, kind="stable")
    class_ids, scores = shown.class_ids[best_first].tolist(), shown.scores[best_first].tolist()
    colors = [class_color(class_id) for class_id in class_ids]
    # A rotated box has its label at the upright one around it.
    outlines = shown.boxes_xyxy if shown.angles is None else _around(shown.corners)
    placed: list[tuple[Rect, str]] = []
    taken: list[Rect] = []
    for box, class_id, score in zip(outlines[best_first].tolist(), class_ids, scores, strict=True):
        text = label_of(labels, class_id)
        text += f" {score:.0%}" if show_scores else ""
        text = _shorten(text, font, width - 2 * line)
        taken.append(_place_label(box, _text_size(text, font, line), (width, height), taken))
        placed.append((taken[-1], text))
    if shown.angles is None:
        picture = image.copy()
        limit = np.array([width, height, width, height]) - 1
        corners = np.clip(np.rint(shown.boxes_xyxy[best_first]), 0, limit).astype(int).tolist()
        for corner, color in zip(reversed(corners), reversed(colors), strict=True):
            _draw_box(picture, corner, color, line)
    else:
        picture = _draw_rotated(image, shown.corners[best_first], colors, line)
    for (rect, text), color in zip(reversed(placed), reversed(colors), strict=True):
        _draw_label(picture, rect, text, color, font)
    return picture


@lru_cache(maxsize=1024)
def class_color(class_id: int) -> Color:
    """A bright colour that is always the same for a class, and far from those of the classes
    beside it.
    """
    # The golden ratio spreads hues evenly however many classes there are; three strengths tell near
    # hues apart.
    hue = (0.02 + class_id * 0.61803398875) % 1.0
    saturation, value = ((0.85, 1.0), (0.35, 1.0), (0.70, 0.75))[class_id % 3]
    light = [_to_light(x) for x in colorsys.hsv_to_rgb(hue, saturation, value)]
    # Blues are dark: towards white, until a thin line shows on a dark photograph.
    missing = max(0.0, (_MIN_LUMINANCE - _luminance(light)) / (1 - _luminance(light)))
    red, green, blue = (round(255 * _from_light(x + (1 - x) * missing)) for x in light)
    return red, green, blue


def text_color(background: Color) -> Color:
    """Black or white, whichever stands out more; the contrast ratio is at least 4.5 to 1 on any
    background.
    """
    luminance = _luminance([_to_light(x / 255) for x in background])
    # Equal contrast with both: (L + 0.05) / 0.05 = 1.05 / (L + 0.05).
    return (0, 0, 0) if luminance > 0.1791 else (255, 255, 255)


def _to_light(encoded: float) -> float:
    """sRGB value 0..1 to linear light. Source: WCAG 2.1, "relative luminance"."""
    return encoded / 12.92 if encoded <= 0.04045 else ((encoded + 0.055) / 1.055) ** 2.4


def _from_light(light: float) -> float:
    """The inverse of `_to_light`."""
    return light * 12.92 if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055


def _luminance(light: Sequence[float]) -> float:
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]


def side_by_side(
    left: ImageArray, right: ImageArray, titles: tuple[str, str], *, font_path: Path | None = None
) -> ImageArray:
    """Two pictures next to each other, each under its title."""
    height = max(len(left), len(right))
    font = _font(_font_size(left.shape[1], left.shape[0]), font_path)
    bar = round(1.6 * font.size) if isinstance(font, ImageFont.FreeTypeFont) else 16
    gap = max(2, bar // 4)
    size = (left.shape[1] + gap + right.shape[1], bar + height)
    sheet = Image.new("RGB", size, _BACKGROUND)
    canvas = ImageDraw.Draw(sheet)
    for picture, title, x in ((left, titles[0], 0), (right, titles[1], left.shape[1] + gap)):
        sheet.paste(Image.fromarray(picture), (x, bar))
        title = _shorten(title, font, picture.shape[1] - 2 * gap)
        canvas.text((x + gap, bar / 2), title, (255, 255, 255), font, anchor="lm")
    return np.asarray(sheet)


def _line_width(width: int, height: int) -> int:
    return 1 + (width + height) // 900


def _font_size(width: int, height: int) -> int:
    return max(_MIN_FONT, 6 + (width + height) // 110)


@lru_cache(maxsize=64)
def _font(size: int, path: Path | None) -> AnyFont:
    return ImageFont.truetype(str(path), size) if path else ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _length(text: str, font: AnyFont) -> float:
    """Width of a text in pixels.

    Pillow takes longer to measure and to draw a label than all the rest takes.
    """
    return font.getlength(text)


def check_font(path: Path) -> None:
    """Find out before the first picture whether a font can be used.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no font.
    """
    files.check_input(path, "--font", "a TrueType font")
    try:
        _font(_MIN_FONT, path).getlength("A")
    except Exception as error:  # FreeType's errors reach Python as OSError, SyntaxError, ...
        raise ValueError(f"--font: expected a TrueType font, {path} is not one ({error}); name another") from error  # fmt: skip


def _shorten(text: str, font: AnyFont, width: float) -> str:
    """`text`, or as much of it as fits into `width` pixels, at least one letter."""
    if len(text) <= LONGEST_LABEL and _length(text, font) <= width:
        return text
    # Letters that fit, and that may fit: each look at one is a look at all of them.
    low, high = 1, min(len(text), LONGEST_LABEL)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _length(text[:middle] + "…", font) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return text[:low] + "…"


@lru_cache(maxsize=4096)
def _text_size(text: str, font: AnyFont, line: int) -> tuple[int, int]:
    """Width and height of a label with its margins; the height is the same for every text."""
    _, top, _, bottom = font.getbbox("Åg")
    margin = max(2, line)
    return round(_length(text, font)) + 2 * margin, round(bottom - top) + margin


def _place_label(
    box: Sequence[float],
    size_wh: tuple[int, int],
    image_wh: tuple[int, int],
    taken: Sequence[Rect],
) -> Rect:
    """Where a label goes: on top of its box, else inside at the top, below, inside at the bottom,
    where no other label is.

    All places are pushed into the image. Where all are taken it is the first, which then lies under
    the better detection's label.
    """
    width, height = size_wh
    x1, y1, x2, y2 = map(round, box)
    most_x, most_y = image_wh[0] - width, image_wh[1] - height
    first: Rect | None = None
    # Plain comparisons: a picture of 50 boxes looks at 300 places, and at 25 labels for each.
    for x, y in (
        (x1, y1 - height),
        (x1, y1),
        (x2 - width, y1 - height),
        (x1, y2),
        (x1, y2 - height),
        (x2 - width, y2),
    ):
        x = 0 if x < 0 or most_x < 0 else most_x if x > most_x else x
        y = 0 if y < 0 or most_y < 0 else most_y if y > most_y else y
        right, bottom = x + width, y + height
        for taken_x1, taken_y1, taken_x2, taken_y2 in taken:
            if x < taken_x2 and taken_x1 < right and y < taken_y2 and taken_y1 < bottom:
                break
        else:
            return x, y, right, bottom
        first = first or (x, y, right, bottom)
    assert first is not None
    return first


def _draw_box(picture: NDArray[np.uint8], corners: Sequence[int], color: Color, line: int) -> None:
    """The outline of a box, inside of it; `corners` are pixels of the picture."""
    x1, y1 = corners[:2]
    x2, y2 = max(x1, corners[2]), max(y1, corners[3])
    for inset in range(min(line, min(x2 - x1, y2 - y1) // 2 + 1)):
        cv2.rectangle(picture, (x1 + inset, y1 + inset), (x2 - inset, y2 - inset), color)


def _around(corners: NDArray[np.float32]) -> NDArray[np.float32]:
    """The upright boxes (n, 4) around corners (n, 4, 2)."""
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def _draw_rotated(
    image: ImageArray, corners: NDArray[np.float32], colors: Sequence[Color], line: int
) -> ImageArray:
    """A copy with the four sides of each box, the first on top, joined at the corners; what lies
    outside the image is not seen.
    """
    picture = Image.fromarray(image)
    canvas = ImageDraw.Draw(picture)
    for corner, color in zip(reversed(corners.tolist()), reversed(colors), strict=True):
        points = [(x, y) for x, y in corner]
        canvas.line([*points, *points[:2]], fill=color, width=line, joint="curve")
    return np.array(picture)


def _draw_label(
    picture: NDArray[np.uint8], rect: Rect, text: str, color: Color, font: AnyFont
) -> None:
    left, top, right, bottom = rect
    label = _label(text, (right - left, bottom - top), color, font)
    target = picture[top:bottom, left:right]  # smaller in a picture smaller than the label
    target[:] = label[: target.shape[0], : target.shape[1]]


@lru_cache(maxsize=2048)
def _label(text: str, size_wh: tuple[int, int], color: Color, font: AnyFont) -> ImageArray:
    """The pixels of a label. Kept, as a run has few classes, and scores in whole per cent."""
    width, height = size_wh
    label = Image.new("RGB", size_wh, color)
    _, top, _, bottom = font.getbbox("Åg", anchor="ms")  # from the baseline: no letter is cut
    base = (width / 2, round((height - top - bottom) / 2))
    ImageDraw.Draw(label).text(base, text, text_color(color), font, anchor="ms")
    return np.asarray(label)
