# SPDX-License-Identifier: Apache-2.0
"""`trtdet.runtimes.trt` on stand-ins for TensorRT and for the CUDA runtime (late, early and random
execution); needs no GPU.

`tests/runtimes/test_gpu.py` runs the same runtime on real CUDA memory, and on real TensorRT where
that is.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from trt_rig import SHAPE, Batch, Rig, assert_same, batches, noise, write_engine

from trtdet import cuda
from trtdet.cuda import CudaError
from trtdet.errors import EngineError
from trtdet.run import benchmark
from trtdet.runtimes.base import default_batch_size
from trtdet.runtimes.open import open_runtime
from trtdet.runtimes.trt import TensorRTRuntime
from trtdet.runtimes.trt_load import Profile, pick_profile

SCHEDULES = [("late", 0), ("early", 0), ("random", 1), ("random", 2), ("random", 3)]


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_infer_every_batch_size(
    rig: Callable[..., Rig], engine: Path, schedule: str, seed: int, cuda_graph: bool
) -> None:
    rig(schedule=schedule, seed=seed)
    with TensorRTRuntime(engine, cuda_graph=cuda_graph) as runtime:
        assert runtime.batch_range == (1, 8)
        assert default_batch_size(runtime) == 4
        for count in [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 3, 3, 3, 1]:
            images = noise(count, count)
            assert_same(runtime.infer(images), images)


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("pinned", [False, True])
def test_map_is_in_order_and_right(
    rig: Callable[..., Rig], engine: Path, schedule: str, seed: int, contexts: int, pinned: bool
) -> None:
    rig(schedule=schedule, seed=seed)
    with TensorRTRuntime(engine, contexts=contexts) as runtime:
        source = batches([4] * 9 + [8, 8, 1, 4, 4, 2], runtime.allocate if pinned else None)
        results = list(runtime.map(source))
        assert [id(batch) for batch, _ in results] == [id(batch) for batch in source]
        for batch, outputs in results:
            assert_same(outputs, batch.images)


def test_outputs_are_owned(rig: Callable[..., Rig], engine: Path) -> None:
    rig()
    with TensorRTRuntime(engine) as runtime:
        kept = [runtime.infer(noise(4, seed)) for seed in range(8)]
    for seed, outputs in enumerate(kept):
        assert_same(outputs, noise(4, seed))
        assert all(array.flags.owndata for array in outputs.values())


def test_input_may_change_after_submit_unless_pinned(rig: Callable[..., Rig], engine: Path) -> None:
    rig()
    with TensorRTRuntime(engine) as runtime:
        images = noise(4)
        runtime.submit(images)
        images[:] = 0
        assert_same(runtime.fetch(), noise(4))
        pinned = runtime.allocate((4, *SHAPE), np.uint8)
        pinned[:] = noise(4)
        runtime.submit(pinned)
        pinned[:] = 0  # against the rules: read in place, so this is what the GPU sees
        assert_same(runtime.fetch(), np.zeros_like(images))
        runtime.submit(pinned[:, ::-1])  # pinned, but not contiguous: copied
        assert_same(runtime.fetch(), np.zeros_like(images))


def test_pinned_input_is_kept_alive(rig: Callable[..., Rig], engine: Path) -> None:
    rig()
    with TensorRTRuntime(engine) as runtime:

        def submit() -> None:
            pinned = runtime.allocate((4, *SHAPE), np.uint8)
            pinned[:] = noise(4)
            runtime.submit(pinned)

        submit()
        gc.collect()
        assert_same(runtime.fetch(), noise(4))


def test_float32_input_and_non_contiguous_images(rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig()
    path = write_engine(tmp_path / "float.engine", dtype="float32")
    images = np.ascontiguousarray(noise(3, dtype="float32").transpose(0, 2, 1, 3))
    with TensorRTRuntime(path) as runtime:
        assert_same(runtime.infer(images), images)
        rotated = images.transpose(0, 2, 1, 3)
        assert_same(runtime.infer(rotated), np.ascontiguousarray(rotated))
        with pytest.raises(ValueError, match=r"type float32, got \(16, 16, 3\) uint8"):
            runtime.infer(noise(3))


@pytest.mark.parametrize(
    ("count", "message"), [(0, "batch of 1 to 8, got 0"), (9, "batch of 1 to 8, got 9")]
)
def test_batches_that_do_not_fit(rig: Callable[..., Rig], engine: Path, count: int, message: str) -> None:  # fmt: skip
    rig()
    with TensorRTRuntime(engine) as runtime, pytest.raises(ValueError, match=message):
        runtime.infer(noise(count))


def test_a_missing_event_would_be_found(
    rig: Callable[..., Rig], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-ins do their work: without the events between the streams the numbers are wrong."""
    machine = rig()
    monkeypatch.setattr(cuda.Stream, "wait", lambda self, event: None)
    with TensorRTRuntime(engine) as runtime:
        outputs = runtime.infer(noise(4))
        with pytest.raises(AssertionError):
            assert_same(outputs, noise(4))
        for stream in list(machine.cudart._streams):
            machine.cudart.cudaStreamSynchronize(stream)


