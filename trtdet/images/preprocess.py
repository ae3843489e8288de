# SPDX-License-Identifier: Apache-2.0
"""Place one image in the network input: resize, pad, layout, type."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trtdet.geometry import ResizeTransform
from trtdet.images.files import ImageArray
from trtdet.images.options import DEFAULT_MAX_SIZE, Resample
from trtdet.spec import PREPROCESSORS, Preprocessing, Sampling

IMAGENET_MEAN = PREPROCESSORS["imagenet"][0]  # RGB: what AutoML pads with
#: Times the rows of the result: from there on bands are faster than a copy of the source.
_MANY_ROWS = 4
#: Two float32 bands of 256 KiB stay in the second-level cache.
_BAND_ELEMENTS = 1 << 16
_FLOAT32 = np.dtype(np.float32)
_thread = threading.local()


# ---- pixels -> network input


@dataclass(frozen=True)
class ShorterSide:
    """Scale every image by itself, for a network that takes any size: ODTK's --resize and
    --max-size.

    The shorter side gets `shorter` pixels, unless the longer would get more than `longer`.
    """

    shorter: int
    longer: int

    def __post_init__(self) -> None:
        if not 1 <= self.shorter <= self.longer:
            raise ValueError(
                f"shorter and longer side: expected at least 1, the shorter no more than the longer, got {self.shorter} and {self.longer}"
            )

    def scale(self, source_hw: tuple[int, ...]) -> float:
        """Pixels of the network input per source pixel."""
        return min(self.shorter / min(source_hw[:2]), self.longer / max(source_hw[:2]))

    def canvas(
        self, sources_hw: Sequence[tuple[int, int]], preprocessing: Preprocessing
    ) -> tuple[int, int]:
        """The smallest network input, height and width, that holds all the images of a batch."""
        smallest = (preprocessing.size_range or (preprocessing.size_hw,))[0]
        sides = []
        for axis in (0, 1):
            needed = [int(hw[axis] * self.scale(hw)) for hw in sources_hw]
            multiple = preprocessing.size_multiple
            sides.append(max(smallest[axis], *(-(-n // multiple) * multiple for n in needed)))
        return sides[0], sides[1]

    def largest_canvas(self, preprocessing: Preprocessing) -> tuple[int, int]:
        """The network input that a batch of the longest images, upright and lying, takes."""
        extremes = [(self.shorter, self.longer), (self.longer, self.shorter)]
        return self.canvas(extremes, preprocessing)


@dataclass(frozen=True)
class OwnSize(ShorterSide):
    """Every image as large as it is, for a network that resizes by itself."""

    def scale(self, source_hw: tuple[int, ...]) -> float:
        return 1.0

    def largest_canvas(self, preprocessing: Preprocessing) -> tuple[int, int]:
        return (preprocessing.size_range or (preprocessing.size_hw,) * 2)[1]


def choose_input(
    preprocessing: Preprocessing,
    *,
    size: tuple[int, int] | None = None,
    resize: int | None = None,
    max_size: int | None = None,
) -> tuple[Preprocessing, ShorterSide | None]:
    """What --size, or --resize and --max_size, make of the input of a model: for `ImageBatcher`.

    Raises:
        ValueError: the model does not take it.
    """
    if size is None and resize is None:
        if preprocessing.own_size and preprocessing.size_range:
            largest = max(preprocessing.size_range[1])
            return preprocessing, OwnSize(largest, largest)
        if preprocessing.shorter_side is None:
            return preprocessing, None
        resize, max_size = preprocessing.shorter_side
    asked = f"--size {size[0]},{size[1]}" if size else f"--resize {resize}"
    if preprocessing.size_range is None and size != preprocessing.size_hw:
        height, width = preprocessing.size_hw
        raise ValueError(
            f"{asked}: the model takes {height}x{width} (height x width) alone; leave it out, or give a model of dynamic size "
            "(create_onnx.py --input_shape N,-1,-1,3, build_engine.py --size MIN:OPT:MAX)"
        )
    if resize and preprocessing.resize != "letterbox":
        raise ValueError(
            f"{asked}: the model was trained on images stretched to its input; use --size H,W"
        )
    shorter_side = ShorterSide(resize, max_size or DEFAULT_MAX_SIZE) if resize else None
    try:
        if size:
            return preprocessing.at(size), None
        if shorter_side:
            asked += f" --max_size {shorter_side.longer}"
            preprocessing.at(shorter_side.largest_canvas(preprocessing))
    except ValueError as error:
        raise ValueError(f"{asked}: {error}") from error
    return preprocessing, shorter_side


def preprocess(
    image: ImageArray,
    preprocessing: Preprocessing,
    *,
    resample: Resample | None = None,
    scale: float | None = None,
    out: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], ResizeTransform]:
    """Place one image in the network input.

    letterbox: scale = min(H / h, W / w), sizes truncated or rounded, image in the top left corner
    or in the centre, the rest filled with `pad_rgb`. Top left and truncated is what AutoML's own
    graph does, in the same float32 arithmetic, but for the order: AutoML normalises first. A linear
    resize commutes with that, and padding with the mean equals its padding with zeros afterwards.
    With rounding "none" it is an affine warp of that scale, and edges blend with the padding.
    stretch: both axes are resized to the full input, each with its own scale.

    Args:
        image: (h, w, 3) uint8 RGB.
        resample: bilinear, as TensorFlow does it (four neighbours, half-pixel centres, also when
            shrinking); or antialias, Pillow's bilinear, which averages over the area when
            shrinking. None: what the model was trained with.
        scale: of the image, instead of as large as fits.
        out: where to write, of `preprocessing.image_shape` and `dtype`, C-contiguous; None
            allocates.

    Returns:
        The network input in its layout and dtype, and the way back to source pixels. For uint8
        values and padding are rounded.

    Source: google/automl efficientdet/dataloader.py, InputProcessor.
    """
    if out is None:
        out = np.empty(preprocessing.image_shape, preprocessing.dtype)
    return out, placer(preprocessing, resample).place(image, out, scale)


_Rect = tuple[int, int, int, int]  # top, bottom, left, right in the network input


class Placer:
    """`preprocess` for one preprocessing: what depends on sizes alone is worked out once for each.

    Threads may share one. Several threads wait for Python's lock in turn, so steps of Python
    cost more than they take: at 16 threads they were half of the time of a batch.
    """

    #: Sizes of images whose place is kept.
    KEPT_SIZES = 1024

    def __init__(self, preprocessing: Preprocessing, resample: Resample | None = None) -> None:
        if resample not in (None, "bilinear", "antialias"):
            raise ValueError(f"resample: expected bilinear or antialias, got {resample!r}")
        if resample == "antialias" and preprocessing.is_warped:
            raise ValueError(
                "resample antialias: this model's images are warped, which is bilinear alone; leave it out"
            )
        self._preprocessing = preprocessing
        self._resample: Resample = resample or (
            "antialias" if preprocessing.antialias else "bilinear"
        )
        self._sampling = preprocessing.sampling
        if resample and self._sampling == "cubic":
            self._sampling = "half_pixel"
        self._shape = preprocessing.image_shape
        self._dtype = np.dtype(preprocessing.dtype)
        self._is_nhwc = preprocessing.layout == "NHWC"
        color = np.asarray(preprocessing.pad_rgb, np.float32)
        if preprocessing.dtype == "uint8":
            color = np.rint(color)
        # The padding colour, once per pixel of an input row.
        self._pad_row = np.tile(color.astype(preprocessing.dtype), preprocessing.size_hw[1])
        self._color = tuple(float(level) for level in color)
        self._places: dict[tuple[int, int, float | None], tuple[_Rect, ResizeTransform]] = {}

    def place(
        self, image: ImageArray, out: NDArray[Any], scale: float | None = None
    ) -> ResizeTransform:
        """Write one image into `out`; see `preprocess`."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image: expected (h, w, 3) uint8, got {image.shape} {image.dtype}")
        if out.shape != self._shape or out.dtype != self._dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out: expected {self._shape} {self._dtype}, C-contiguous, got {out.shape} {out.dtype}"
            )
        rect, transform = self._place_of(image.shape[0], image.shape[1], scale)
        if self._preprocessing.is_warped:
            self._warp(image, out, transform)
        elif self._is_nhwc:
            self._write_pixels(image, out, rect)
        else:
            self._write_planes(image, out, rect)
        return transform

    def _place_of(
        self, height: int, width: int, scale: float | None
    ) -> tuple[_Rect, ResizeTransform]:
        known = self._places.get((height, width, scale))
        if known is not None:
            return known
        (placed_h, placed_w), transform = placement_of((height, width), self._preprocessing, scale)
        left, top = (int(offset) for offset in transform.offset_xy)
        found = (top, top + placed_h, left, left + placed_w), transform
        if len(self._places) < self.KEPT_SIZES:
            self._places[height, width, scale] = found
        return found

    def _write_pixels(self, image: ImageArray, out: NDArray[Any], rect: _Rect) -> None:
        """NHWC.

        Filling whole rows is thirty times as fast as broadcasting three values over pixels.
        """
        top, bottom, left, right = rect
        height, width, _ = self._shape
        if bottom - top < height or right - left < width:
            rows, pad_row = out.reshape(height, -1), self._pad_row
            if top:
                rows[:top] = pad_row
            if bottom < height:
                rows[bottom:] = pad_row
            if left:
                rows[top:bottom, : 3 * left] = pad_row[: 3 * left]
            if right < width:
                rows[top:bottom, 3 * right :] = pad_row[3 * right :]
            out = out[top:bottom, left:right]
        _resize(image, out, self._resample, self._sampling)

    def _write_planes(self, image: ImageArray, out: NDArray[Any], rect: _Rect) -> None:
        """NCHW. Each side is filled in one step, for all planes."""
        top, bottom, left, right = rect
        _, height, width = self._shape
        color = self._pad_row[:3, None, None]
        if top:
            out[:, :top] = color
        if bottom < height:
            out[:, bottom:] = color
        if left:
            out[:, top:bottom, :left] = color
        if right < width:
            out[:, top:bottom, right:] = color
        shape = (bottom - top, right - left, 3)
        resized = _scratch("planes", math.prod(shape), self._dtype).reshape(shape)
        _resize(image, resized, self._resample, self._sampling)
        cv2.split(resized, [plane[top:bottom, left:right] for plane in out])

    def _warp(self, image: ImageArray, out: NDArray[Any], transform: ResizeTransform) -> None:
        """As OpenCV's warpAffine does it: beyond the image everything has the padding colour."""
        matrix = np.zeros((2, 3))
        for axis, (scale, offset) in enumerate(zip(transform.scale_xy, transform.offset_xy, strict=True)):  # fmt: skip
            from_corner = self._preprocessing.sampling == "corner"
            matrix[axis, axis] = scale
            matrix[axis, 2] = offset + (0 if from_corner else (scale - 1) / 2)
        pixels: NDArray[Any] = image
        if self._dtype == _FLOAT32:
            pixels = _scratch("source", image.size, _FLOAT32).reshape(image.shape)
            np.copyto(pixels, image)
        height, width = self._preprocessing.size_hw
        warped = out
        if not self._is_nhwc:
            warped = _scratch("planes", out.size, self._dtype).reshape(height, width, 3)
        cv2.warpAffine(pixels, matrix, (width, height), dst=warped, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=self._color)  # fmt: skip
        if not self._is_nhwc:
            cv2.split(warped, list(out))


