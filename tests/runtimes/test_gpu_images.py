# SPDX-License-Identifier: Apache-2.0
"""`trtdet.runtimes.gpu_images` on stand-ins for CUDA, for nvImageCodec and for the launch of its
kernel, against `ImageBatcher`; on a GPU, with nvImageCodec itself, by `pytest -m gpu`.
"""

import gc
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_engines
import numpy as np
import pytest
import standin_gpu_decoder
import toy_network
from conftest import EXAMPLES
from numpy.typing import NDArray
from PIL import Image
from standin_gpu_decoder import REFUSED, StandinDecoder
from standin_network import write_network_engine
from trt_rig import Rig

import trtdet
from trtdet import cuda, sessions
from trtdet.commands import create_onnx, eval_coco, infer
from trtdet.errors import EngineError
from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import load_image
from trtdet.images.preprocess import IMAGENET_MEAN, ShorterSide
from trtdet.runtimes import gpu_images
from trtdet.runtimes.base import DeviceImages
from trtdet.runtimes.gpu_images import GpuImageBatcher
from trtdet.runtimes.ort import PROVIDERS
from trtdet.spec import Preprocessing

COUNT = len(list(EXAMPLES.glob("images/*")))
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


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images") / "of all kinds")


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
    monkeypatch.setattr(gpu_images, "MOST_PIXEL_BYTES", 40_000)
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


