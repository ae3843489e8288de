# SPDX-License-Identifier: Apache-2.0
"""`trtdet.runtimes.trt` on a GPU: `pytest -m gpu`.

Each test runs with TensorRT, with TensorRT-RTX and with the stand-in engine on real CUDA memory,
and skips those that are not here. The id says which: only `stand-in` means that TensorRT itself was
not tested.
"""

import gc
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_engines
import numpy as np
import pytest
from gpu_engines import CASES, STATIC_BATCH, Case, GpuEngine
from numpy.typing import NDArray
from PIL import Image

from trtdet import cuda
from trtdet.commands import eval_coco, infer
from trtdet.engine.flavor import find_flavor
from trtdet.errors import EngineError
from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import find_images
from trtdet.runtimes.multi import MultiRuntime, open_devices
from trtdet.runtimes.trt import TensorRTRuntime

pytestmark = pytest.mark.gpu

FLAVOR_OF = {"stand-in": "tensorrt", "tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx"}
#: The driver allocates device memory by 2 MiB.
SLACK = 2 << 20


def make(
    kind: str, factory: pytest.TempPathFactory, *, case: Case = "plain", spin_ms: float = 0.0
) -> GpuEngine:
    """An engine that has run on every GPU: what CUDA and TensorRT keep for the process is there."""
    try:
        made = gpu_engines.make_engine(kind, factory.mktemp("gpu"), case=case, spin_ms=spin_ms)
    except (EngineError, ImportError, OSError) as error:
        pytest.skip(f"{kind}: {error}")
    for cuda_graph in (True, False):
        with open_devices(made.path, "all", cuda_graph=cuda_graph) as runtime:
            one: Any
            for one in getattr(runtime, "_runtimes", (runtime,)):
                for _ in one.map([Batch(made.images(min(4, one.batch_range[1])))] * 12):
                    pass
    return made


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt_rtx", "stand-in"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GpuEngine]:
    missing = gpu_engines.find_gpu()
    if missing:
        pytest.skip(f"no GPU: {missing}")
    yield make(request.param, tmp_path_factory, spin_ms=1.0)
    gpu_engines.remove_standin()  # later modules import the real one


@pytest.fixture(scope="module", params=[case for case in CASES if case != "plain"])
def other(
    request: pytest.FixtureRequest, engine: GpuEngine, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, GpuEngine]:
    return request.param, make(engine.kind, tmp_path_factory, case=request.param)


@pytest.fixture(scope="module")
def free(engine: GpuEngine, tmp_path_factory: pytest.TempPathFactory) -> GpuEngine:
    return make(engine.kind, tmp_path_factory, case="dynamic size")


@pytest.fixture
def standin_only(engine: GpuEngine) -> GpuEngine:
    if engine.kind != "stand-in":
        pytest.skip("needs the fixed device time of the stand-in")
    return engine


def free_memory() -> list[int]:
    """Of each GPU."""
    found = []
    for index in range(cuda.device_count()):
        cuda.use_device(index)
        found.append(cuda.free_memory())
    cuda.use_device(0)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(engine: GpuEngine) -> Iterator[None]:
    gc.collect()
    before = free_memory()
    yield
    gc.collect()
    assert [t.name for t in threading.enumerate() if t.name.startswith("gpu-")] == []
    grown = [old - new for old, new in zip(before, free_memory(), strict=True)]
    assert max(grown) <= SLACK, f"device memory not given back, bytes by GPU: {grown}"


@dataclass
class Batch:
    images: NDArray[Any]
    paths: tuple[Path, ...] = ()


def assert_same(engine: GpuEngine, outputs: dict[str, NDArray[Any]], images: NDArray[Any]) -> None:
    if engine.has_nms:
        outputs = {name: array.copy() for name, array in outputs.items()}
        for row, count in enumerate(outputs["num_detections"][:, 0]):
            for name in outputs.keys() - {"num_detections"}:
                outputs[name][row, count:] = 0
    for name, expected in engine.reference(images).items():
        assert outputs[name].shape == expected.shape
        np.testing.assert_allclose(outputs[name], expected, rtol=engine.tolerance, err_msg=name)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_every_batch_size(engine: GpuEngine, cuda_graph: bool) -> None:
    with TensorRTRuntime(engine.path, cuda_graph=cuda_graph) as runtime:
        assert runtime.batch_range == (1, 8)
        for count in [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8, 3, 3, 3, 3, 1]:
            images = engine.images(count, count)
            assert_same(engine, runtime.infer(images), images)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_every_batch_may_have_another_size(free: GpuEngine, cuda_graph: bool) -> None:
    sizes = [(16, 16)] * 5 + [(32, 64)] * 5 + [(8, 8), (32, 64), (8, 8), (16, 24), (16, 24)]
    batches = [Batch(free.images(1 + i % 8, i, size)) for i, size in enumerate(sizes)]
    with TensorRTRuntime(free.path, cuda_graph=cuda_graph) as runtime:
        for batch, outputs in runtime.map(batches * 3):
            assert_same(free, outputs, batch.images)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_engines_of_other_kinds(other: tuple[Case, GpuEngine], cuda_graph: bool) -> None:
    case, made = other
    with TensorRTRuntime(made.path, cuda_graph=cuda_graph) as runtime:
        largest = runtime.batch_range[1]
        assert largest == (STATIC_BATCH if case == "static batch" else 8)
        assert len(runtime._engine.profiles) == (2 if case == "two profiles" else 1)
        assert runtime.spec.preprocessing.dtype == made.dtype
        counts = [1 + index % largest for index in range(2 * largest)] + [largest] * 8 + [2] * 8
        batches = [Batch(made.images(count, index)) for index, count in enumerate(counts)]
        done = 0
        for batch, outputs in runtime.map(batches):
            assert_same(made, outputs, batch.images)
            done += 1
    assert done == len(counts)


