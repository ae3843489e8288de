# SPDX-License-Identifier: Apache-2.0
"""What the tests of `trtdet.runtimes.gpu_images` have in common: images of all kinds, and batches
of them made by the CPU and by the GPU, or its stand-ins.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standin_gpu_decoder
from numpy.typing import NDArray
from PIL import Image
from standin_gpu_decoder import REFUSED, StandinDecoder
from trt_rig import Rig

from trtdet.images.batcher import ImageBatcher
from trtdet.images.preprocess import IMAGENET_MEAN
from trtdet.runtimes import gpu_images
from trtdet.runtimes.base import DeviceImages
from trtdet.runtimes.gpu_images import GpuImageBatcher
from trtdet.spec import Preprocessing

UINT8 = Preprocessing((64, 96), "NHWC", "uint8", pad_rgb=IMAGENET_MEAN)
FLOAT32 = replace(UINT8, layout="NCHW", dtype="float32", placement="center")
DYNAMIC = replace(UINT8, size_range=((32, 32), (128, 128)), size_multiple=16)


def pixels(number: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(number)
    height, width = (int(n) for n in rng.integers(20, 150, 2))
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def write_images(folder: Path, count: int = 40) -> list[Path]:
    """JPEGs for the GPU, and images of every kind that is left to the CPU or cannot be read."""
    folder.mkdir()
    paths = []
    for number in range(count):
        image, kind = Image.fromarray(pixels(number)), number % 10
        path = folder / f"{number:02}.{'png' if kind == 3 else 'jpg'}"
        exif = Image.Exif()
        if kind == 5:
            exif[0x0112] = 6
        modes = {1: "L", 2: "CMYK"}
        if kind in modes:
            image = image.convert(modes[kind])
        options = {} if kind == 3 else {"exif": exif, "progressive": kind == 4, "quality": 95}
        image.save(path, **options)
        if kind == 6:
            path.write_bytes(path.read_bytes() + REFUSED)
        if kind == 7:
            path.write_bytes(path.read_bytes()[:60])
        if kind == 8 and number % 20 == 8:
            path.write_text("no image")
        if kind == 9:  # a second picture behind the first, as in files of stereo cameras
            second = BytesIO()
            Image.fromarray(pixels(number + 1)).save(second, "JPEG", quality=95)
            path.write_bytes(path.read_bytes() + second.getvalue())
        paths.append(path)
    paths.insert(9, folder / "missing.jpg")
    return paths


@pytest.fixture
def decoder(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[tuple[Rig, StandinDecoder]]:
    made = rig(**getattr(request, "param", {}))
    yield made, standin_gpu_decoder.install(monkeypatch, made.cudart)
    gpu_images.missing.cache_clear()


Found = list[tuple[NDArray[Any], tuple[Path, ...], Any, Any]]


def by_cpu(paths: list[Path], *args: Any, **options: Any) -> tuple[Found, list[tuple[Path, str]]]:
    with ImageBatcher(paths, *args, workers=2, **options) as batcher:
        found = [(b.images.copy(), b.paths, b.transforms, b.sources) for b in batcher]
    return found, batcher.failures


def by_gpu(
    read: Callable[[DeviceImages], NDArray[Any]], paths: list[Path], *args: Any, **options: Any
) -> tuple[Found, list[tuple[Path, str]]]:
    found = []
    with GpuImageBatcher(paths, *args, **options) as batcher:
        for b in batcher:
            found.append((read(b.images), b.paths, b.transforms, b.sources))
            b.release()
    return found, batcher.failures


def reader(cudart: Any) -> Callable[[DeviceImages], NDArray[Any]]:
    """What lies in the stand-in's memory."""

    def read(images: DeviceImages) -> NDArray[Any]:
        data = cudart.memory(images.address, images.nbytes, device=images.device)
        return data.view(images.dtype).reshape(images.shape).copy()

    return read