def test_a_fifo_is_not_waited_for(decoder: tuple[Rig, StandinDecoder], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    found, failures = by_gpu(reader(decoder[0].cudart), [tmp_path / "a.jpg"], UINT8, 1)
    assert found == []
    assert "found a folder, a device or a FIFO" in failures[0][1]


# ---- through infer.py


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, path in enumerate(sorted(EXAMPLES.glob("images/*"))):
        Image.open(path).convert("RGB").save(folder / f"{number:02}.jpg", quality=95)
    return folder


def run(model: Path, photos: Path, output: Path, *options: str) -> dict[str, bytes]:
    arguments = ["--model", str(model), "--input", str(photos), "--output", str(output)]
    assert infer.main([*arguments, "--batch_size", "4", *options]) == 0
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.fixture(scope="module")
def uint8_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose input the kernel makes to the last bit."""
    pytest.importorskip("tensorflow", reason="needs requirements-tensorflow.txt")
    path = tmp_path_factory.mktemp("uint8") / "uint8.onnx"
    arguments = ["--saved_model", str(EXAMPLES / "tiny_shapes"), "--onnx", str(path)]
    assert create_onnx.main([*arguments, "--input_dtype", "uint8"]) == 0
    return path


@pytest.mark.parametrize("decoder", [{"devices": 2}], indirect=True)
@pytest.mark.parametrize("devices", ["0", "1", "all"])
def test_files_are_those_of_the_cpu(
    decoder: tuple[Rig, StandinDecoder],
    uint8_onnx: Path,
    photos: Path,
    tmp_path: Path,
    devices: str,
) -> None:
    engine = write_network_engine(tmp_path / "network.engine", uint8_onnx)
    wanted = run(engine, photos, tmp_path / "by cpu", "--devices", devices, "--decode", "cpu")
    assert decoder[1].decoded == []
    found = run(engine, photos, tmp_path / "by gpu", "--devices", devices, "--decode", "gpu")
    assert sum(decoder[1].decoded) == COUNT
    assert sum(name.endswith(".png") for name in found) == COUNT  # pictures too
    assert found == wanted


def test_the_python_api(
    decoder: tuple[Rig, StandinDecoder], uint8_onnx: Path, photos: Path, tmp_path: Path
) -> None:
    engine = write_network_engine(tmp_path / "network.engine", uint8_onnx)
    files = sorted(photos.iterdir())
    with trtdet.load(engine) as model:
        wanted = model(files)
    assert decoder[1].decoded == []
    with trtdet.load(engine, decode="gpu") as model:
        found = model(files)
        one = model(files[0])
        array = model(load_image(files[0]))  # not a file: nothing to decode
    assert sum(decoder[1].decoded) == COUNT + 1
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(a.boxes_xyxy, b.boxes_xyxy)
    np.testing.assert_array_equal(one.boxes_xyxy, array.boxes_xyxy)


def test_a_model_of_dynamic_size(
    decoder: tuple[Rig, StandinDecoder], photos: Path, tmp_path: Path
) -> None:
    import onnx

    model = tmp_path / "dynamic size.onnx"
    onnx.save(toy_network.free_network(), model)
    engine = write_network_engine(tmp_path / "network.engine", model)
    options = ("--no_images", "--resize", "32", "--max_size", "64", "--decode")
    found = []
    for decode in ("cpu", "gpu"):
        written = run(engine, photos, tmp_path / decode, *options, decode)
        found.append(json.loads(written["detections.json"]))
    assert len(found[0]) == len(found[1]) == 10 * COUNT
    for one, other in zip(*found, strict=True):  # float32: the last digits may differ
        assert one["image_id"] == other["image_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.01)
    assert sum(decoder[1].decoded) == COUNT


def test_ap_is_that_of_the_cpu(
    decoder: tuple[Rig, StandinDecoder], tiny_onnx: Path, tmp_path: Path
) -> None:
    engine = write_network_engine(tmp_path / "network.engine", tiny_onnx)
    ap = {}
    for decode in ("cpu", "gpu"):
        arguments = ["--model", str(engine), "--input", str(EXAMPLES / "images")]
        arguments += ["--annotations", str(EXAMPLES / "annotations.json"), "--decode", decode]
        assert eval_coco.main([*arguments, "--json", str(tmp_path / "m.json")]) == 0
        ap[decode] = json.loads((tmp_path / "m.json").read_text())["AP"]
    assert ap["gpu"] == ap["cpu"]


def test_auto_takes_the_gpu_for_many_jpegs(
    decoder: tuple[Rig, StandinDecoder],
    tiny_onnx: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = write_network_engine(tmp_path / "network.engine", tiny_onnx)
    run(engine, photos, tmp_path / "few", "--no_images")
    assert decoder[1].decoded == []
    monkeypatch.setattr("trtdet.run.detect.MANY_IMAGES", COUNT)
    run(engine, photos, tmp_path / "many", "--no_images")
    assert sum(decoder[1].decoded) == COUNT
    for path in sorted(photos.iterdir())[:8]:
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    run(engine, photos, tmp_path / "pngs", "--no_images")
    assert sum(decoder[1].decoded) == COUNT


def test_without_nvimagecodec(
    rig: Callable[..., Rig],
    tiny_onnx: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`auto` says so once and goes on; `gpu` is refused."""
    rig()
    gpu_images.missing.cache_clear()

    def absent(device: int) -> Any:
        raise EngineError("nvImageCodec does not load (No module named 'nvidia')")

    monkeypatch.setattr(gpu_images, "decoder_of", absent)
    monkeypatch.setattr("trtdet.run.detect.MANY_IMAGES", 1)
    engine = write_network_engine(tmp_path / "network.engine", tiny_onnx)
    run(engine, photos, tmp_path / "auto", "--no_images")
    said = "images are decoded on the CPU: nvImageCodec does not load (No module named 'nvidia'); pip install -r requirements-gpu.txt"
    assert capsys.readouterr().err.count(said) == 1
    arguments = ["--model", str(engine), "--input", str(photos), "--output", str(tmp_path / "gpu")]
    assert infer.main([*arguments, "--decode", "gpu"]) == 1
    assert "--decode gpu: nvImageCodec does not load" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()
    gpu_images.missing.cache_clear()


def test_a_model_on_the_cpu_is_refused(
    tiny_onnx: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_onnx), "--input", str(photos), "--output", str(tmp_path / "o")]
    assert infer.main([*arguments, "--decode", "gpu", "--provider", "cpu"]) == 1
    assert "--decode gpu: expected a model on a GPU, found ONNX Runtime" in capsys.readouterr().err


# ---- on a GPU


@pytest.fixture
def real() -> Iterator[Callable[[DeviceImages], NDArray[Any]]]:
    """Reads a batch from the memory of GPU 0."""
    if missing := gpu_engines.find_gpu() or gpu_images.missing(0):
        pytest.skip(missing)

    def read(images: DeviceImages) -> NDArray[Any]:
        data = cuda.pinned_empty((images.nbytes,), np.uint8)
        with cuda.Stream() as stream:
            stream.copy_out(data, images.address)
            stream.synchronize()
        return data.view(images.dtype).reshape(images.shape).copy()

    cuda.use_device(0)
    yield read
    gc.collect()


