# SPDX-License-Identifier: Apache-2.0


import io
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from operator import length_hint
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import toy_detector
from numpy.typing import NDArray
from PIL import Image, ImageOps

from trtdet.commands import image_batcher
from trtdet.engine.options import BatchRange
from trtdet.engine.sidecar import EngineInfo, write_engine
from trtdet.images import files as image_files
from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import find_images, load_image
from trtdet.images.preprocess import preprocess
from trtdet.spec import ModelSpec, Nms, Preprocessing

MEAN = (123.675, 116.28, 103.53)
RANDOM = np.random.default_rng(0)
Pixels = NDArray[np.uint8]


def noise(height: int, width: int) -> Pixels:
    """An image in which every misplaced pixel shows."""
    return RANDOM.integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> Pixels:
    """Noise that JPEG keeps nearly as it is."""
    return cv2.resize(noise(4, 5), (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(image: Pixels, **options: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=90, **options)
    return data.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


# ---- find_images


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_find_images_takes_the_known_suffixes_in_order(tmp_path: Path) -> None:
    images = ["B.JPG", "a.jpeg", "c.Png", "d.bmp", "e.webp", "f.tif", "g.TIFF"]
    touch(tmp_path, *images, "notes.txt", "a.gif", "._a.jpg", "sub/h.jpg", ".hidden/i.jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert find_images(tmp_path) == [tmp_path / name for name in images]
    below = [tmp_path / name for name in sorted([*images, "sub/h.jpg"])]
    assert find_images(tmp_path, recursive=True) == below


def test_find_images_takes_one_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.JPG", "notes.txt")
    assert find_images(tmp_path / "a.JPG") == [tmp_path / "a.JPG"]
    with pytest.raises(ValueError, match=r"expected an image \(jpg .*found .*notes\.txt"):
        find_images(tmp_path / "notes.txt")


def test_find_images_says_what_is_missing(tmp_path: Path) -> None:
    touch(tmp_path, "sub/a.jpg")
    with pytest.raises(FileNotFoundError, match=r"found nothing at .*nowhere"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected images \(jpg .*--recursive"):
        find_images(tmp_path)


# ---- load_image


@pytest.mark.parametrize("subsampling", [0, 1, 2])  # 4:4:4, 4:2:2, 4:2:0
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_decoded_exactly_as_pillow_does(
    tmp_path: Path, subsampling: int, progressive: bool, mode: str
) -> None:
    source = Image.fromarray(noise(67, 131)).convert(mode)
    path = tmp_path / "a.jpg"
    source.save(path, quality=85, subsampling=subsampling, progressive=progressive)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(load_image(path), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    # What a camera stores so that it comes out upright: the inverse of each of the eight turns.
    upright = smooth(24, 40)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    path = tmp_path / f"a{suffix}"
    options = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif(orientation), **options)
    found = load_image(path)
    assert found.shape == upright.shape
    lossy = 8 if suffix == ".jpg" else 0  # a turn or flip that went wrong is off by 60 and more
    assert np.abs(found.astype(int) - upright).mean() <= lossy
    with Image.open(path) as image:
        np.testing.assert_array_equal(found, np.asarray(ImageOps.exif_transpose(image)))


def test_16_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]  # value / 257, rounded
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        found = load_image(tmp_path / name)
        assert found.dtype == np.uint8
        assert found[0, :, 0].tolist() == found[0, :, 2].tolist() == expected
    Image.fromarray(values.astype(">u2")).save(tmp_path / "big-endian.tif")
    assert load_image(tmp_path / "big-endian.tif")[0, :, 1].tolist() == expected
    assert cv2.imwrite(str(tmp_path / "rgb.png"), np.repeat(values[:, :, None], 3, axis=2))
    rgb = load_image(tmp_path / "rgb.png").astype(int)
    assert rgb.shape == (1, 6, 3)
    assert np.abs(rgb[0, :, 0] - expected).max() <= 1  # Pillow keeps the upper byte


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 0), (100, 100, 100)),  # alpha is dropped, not blended
        ("RGBA", (10, 200, 30, 0), (10, 200, 30)),
        ("1", 1, (255, 255, 255)),
        ("P", 7, (70, 80, 90)),
    ],
)
def test_other_modes_become_rgb(
    tmp_path: Path, mode: str, color: Any, rgb: tuple[int, int, int]
) -> None:
    image = Image.new(mode, (5, 4), color)
    if mode == "P":
        image.putpalette([0, 0, 0] * 7 + [70, 80, 90])
        image.info["transparency"] = b"\0" * 8
    image.save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.png")
    assert found.shape == (4, 5, 3)
    assert (found == rgb).all()


