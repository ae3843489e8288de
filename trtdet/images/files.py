# SPDX-License-Identifier: Apache-2.0
"""Find and decode image files."""

import io
import os
import struct
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

ImageArray = NDArray[np.uint8]  # (h, w, 3) RGB

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


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
    """Decode an image file the way it is meant to be seen: `decode_image` of its bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: as in `decode_image`; names the file.
    """
    return decode_image(Path(path).read_bytes(), str(path))


def decode_image(data: bytes, name: str) -> ImageArray:
    """Decode the bytes of an image file the way it is meant to be seen.

    The EXIF orientation is applied; 16 bits are scaled to 8; grey, palette and CMYK become RGB; alpha is dropped.
    A JPEG that is damaged in the middle comes out with wrong pixels: libjpeg goes on, and writes its warning to stderr by itself.
    JPEGs go through OpenCV, with the same pixels as Pillow's (both are libjpeg-turbo with its default, exact settings) in 0.8 of the
    time, and less where several threads decode, as Pillow's way into NumPy holds the GIL. CMYK and all other kinds go through Pillow.

    Args:
        name: of the image, for messages.

    Returns:
        (h, w, 3) uint8 RGB, not necessarily writable.

    Raises:
        ValueError: it is not an image, is damaged, or has more than twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million); one line that
            begins with `name`.
    """
    if not data:
        raise ValueError(f"{name}: expected an image, found an empty file")
    try:
        if _plain_jpeg(data):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if pixels is not None:  # None: damaged; Pillow says how
                return np.asarray(pixels, np.uint8)
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image)
    except Exception as error:  # on a damaged file Pillow's readers raise errors of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not an image, or of an unknown kind (first bytes: {data[:8]!r})"
        raise ValueError(f"{name}: cannot be decoded: {reason}") from error


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
