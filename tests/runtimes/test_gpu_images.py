# SPDX-License-Identifier: Apache-2.0
"""`trtdet.runtimes.gpu_images` on stand-ins for CUDA, for nvImageCodec and for the launch of its
kernel, against `ImageBatcher`.
"""

import io
import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_batches_rig import DYNAMIC, FLOAT32, UINT8, by_cpu, by_gpu, pixels, reader, write_images
from PIL import Image
from standin_gpu_decoder import StandinDecoder, StandinKernel
from trt_rig import Rig

from trtdet import cuda
from trtdet.errors import EngineError
from trtdet.images.files import load_image
from trtdet.images.preprocess import ShorterSide
from trtdet.runtimes import gpu_filling, gpu_images
from trtdet.runtimes.gpu_images import GpuImageBatcher
from trtdet.spec import Preprocessing


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images") / "of all kinds")


@pytest.mark.parametrize("decoder", [{"schedule": s} for s in ("late", "early", "random")], indirect=True)  # fmt: skip
@pytest.mark.parametrize(
    ("preprocessing", "batch_size", "options"),
    [
        (UINT8, 1, {}),
        (UINT8, 4, {"keep_sources": True}),
        (FLOAT32, 7, {"pad_to_batch": True}),
        (UINT8, 100, {}),
        (UINT8, 3, {"resample": "antialias"}),
        (DYNAMIC, 4, {"resize": ShorterSide(40, 100), "pad_to_batch": True}),
    ],
)
def test_batches_are_those_of_the_cpu(
    decoder: tuple[Rig, StandinDecoder],
    images: list[Path],
    preprocessing: Preprocessing,
    batch_size: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(gpu_images, "CHUNK", 12)
    caplog.set_level(logging.INFO)
    wanted, failures = by_cpu(images, preprocessing, batch_size, **options)
    found, failed = by_gpu(reader(decoder[0].cudart), images, preprocessing, batch_size, **options)
    assert failed == failures
    assert len(failures) == 7
    assert [paths for _, paths, _, _ in found] == [paths for _, paths, _, _ in wanted]
    for (a, _, transforms, sources), (b, _, others, theirs) in zip(found, wanted, strict=True):
        assert transforms == others
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert np.abs(a.astype(np.float64) - b).max() <= (1e-4 if b.dtype == np.float32 else 0)
        assert (sources is None) == (theirs is None)
        for one, other in zip(sources or (), theirs or (), strict=True):
            np.testing.assert_array_equal(one, other)
    assert sum(decoder[1].decoded) == 18  # of 41 files; the others by the CPU
    assert "20 of 41 images were decoded on the CPU" in caplog.text


def test_few_pixels_at_a_time(
    decoder: tuple[Rig, StandinDecoder], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_filling, "MOST_PIXEL_BYTES", 40_000)
    wanted, _ = by_cpu(images, UINT8, 4)
    found, _ = by_gpu(reader(decoder[0].cudart), images, UINT8, 4)
    assert len(decoder[1].decoded) > 5
    assert max(decoder[1].decoded) < 6
    for (a, *_), (b, *_) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_is_used_again(decoder: tuple[Rig, StandinDecoder], images: list[Path]) -> None:
    """Buffers of batches that are released: no more of them with more images."""
    used = []
    for times in (1, 6):
        before = decoder[0].cudart.calls["cudaMalloc"] - sum(decoder[1].decoded)
        by_gpu(reader(decoder[0].cudart), images * times, UINT8, 4)
        used.append(decoder[0].cudart.calls["cudaMalloc"] - sum(decoder[1].decoded) - before)
    assert used[1] <= used[0] + 24


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_leaving_early(
    decoder: tuple[Rig, StandinDecoder], images: list[Path], batches: int
) -> None:
    with GpuImageBatcher(images * 5, UINT8, 4) as batcher:
        for number, _ in enumerate(batcher):
            if number + 1 >= batches:
                break
    assert [t.name for t in threading.enumerate() if t.name.startswith("gpu-images")] == []


def test_errors_end_the_iteration(
    decoder: tuple[Rig, StandinDecoder], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any) -> list[Any]:
        raise EngineError("nvImageCodec failed")

    monkeypatch.setattr(decoder[1], "decode", decode)
    with (
        GpuImageBatcher(images, UINT8, 4) as batcher,
        pytest.raises(EngineError, match="nvImageCodec failed"),
    ):
        list(batcher)


def test_no_memory_is_an_error(decoder: tuple[Rig, StandinDecoder], images: list[Path]) -> None:
    large = replace(UINT8, size_hw=(20000, 20000))
    with (
        pytest.raises(cuda.CudaError, match="cudaMalloc: cudaErrorMemoryAllocation"),
        GpuImageBatcher(images, large, 4) as batcher,
    ):
        list(batcher)


def test_left_again_and_again(decoder: tuple[Rig, StandinDecoder], images: list[Path]) -> None:
    """Batches that were not handed out give their memory back."""
    in_flight = (gpu_images.AHEAD + 2) * gpu_images.CHUNK // 4 + 1
    with GpuImageBatcher(images * 5, UINT8, 4) as batcher:
        for _ in range(8):
            iteration = iter(batcher)
            next(iteration).release()
            del iteration  # which ends it
        assert len(batcher._pool._all) <= in_flight


def test_after_an_error_it_begins_anew(
    decoder: tuple[Rig, StandinDecoder], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was queued before the error is not handed out afterwards."""
    launch, launches = StandinKernel.launch, []

    def failing(*args: Any) -> None:
        launches.append(args)
        if len(launches) == 2:
            raise EngineError("cuLaunchKernel failed")
        launch(*args)

    monkeypatch.setattr(StandinKernel, "launch", failing)
    monkeypatch.setattr(gpu_images, "CHUNK", 8)
    wanted, failures = by_cpu(images, UINT8, 3)
    with GpuImageBatcher(images, UINT8, 3) as batcher:
        with pytest.raises(EngineError, match="cuLaunchKernel failed"):
            list(batcher)
        found = [batch.paths for batch in batcher]
        assert batcher.failures == failures
    assert found == [paths for _, paths, _, _ in wanted]


def test_large_images_are_not_all_on_the_gpu_at_once(
    decoder: tuple[Rig, StandinDecoder], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 70_000  # more than any image has
    monkeypatch.setattr(gpu_filling, "MOST_PIXEL_BYTES", most)
    monkeypatch.setattr(gpu_images, "MOST_PIXEL_BYTES", most)
    for batch_size, preprocessing, resize in ((4, UINT8, None), (2, DYNAMIC, ShorterSide(40, 100))):
        wanted, failures = by_cpu(images * 3, preprocessing, batch_size, resize=resize)
        found, failed = by_gpu(reader(decoder[0].cudart), images * 3, preprocessing, batch_size, resize=resize)  # fmt: skip
        assert failed == failures
        for (a, *_), (b, *_) in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
    slots = gpu_images.AHEAD + 2
    assert most < decoder[1].most_bytes <= 2 * (slots + 1) * most  # two images stay together


def test_large_network_inputs_make_small_chunks(
    decoder: tuple[Rig, StandinDecoder], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_images, "MOST_INPUT_BYTES", 9 * 64 * 96 * 3)
    by_gpu(reader(decoder[0].cudart), images, UINT8, 4)
    assert max(decoder[1].decoded) <= 8


def test_several_threads_decode_on_the_cpu(
    decoder: tuple[Rig, StandinDecoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photographs of a telephone held upright are all left to the CPU."""
    together, decode = threading.Barrier(3, timeout=20), gpu_images.decode_on_cpu

    def waiting(path: Path) -> Any:
        together.wait()
        return decode(path)

    monkeypatch.setattr(gpu_images, "decode_on_cpu", waiting)
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [tmp_path / f"{number}.jpg" for number in range(9)]
    for number, path in enumerate(paths):
        Image.fromarray(pixels(number)).save(path, exif=exif)
    wanted, _ = by_cpu(paths, UINT8, 4)
    found, failed = by_gpu(reader(decoder[0].cudart), paths, UINT8, 4, workers=3)
    assert failed == []
    for (a, *_), (b, *_) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_cameras_append_keeps_no_image_from_the_gpu(
    decoder: tuple[Rig, StandinDecoder], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(5)]
    for number, path in enumerate(paths):
        Image.fromarray(pixels(number)).save(path, quality=95)
        path.write_bytes(path.read_bytes() + b"\0" * 64 * number)
    wanted, _ = by_cpu(paths, UINT8, 4)
    found, _ = by_gpu(reader(decoder[0].cudart), paths, UINT8, 4)
    assert sum(decoder[1].decoded) == 5
    for (a, *_), (b, *_) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_header_is_one_image_that_is_skipped(
    decoder: tuple[Rig, StandinDecoder], tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xee\x00\x0eAdobe\xff\xd9")
    found, failures = by_gpu(reader(decoder[0].cudart), [tmp_path / "a.jpg"], UINT8, 1)
    assert found == []
    assert [path.name for path, _ in failures] == ["a.jpg"]


def test_no_images(decoder: tuple[Rig, StandinDecoder]) -> None:
    assert by_gpu(reader(decoder[0].cudart), [], UINT8, 4) == ([], [])


def test_a_fifo_is_not_waited_for(decoder: tuple[Rig, StandinDecoder], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    found, failures = by_gpu(reader(decoder[0].cudart), [tmp_path / "a.jpg"], UINT8, 1)
    assert found == []
    assert "found a folder, a device or a FIFO" in failures[0][1]


def test_the_stand_in_decodes_as_the_cpu(images: list[Path]) -> None:
    """What the tests above rest on."""
    data = images[0].read_bytes()
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(load_image(images[0]), wanted)