# --- CUDA graphs, profiles, contexts --------------------------------------------------------------


def test_graph_is_captured_once_per_slot_and_replayed(
    rig: Callable[..., Rig], engine: Path
) -> None:
    calls = rig().cudart.calls
    with TensorRTRuntime(engine) as runtime:
        list(runtime.map(batches([8] * 12 + [3])))
        assert runtime.depth == 3
        # One plain run of the new shape, then one capture for each set of buffers; the lone last
        # batch runs plainly.
        assert calls["cudaStreamBeginCapture"] == 3
        assert calls["cudaGraphLaunch"] == 11
        assert calls["cudaGraphExecDestroy"] == 3  # dropped at the change of shape
        list(runtime.map(batches([8] * 4)))
        assert calls["cudaStreamBeginCapture"] == 6  # captured again
        assert calls["cudaGraphLaunch"] == 14


def test_graphs_can_be_turned_off(rig: Callable[..., Rig], engine: Path) -> None:
    calls = rig().cudart.calls
    with TensorRTRuntime(engine, cuda_graph=False) as runtime:
        list(runtime.map(batches([8] * 12)))
    assert (calls["cudaStreamBeginCapture"], calls["cudaGraphLaunch"]) == (0, 0)


def test_engine_that_cannot_be_captured_runs_plainly(
    rig: Callable[..., Rig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = rig()
    path = write_engine(tmp_path / "loop.engine", capturable=False)
    with TensorRTRuntime(path) as runtime:
        for batch, outputs in runtime.map(batches([4] * 8)):
            assert_same(outputs, batch.images)
    assert machine.cudart.calls["cudaStreamBeginCapture"] == 1
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "running without: execute_async_v3 failed: IExecutionContext: cannot be captured" in warnings[0]  # fmt: skip


def profile(*batches: int, sides: tuple[int, int, int] = (16, 16, 16)) -> Profile:
    return Profile(*((n, side, side, 3) for n, side in zip(batches, sides, strict=True)))


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, (0, 1)),  # the only one that takes it unfilled
        (4, (1, 4)),  # exactly the best size of the second
        (5, (1, 5)),  # nearer to 4 than to 16
        (8, (1, 8)),  # both take it; 4 is nearer than 16
        (9, (2, 9)),
        (16, (2, 16)),
    ],
)
def test_profile_that_fits_best(count: int, expected: tuple[int, int]) -> None:
    profiles = [profile(1, 1, 1), profile(2, 4, 8), profile(8, 16, 16)]
    assert pick_profile(profiles, (count, 16, 16, 3)) == expected


def test_profile_with_the_fewest_rows_to_fill_up() -> None:
    assert pick_profile([profile(8, 8, 8), profile(4, 4, 4)], (3, 16, 16, 3)) == (1, 4)
    narrower = [profile(1, 8, 8), profile(1, 8, 32)]
    assert pick_profile(narrower, (8, 16, 16, 3)) == (0, 8)


