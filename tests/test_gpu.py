# SPDX-License-Identifier: Apache-2.0
"""`trtdet.runtimes.trt` on a GPU: `pytest -m gpu`.

Each test runs with TensorRT, with TensorRT-RTX and with the stand-in engine on real CUDA memory, and skips those that are not here.
The id says which: only `stand-in` means that TensorRT itself was not tested.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_engines
import numpy as np
import pytest
from gpu_engines import GpuEngine
from numpy.typing import NDArray

from trtdet import device
from trtdet.errors import EngineError
from trtdet.runtimes.multi import MultiRuntime, open_devices
from trtdet.runtimes.trt import TensorRTRuntime

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt_rtx", "stand-in"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GpuEngine:
    missing = gpu_engines.find_gpu()
    if missing:
        pytest.skip(f"no GPU: {missing}")
    try:
        return gpu_engines.make_engine(request.param, tmp_path_factory.mktemp("gpu"), spin_ms=1.0)
    except (EngineError, ImportError, OSError) as error:
        pytest.skip(f"{request.param}: {error}")


@pytest.fixture
def standin_only(engine: GpuEngine) -> GpuEngine:
    if engine.kind != "stand-in":
        pytest.skip("needs the fixed device time of the stand-in")
    return engine


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()


@dataclass
class Batch:
    images: NDArray[Any]
    paths: tuple[Path, ...] = ()


def assert_same(engine: GpuEngine, outputs: dict[str, NDArray[Any]], images: NDArray[Any]) -> None:
    for name, expected in engine.reference(images).items():
        assert outputs[name].shape == expected.shape
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-6, atol=0, err_msg=name)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_every_batch_size(engine: GpuEngine, cuda_graph: bool) -> None:
    with TensorRTRuntime(engine.path, cuda_graph=cuda_graph) as runtime:
        assert runtime.batch_range == (1, 8)
        for count in [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8, 3, 3, 3, 3, 1]:
            images = engine.images(count, count)
            assert_same(engine, runtime.infer(images), images)


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("pinned", [False, True])
def test_map_is_in_order_and_right(engine: GpuEngine, contexts: int, pinned: bool) -> None:
    with TensorRTRuntime(engine.path, contexts=contexts) as runtime:

        def source() -> Iterator[Batch]:
            for index, size in enumerate([8] * 40 + [3, 8, 8, 1, 8, 8, 8, 8, 8, 8, 5]):
                images = engine.images(size, index)
                if pinned:
                    target = runtime.allocate(images.shape, images.dtype)
                    target[:] = images
                    images = target
                yield Batch(images)

        count = 0
        for index, (batch, outputs) in enumerate(runtime.map(source())):
            assert_same(engine, outputs, batch.images)
            np.testing.assert_array_equal(batch.images, engine.images(len(batch.images), index))
            count += 1
        assert count == 51


def test_reused_buffer_is_free_once_its_outputs_are_out(engine: GpuEngine) -> None:
    """Two pinned buffers in turn, overwritten as soon as the rule allows."""
    with TensorRTRuntime(engine.path, depth=1) as runtime:
        buffers = [runtime.allocate((8, 16, 16, 3), engine.dtype) for _ in range(2)]
        for index in range(60):
            target = buffers[index % 2]
            target[:] = engine.images(8, index)
            runtime.submit(target)
            assert_same(engine, runtime.fetch(), engine.images(8, index))


def test_leaving_early_and_going_on(engine: GpuEngine) -> None:
    with TensorRTRuntime(engine.path) as runtime:
        for index, _ in enumerate(runtime.map([Batch(engine.images(8))] * 20)):
            if index == 5:
                break
        gc.collect()
        assert runtime.in_flight == 0
        images = engine.images(4)
        assert_same(engine, runtime.infer(images), images)


def test_device_memory_comes_back(engine: GpuEngine) -> None:
    def run(batches: int) -> None:
        with TensorRTRuntime(engine.path) as runtime:
            for _ in runtime.map([Batch(engine.images(8))] * batches):
                pass

    run(20)  # what CUDA and TensorRT keep for the process
    before = device.free_memory()
    for _ in range(3):
        run(20)
    assert before - device.free_memory() <= 2 << 20  # the driver allocates by 2 MiB


def test_memory_is_flat_while_it_runs(engine: GpuEngine) -> None:
    with TensorRTRuntime(engine.path) as runtime:
        levels = []
        for count in (100, 900):
            for _ in runtime.map([Batch(engine.images(8))] * count):
                pass
            levels.append(device.free_memory())
    assert levels[0] == levels[1]


def test_times(engine: GpuEngine) -> None:
    with TensorRTRuntime(engine.path) as runtime:
        for _ in range(5):
            times = runtime.infer_timed(engine.images(8))
        assert times.compute_ms >= engine.spin_ms
        assert times.compute_ms < engine.spin_ms + 5
        assert min(times.enqueue_ms, times.h2d_ms, times.d2h_ms) > 0
        spans = runtime.last_spans()
    moments = [moment for name in ("h2d", "compute", "d2h") for moment in spans[name]]
    assert moments == sorted(moments)


def test_host_and_device_overlap(standin_only: GpuEngine) -> None:
    """200 batches of 1 ms on the device and 0.5 ms on the host take little more than 200 ms."""
    with TensorRTRuntime(standin_only.path) as runtime:
        batch = Batch(standin_only.images(8))
        for _ in runtime.map([batch] * 10):
            pass
        start = time.perf_counter()
        for _ in runtime.map([batch] * 200):
            busy_until = time.perf_counter() + 0.0005
            while time.perf_counter() < busy_until:
                pass
        seconds = time.perf_counter() - start
    assert 0.2 <= seconds < 0.26


def test_errors_name_cuda_and_the_gpu(engine: GpuEngine) -> None:
    with pytest.raises(device.CudaError, match="cudaGetDeviceProperties: cudaErrorInvalidDevice"):
        TensorRTRuntime(engine.path, device=device.device_count())


def test_several_gpus_give_the_results_of_one(engine: GpuEngine) -> None:
    if device.device_count() < 2:
        pytest.skip("needs two GPUs")
    source = [Batch(engine.images(8, index)) for index in range(60)]
    with open_devices(engine.path, "all") as runtime:
        assert isinstance(runtime, MultiRuntime)
        found = list(runtime.map(source))
    assert [id(batch) for batch, _ in found] == [id(batch) for batch in source]
    for batch, outputs in found:
        assert_same(engine, outputs, batch.images)