def photographs(shared: Path) -> list[Path]:
    return sorted((shared / "images" / "person_val100").glob("*.jpg"))


@pytest.mark.gpu
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
def test_photographs_on_a_real_gpu(
    real: Callable[..., Any], shared: Path, resize: Any, dtype: Any, antialias: bool
) -> None:
    """At most two levels apart, .02 on average."""
    paths = photographs(shared)
    preprocessing = Preprocessing((512, 512), "NHWC", dtype, resize=resize, antialias=antialias, pad_rgb=IMAGENET_MEAN)  # fmt: skip
    wanted, _ = by_cpu(paths, preprocessing, 8)
    found, _ = by_gpu(real, paths, preprocessing, 8)
    assert sum(len(a) for a, *_ in found) == 100
    apart = [np.abs(a[0].astype(np.float64) - b[0]) for a, b in zip(found, wanted, strict=True)]
    means = [one.mean() for one in apart]
    print(f"{resize} {dtype} antialias={antialias}: at most {max(one.max() for one in apart):.3f}, {np.mean(means):.4f} on average")  # fmt: skip
    assert max(one.max() for one in apart) <= 2
    assert np.mean(means) <= 0.02


@pytest.mark.gpu
def test_all_kinds_of_images_on_a_real_gpu(real: Callable[..., Any], images: list[Path]) -> None:
    """Also those that fail: the same batches, and nothing left of them."""
    for preprocessing, options in (
        (UINT8, {"keep_sources": True}),
        (FLOAT32, {"pad_to_batch": True}),
        (DYNAMIC, {"resize": ShorterSide(40, 100)}),
    ):
        wanted, failures = by_cpu(images, preprocessing, 4, **options)
        found, failed = by_gpu(real, images, preprocessing, 4, **options)
        assert failed == failures
        assert [b[1] for b in found] == [b[1] for b in wanted]
        for (a, *_, sources), (b, *_, theirs) in zip(found, wanted, strict=True):
            assert np.abs(a.astype(np.float64) - b).max() <= 4  # colours that no photograph has
            for one, other in zip(sources or (), theirs or (), strict=True):
                assert np.abs(np.asarray(one, np.int16) - other).max() <= 4


@pytest.mark.gpu
def test_memory_and_threads_on_a_real_gpu(real: Callable[..., Any], shared: Path) -> None:
    """Left early, opened again and again: nothing grows, nothing crashes."""
    paths = photographs(shared) * 3
    free = []
    for leave in (1, 5, 1000, 2, 1000, 1000):
        with GpuImageBatcher(paths, replace(UINT8, size_hw=(512, 512)), 8) as batcher:
            for number, batch in enumerate(batcher):
                batch.release()
                if number == leave:
                    break
        free.append(cuda.free_memory())
    assert free[2] - free[-1] <= 2 << 20
    assert [t.name for t in threading.enumerate() if t.name.startswith("gpu-images")] == []


@pytest.mark.gpu
def test_ap_of_d0_on_a_real_gpu(real: Callable[..., Any], shared: Path, tmp_path: Path) -> None:
    """Decoded by the GPU and by the CPU: within .0005."""
    d0 = shared / "d0_person.onnx"
    if not d0.is_file() or PROVIDERS["cuda"] not in sessions.available_providers():
        pytest.skip("needs onnxruntime-gpu, and ../shared/d0_person.onnx, which create_onnx.py makes of ../shared/models/d0_person")  # fmt: skip
    folder = shared / "images" / "person_val100"
    ap = {}
    for decode in ("cpu", "gpu"):
        arguments = ["--model", str(d0), "--input", str(folder), "--annotations", f"{folder}.json"]
        arguments += ["--provider", "cuda", "--decode", decode, "--json", str(tmp_path / "m.json")]
        assert eval_coco.main(arguments) == 0
        ap[decode] = json.loads((tmp_path / "m.json").read_text())["AP"]
    print(f"AP: {ap}")
    assert ap["gpu"] == pytest.approx(ap["cpu"], abs=5e-4)


def test_the_stand_in_decodes_as_the_cpu(images: list[Path]) -> None:
    """What the tests above rest on."""
    data = images[0].read_bytes()
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(load_image(images[0]), wanted)
