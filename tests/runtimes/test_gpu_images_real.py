# SPDX-License-Identifier: Apache-2.0
"""`trtdet.runtimes.gpu_images` on a GPU, with nvImageCodec itself (`pytest -m gpu`)."""

import gc
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_engines
import numpy as np
import pytest
from gpu_batches_rig import DYNAMIC, FLOAT32, UINT8, by_cpu, by_gpu, write_images
from numpy.typing import NDArray

from trtdet import cuda, sessions
from trtdet.commands import eval_coco
from trtdet.images.preprocess import IMAGENET_MEAN, ShorterSide
from trtdet.runtimes import gpu_images
from trtdet.runtimes.base import DeviceImages
from trtdet.runtimes.gpu_images import GpuImageBatcher
from trtdet.sessions import PROVIDERS
from trtdet.spec import Preprocessing


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images") / "of all kinds")


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