def test_from_files_to_the_metric(engine: GpuEngine, tmp_path: Path) -> None:
    """infer.py and eval_coco.py from the command line: the detections of both are those of the
    network.
    """
    photos, found = tmp_path / "photos", tmp_path / "found"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(1, 12):
        pixels = rng.integers(0, 256, (20 + number, 30, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    with TensorRTRuntime(engine.path) as runtime:
        preprocessing = runtime.spec.preprocessing
        categories = runtime.spec.category_ids
    with ImageBatcher(find_images(photos), preprocessing, 4) as batches:
        expected = {
            int(path.stem): int(count)
            for batch in batches
            for path, (count,) in zip(batch.paths, engine.reference(batch.images)["num_detections"], strict=True)
        }  # fmt: skip
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 20 + n, "width": 30} for n in expected],
        "categories": [{"id": id_, "name": str(id_)} for id_ in categories],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0} for n in expected],
    }  # fmt: skip
    (tmp_path / "annotations.json").write_text(json.dumps(coco), encoding="utf-8")
    common = ["-e", str(engine.path), "-i", str(photos), "--devices", "all", "--batch_size", "4"]
    assert infer.main([*common, "-o", str(found)]) == 0
    again, metrics = tmp_path / "again.json", tmp_path / "metrics.json"
    options = [
        "-a",
        str(tmp_path / "annotations.json"),
        "--detections",
        str(again),
        "--json",
        str(metrics),
    ]
    assert eval_coco.main([*common, *options]) == 0
    detections = json.loads((found / "detections.json").read_text(encoding="utf-8"))
    assert json.loads(again.read_text(encoding="utf-8")) == detections
    assert json.loads(metrics.read_text(encoding="utf-8"))["images"] == 11
    by_image = {n: sum(each["image_id"] == n for each in detections) for n in expected}
    lines = {n: len((found / f"{n}.tsv").read_text(encoding="utf-8").splitlines()) for n in expected}  # fmt: skip
    assert by_image == lines == expected
    assert sum(expected.values()) > 0
    assert len(list(found.glob("*.png"))) == 11


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("pinned", [False, True])
def test_map_is_in_order_and_right(engine: GpuEngine, contexts: int, pinned: bool) -> None:
    if contexts > 1 and not find_flavor(FLAVOR_OF[engine.kind]).contexts_share_profiles:
        pytest.skip("this TensorRT gives each optimization profile to one context")
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
        assert len(runtime._running) == 0
        images = engine.images(4)
        assert_same(engine, runtime.infer(images), images)


def test_device_memory_comes_back(engine: GpuEngine) -> None:
    def run(batches: int) -> None:
        with TensorRTRuntime(engine.path) as runtime:
            for _ in runtime.map([Batch(engine.images(8))] * batches):
                pass

    run(20)  # what CUDA and TensorRT keep for the process
    before = cuda.free_memory()
    for _ in range(3):
        run(20)
    assert before - cuda.free_memory() <= SLACK


def test_memory_is_flat_while_it_runs(engine: GpuEngine) -> None:
    with TensorRTRuntime(engine.path) as runtime:
        levels = []
        for count in (100, 900):
            for _ in runtime.map([Batch(engine.images(8))] * count):
                pass
            levels.append(cuda.free_memory())
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
    with pytest.raises(cuda.CudaError, match="cudaGetDeviceProperties: cudaErrorInvalidDevice"):
        TensorRTRuntime(engine.path, device=cuda.device_count())


def test_several_gpus_give_the_results_of_one(engine: GpuEngine) -> None:
    if cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    source = [Batch(engine.images(8, index)) for index in range(60)]
    with open_devices(engine.path, "all") as runtime:
        assert isinstance(runtime, MultiRuntime)
        found = list(runtime.map(source))
    assert [id(batch) for batch, _ in found] == [id(batch) for batch in source]
    for batch, outputs in found:
        assert_same(engine, outputs, batch.images)
