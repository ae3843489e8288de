# SPDX-License-Identifier: Apache-2.0
"""Turn image files into batches for a network. Run alone, it shows what the network sees.

    image_batcher.py --model model.onnx --input photos --output seen

writes one PNG per image, the pixels that the network gets (rounded, where it takes floats), and prints how each image was scaled.

Exit status: 0 every image is shown; 1 an error; 2 wrong usage; 3 done, but some images could not be read.
"""

import argparse
import io
import logging
import math
import os
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from trtdet.cli import (
    DEFAULT_MAX_SIZE,
    SOME_SKIPPED,
    add_size_options,
    check_size_usage,
    positive_int,
    run_main,
    setup_logging,
)
from trtdet.closing import Closing
from trtdet.geometry import ResizeTransform
from trtdet.machine import available_cores
from trtdet.outputs import check_not_inputs, output_names, with_suffix_added, write_png
from trtdet.sidecar import read_sidecar, sidecar_path
from trtdet.spec import ModelSpec, Preprocessing, Sampling

logger = logging.getLogger(__name__)

ImageArray = NDArray[np.uint8]  # (h, w, 3) RGB
Resample = Literal["bilinear", "antialias"]
#: (shape, dtype) -> array: where batches are written. A runtime hands in one that returns pinned memory.
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB: AutoML's default, (0.485, 0.456, 0.406) * 255
#: Times the rows of the result: from there on bands are faster than a copy of the source.
_MANY_ROWS = 4
#: Two float32 bands of 256 KiB stay in the second-level cache.
_BAND_ELEMENTS = 1 << 16
_thread = threading.local()


# ---- files -> pixels


def find_images(path: Path, *, recursive: bool = False, option: str = "--input") -> list[Path]:
    """The image files of a directory, sorted; or the one file that `path` is.

    Hidden files and folders (a leading dot) are left out: macOS leaves `._photo.jpg` files that are not images.

    Args:
        option: the one that named `path`, for messages.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: no image there; says what was looked for.
    """
    path = Path(path)
    kinds = " ".join(suffix[1:] for suffix in SUFFIXES)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{option}: expected an image ({kinds}), found {path}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"{option}: expected an image or a directory of images, found nothing at {path}"
        )
    found = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if recursive and not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
    if not found:
        advice = (
            ""
            if recursive or option != "--input"
            else "; sub-folders are searched with --recursive"
        )
        raise ValueError(f"{option}: expected images ({kinds}) in {path}, found none{advice}")
    return sorted(found)


