# SPDX-License-Identifier: Apache-2.0
"""Find and decode image files."""

import glob
import io
import logging
import os
import re
import stat
import struct
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

ImageArray = NDArray[np.uint8]  # (h, w, 3) RGB

#: Where images are: a file, a folder or a glob, or several of them.
Sources: TypeAlias = Path | Sequence[Path]
Item = TypeVar("Item")

GLOB = re.compile(r"[*?\[]")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
#: What Pillow decodes of them, whatever they are called. Not EPS, for which it runs Ghostscript,
#: nor the many kinds that nobody photographs in.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF")
#: Markers of a JPEG (ITU-T T.81, annex B): its start, and the frame headers that are read.
SOI = b"\xff\xd8"
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
#: Files shorter than this are read into memory that each thread keeps.
_KEPT_BYTES = 1 << 20
_thread = threading.local()


logger = logging.getLogger(__name__)


# ---- files -> pixels


def find_images(
    sources: Sources,
    *,
    recursive: bool = False,
    num_images: int | None = None,
    option: str = "--input",
) -> list[Path]:
    """The image files among `sources`, each once: sorted within a folder, else in the order given.

    Hidden files and folders (a leading dot) are left out: macOS leaves `._photo.jpg` files that are
    not images.

    Args:
        sources: files, folders and globs.
        num_images: at most so many of them, evenly spread.
        option: the one that named `sources`, for messages.

    Raises:
        FileNotFoundError: nothing at one of `sources`.
        ValueError: no image there; says what was looked for.
    """
    kinds = " ".join(suffix[1:] for suffix in SUFFIXES)
    paths = expand(sources, option)
    found: list[Path] = []
    others: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += map(Path, sorted(_images_in(path, recursive=recursive), key=_in_order))
        elif path.suffix.lower() in SUFFIXES:
            found.append(path)
        else:
            others.append(path)
    if others and (not found or len(paths) == 1):
        raise ValueError(f"{option}: expected an image ({kinds}), found {others[0]}")
    if others:
        logger.warning("%s: %d files are no images (%s): left out", option, len(others), others[0])
    if not found:
        advice = (
            ""
            if recursive or option != "--input"
            else "; sub-folders are searched with --recursive"
        )
        where = " ".join(map(str, paths))
        raise ValueError(f"{option}: expected images ({kinds}) in {where}, found none{advice}")
    return spread(list(dict.fromkeys(found)), num_images)


def check_no_image(outputs: Iterable[Path | None], sources: Sources | None) -> None:
    """Find out before long work whether an output would replace one of the images.

    Raises:
        ValueError: names it.
    """
    read = [os.path.realpath(path) for path in expand(sources)] if sources is not None else []
    for output in outputs:
        if output is None or output.suffix.lower() not in SUFFIXES or not output.is_file():
            continue
        target = os.path.realpath(output)
        if any(target == path or target.startswith(f"{path}{os.sep}") for path in read):
            raise ValueError(f"{output}: is one of the images; give the output another name")


