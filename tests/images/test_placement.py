# SPDX-License-Identifier: Apache-2.0
"""How images come into the network input: placement, rounding, and inputs of dynamic size."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import image_size
from trtdet.images.preprocess import ShorterSide, preprocess
from trtdet.spec import ModelSpec, Nms, Preprocessing

RANDOM = np.random.default_rng(0)
FREE = Preprocessing(
    (256, 256), pad_rgb=(9, 8, 7), size_range=((64, 64), (512, 512)), size_multiple=64
)


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return RANDOM.integers(0, 256, (height, width, 3), np.uint8)


def save(folder: Path, name: str, height: int, width: int, **options: Any) -> Path:
    path = folder / name
    Image.fromarray(noise(height, width)).save(path, **options)
    return path


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize(
    ("source_hw", "box"),  # top, left, bottom, right of the picture in 96 x 128
    [
        ((50, 100), (16, 0, 80, 128)),  # padded above and below
        ((60, 50), (0, 24, 96, 104)),  # left and right
        ((75, 103), (1, 0, 94, 128)),  # 93.2 rows round to 93; the odd one of 3 goes below
        ((96, 128), (0, 0, 96, 128)),  # not at all
    ],
)
def test_yolo_letterbox(
    source_hw: tuple[int, int], box: tuple[int, int, int, int], layout: Any, dtype: Any
) -> None:
    """Centred on 114 grey, the size rounded; the way back takes each corner of the picture to
    that of the image.
    """
    preprocessing = Preprocessing(
        (96, 128), layout, dtype, pad_rgb=(114, 114, 114), placement="center", rounding="round"
    )
    image = noise(*source_hw)
    seen, transform = preprocess(image, preprocessing)
    seen = seen if layout == "NHWC" else seen.transpose(1, 2, 0)
    top, left, bottom, right = box
    outside = np.ones((96, 128), bool)
    outside[top:bottom, left:right] = False
    assert (seen[outside] == 114).all()
    resized = cv2.resize(image.astype(dtype), (right - left, bottom - top))
    np.testing.assert_array_equal(seen[top:bottom, left:right], resized)
    corners = transform.to_source(np.array([[left, top, right, bottom]], np.float32))
    np.testing.assert_allclose(corners, [[0, 0, source_hw[1], source_hw[0]]], atol=1e-4)


WARPED = Preprocessing(
    (96, 96), pad_rgb=(9, 8, 7), placement="center", rounding="none", sampling="corner"
)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """No two neighbours differ by more than a few levels, but for the edges."""
    y, x, c = np.mgrid[:height, :width, :3]
    return np.uint8(127 + 60 * np.sin(x / 9 + c) + 60 * np.cos(y / 7 - c))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("source_hw", [(50, 101), (333, 200), (97, 130), (96, 96), (20, 31)])
def test_affine_warp(source_hw: tuple[int, int], layout: Any, dtype: Any) -> None:
    """CenterNet's: the middle of the image comes to the middle of the input, its longer side to
    that of the input; three points give OpenCV's matrix.
    """
    preprocessing = dataclasses.replace(WARPED, layout=layout, dtype=dtype)
    image = smooth(*source_hw)
    seen, transform = preprocess(image, preprocessing)
    seen = seen if layout == "NHWC" else seen.transpose(1, 2, 0)
    height, width = source_hw
    half = np.float32(max(source_hw) / 2)
    middle = np.array([width / 2, height / 2], np.float32)
    source = np.stack([middle, middle - [0, half], middle - [half, half]]).astype(np.float32)
    matrix = cv2.getAffineTransform(source, np.array([[48, 48], [48, 0], [0, 0]], np.float32))
    wanted = cv2.warpAffine(image.astype(dtype), matrix, (96, 96), borderValue=(9, 8, 7))
    assert np.abs(seen.astype(np.float64) - wanted).max() <= (1 if dtype == "uint8" else 0.01)
    corners = np.array([[0, 0, 1], [width, height, 1]]) @ matrix.T
    found = transform.to_source(corners.reshape(1, 4).astype(np.float32), clip=False)
    np.testing.assert_allclose(found, [[0, 0, width, height]], atol=1e-3)


def test_affine_warp_by_hand() -> None:
    """Twice as large: odd pixels lie halfway between two of the image, or between its edge and the
    padding; with centres at half pixels a quarter and three quarters of the way.
    """
    image = np.full((2, 4, 3), 100, np.uint8)
    image[:, 1] = 200
    row, _ = preprocess(image, dataclasses.replace(WARPED, size_hw=(8, 8), pad_rgb=(0, 0, 0)))
    np.testing.assert_allclose(row[2, :, 0], [100, 150, 200, 150, 100, 100, 100, 50], atol=0.1)
    np.testing.assert_allclose(row[:, 0, 0], [0, 50, 100, 100, 100, 50, 0, 0], atol=0.1)
    centred = dataclasses.replace(WARPED, size_hw=(8, 8), sampling="half_pixel", pad_rgb=(0, 0, 0))
    row, _ = preprocess(image, centred)
    np.testing.assert_allclose(row[3, :3, 0], [75, 125, 175], atol=0.1)


def test_affine_warp_is_bilinear_alone() -> None:
    with pytest.raises(ValueError, match="this model's images are warped, which is bilinear alone"):
        preprocess(noise(50, 60), WARPED, resample="antialias")
    with pytest.raises(ValueError, match="antialias: expected false where rounding is none"):
        dataclasses.replace(WARPED, antialias=True)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_cubic_is_opencvs(dtype: Any, layout: Any) -> None:
    """Whole levels, larger and smaller; bilinear where that is asked for."""
    cubic = Preprocessing((40, 90), layout, dtype, resize="stretch", sampling="cubic")
    for image in (noise(100, 60), noise(30, 45)):
        found, _ = preprocess(image, cubic)
        pixels = found if layout == "NHWC" else found.transpose(1, 2, 0)
        expected = cv2.resize(image, (90, 40), interpolation=cv2.INTER_CUBIC)
        np.testing.assert_array_equal(pixels, expected)
        plain = dataclasses.replace(cubic, sampling="half_pixel")
        asked, _ = preprocess(image, cubic, resample="bilinear")
        np.testing.assert_array_equal(asked, preprocess(image, plain)[0])
        assert np.abs(asked.astype(float) - found).max() > 5
    for change in ({"antialias": True}, {"resize": "letterbox", "rounding": "none"}):
        with pytest.raises(ValueError, match="sampling: expected no cubic"):
            dataclasses.replace(cubic, **change)


def test_antialias_belongs_to_the_model() -> None:
    """Shrinking by four: the mean of the area where the model was trained so, else four
    neighbours.
    """
    image = np.zeros((64, 64, 3), np.uint8)
    image[::4] = 255  # rows that no neighbour of a target pixel's centre touches
    plain, _ = preprocess(image, Preprocessing((16, 16)))
    smooth, _ = preprocess(image, Preprocessing((16, 16), antialias=True))
    assert plain.max() == 0
    assert abs(smooth[4:-4].mean() - 255 / 4) < 16


@pytest.mark.parametrize(
    ("source_hw", "scale"), [((480, 640), 200 / 480), ((1000, 200), 0.3), ((100, 100), 2.0)]
)
def test_shorter_side(source_hw: tuple[int, int], scale: float) -> None:
    assert ShorterSide(200, 300).scale(source_hw) == pytest.approx(scale)


def test_the_canvas_holds_every_image_of_the_batch() -> None:
    sizes = [(480, 640), (1000, 200)]  # become 200 x 266 and 300 x 60
    assert ShorterSide(200, 300).canvas(sizes[:1], FREE) == (256, 320)
    assert ShorterSide(200, 300).canvas(sizes, FREE) == (320, 320)
    assert ShorterSide(20, 30).canvas(sizes, FREE) == (64, 64)  # the smallest that the model takes


def test_a_size_out_of_range_is_refused() -> None:
    assert FREE.at((128, 512)).image_shape == (128, 512, 3)
    for size_hw in ((128, 576), (32, 128), (128, 100)):
        with pytest.raises(ValueError, match="the model takes 64x64 to 512x512 in steps of 64"):
            FREE.at(size_hw)
    with pytest.raises(ValueError, match=r"input size 64x64 .*: the model takes 32x48"):
        Preprocessing((32, 48)).at((64, 64))
    with pytest.raises(ValueError, match="input size 576x576"):
        ImageBatcher([], FREE, 2, resize=ShorterSide(400, 570))


def test_a_free_size_survives_the_file() -> None:
    spec = ModelSpec("toy", FREE, Nms(), (1,))
    assert ModelSpec.from_json(json.dumps(spec.to_dict())) == spec
    assert FREE.image_dims == ("H", "W", 3)


def test_header_size_is_the_upright_one(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = save(tmp_path, "rotated.jpg", 30, 50, exif=exif.tobytes())
    assert image_size(save(tmp_path, "plain.png", 30, 50)) == (30, 50)
    assert image_size(rotated) == (50, 30)
    (tmp_path / "text.png").write_text("no picture")
    assert image_size(tmp_path / "text.png") is None


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_batches_of_a_free_size(tmp_path: Path, layout: Any) -> None:
    """Every batch has the smallest input that holds its images; an unreadable one leaves a
    shorter batch; pixels are those of one alone.
    """
    preprocessing = Preprocessing(
        (256, 256), layout, size_range=FREE.size_range, size_multiple=64, pad_rgb=(9, 8, 7)
    )
    sizes = [(480, 640), (300, 400), (1000, 200), (100, 100), (200, 900)]
    paths = [save(tmp_path, f"{i}.png", *hw) for i, hw in enumerate(sizes)]
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    paths.insert(3, bad)
    resize = ShorterSide(200, 300)
    shapes = []
    with ImageBatcher(paths, preprocessing, 2, resize=resize, workers=2) as batches:
        for batch in batches:
            images = batch.images if layout == "NHWC" else batch.images.transpose(0, 2, 3, 1)
            shapes.append(images.shape)
            for seen, path, transform in zip(images, batch.paths, batch.transforms, strict=True):
                image = np.asarray(Image.open(path))
                height, width = (int(n * resize.scale(image.shape)) for n in image.shape[:2])
                alone = cv2.resize(image.astype(np.float32), (width, height))
                np.testing.assert_array_equal(seen[:height, :width], alone)
                assert (seen[height:] == (9, 8, 7)).all()
                assert (seen[:height, width:] == (9, 8, 7)).all()
                assert transform.scale_xy == pytest.approx((resize.scale(image.shape),) * 2)
            batch.release()
    assert shapes == [(2, 256, 320, 3), (1, 320, 64, 3), (2, 256, 320, 3)]
    assert [path for path, _ in batches.failures] == [bad]