def test_cmyk_jpegs_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(load_image(tmp_path / "a.jpg").astype(int) - (0, 255, 255)).max() <= 3


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm(tmp_path: Path) -> None:
    data = jpeg(smooth(20, 30))
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "b.jpg").write_bytes(data + b"SAMSUNG" + bytes(100))
    np.testing.assert_array_equal(load_image(tmp_path / "a.jpg"), load_image(tmp_path / "b.jpg"))


@pytest.mark.parametrize("length", [2**20 - 1, 2**20, 2**20 + 1, 2**21])
def test_files_of_any_length_are_read_whole(tmp_path: Path, length: int) -> None:
    """What a thread keeps to read into has 2**20 bytes; the comment in front of the pixels fills
    the file.
    """
    short = jpeg(smooth(20, 30))
    rest = length - len(short)
    comments = b""
    while rest:  # segments of 6 to 65537 bytes
        size = rest if rest <= 65537 else min(65537, rest - 6)
        comments += b"\xff\xfe" + (size - 2).to_bytes(2, "big") + bytes(size - 4)
        rest -= size
    (tmp_path / "long.jpg").write_bytes(short[:2] + comments + short[2:])
    (tmp_path / "short.jpg").write_bytes(short)
    assert (tmp_path / "long.jpg").stat().st_size == length
    found = load_image(tmp_path / "long.jpg")
    np.testing.assert_array_equal(found, load_image(tmp_path / "short.jpg"))


def test_pixels_outlive_the_memory_that_files_are_read_into(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(3)]
    for path in paths:
        path.write_bytes(jpeg(noise(30, 40)))
    found = [load_image(path) for path in paths]
    for path, pixels in zip(paths, found, strict=True):
        with Image.open(path) as image:
            np.testing.assert_array_equal(pixels, np.asarray(image))