def root_of(sources: Sources) -> Path:
    """What names of results are relative to: a folder given alone, or the folder that all of
    several sources are in.
    """
    if isinstance(sources, Path) and sources.exists():
        return sources
    paths = expand(sources)
    if len(paths) == 1:
        return paths[0]
    folders = [path if path.is_dir() else path.parent for path in paths]
    if all(folder == folders[0] for folder in folders):
        return folders[0]
    absolute = any(folder.is_absolute() for folder in folders)
    shared = os.path.commonpath([folder.absolute() if absolute else folder for folder in folders])
    return Path(shared)


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """`count` of the items, evenly spread; all of them where there are no more, or for None."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]


def expand(sources: Sources, option: str = "--input") -> list[Path]:
    """`sources` with each glob replaced by what it matches.

    A path that exists is taken as it is, whatever its characters.
    """
    paths: list[Path] = []
    for path in [sources] if isinstance(sources, str | Path) else sources:
        path = Path(path)
        found = [path] if path.exists() else []
        if not found and GLOB.search(str(path)):
            found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise FileNotFoundError(
                f"{option}: expected an image or a folder of images, found nothing at {path}"
            )
        paths += found
    return paths


def _in_order(path: str) -> str:
    """What sorts paths as `Path` does, part by part, in a fraction of the time."""
    return path.replace(os.sep, "\0")


def _images_in(folder: Path, *, recursive: bool) -> Iterator[str]:
    others: Counter[str] = Counter()
    for inner, subfolders, names in os.walk(folder, onerror=_raise):
        subfolders[:] = [name for name in subfolders if recursive and not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                yield os.path.join(inner, name)
            else:
                others[suffix or "no suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(4))
        logger.info("%s: %d other files are not read (%s)", folder, others.total(), kinds)


def _raise(error: OSError) -> None:
    """A folder that cannot be read is said, not passed over."""
    raise error


def load_image(path: Path) -> ImageArray:
    """Decode an image file the way it is meant to be seen: `decode_image` of its bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: as in `decode_image`, or no regular file: a FIFO would wait for ever, a device
            has no end; names the file.
    """
    data = _read_short(path)
    if data is not None:
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return pixels
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: expected an image file, found a folder, a device or a FIFO")
    return decode_image(Path(path).read_bytes(), str(path))


def _read_short(path: Path) -> memoryview | None:
    """The bytes of a file, in memory that the thread keeps and fills again.

    None for one that does not fit, or gives nothing.

    Three calls of the system and no fresh memory. `Path.read_bytes` makes seven, and many threads
    wait for Python's lock after each. A FIFO is not waited for.
    """
    kept: memoryview | None = _thread.__dict__.get("kept")
    if kept is None:
        kept = _thread.__dict__["kept"] = memoryview(bytearray(_KEPT_BYTES))
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        count = os.readv(file, [kept])
    except OSError:  # a folder, an empty FIFO, a broken disk: `load_image` says which
        return None
    finally:
        os.close(file)
    return kept[:count] if 0 < count < _KEPT_BYTES else None


def decode_image(data: bytes, name: str) -> ImageArray:
    """Decode the bytes of an image file the way it is meant to be seen.

    The EXIF orientation is applied; 16 bits are scaled to 8; grey, palette and CMYK become RGB;
    alpha is dropped. A JPEG that is damaged in the middle comes out with wrong pixels: libjpeg goes
    on, and writes its warning to stderr by itself. JPEGs go through OpenCV, with the same pixels as
    Pillow's (both are libjpeg-turbo with its default, exact settings) in 0.8 of the time, and less
    where several threads decode, as Pillow's way into NumPy holds the GIL. CMYK and all other kinds
    go through Pillow.

    Args:
        name: of the image, for messages.

    Returns:
        (h, w, 3) uint8 RGB, not necessarily writable.

    Raises:
        ValueError: it is not an image, is damaged, or has more than twice
            `PIL.Image.MAX_IMAGE_PIXELS` (179 million); one line that begins with `name`.
    """
    if not data:
        raise ValueError(f"{name}: expected an image, found an empty file")
    try:
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return pixels
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return _to_rgb(image)
    except Exception as error:  # on a damaged file Pillow's readers raise errors of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not an image, or of an unknown kind (first bytes: {data[:8]!r})"
        raise ValueError(f"{name}: cannot be decoded: {reason}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode_jpeg(data: bytes | memoryview) -> ImageArray | None:
    """A JPEG decoded by OpenCV, which applies the EXIF orientation too.

    None for others and for damaged ones: Pillow says how.
    """
    if not _plain_jpeg(data):
        return None
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return None if pixels is None else np.asarray(pixels, np.uint8)


def _plain_jpeg(data: bytes | memoryview) -> bool:
    """Whether this is a JPEG of 8-bit grey or colour, not CMYK, and of a size that Pillow would
    open.

    Pillow's own reading of the header takes four times as long, with the GIL held: at 16 cores 4 %
    of the throughput.
    """
    for marker, at, _ in segments(data):
        if is_frame(marker):
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            return bits == 8 and channels in (1, 3) and height * width <= most_pixels()
    return False


def segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """The segments of a header one after the other: marker, where it begins, where it ends. None of
    what is no JPEG.
    """
    at = len(SOI) if data[:2] == SOI else len(data)
    while at + 10 <= len(data) and data[at] == 0xFF:
        end = at + 2 + (data[at + 2] << 8) + data[at + 3]
        yield data[at + 1], at, end
        at = end


def is_frame(marker: int) -> bool:
    """Whether a segment is the header of a frame that is coded in the usual ways."""
    return BASELINE <= marker <= PROGRESSIVE


def most_pixels() -> int:
    """Pixels of the largest image that is decoded: Pillow's limit."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else sys.maxsize


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
    pixels = np.asarray(upright.convert("RGB"))
    if pixels.ndim != 3:  # where Pillow fails, NumPy makes an array of one object
        raise ValueError("damaged")
    return pixels


def image_size(path: Path) -> tuple[int, int] | None:
    """Height and width of the upright image, from the file's header.

    None where it has none that can be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with Image.open(path, formats=_formats()) as image:
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # Pillow's readers raise errors of many kinds; decoding will say which
        return None
    return (width, height) if sideways else (height, width)


def check_read(failures: Sequence[tuple[Path, str]], count: int) -> None:
    """Raise ValueError where not one image could be read.

    Args:
        failures: (path, message) of those that could not, which are logged already.
        count: of those that could.
    """
    if not count:
        raise ValueError(f"--input: none of {len(failures)} images could be read; {failures[0][1]}")
