# SPDX-License-Identifier: Apache-2.0
"""`trtdet.images.jpeg`: which JPEGs every decoder shows alike."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trtdet.images.jpeg import plain_size

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
        ("Exif of no byte order", PLAIN.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")),
        ("an Exif entry beyond the end", PLAIN.replace(b"\x00\x01\x01\x0f", b"\xff\xff\x01\x0f")),
    ],
)  # fmt: skip
def test_not_plain(what: str, data: bytes) -> None:
    assert plain_size(data) is None, what


def test_no_damage_is_an_exception() -> None:
    rng = np.random.default_rng(0)
    whole = bytearray(jpeg(orientation=1))
    for _ in range(2000):
        damaged = whole.copy()
        for at in rng.integers(2, 300, 3):
            damaged[at] = rng.integers(0, 256)
        size = plain_size(bytes(damaged))
        assert size is None or min(size) > 0