def png(image: Pixels) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "found an empty file"),
        (b"just text", r"not an image.*b'just tex'"),
        (jpeg(noise(64, 64))[:-1], "truncated"),
        (jpeg(noise(64, 64))[:2000], "truncated"),  # in the middle of the pixels
        (jpeg(noise(64, 64))[:30], ""),  # in the header
        (png(noise(64, 64))[:5000], "truncated|broken"),
    ],
)
def test_damaged_files_are_one_line_that_names_them(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    path = tmp_path / "damaged.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"damaged\.jpg: .*({reason})") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_decompression_bombs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    Image.fromarray(noise(30, 40)).save(tmp_path / f"a{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)  # Pillow refuses more than twice that
    with pytest.raises(ValueError, match=r"a\..*1200 pixels"):
        load_image(tmp_path / f"a{suffix}")


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: .*expected 8 or 16 bits.*found 32"):
        load_image(tmp_path / "a.tif")


# ---- preprocess


def tensorflow_resize(image: Pixels, height: int, width: int) -> NDArray[np.float32]:
    """tf.image.resize(image, (height, width), "bilinear"): half-pixel centres, no antialias, all
    in float32.
    """

    def neighbours(source: int, target: int) -> tuple[Any, Any, NDArray[np.float32]]:
        step = np.float32(source) / np.float32(target)
        at = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
        lower = np.floor(at)
        upper = np.clip(lower + 1, 0, source - 1).astype(int)
        return np.clip(lower, 0, None).astype(int), upper, at - lower

    top, bottom, weight_y = neighbours(image.shape[0], height)
    left, right, weight_x = neighbours(image.shape[1], width)
    x = image.astype(np.float32)
    wx, wy = weight_x[None, :, None], weight_y[:, None, None]
    upper = x[top][:, left] + (x[top][:, right] - x[top][:, left]) * wx
    lower = x[bottom][:, left] + (x[bottom][:, right] - x[bottom][:, left]) * wx
    return upper + (lower - upper) * wy


#: Source height and width -> where AutoML's float32 arithmetic puts it in 512 x 512.
PLACED = [
    ((480, 640), (384, 512)),
    ((426, 640), (340, 512)),  # 340.8: truncated, not rounded
    ((100, 121), (423, 511)),  # float64 would say 512
    ((100, 394), (129, 512)),  # float64 would say 511
    ((512, 512), (512, 512)),  # nothing to resize
    ((300, 512), (300, 512)),
    ((7, 3), (512, 219)),  # enlarged
    ((1000, 77), (512, 39)),
    ((3000, 500), (512, 85)),  # so tall that rows are picked before they are converted
    ((20, 30000), (1, 512)),
    ((2, 4000), (1, 512)),  # 0.256 rows: at least one stays
]


@pytest.mark.parametrize(("source_hw", "placed_hw"), PLACED)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_letterbox_equals_tensorflow(
    source_hw: tuple[int, int], placed_hw: tuple[int, int], layout: Any
) -> None:
    image = noise(*source_hw)
    height, width = placed_hw
    expected = np.full((512, 512, 3), np.float32(MEAN), np.float32)
    expected[:height, :width] = tensorflow_resize(image, height, width)

    floats, transform = preprocess(image, Preprocessing((512, 512), layout, pad_rgb=MEAN))
    assert floats.dtype == np.float32
    as_nhwc = floats if layout == "NHWC" else floats.transpose(1, 2, 0)
    np.testing.assert_allclose(as_nhwc[:height, :width], expected[:height, :width], atol=0.02)
    np.testing.assert_array_equal(as_nhwc[height:], expected[height:])  # the exact mean
    np.testing.assert_array_equal(as_nhwc[:height, width:], expected[:height, width:])
    assert transform.source_wh == source_hw[::-1]
    scale = np.float32(512) / np.float32(max(source_hw))
    assert transform.scale_xy == (scale, scale)
    assert transform.offset_xy == (0, 0)

    bytes_, _ = preprocess(image, Preprocessing((512, 512), layout, "uint8", pad_rgb=MEAN))
    assert bytes_.dtype == np.uint8
    as_nhwc = bytes_ if layout == "NHWC" else bytes_.transpose(1, 2, 0)
    # OpenCV interpolates bytes in fixed point: up to 0.8 where plain rounding is up to 0.5.
    assert np.abs(as_nhwc[:height, :width] - expected[:height, :width]).max() < 0.85
    assert (as_nhwc[height:] == (124, 116, 104)).all()
    assert (as_nhwc[:height, width:] == (124, 116, 104)).all()


def test_bilinear_by_hand() -> None:
    image = np.array([[[0, 10, 20], [200, 110, 20]]], np.uint8)  # one row, two pixels
    found, transform = preprocess(image, Preprocessing((2, 4), resize="stretch"))
    # Centres of the four new pixels lie at -0.25, 0.25, 0.75, 1.25 of the old ones.
    expected = [[0, 10, 20], [50, 35, 20], [150, 85, 20], [200, 110, 20]]
    np.testing.assert_array_equal(found, [expected, expected])
    assert transform.scale_xy == (2, 2)


def test_shrinking_looks_at_four_neighbours_only() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[1, 1] = 160  # the middle of the first 4 x 4 pixels is at 1.5: a quarter of this one
    image[0, 0] = 255  # antialiasing would see this one too
    found, _ = preprocess(image, Preprocessing((2, 2)))
    np.testing.assert_array_equal(found[:, :, 0], [[40, 0], [0, 0]])


def test_stretch_has_a_scale_per_axis() -> None:
    image = noise(30, 80)
    found, transform = preprocess(image, Preprocessing((60, 40), resize="stretch"))
    np.testing.assert_allclose(found, tensorflow_resize(image, 60, 40), atol=1e-3)
    assert transform.scale_xy == (0.5, 2.0)
    boxes = transform.to_source(np.array([[10, 20, 40, 60]], np.float32))
    np.testing.assert_allclose(boxes, [[20, 10, 80, 30]])


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_antialias_is_pillows(dtype: Any) -> None:
    image = noise(80, 120)
    found, _ = preprocess(image, Preprocessing((30, 30), dtype=dtype), resample="antialias")
    expected = Image.fromarray(image).resize((30, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found[:20], np.asarray(expected))
    assert not found[20:].any()


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_out_is_filled_completely_and_returned(layout: Any, dtype: Any) -> None:
    preprocessing = Preprocessing((64, 48), layout, dtype, pad_rgb=MEAN)
    fresh, _ = preprocess(noise(50, 90), preprocessing)
    for image in (noise(50, 90), noise(90, 20), noise(1, 1)):
        dirty = np.full_like(fresh, 77)
        found, _ = preprocess(image, preprocessing, out=dirty)
        assert found is dirty
        np.testing.assert_array_equal(dirty, preprocess(image, preprocessing)[0])


@pytest.mark.parametrize(
    "out",
    [
        np.empty((48, 64, 3), np.float32),  # height and width swapped
        np.empty((64, 48, 3), np.uint8),  # another type
        np.empty((64, 48, 6), np.float32)[:, :, ::2],  # not contiguous
    ],
)
def test_a_wrong_out_is_an_error(out: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"out: expected \(64, 48, 3\) float32"):
        preprocess(noise(9, 9), Preprocessing((64, 48)), out=out)


def test_a_wrong_image_or_resample_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected \(h, w, 3\) uint8, got \(9, 9\) uint8"):
        preprocess(np.zeros((9, 9), np.uint8), Preprocessing((64, 48)))
    with pytest.raises(ValueError, match="expected bilinear or antialias, got 'cubic'"):
        preprocess(noise(9, 9), Preprocessing((64, 48)), resample="cubic")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size_hw"), [("tiny_shapes", (128, 128)), ("tiny_rect", (128, 192)), ("d0_person", (512, 512))]
)  # fmt: skip
def test_equals_what_automls_own_graph_computes(
    shared: Path, model: str, size_hw: tuple[int, int]
) -> None:
    """The input of the first convolution, in TensorFlow, from real images.

    Measured with TensorFlow 2.21 and OpenCV 5.0: float32 at most 0.0043 grey levels off and 3e-5 on
    average; uint8 at most 0.80 and 0.29 (plain rounding of the exact values: 0.50 and 0.23).
    Pillow's antialiased resize, as in NVIDIA's sample: up to 150 off, 2.7 on average.
    """
    tf = pytest.importorskip("tensorflow").compat.v1
    std = np.float32((58.395, 57.12, 57.375))
    images = find_images(shared / "images" / "person_val100")[:12]
    images += find_images(shared / "images" / "shapes_val")[:12]
    errors: dict[str, list[NDArray[np.float32]]] = {"float32": [], "uint8": []}
    with tf.Graph().as_default() as graph, tf.Session() as session:
        tf.saved_model.load(session, ["serve"], str(shared / "models" / model))
        stem = next(node for node in graph.get_operations() if node.type == "Conv2D")
        for path in images:
            image = load_image(path)
            seen = session.run(stem.inputs[0], {"image_arrays:0": image[None]})[0]
            expected = seen * std + np.float32(MEAN)
            for dtype, found in errors.items():
                preprocessing = Preprocessing(size_hw, dtype=dtype, pad_rgb=MEAN)  # type: ignore[arg-type]
                found.append(np.abs(preprocess(image, preprocessing)[0] - expected))
    assert max(error.max() for error in errors["float32"]) < 0.01
    assert np.mean([error.mean() for error in errors["float32"]]) < 1e-4
    assert max(error.max() for error in errors["uint8"]) < 0.85
    assert np.mean([error.mean() for error in errors["uint8"]]) < 0.32


# ---- ImageBatcher


SMALL = Preprocessing((16, 24), dtype="uint8", pad_rgb=MEAN)


def write_images(folder: Path, count: int, bad: tuple[int, ...] = ()) -> list[Path]:
    """`count` different images; those in `bad` are damaged."""
    paths = []
    for number in range(count):
        path = folder / f"{number:03d}.png"
        path.write_bytes(b"damaged" if number in bad else png(noise(10 + number % 5, 12)))
        paths.append(path)
    return paths


def worker_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("image-batcher")]


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 20])
def test_batches_are_the_images_in_order(
    tmp_path: Path, batch_size: int, dtype: Any, layout: Any
) -> None:
    preprocessing = Preprocessing((16, 24), layout, dtype, pad_rgb=MEAN)
    paths = write_images(tmp_path, 10)
    batches = list(ImageBatcher(paths, preprocessing, batch_size, keep_sources=True))
    assert [len(b) for b in batches] == [
        min(batch_size, 10 - start) for start in range(0, 10, batch_size)
    ]
    assert [path for b in batches for path in b.paths] == paths
    for batch in batches:
        assert batch.images.shape == (len(batch), *preprocessing.image_shape)
        assert batch.images.flags.c_contiguous
        assert batch.sources is not None
        for image, path, transform, source in zip(
            batch.images, batch.paths, batch.transforms, batch.sources, strict=True
        ):
            np.testing.assert_array_equal(source, load_image(path))
            expected, expected_transform = preprocess(source, preprocessing)
            np.testing.assert_array_equal(image, expected)
            assert transform == expected_transform