def load_image(path: Path) -> ImageArray:
    """Decode an image file the way it is meant to be seen.

    The EXIF orientation is applied; 16 bits are scaled to 8; grey, palette and CMYK become RGB; alpha is dropped.
    A JPEG that is damaged in the middle comes out with wrong pixels: libjpeg goes on, and writes its warning to stderr by itself.
    JPEGs go through OpenCV, with the same pixels as Pillow's (both are libjpeg-turbo with its default, exact settings) in 0.8 of the
    time, and less where several threads decode, as Pillow's way into NumPy holds the GIL. CMYK and all other kinds go through Pillow.

    Returns:
        (h, w, 3) uint8 RGB, not necessarily writable.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an image, is damaged, or has more than twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million); one line that
            names the file.
    """
    data = Path(path).read_bytes()
    if not data:
        raise ValueError(f"{path}: expected an image, found an empty file")
    try:
        if _plain_jpeg(data):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if pixels is not None:  # None: damaged; Pillow says how
                return np.asarray(pixels, np.uint8)
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image)
    except Exception as error:  # on a damaged file Pillow's readers raise errors of many kinds
        reason = " ".join(str(error).replace(str(path), "").split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not an image, or of an unknown kind (first bytes: {data[:8]!r})"
        raise ValueError(f"{path}: cannot be decoded: {reason}") from error


def _plain_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG of 8-bit grey or colour, not CMYK, and of a size that Pillow would open.

    Pillow's own reading of the header takes four times as long, with the GIL held: at 16 cores 4 % of the throughput.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    at = 2
    # One segment after the other, to the frame header.
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            limit = 2 * (Image.MAX_IMAGE_PIXELS or height * width)
            return bits == 8 and channels in (1, 3) and height * width <= limit
        at += 2 + length
    return False


def _to_rgb(image: Image.Image) -> ImageArray:
    """An opened Pillow image as upright (h, w, 3) uint8 RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion clips at 255: almost every 16-bit picture would turn white.
        grey = np.asarray(upright).astype(np.uint32)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if upright.mode in ("I", "F"):
        raise ValueError(
            f"expected 8 or 16 bits per channel, found 32 ({upright.mode}), whose range is unknown; convert it to 16 bits"
        )
    if upright.mode == "P":
        upright = upright.convert("RGBA")  # straight to RGB, Pillow warns about transparency
    return np.asarray(upright.convert("RGB"))


def image_size(path: Path) -> tuple[int, int] | None:
    """Height and width of the upright image, from the file's header; None where it has none that can be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # Pillow's readers raise errors of many kinds; decoding will say which
        return None
    return (width, height) if turned else (height, width)


# ---- pixels -> network input


@dataclass(frozen=True)
class ShorterSide:
    """Scale every image by itself, for a network that takes any size: ODTK's --resize and --max-size.

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
        return preprocessing, None
    asked = f"--size {size[0]},{size[1]}" if size else f"--resize {resize}"
    if preprocessing.size_range is None and size != preprocessing.size_hw:
        height, width = preprocessing.size_hw
        raise ValueError(
            f"{asked}: the model takes {height}x{width} (height x width) alone; leave it out, or give a model of free size "
            "(create_onnx.py --input_shape N,-1,-1,3, build_engine.py --input_size MIN,OPT,MAX)"
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

    letterbox: scale = min(H / h, W / w), sizes truncated or rounded, image in the top left corner or in the centre, the rest filled with
    `pad_rgb`. Top left and truncated is what AutoML's own graph does, in the same float32 arithmetic, but for the order: AutoML normalises
    first. A linear resize commutes with that, and padding with the mean equals its padding with zeros afterwards.
    stretch: both axes are resized to the full input, each with its own scale.

    Args:
        image: (h, w, 3) uint8 RGB.
        resample: bilinear, as TensorFlow does it (four neighbours, half-pixel centres, also when shrinking); or antialias, Pillow's
            bilinear, which averages over the area when shrinking. None: what the model was trained with.
        scale: of the image, instead of as large as fits.
        out: where to write, of `preprocessing.image_shape` and `dtype`, C-contiguous; None allocates.

    Returns:
        The network input in its layout and dtype, and the way back to source pixels. For uint8 values and padding are rounded.

    Source: google/automl efficientdet/dataloader.py, InputProcessor.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected (h, w, 3) uint8, got {image.shape} {image.dtype}")
    dtype = np.dtype(preprocessing.dtype)
    if out is None:
        out = np.empty(preprocessing.image_shape, dtype)
    elif out.shape != preprocessing.image_shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(
            f"out: expected {preprocessing.image_shape} {dtype}, C-contiguous, got {out.shape} {out.dtype}"
        )
    if resample is None:
        resample = "antialias" if preprocessing.antialias else "bilinear"
    (height, width), transform = _placement(image.shape[:2], preprocessing, scale)
    left, top = (int(offset) for offset in transform.offset_xy)
    right, bottom = left + width, top + height
    pad_row = _pad_row(preprocessing)
    # Filling whole rows or planes is thirty times as fast as broadcasting three values over pixels.
    if preprocessing.layout == "NHWC":
        rows = out.reshape(out.shape[0], -1)
        rows[:top] = rows[bottom:] = pad_row
        rows[top:bottom, : 3 * left] = pad_row[: 3 * left]
        rows[top:bottom, 3 * right :] = pad_row[3 * right :]
        _resize(image, out[top:bottom, left:right], resample, preprocessing.sampling)
    else:
        for plane, value in zip(out, pad_row[:3], strict=True):
            plane[:top] = plane[bottom:] = value
            plane[top:bottom, :left] = plane[top:bottom, right:] = value
        resized = np.empty((height, width, 3), dtype)
        _resize(image, resized, resample, preprocessing.sampling)
        cv2.split(resized, [plane[top:bottom, left:right] for plane in out])
    return out, transform


@lru_cache(maxsize=16)
def _pad_row(preprocessing: Preprocessing) -> NDArray[Any]:
    """The padding colour, once per pixel of an input row, in the input's dtype."""
    color = np.asarray(preprocessing.pad_rgb, np.float32)
    if preprocessing.dtype == "uint8":
        color = np.rint(color)
    return np.tile(color.astype(preprocessing.dtype), preprocessing.size_hw[1])


def _placement(
    source_hw: tuple[int, ...], preprocessing: Preprocessing, ratio: float | None = None
) -> tuple[tuple[int, int], ResizeTransform]:
    """Height and width of the image inside the network input, and the transform."""
    source_h, source_w = source_hw
    input_h, input_w = preprocessing.size_hw
    # float32 as in AutoML's graph: in float64 some sizes come out one pixel larger.
    scale_y = np.float32(input_h) / np.float32(source_h)
    scale_x = np.float32(input_w) / np.float32(source_w)
    if preprocessing.resize == "stretch":
        transform = ResizeTransform((source_w, source_h), (float(scale_x), float(scale_y)))
        return (input_h, input_w), transform
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
    else:  # in float64, and each axis then has the scale that rounding left it
        ratio = ratio or min(input_h / source_h, input_w / source_w)
        height, width = max(1, round(source_h * ratio)), max(1, round(source_w * ratio))
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
    elif resample != "bilinear":
        raise ValueError(f"resample: expected bilinear or antialias, got {resample!r}")
    elif sampling == "corner":
        _resize_corner(image, target)
    elif target.dtype == np.uint8:
        cv2.resize(image, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
    else:
        _resize_float(image, target)


def _resize_corner(image: ImageArray, target: NDArray[Any]) -> None:
    """Bilinear as in TensorFlow 1 (half_pixel_centers=False): pixel i of the result lies at i * source / target, not half a pixel on."""
    pixels: NDArray[Any] = image
    for axis in (0, 1):
        source, count = image.shape[axis], target.shape[axis]
        position = np.arange(count, dtype=np.float32) * (np.float32(source) / np.float32(count))
        lower = position.astype(np.intp)
        upper = np.minimum(lower + 1, source - 1)
        weight = np.expand_dims(position - lower, (1, 2) if axis == 0 else (0, 2))
        first = pixels.take(lower, axis).astype(np.float32)
        pixels = first + (pixels.take(upper, axis) - first) * weight
    target[:] = np.rint(pixels) if target.dtype == np.uint8 else pixels


def _resize_float(image: ImageArray, target: NDArray[np.float32]) -> None:
    """TensorFlow's bilinear resize to float32.

    OpenCV does it alone on a float32 copy of the source. Where most source rows are never looked at, only those that are get copied.
    """
    height, width = target.shape[:2]
    if image.shape[0] > _MANY_ROWS * height:
        _resize_float_in_bands(image, target)
        return
    copy = _scratch(image.size).reshape(image.shape)
    np.copyto(copy, image)
    cv2.resize(copy, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)


def _scratch(size: int) -> NDArray[np.float32]:
    """`size` floats that each thread keeps and uses again: fresh memory costs more, page by page, than the copy into it."""
    buffer: NDArray[np.float32] | None = getattr(_thread, "scratch", None)
    if buffer is None or len(buffer) < size:
        buffer = _thread.scratch = np.empty(size, np.float32)
    return buffer[:size]


def _resize_float_in_bands(image: ImageArray, target: NDArray[np.float32]) -> None:
    """The same: NumPy mixes the rows, in bands that stay in the cache, then OpenCV the columns."""
    source_h, (height, width) = image.shape[0], target.shape[:2]
    step = np.float32(source_h) / np.float32(height)
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    upper = np.floor(y)
    weight = (y - upper)[:, None, None]
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


# ---- batches


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images, ready for the network.

    Attributes:
        images: (n, *image_shape) in the network's layout and dtype, C-contiguous. n = len(batch), or the batch size with `pad_to_batch`:
            the rows beyond are zero.
        paths: one per real image.
        transforms: one per real image, the way back to source pixels.
        sources: the decoded images, where they were asked for.
    """

    images: NDArray[Any]
    paths: tuple[Path, ...]
    transforms: tuple[ResizeTransform, ...]
    sources: tuple[ImageArray, ...] | None = None
    lease: "_Lease | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        """The number of real images."""
        return len(self.paths)

    def release(self) -> None:
        """Give the memory of `images` back to be filled again; the arrays must not be read after this.

        Optional: a batch that is never released is simply the caller's, and another buffer is allocated.
        """
        if self.lease is not None:
            self.lease.release()


class _Lease:
    """The right to give one buffer back to its pool, once."""

    def __init__(self, pool: "_BufferPool", buffer: NDArray[Any]) -> None:
        self._pool = pool
        self._buffers = [buffer]

    def release(self) -> None:
        while self._buffers:
            self._pool.give(self._buffers.pop())


class _BufferPool:
    """Batch buffers: those given back first, new ones where there are none, so that taking never waits.

    Threads may take and give at once (a deque's append and pop are atomic).
    """

    def __init__(self, allocate: Allocate, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._allocate, self._shape, self._dtype = allocate, shape, dtype
        self._free: deque[NDArray[Any]] = deque()

    def take(self) -> NDArray[Any]:
        try:
            return self._free.pop()
        except IndexError:
            return self._allocate(self._shape, self._dtype)

    def give(self, buffer: NDArray[Any]) -> None:
        self._free.append(buffer)


class _OpenCVThreads:
    """Keeps OpenCV from starting threads of its own inside each worker, while any batcher runs."""

    _lock = threading.Lock()
    _users: ClassVar[int] = 0
    _before: ClassVar[int] = 0

    @classmethod
    @contextmanager
    def single(cls) -> Iterator[None]:
        with cls._lock:
            if cls._users == 0:
                cls._before = cv2.getNumThreads()
                cv2.setNumThreads(1)
            cls._users += 1
        try:
            yield
        finally:
            with cls._lock:
                cls._users -= 1
                if cls._users == 0:
                    cv2.setNumThreads(cls._before)


_Prepared = tuple[ResizeTransform, ImageArray | None]  # the source where it is kept


def _held_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class _Task:
    """One image on its way: what is decoded, into which row, and what came of it."""

    path: Path
    buffer: NDArray[Any]  # (batch, *image_shape)
    row: int
    memory: NDArray[Any]  # what `buffer` lies in, from the pool
    #: Set by the worker: the image, the reason why it cannot be used, or an error that ends the iteration.
    result: _Prepared | str | BaseException | None = None
    #: Held from the start; released by the worker when `result` is set.
    done: threading.Lock = field(default_factory=_held_lock)


class ImageBatcher(Closing):
    """Image files as `Batch`es, decoded and resized by a pool of threads ahead of the consumer.

        with ImageBatcher(find_images(folder), spec.preprocessing, 8) as batches:
            for batch in batches:
                outputs = runtime.infer(batch.images)
                batch.release()

    Order is kept. An image that cannot be read is logged, noted in `failures` and left out; the images after it move up, so that
    every batch but the last is full (with `resize` they stay in their batch). Memory is bounded, whatever the number of images: by
    `prefetch` batches ahead, or as many as hold two images per worker; with `keep_sources` by their decoded images too. Threads scale with
    the cores, as OpenCV and Pillow release the GIL while they decode and resize. Leaving a loop early, by break, an exception or
    Ctrl-C, ends the threads within the time of one image. One thread at a time may ask for the next batch.

    Attributes:
        failures: (path, message) of the images left out in the latest iteration.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        resample: Resample | None = None,
        resize: ShorterSide | None = None,
        workers: int | None = None,
        prefetch: int = 2,
        keep_sources: bool = False,
        pad_to_batch: bool = False,
        allocate: Allocate = np.empty,
    ) -> None:
        """
        Args:
            paths: the image files.
            resize: scale every image by itself, for a model of free input size; each batch has the smallest input that holds its images.
            workers: threads; None: one per available core.
            prefetch: batches that are prepared ahead of the consumer.
            keep_sources: keep the decoded images in `Batch.sources`, for drawing on them.
            pad_to_batch: fill a last batch that is not full with zero rows, for models of a fixed batch size.
            allocate: makes the batch buffers, (batch_size, *image_shape) each; for example of pinned memory, into which the workers then
                write directly. Where the consumer calls `Batch.release`, as many are made as hold the images ahead and the batches in use.
                Their memory must outlive the batches.
        """
        if batch_size < 1 or prefetch < 1 or (workers is not None and workers < 1):
            raise ValueError(
                f"batch_size, prefetch, workers: expected at least 1, got {batch_size}, {prefetch}, {workers}"
            )
        if resample not in (None, "bilinear", "antialias"):
            raise ValueError(f"resample: expected bilinear or antialias, got {resample!r}")
        self.paths = list(paths)
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.failures: list[tuple[Path, str]] = []
        self._resample = resample
        self._workers = workers or available_cores()
        # Every worker needs an image in hand and one to go on with, even where batches are small.
        self._ahead = max(prefetch, -(-2 * self._workers // batch_size))
        self._keep_sources = keep_sources
        self._pad_to_batch = pad_to_batch
        self._resize = resize
        if resize:
            largest = preprocessing.at(resize.largest_canvas(preprocessing))
            shape = (batch_size, *largest.image_shape)
        else:
            shape = (batch_size, *preprocessing.image_shape)
        self._pool = _BufferPool(allocate, shape, np.dtype(preprocessing.dtype))
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

    def close(self) -> None:
        """End iterations that were left before their end. Call it from the thread that iterates."""
        for iteration in list(self._running):
            iteration.close()

    def __iter__(self) -> Iterator[Batch]:
        self.failures = []
        iteration = self._iterate()
        self._running.add(iteration)
        return iteration

    def _iterate(self) -> Generator[Batch, None, None]:
        # Plain threads and a queue: at 16 cores, concurrent.futures costs a tenth of the throughput.
        todo: SimpleQueue[_Task | None] = SimpleQueue()
        threads: list[threading.Thread] = []
        with _OpenCVThreads.single():
            try:
                for number in range(self._workers):
                    name = f"image-batcher-{number}"
                    thread = threading.Thread(
                        target=self._work, args=(todo,), name=name, daemon=True
                    )
                    thread.start()
                    threads.append(thread)
                yield from self._assemble(self._in_order(todo))
            finally:
                with suppress(Empty):
                    while True:
                        todo.get_nowait()
                for _ in threads:
                    todo.put(None)
                for thread in threads:
                    thread.join()

    def _work(self, todo: "SimpleQueue[_Task | None]") -> None:
        """What each worker does until it meets None."""
        while (task := todo.get()) is not None:
            try:
                task.result = self._prepare(task.path, task.buffer[task.row])
            except BaseException as error:  # the consumer raises it
                task.result = error
            task.done.release()

    def _prepare(self, path: Path, out: NDArray[Any]) -> _Prepared | str:
        """Decode and resize one image; a text says why it cannot be used."""
        try:
            image = load_image(path)
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())
        preprocessing, scale = self.preprocessing, None
        if self._resize:
            preprocessing, scale = self._fixed(out.shape), self._resize.scale(image.shape)
            if max(image.shape[:2]) * scale >= max(preprocessing.size_hw) + 1:
                return f"{path}: expected the size in the file's header, found {image.shape[:2]}"
        _, transform = preprocess(
            image, preprocessing, resample=self._resample, scale=scale, out=out
        )
        return transform, image if self._keep_sources else None

    def _in_order(self, todo: "SimpleQueue[_Task | None]") -> Iterator[_Task]:
        """Hand out the images to the workers, `_ahead` batches at a time, and yield the finished tasks in order."""
        batches = self._tasks()
        waiting: deque[list[_Task]] = deque()

        def hand_out(count: int) -> None:
            for batch in islice(batches, count):
                waiting.append(batch)
                for task in batch:
                    todo.put(task)

        hand_out(self._ahead)
        while waiting:
            batch = waiting.popleft()
            hand_out(1)
            for task in reversed(batch):  # the last one first: one wait instead of many
                task.done.acquire()
            yield from batch

    def _tasks(self) -> Iterator[list[_Task]]:
        """The images of one buffer at a time."""
        for start in range(0, len(self.paths), self.batch_size):
            paths = self.paths[start : start + self.batch_size]
            memory = buffer = self._pool.take()
            if self._resize:
                sizes = [size for path in paths if (size := image_size(path))]
                canvas = self._resize.canvas(sizes or [(1, 1)], self.preprocessing)
                shape = (self.batch_size, *self.preprocessing.at(canvas).image_shape)
                buffer = memory.reshape(-1)[: math.prod(shape)].reshape(shape)
            yield [_Task(path, buffer, row, memory) for row, path in enumerate(paths)]

    def _fixed(self, image_shape: tuple[int, ...]) -> Preprocessing:
        """The preprocessing for a network input of this shape, in the network's layout."""
        return self.preprocessing.at(self.preprocessing.size_of(image_shape))

    def _assemble(self, tasks: Iterator[_Task]) -> Generator[Batch, None, None]:
        """Batches out of finished tasks.

        Each image was written where it belongs if none before it failed. After a failure, images are copied down into the hole; the row
        written to never lies behind the row read from, so nothing unread is lost.
        """
        done: list[tuple[Path, ResizeTransform, ImageArray | None]] = []
        target: _Task | None = None  # the first of the batch, whose buffer it gets
        for task in tasks:
            if isinstance(task.result, BaseException):
                raise task.result
            if isinstance(task.result, str):
                logger.warning("skipped: %s", task.result)
                self.failures.append((task.path, task.result))
            elif task.result is not None:
                target = target or task
                if target.buffer is not task.buffer or len(done) != task.row:
                    target.buffer[len(done)] = task.buffer[task.row]
                done.append((task.path, *task.result))
            last = task.row == self.batch_size - 1
            if last and (target is None or task.memory is not target.memory):
                self._pool.give(task.memory)  # all of its images failed or moved up
            # Images that were resized for another batch have another shape: they do not move up.
            if target is not None and (len(done) == self.batch_size or (last and self._resize)):
                yield self._batch(target, done)
                target, done = None, []
        if target is not None:
            yield self._batch(target, done)

    def _batch(
        self,
        target: _Task,
        done: Sequence[tuple[Path, ResizeTransform, ImageArray | None]],
    ) -> Batch:
        images = target.buffer[: len(done)]
        if self._pad_to_batch:
            target.buffer[len(done) :] = 0
            images = target.buffer
        paths, transforms, sources = zip(*done, strict=True)
        kept = sources if self._keep_sources else None
        return Batch(images, paths, transforms, kept, _Lease(self._pool, target.memory))


# ---- run alone


def read_preprocessing(model: Path) -> Preprocessing:
    """What the host has to feed to a model: from an ONNX file's metadata, or from the `.json` beside an engine.

    Raises:
        FileNotFoundError, GraphError, EngineError: no such file, or nothing in it that says so.
    """
    if model.suffix.lower() == ".onnx":
        import onnx

        return ModelSpec.from_onnx(onnx.load(model, load_external_data=False), model).preprocessing
    info = read_sidecar(model)
    if info is None:
        raise FileNotFoundError(
            f"--model: expected an ONNX file of create_onnx.py, or an engine of build_engine.py with its .json, found no "
            f"{sidecar_path(model)}; --size H,W does without"
        )
    return info.spec.preprocessing


def to_picture(network_input: NDArray[Any], preprocessing: Preprocessing) -> ImageArray:
    """One network input as a picture: (h, w, 3) uint8 RGB, rounded."""
    picture = network_input
    if preprocessing.layout == "NCHW":
        picture = network_input.transpose(1, 2, 0)
    return np.ascontiguousarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))


def show(
    images: Sequence[Path],
    root: Path,
    output: Path,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 8,
    resample: Resample | None = None,
    resize: ShorterSide | None = None,
) -> int:
    """Write what the network sees of each image, and print how it was scaled.

    Returns:
        The number of images that could not be read.
    """
    names = dict(zip(images, output_names(images, root), strict=True))
    targets = {path: output / with_suffix_added(name, ".png") for path, name in names.items()}
    check_not_inputs(targets.values(), images)
    height, width = preprocessing.size_hw
    size = f"of {resize.shorter} to {resize.longer}" if resize else f"{width} x {height}"
    print(
        f"network input {size} {preprocessing.layout} {preprocessing.dtype}, "
        f"{preprocessing.resize}, padding {preprocessing.pad_rgb}"
    )
    print(f"{'source':>13} {'scale x':>9} {'scale y':>9} {'in network':>13}  picture")
    with ImageBatcher(
        images, preprocessing, batch_size, resample=resample, resize=resize
    ) as batches:
        for batch in batches:
            for seen, path, transform in zip(
                batch.images, batch.paths, batch.transforms, strict=True
            ):
                write_png(targets[path], to_picture(seen, preprocessing))
                print(
                    _table_row(transform, preprocessing, resize), targets[path].relative_to(output)
                )
            batch.release()
    return len(batches.failures)


def _table_row(
    transform: ResizeTransform, preprocessing: Preprocessing, resize: ShorterSide | None
) -> str:
    source_w, source_h = transform.source_wh
    scale = resize.scale((source_h, source_w)) if resize else None
    (height, width), _ = _placement((source_h, source_w), preprocessing, scale)
    source, inside = f"{source_w} x {source_h}", f"{width} x {height}"
    scale_x, scale_y = transform.scale_xy
    return f"{source:>13} {scale_x:>9.5f} {scale_y:>9.5f} {inside:>13} "


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("-m", "--model", type=Path, help="ONNX file, or engine with its .json, that says how images are prepared")
    parser.add_argument("-i", "--input", type=Path, required=True, help="an image, or a directory of images")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory for the PNGs")
    parser.add_argument("-b", "--batch_size", type=positive_int, default=8, help="images per batch (default: %(default)s)")
    parser.add_argument("--resample", choices=["bilinear", "antialias"], help="bilinear as TensorFlow does it, or antialiased as Pillow does it (default: as the model was trained)")
    parser.add_argument("--recursive", action="store_true", help="search sub-folders too")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    # fmt: on
    add_size_options(
        parser,
        size_help="size of the network input, where the model leaves it open; without --model, of AutoML's letterbox",
    )
    args = parser.parse_args(argv)
    check_size_usage(parser, args)
    if not args.model and not args.size:
        parser.error("give --model, or --size H,W to see AutoML's letterbox without a model")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging(args.verbose)

    def run() -> int:
        preprocessing, resize = Preprocessing(args.size, pad_rgb=IMAGENET_MEAN), None
        if args.model:
            preprocessing, resize = choose_input(
                read_preprocessing(args.model),
                size=args.size,
                resize=args.resize,
                max_size=args.max_size,
            )
        images = find_images(args.input, recursive=args.recursive)
        failed = show(
            images,
            args.input,
            args.output,
            preprocessing,
            batch_size=args.batch_size,
            resample=args.resample,
            resize=resize,
        )
        logger.info("%d of %d images shown", len(images) - failed, len(images))
        print(args.output)
        return SOME_SKIPPED if failed else 0

    return run_main(run)


if __name__ == "__main__":
    raise SystemExit(main())
