# SPDX-License-Identifier: Apache-2.0
"""`trtdet.images.jpeg`: which JPEGs every decoder shows alike."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trtdet.images.jpeg import plain_size, without_trailer

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)


def jpeg(mode: str = "RGB", *, orientation: int | None = None, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    if orientation is not None:
        exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(out, "JPEG", exif=exif, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        jpeg(),
        jpeg(subsampling=0),
        jpeg(subsampling=1),
        jpeg(progressive=True),
        jpeg(orientation=1),
        jpeg(comment=b"x" * 400, quality=30),
    ],
)
def test_plain(data: bytes) -> None:
    assert plain_size(data) == (30, 50)
    assert plain_size(memoryview(data)) == (30, 50)


ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
PLAIN = jpeg()


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("grey", jpeg("L")),
        ("CMYK", jpeg("CMYK")),
        ("RGB by its Adobe segment", PLAIN[:2] + ADOBE_RGB + PLAIN[2:]),
        ("RGB by its component ids", jpeg(keep_rgb=True)),
        *((f"orientation {n}", jpeg(orientation=n)) for n in (0, 2, 3, 6, 8)),
        ("truncated", PLAIN[:-10]),
        ("no pixels", PLAIN[:40] + b"\xff\xd9"),
        ("a PNG", b"\x89PNG\r\n\x1a\n" + bytes(40)),
        ("nothing", b""),
        ("an Adobe segment that is cut", b"\xff\xd8\xff\xee\x00\x0eAdobe\xff\xd9"),
        ("Exif of no byte order", PLAIN.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")),
        ("an Exif entry beyond the end", PLAIN.replace(b"\x00\x01\x01\x0f", b"\xff\xff\x01\x0f")),
    ],
)  # fmt: skip
def test_not_plain(what: str, data: bytes) -> None:
    assert plain_size(data) is None, what


def with_thumbnail() -> bytes:
    """A JPEG with another one in its Exif segment."""
    inner = b"Exif\0\0II*\0\x08\0\0\0\0\0" + PLAIN  # no entries
    return PLAIN[:2] + b"\xff\xe1" + (len(inner) + 2).to_bytes(2, "big") + inner + PLAIN[2:]


@pytest.mark.parametrize(
    "data", [PLAIN, jpeg(progressive=True), jpeg(restart_marker_blocks=1), with_thumbnail()]
)
@pytest.mark.parametrize("trailer", [b"\0", b"\0" * 999, b"MotionPhoto_Data\0ftypmp42", PLAIN + b"\0"])  # fmt: skip
def test_what_follows_the_end_is_cut_off(data: bytes, trailer: bytes) -> None:
    assert plain_size(data + trailer) is None
    assert without_trailer(data + trailer) == without_trailer(data) == data
    assert plain_size(without_trailer(data + trailer)) == (30, 50)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", PLAIN[:40], PLAIN[:-10], with_thumbnail()[:-10], b"\x89PNG\r\n\x1a\n"])  # fmt: skip
def test_without_an_end_nothing_is_cut_off(data: bytes) -> None:
    assert without_trailer(data) == data


def test_no_damage_is_an_exception() -> None:
    rng = np.random.default_rng(0)
    whole = bytearray(jpeg(orientation=1))
    for _ in range(2000):
        damaged = whole.copy()
        for at in rng.integers(2, 300, 3):
            damaged[at] = rng.integers(0, 256)
        size = plain_size(bytes(damaged))
        assert size is None or min(size) > 0
        assert bytes(damaged).startswith(without_trailer(bytes(damaged)))