def test_sources_are_kept_only_where_asked_for(tmp_path: Path) -> None:
    (batch,) = ImageBatcher(write_images(tmp_path, 2), SMALL, 2)
    assert batch.sources is None


def test_pad_to_batch_fills_up_with_zeros(tmp_path: Path) -> None:
    paths = write_images(tmp_path, 7)
    with ImageBatcher(paths, SMALL, 4, pad_to_batch=True) as batcher:
        first, last = (batch for batch in batcher)
    assert (len(first), len(last)) == (4, 3)
    assert first.images.shape == last.images.shape == (4, 16, 24, 3)
    assert last.images[:3].any(axis=(1, 2, 3)).all()
    assert not last.images[3].any()


def test_no_images_are_no_batches() -> None:
    assert list(ImageBatcher([], SMALL, 4)) == []


@pytest.mark.parametrize(
    ("count", "batch_size", "batches"),
    [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (9, 4, 3), (9, 1, 9), (3, 100, 1)],
)
def test_how_many_batches_are_announced(count: int, batch_size: int, batches: int, tmp_path: Path) -> None:  # fmt: skip
    with ImageBatcher(write_images(tmp_path, count), SMALL, batch_size, workers=2) as batcher:
        assert length_hint(batcher, 99) == batches
        assert len(list(batcher)) == batches
        assert length_hint(batcher, 99) == batches