def test_profile_of_the_size() -> None:
    small = profile(1, 4, 8, sides=(16, 16, 32))
    large = profile(2, 4, 8, sides=(16, 64, 64))
    for shape, expected in [
        ((4, 16, 16, 3), (0, 4)),  # both take it; the smaller is tuned for nearly that
        ((1, 16, 16, 3), (0, 1)),
        ((4, 48, 32, 3), (1, 4)),
        ((1, 64, 64, 3), (1, 2)),  # filled up
    ]:
        assert pick_profile([small, large], shape) == expected
    for shape in [(4, 64, 65, 3), (4, 8, 64, 3), (9, 64, 64, 3), (4, 3, 64, 64)]:
        with pytest.raises(ValueError, match=r"expected a batch of one of the engine's profiles \(\(1, 16, 16, 3\) to \(8, 32, 32, 3\), \(2, "):  # fmt: skip
            pick_profile([small, large], shape)


def test_several_profiles(rig: Callable[..., Rig], tmp_path: Path) -> None:
    machine = rig()
    path = write_engine(tmp_path / "two.engine", profiles=[(1, 1, 1), (4, 4, 4), (6, 8, 8)])
    with TensorRTRuntime(path) as runtime:
        assert (runtime.batch_range, runtime.preferred_batch) == ((1, 8), 8)
        for count, profile in [(1, 0), (3, 1), (4, 1), (5, 2), (8, 2), (1, 0), (2, 1)]:
            images = noise(count)
            assert_same(runtime.infer(images), images)
            assert machine.contexts[0].active_optimization_profile == profile


def test_static_batch_is_filled_up_and_cut(rig: Callable[..., Rig], tmp_path: Path) -> None:
    machine = rig()
    path = write_engine(tmp_path / "static.engine", static_batch=4)
    with TensorRTRuntime(path) as runtime:
        assert runtime.batch_range == (1, 4)
        for count in (4, 1, 3, 2):
            images = noise(count)
            assert_same(runtime.infer(images), images)
        assert machine.cudart.calls["cudaGraphLaunch"] == 3  # one shape: a short batch replays too


def test_contexts_share_the_work(rig: Callable[..., Rig], engine: Path) -> None:
    machine = rig()
    with TensorRTRuntime(engine, contexts=2) as runtime:
        list(runtime.map(batches([4] * 10)))
        assert (len(machine.contexts), runtime.depth) == (2, 4)
        assert all(context._ran_with_shape for context in machine.contexts)
        assert len({context._stream for context in machine.contexts}) == 2
    with pytest.raises(ValueError, match=r"contexts: expected 1 to depth \(1\), got 2"):
        TensorRTRuntime(engine, contexts=2, depth=1)


def test_rtx_compiles_its_kernels_before_they_are_captured(
    rig: Callable[..., Rig], tmp_path: Path
) -> None:
    machine = rig(name="tensorrt_rtx", version="1.7.1.116")
    path = write_engine(tmp_path / "rtx.engine", info={"flavor": "tensorrt_rtx", "version": "1.7.1.116"})  # fmt: skip
    with TensorRTRuntime(path) as runtime:
        (context,) = machine.contexts
        strategy = context.runtime_config.dynamic_shapes_kernel_specialization_strategy
        assert strategy == "EAGER"
        for batch, outputs in runtime.map(batches([4] * 5)):
            assert_same(outputs, batch.images)


# --- the pipeline ---------------------------------------------------------------------------------


def test_map_takes_no_more_batches_than_it_has_room_for(
    rig: Callable[..., Rig], engine: Path
) -> None:
    rig()
    taken = []

    def source() -> Iterator[Batch]:
        for index, batch in enumerate(batches([4] * 20)):
            taken.append(index)
            yield batch

    with TensorRTRuntime(engine) as runtime:
        for done, _ in enumerate(runtime.map(source())):
            assert (
                len(taken) - done <= runtime.depth + 1
            )  # in flight, and the one that waits for a slot
            assert len(runtime._running) <= runtime.depth - 1