@lru_cache(maxsize=16)
def placer(preprocessing: Preprocessing, resample: Resample | None = None) -> Placer:
    """The `Placer` of a preprocessing, shared by all who ask for it."""
    return Placer(preprocessing, resample)


def placement_of(
    source_hw: tuple[int, ...], preprocessing: Preprocessing, ratio: float | None = None
) -> tuple[tuple[int, int], ResizeTransform]:
    """Height and width of the image inside the network input, and the transform. Where these are
    fractions of pixels: the nearest whole numbers.
    """
    source_h, source_w = source_hw
    input_h, input_w = preprocessing.size_hw
    # float32 as in AutoML's graph: in float64 some sizes come out one pixel larger.
    scale_y = np.float32(input_h) / np.float32(source_h)
    scale_x = np.float32(input_w) / np.float32(source_w)
    if preprocessing.resize == "stretch":
        transform = ResizeTransform((source_w, source_h), (float(scale_x), float(scale_y)))
        return (input_h, input_w), transform
    if preprocessing.longest is not None and ratio is None:
        ratio = preprocessing.longest / max(source_h, source_w)
    # At least one pixel: 4000 x 2 in 512 x 512 would be 512 x 0.
    if preprocessing.rounding == "floor":
        scale = min(scale_y, scale_x) if ratio is None else np.float32(ratio)
        height = max(1, int(np.float32(source_h) * scale))
        width = max(1, int(np.float32(source_w) * scale))
        scale_xy = (float(scale), float(scale))
    elif preprocessing.rounding == "floor64":
        ratio = ratio or min(input_h / source_h, input_w / source_w)
        height, width = max(1, int(source_h * ratio)), max(1, int(source_w * ratio))
        scale_xy = (ratio, ratio)
    elif preprocessing.rounding == "none":
        ratio = ratio or min(input_h / source_h, input_w / source_w)
        middle = (0.0, 0.0)
        if preprocessing.placement == "center":
            middle = ((input_w - source_w * ratio) / 2, (input_h - source_h * ratio) / 2)
        height, width = max(1, round(source_h * ratio)), max(1, round(source_w * ratio))
        return (height, width), ResizeTransform((source_w, source_h), (ratio, ratio), middle)
    else:  # in float64, and each axis then has the scale that rounding left it
        ratio = ratio or min(input_h / source_h, input_w / source_w)
        whole = int if preprocessing.rounding == "floor_axes" else round
        height, width = max(1, whole(source_h * ratio)), max(1, whole(source_w * ratio))
        scale_xy = (width / source_w, height / source_h)
    offset = (0, 0)
    if preprocessing.placement == "center":  # an odd pixel goes to the right and the bottom
        offset = ((input_w - width) // 2, (input_h - height) // 2)
    return (height, width), ResizeTransform((source_w, source_h), scale_xy, offset)


def _resize(
    image: ImageArray, target: NDArray[Any], resample: Resample, sampling: Sampling
) -> None:
    """Resize `image` into `target`, (h, w, 3), whose rows need not follow each other directly."""
    height, width = target.shape[:2]
    if image.shape == target.shape:
        target[:] = image
    elif resample == "antialias":
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        target[:] = np.asarray(resized)
    elif sampling == "corner":
        _resize_corner(image, target)
    elif sampling == "cubic":
        cubic = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
        target[:] = cubic  # whole levels, as who trains on them has
    elif target.dtype == np.uint8:
        cv2.resize(image, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
    else:
        _resize_float(image, target)


def _resize_corner(image: ImageArray, target: NDArray[Any]) -> None:
    """Bilinear as in TensorFlow 1 (half_pixel_centers=False): pixel i of the result lies at i *
    source / target, not half a pixel on.
    """
    pixels: NDArray[Any] = image
    for axis in (0, 1):
        source, count = image.shape[axis], target.shape[axis]
        position = np.arange(count, dtype=np.float32) * (np.float32(source) / np.float32(count))
        lower = position.astype(np.intp)
        upper = np.minimum(lower + 1, source - 1)
        weight = np.expand_dims(position - np.floor(position), (1, 2) if axis == 0 else (0, 2))
        first = pixels.take(lower, axis).astype(np.float32)
        pixels = first + (pixels.take(upper, axis) - first) * weight
    target[:] = np.rint(pixels) if target.dtype == np.uint8 else pixels


def _resize_float(image: ImageArray, target: NDArray[np.float32]) -> None:
    """TensorFlow's bilinear resize to float32.

    OpenCV does it alone on a float32 copy of the source. Where most source rows are never looked
    at, only those that are get copied.
    """
    height, width = target.shape[:2]
    if image.shape[0] > _MANY_ROWS * height:
        _resize_float_in_bands(image, target)
        return
    copy = _scratch("source", image.size, _FLOAT32).reshape(image.shape)
    np.copyto(copy, image)
    cv2.resize(copy, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)


def _scratch(use: str, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """`size` numbers that each thread keeps for a use, and uses again: fresh memory costs more,
    page by page, than the copy into it.
    """
    name = f"{use} {dtype.char}"
    buffer: NDArray[Any] | None = _thread.__dict__.get(name)
    if buffer is None or len(buffer) < size:
        buffer = _thread.__dict__[name] = np.empty(size, dtype)
    return buffer[:size]


def _resize_float_in_bands(image: ImageArray, target: NDArray[np.float32]) -> None:
    """The same: NumPy mixes the rows, in bands that stay in the cache, then OpenCV the columns."""
    source_h, (height, width) = image.shape[0], target.shape[:2]
    y = (np.arange(height) + 0.5) * (source_h / height) - 0.5
    upper = np.floor(y)
    weight = (y - upper).astype(np.float32)[:, None, None]
    first = np.maximum(upper, 0).astype(np.intp)
    second = np.minimum(upper + 1, source_h - 1).astype(np.intp)
    band = max(1, _BAND_ELEMENTS // (image.shape[1] * 3))
    for start in range(0, height, band):
        rows = slice(start, start + band)
        top = image[first[rows]].astype(np.float32)
        mixed = image[second[rows]].astype(np.float32)
        mixed -= top
        mixed *= weight[rows]
        mixed += top
        size = (width, len(mixed))
        cv2.resize(mixed, size, dst=target[rows], interpolation=cv2.INTER_LINEAR)


def to_picture(network_input: NDArray[Any], preprocessing: Preprocessing) -> ImageArray:
    """One network input as a picture: (h, w, 3) uint8 RGB, rounded."""
    picture = network_input
    if preprocessing.layout == "NCHW":
        picture = network_input.transpose(1, 2, 0)
    return np.ascontiguousarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))