def test_images_that_cannot_be_read_are_announced(tmp_path: Path) -> None:
    with ImageBatcher(write_images(tmp_path, 9, bad=(0, 1, 7)), SMALL, 4, workers=2) as batcher:
        assert (length_hint(batcher, 99), len(list(batcher))) == (3, 2)


@pytest.mark.parametrize(
    "bad",
    [
        (0,),
        (3,),  # last of the first batch
        (1, 2, 7),
        (0, 1, 2, 3),  # a whole batch
        (2, 4, 5, 6, 7, 8, 9, 10, 11, 12),  # more than a batch in a row
        (13,),  # the very last
        tuple(range(0, 14, 2)),
        tuple(range(14)),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_an_unreadable_image_leaves_no_hole(
    tmp_path: Path, bad: tuple[int, ...], batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write_images(tmp_path, 14, bad)
    good = [path for number, path in enumerate(paths) if number not in bad]
    check_batches(paths, good, batch_size)
    batcher = ImageBatcher(paths, SMALL, batch_size)
    list(batcher)
    assert [path for path, _ in batcher.failures] == [paths[number] for number in bad]
    for path, message in batcher.failures:
        assert message.startswith(f"{path}: ")
        assert f"skipped: {message}" in caplog.text
    list(batcher)
    assert len(batcher.failures) == len(bad)  # counted per iteration


def check_batches(paths: list[Path], good: list[Path], batch_size: int, **options: Any) -> None:
    """Exactly the good images, in order, in full batches, whether buffers are given back or not."""
    for release in (False, True):
        seen = []
        with ImageBatcher(paths, SMALL, batch_size, **options) as batcher:
            for batch in batcher:
                seen.append(len(batch))
                for image, path in zip(batch.images, batch.paths, strict=True):
                    assert path == good[sum(seen[:-1]) + list(batch.paths).index(path)]
                    expected, _ = preprocess(load_image(path), SMALL)
                    np.testing.assert_array_equal(image, expected)
                if release:
                    batch.images[:] = 99
                    batch.release()
        assert sum(seen) == len(good)
        assert all(count == batch_size for count in seen[:-1])


def test_failures_at_random_places(tmp_path: Path) -> None:
    dice = random.Random(0)
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        count = dice.randrange(1, 30)
        bad = tuple(dice.sample(range(count), dice.randrange(count + 1)))
        paths = write_images(folder, count, bad)
        good = [path for i, path in enumerate(paths) if i not in bad]
        check_batches(
            paths, good, dice.randrange(1, 7), workers=dice.randrange(1, 5), prefetch=dice.choice((1, 3))
        )  # fmt: skip


@pytest.mark.parametrize("bad", [(), tuple(range(0, 40, 2)), tuple(range(4, 30))])
def test_released_buffers_are_filled_again(tmp_path: Path, bad: tuple[int, ...]) -> None:
    made: list[NDArray[Any]] = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        made.append(np.empty(shape, dtype))
        return made[-1]

    paths = write_images(tmp_path, 40, bad)
    batcher = ImageBatcher(paths * 5, SMALL, 4, workers=2, prefetch=2, allocate=allocate)
    for batch in batcher:
        assert any(np.shares_memory(batch.images, buffer) for buffer in made)
        batch.release()
        batch.release()  # once is enough, twice does no harm
    assert all(buffer.shape == (4, 16, 24, 3) for buffer in made)
    assert len(made) <= 4  # two batches ahead, one being filled, one in use
    used = len(made)
    for batch in batcher:
        batch.release()
    assert len(made) == used  # kept for the next time


def test_a_batch_that_is_not_released_is_the_callers(tmp_path: Path) -> None:
    paths = write_images(tmp_path, 40)
    batches = list(ImageBatcher(paths, SMALL, 4))
    again = [batch.images.copy() for batch in ImageBatcher(paths, SMALL, 4)]
    for batch, expected in zip(batches, again, strict=True):
        np.testing.assert_array_equal(batch.images, expected)


def test_work_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_images(tmp_path, 60)
    started: list[Path] = []

    def counted(path: Path) -> Pixels:
        started.append(path)
        return load_image(path)

    monkeypatch.setattr(image_files, "load_image", counted)
    consumed = 0
    for batch in ImageBatcher(paths, SMALL, 2, workers=2, prefetch=3):
        consumed += len(batch)
        time.sleep(0.01)  # long enough for the workers to run as far ahead as they may
        assert len(started) <= consumed + 3 * 2
    assert consumed == 60


@pytest.fixture
def slow_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A thousand images at 20 ms each: whoever waits for all of them fails the test."""
    paths = write_images(tmp_path, 10) * 100

    def slow(path: Path) -> Pixels:
        time.sleep(0.02)
        return load_image(path)

    monkeypatch.setattr(image_files, "load_image", slow)
    return paths


def leave_by_break(batcher: ImageBatcher) -> None:
    for _ in batcher:
        break


def leave_by_exception(batcher: ImageBatcher) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in batcher:
            raise ZeroDivisionError


def leave_by_ctrl_c(batcher: ImageBatcher) -> None:
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(batcher)
    timer.join()


def leave_by_close(batcher: ImageBatcher) -> None:
    with batcher:
        batches = iter(batcher)
        next(batches)
    assert list(batches) == []


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_exception, leave_by_ctrl_c, leave_by_close]
)
def test_leaving_early_ends_the_threads_at_once(
    slow_images: list[Path], leave: Callable[[ImageBatcher], None]
) -> None:
    start = time.monotonic()
    leave(ImageBatcher(slow_images, SMALL, 4, workers=2, prefetch=200))
    assert worker_threads() == []
    assert time.monotonic() - start < 5  # all of them would take 10 s


def test_opencvs_own_threads_are_off_while_a_batcher_runs(tmp_path: Path) -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        paths = write_images(tmp_path, 8)
        outer, inner = iter(ImageBatcher(paths, SMALL, 2)), iter(ImageBatcher(paths, SMALL, 2))
        next(outer), next(inner)
        assert cv2.getNumThreads() == 1
        list(outer)
        assert cv2.getNumThreads() == 1  # the other one still runs
        list(inner)
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_a_wrong_buffer_is_an_error_not_an_unreadable_image(tmp_path: Path) -> None:
    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.empty(shape, np.float64)

    with pytest.raises(ValueError, match=r"out: expected .* uint8, .*got .* float64"):
        list(ImageBatcher(write_images(tmp_path, 3), SMALL, 2, allocate=allocate))
    assert worker_threads() == []


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"workers": 0}, {"prefetch": 0}, {"resample": "cubic"}],
)
def test_wrong_options_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ImageBatcher([], SMALL, **{"batch_size": 1, **options})


# ---- the command


def test_main_writes_what_the_network_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, seen = tmp_path / "photos", tmp_path / "seen"
    (photos / "sub").mkdir(parents=True)
    image = noise(30, 40)
    (photos / "a.png").write_bytes(png(image))
    (photos / "sub" / "a.png").write_bytes(png(noise(40, 30)))
    arguments = ["--size", "48,64", "--input", str(photos), "--output", str(seen), "--recursive"]
    assert image_batcher.main(arguments) == 0
    expected, _ = preprocess(image, Preprocessing((48, 64), pad_rgb=MEAN))
    np.testing.assert_array_equal(load_image(seen / "a.png"), np.rint(expected))
    assert load_image(seen / "sub" / "a.png").shape == (48, 64, 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("network input 64 x 48 NHWC float32, letterbox")
    assert " ".join(lines[2].split()) == "40 x 30 1.60000 1.60000 64 x 48 a.png"
    assert " ".join(lines[3].split()) == "30 x 40 1.20000 1.20000 36 x 48 sub/a.png"
    assert lines[-1] == str(seen)


def test_main_asks_the_model(tmp_path: Path) -> None:
    model = toy_detector.save(tmp_path / "toy.onnx")
    photos = tmp_path / "photos"
    photos.mkdir()
    write_images(photos, 1)
    arguments = ["--model", str(model), "--input", str(photos), "--output", str(tmp_path / "seen")]
    assert image_batcher.main(arguments) == 0
    assert load_image(tmp_path / "seen" / "000.png").shape == (*toy_detector.SIZE_HW, 3)


def test_an_engine_says_it_in_its_sidecar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ModelSpec("automl", SMALL, Nms(), category_ids=(1,))
    info = EngineInfo(spec, "tensorrt", "10.13.3.9", "fp16", BatchRange(1, 1, 1))
    write_engine(tmp_path / "a.engine", b"plan", info)
    (tmp_path / "b.engine").write_bytes(b"ftrt\0plan")
    (tmp_path / "photos").mkdir()
    write_images(tmp_path / "photos", 1)
    rest = ["--input", str(tmp_path / "photos"), "--output", str(tmp_path / "seen")]
    assert image_batcher.main(["--model", str(tmp_path / "a.engine"), *rest]) == 0
    assert load_image(tmp_path / "seen" / "000.png").shape == (*SMALL.size_hw, 3)
    assert image_batcher.main(["--model", str(tmp_path / "b.engine"), *rest]) == 1
    error = f"{tmp_path / 'b.engine'}: expected b.engine.json beside it, found none"
    assert error in capsys.readouterr().err


def test_main_reports_unreadable_images(tmp_path: Path) -> None:
    write_images(tmp_path, 3, bad=(1,))
    output = tmp_path / "seen"
    arguments = ["--size", "16,16", "--input", str(tmp_path), "--output", str(output)]
    assert image_batcher.main(arguments) == 3
    assert sorted(path.name for path in output.iterdir()) == ["000.png", "002.png"]


def test_main_does_not_overwrite_its_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = write_images(tmp_path, 1)
    before = path.read_bytes()
    arguments = ["--size", "16,16", "--input", str(tmp_path), "--output", str(tmp_path)]
    assert image_batcher.main(arguments) == 1
    assert "the next run would read its own drawings" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--input", "x", "--output", "y"],  # neither --model nor --size
        ["--input", "x", "--output", "y", "--size", "512,512,512"],
        ["--input", "x", "--output", "y", "--size", "0,512"],
        ["--input", "x", "--output", "y", "--size", "4,4", "--resize", "2"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        image_batcher.main(arguments)
    assert caught.value.code == 2


def test_what_is_no_regular_file_is_skipped_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """A FIFO would hang, /dev/zero has no end, a link to itself leads nowhere."""
    write_images(tmp_path, 2)
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("a.gif", "b.GIF", "README", "c.jp2"):
        (tmp_path / name).touch()
    with caplog.at_level("INFO"):
        paths = find_images(tmp_path)
    assert f"{tmp_path}: 4 other files are not read (2 .gif, 1 " in caplog.text
    with ImageBatcher(paths, SMALL, 2) as batches:
        assert sum(len(batch.paths) for batch in batches) == 2
    assert sorted(path.name for path, _ in batches.failures) == ["fifo.png", "loop.png", "zero.png"]


@pytest.mark.parametrize(("good", "status"), [(0, 1), (1, 3)])
def test_status_says_whether_any_image_could_be_read(
    good: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of the other stages: 1 where none could, 3 where some could not."""
    for number in range(good):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "x.jpg").write_bytes(b"no image")
    arguments = ["--input", tmp_path, "--output", tmp_path / "seen", "--size", "8,8"]
    assert image_batcher.main([str(argument) for argument in arguments]) == status
    said = capsys.readouterr().err
    assert ("error: --input: none of 1 images could be read; " in said) == (status == 1)
    assert len([*(tmp_path / "seen").glob("*.png")]) == good