def test_map_keeps_the_gpu_busy(rig: Callable[..., Rig], engine: Path) -> None:
    """When the host waits for a batch, the next ones are queued already."""
    machine = rig()
    queued = []
    original = cuda.Event.synchronize

    def synchronize(self: cuda.Event) -> None:
        queued.append(sum(bool(s.queue) for s in machine.cudart._streams.values()))
        original(self)

    with TensorRTRuntime(engine) as runtime, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Event, "synchronize", synchronize)
        list(runtime.map(batches([4] * 10)))
    assert queued == [3] * 9 + [3]  # copy in, run and copy out all have work


def test_finished_batches_are_yielded_before_the_next_is_taken(
    rig: Callable[..., Rig], engine: Path
) -> None:
    rig(schedule="early")
    with TensorRTRuntime(engine) as runtime:
        seen = 0
        for _ in runtime.map(batches([2] * 6)):
            seen += 1
            assert (
                len(runtime._running) <= 1
            )  # a GPU that is done at once never has more than one waiting
        assert seen == 6


def test_submit_fetch_and_their_limits(rig: Callable[..., Rig], engine: Path) -> None:
    rig()
    with TensorRTRuntime(engine, depth=2) as runtime:
        with pytest.raises(EngineError, match="fetch: no batch is in flight"):
            runtime.fetch()
        runtime.submit(noise(1))
        runtime.submit(noise(2))
        assert (len(runtime._running), runtime.ready()) == (2, False)
        with pytest.raises(EngineError, match="submit: 2 batches are in flight already"):
            runtime.submit(noise(3))
        with pytest.raises(EngineError, match="infer: batches of map or submit are in flight"):
            runtime.infer(noise(3))
        with pytest.raises(EngineError, match="map: batches of another map"):
            next(runtime.map(batches([1])))
        assert_same(runtime.fetch(), noise(1))
        assert runtime.ready() is False
        runtime.discard()
        assert len(runtime._running) == 0
        assert_same(runtime.infer(noise(3)), noise(3))


def test_map_replays_graphs(rig: Callable[..., Rig], engine: Path) -> None:
    machine = rig()
    with open_runtime(engine) as runtime:
        source = batches([4, 4, 4, 4, 1])
        for (batch, outputs), expected in zip(runtime.map(source), source, strict=True):
            assert batch is expected
            assert_same(outputs, batch.images)
        assert runtime.description == "TensorRT 10.13.3.9, GPU 0 (CPU stand-in, compute capability 9.0)"  # fmt: skip
    assert machine.cudart.calls["cudaGraphLaunch"] == 3


def test_other_gpu(rig: Callable[..., Rig], engine: Path) -> None:
    machine = rig(devices=2)
    with TensorRTRuntime(engine, device=1) as runtime:
        assert_same(runtime.infer(noise(4)), noise(4))
        assert {s.device for s in machine.cudart._streams.values()} == {1}
        assert machine.cudart.current() == 1  # it stays: putting back GPU 0 would start CUDA on it
    with pytest.raises(CudaError, match="cudaGetDeviceProperties: cudaErrorInvalidDevice"):
        TensorRTRuntime(engine, device=2)


# --- times ----------------------------------------------------------------------------------------


def test_times_and_spans(rig: Callable[..., Rig], engine: Path) -> None:
    rig(schedule="early")
    with TensorRTRuntime(engine) as runtime:
        with pytest.raises(EngineError, match="times: known only between"):
            runtime.last_times()
        times = runtime.infer_timed(noise(4))
        assert min(times.h2d_ms, times.compute_ms, times.d2h_ms, times.enqueue_ms) > 0
        spans = runtime.last_spans()
        moments = [moment for name in ("h2d", "compute", "d2h") for moment in spans[name]]
        assert moments == sorted(moments)
        start, end = spans["compute"]
        assert end - start == pytest.approx(times.compute_ms, abs=1e-6)


def test_benchmark_measures_it(rig: Callable[..., Rig], engine: Path) -> None:
    rig(schedule="early")
    with TensorRTRuntime(engine) as runtime:
        (batch,) = batches([8])
        measured = benchmark.measure(runtime, batch, iterations=5, warmup=2)
    assert list(measured.summaries) == ["Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency"]  # fmt: skip
    assert measured.throughput_qps > 0
