# SPDX-License-Identifier: Apache-2.0
"""`trtdet.runtimes.multi` on several stand-in GPUs; needs no GPU."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standin_cudart import cudaError_t
from trt_rig import SHAPE, Batch, Rig, assert_same, batches, noise

from trtdet.engine.sidecar import sidecar_path
from trtdet.errors import EngineError
from trtdet.runtimes.multi import MultiRuntime, open_devices
from trtdet.runtimes.options import parse_devices
from trtdet.runtimes.trt import TensorRTRuntime


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize(("text", "devices"), [("all", "all"), ("0", (0,)), ("1,0,3", (1, 0, 3))])
def test_parse_devices(text: str, devices: Any) -> None:
    assert parse_devices(text) == devices


@pytest.mark.parametrize("text", ["", "a", "0,", "0,0", "-1", "0 1"])
def test_parse_devices_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="different GPU numbers as in 0,1"):
        parse_devices(text)


@pytest.mark.parametrize("schedule", ["late", "early", "random"])
@pytest.mark.parametrize("count", [2, 3])
def test_results_are_those_of_one_gpu_in_order(
    rig: Callable[..., Rig], engine: Path, count: int, schedule: str
) -> None:  # fmt: skip
    machine = rig(devices=count, schedule=schedule)
    source = batches([4] * 30 + [2])
    with open_devices(engine, [0]) as one:
        assert isinstance(one, TensorRTRuntime)
        expected = list(one.map(source))
    with open_devices(engine, "all") as runtime:
        assert isinstance(runtime, MultiRuntime)
        assert runtime.description.startswith(f"{count} GPUs: TensorRT 10.13.3.9, GPU 0 (")
        assert (runtime.batch_range, runtime.preferred_batch) == ((1, 8), 4)
        found = list(runtime.map(source))
        ran = [context._device for context in machine.contexts if context._stream is not None]
    assert [id(batch) for batch, _ in found] == [id(batch) for batch in source]
    for (_, a), (_, b) in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert set(ran) <= set(range(count))


def test_every_gpu_works(rig: Callable[..., Rig], engine: Path) -> None:
    """With batches enough for both, a GPU that has no room leaves them to the other."""
    machine = rig(devices=2)
    both_ran = threading.Event()
    ran: set[int] = set()
    original = TensorRTRuntime.fetch

    def fetch(self: TensorRTRuntime) -> Any:
        ran.add(self._device)
        if len(ran) == 2:
            both_ran.set()
        assert both_ran.wait(20)  # hold the first GPU until the second has taken a batch
        return original(self)

    with pytest.MonkeyPatch.context() as patch, open_devices(engine, [0, 1]) as runtime:
        patch.setattr(TensorRTRuntime, "fetch", fetch)
        for batch, outputs in runtime.map(batches([4] * 12)):
            assert_same(outputs, batch.images)
    assert ran == {0, 1}
    assert machine.cudart.current() == 0


def test_infer_and_pinned_memory(rig: Callable[..., Rig], engine: Path) -> None:
    rig(devices=2)
    with open_devices(engine, (1, 0)) as runtime:
        assert_same(runtime.infer(noise(3)), noise(3))
        pinned = runtime.allocate((3, *SHAPE), np.uint8)
        pinned[:] = noise(3)
        ((_, outputs),) = runtime.map([Batch(pinned, ())])
        assert_same(outputs, noise(3))


def test_only_the_gpus_that_were_asked_for_are_touched(
    rig: Callable[..., Rig], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = rig(devices=3).cudart
    allocate, touched = cudart.cudaHostAlloc, []

    def note_and_allocate(*args: Any) -> Any:
        touched.append(cudart.current())
        return allocate(*args)

    choose, chosen = cudart.cudaSetDevice, set()

    def note_and_choose(index: int) -> Any:
        chosen.add(index)
        return choose(index)

    monkeypatch.setattr(cudart, "cudaHostAlloc", note_and_allocate)
    monkeypatch.setattr(cudart, "cudaSetDevice", note_and_choose)
    with open_devices(engine, (2, 1)) as runtime:
        runtime.allocate((3, *SHAPE), np.uint8)
        list(runtime.map(batches([2, 2])))
    assert touched[:7] == [2, 2, 2, 1, 1, 1, 2]
    assert set(touched) == {1, 2}
    assert chosen == {1, 2}  # naming GPU 0, if only to put it back, would start CUDA on it


def test_a_thread_that_does_not_start_leaves_none_behind(
    rig: Callable[..., Rig], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig(devices=2)
    start, started = threading.Thread.start, []

    def start_one(thread: threading.Thread) -> None:
        if thread.name.startswith("gpu-") and started:
            raise RuntimeError("can't start new thread")
        started.append(thread.name)
        start(thread)

    with open_devices(engine, (0, 1)) as runtime:
        monkeypatch.setattr(threading.Thread, "start", start_one)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            list(runtime.map(batches([2])))
    assert not [t for t in threading.enumerate() if t.name.startswith("gpu-")]


@pytest.mark.parametrize(
    ("count", "devices", "message"),
    [
        (2, (0, 1, 7), "--devices: there is no GPU 7: GPUs 0 to 1 are here (2 in all); choose among these, or give 'all'"),
        (1, (3, 1), "--devices: there is no GPU 3, 1: GPU 0 alone is here (1 in all); choose among these, or give 'all'"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_not_there_is_named(
    rig: Callable[..., Rig], engine: Path, count: int, devices: tuple[int, ...], message: str
) -> None:
    machine = rig(devices=count)
    with pytest.raises(EngineError) as caught:
        open_devices(engine, devices)
    assert str(caught.value) == message
    assert machine.cudart.calls["cudaStreamCreateWithFlags"] == 0  # nothing was opened before


_listeners: list[list[str]] = []


@lru_cache(maxsize=1)
def note_opened_files() -> None:
    """Tell `_listeners` from now on. A hook cannot be taken away."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            for listener in _listeners:
                listener.append(str(arguments[0]))

    sys.addaudithook(note)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Names of the files that are opened, in order."""
    note_opened_files()
    listener: list[str] = []
    _listeners.append(listener)
    yield listener
    _listeners.remove(listener)


def test_a_tensorrt_that_is_missing_is_said_before_a_gpu_that_is(
    rig: Callable[..., Rig], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig(name="tensorrt_rtx", version="1.7.0.1", devices=0)
    with pytest.raises(EngineError, match=r"was built by TensorRT 10\.13.*pip install tensorrt"):
        open_devices(engine, "all")


@pytest.mark.parametrize("sidecar", [True, False])
def test_the_engine_is_read_once_for_all_gpus(
    rig: Callable[..., Rig],
    engine: Path,
    sidecar: bool,
    opened: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig(devices=8)
    if not sidecar:
        sidecar_path(engine).unlink()
    with open_devices(engine, "all") as runtime:
        for batch, outputs in runtime.map(batches([4] * 12)):
            assert_same(outputs, batch.images)
    counts = [opened.count(str(path)) for path in (engine, sidecar_path(engine))]
    assert counts == [1, int(sidecar)]
    assert caplog.text.count("beside it: taken for AutoML's EfficientDet") == (not sidecar)


def test_a_gpu_that_fails_closes_those_that_were_opened(
    rig: Callable[..., Rig], engine: Path
) -> None:
    machine = rig(devices=2)
    machine.cudart.fail("cudaStreamCreateWithFlags", cudaError_t.cudaErrorMemoryAllocation, after=4)
    with pytest.raises(EngineError, match="cudaStreamCreateWithFlags: cudaErrorMemoryAllocation"):
        open_devices(engine, [0, 1])
    assert len(machine.trt.Runtime.engines) == 0
    assert machine.cudart.live() == {}


def test_a_failed_gpu_ends_the_run_with_its_error(rig: Callable[..., Rig], engine: Path) -> None:
    machine = rig(devices=2)
    with open_devices(engine, "all", cuda_graph=False) as runtime:
        (bad,) = [context for context in machine.contexts if context._device == 1]
        (good,) = [context for context in machine.contexts if context._device == 0]
        bad.fail_after = 0
        good.fail_after = 10  # whichever GPU is quicker, one fails
        with pytest.raises(EngineError, match=r"batch \d+: execute_async_v3 failed: .*a test made it fail \(images: \d+_0\.jpg"):  # fmt: skip
            list(runtime.map(batches([4] * 40)))
        bad.fail_after = good.fail_after = None
        for batch, outputs in runtime.map(batches([4] * 5)):  # usable again
            assert_same(outputs, batch.images)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["source", "consumer"])
def test_leaving_early_stops_every_worker(
    rig: Callable[..., Rig], engine: Path, error: type[BaseException], place: str
) -> None:  # fmt: skip
    rig(devices=2)

    def source() -> Iterator[Batch]:
        for index, batch in enumerate(batches([4] * 30)):
            if place == "source" and index == 15:
                raise error
            yield batch

    with open_devices(engine, "all") as runtime:
        generator = runtime.map(source())
        with pytest.raises(error):
            for index, _ in enumerate(generator):
                if place == "consumer" and index == 3:
                    raise error
        generator.close()
        assert all(len(one._running) == 0 for one in runtime._runtimes)
        assert not [t.name for t in threading.enumerate() if t.name.startswith("gpu-")]


def test_the_source_outlives_the_work_on_the_gpus(
    rig: Callable[..., Rig], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may own pinned memory: freed under copies that are queued, it would hold up the GPUs."""
    machine = rig(devices=2)
    closed, queued = threading.Event(), []

    class Source:
        """As `ImageBatcher`: what holds the memory is the iteration."""

        def __iter__(self) -> Iterator[Batch]:
            try:
                yield from batches([4] * 40, runtime.allocate)
            finally:
                streams = machine.cudart._streams.values()
                queued.append(sum(kind == "run" for stream in streams for kind, _ in stream.queue))
                closed.set()

    def fetch_late(runtime: TensorRTRuntime) -> Any:
        closed.wait(0.5)  # an error of the other GPU finds this one at work
        return fetch(runtime)

    fetch = TensorRTRuntime.fetch
    with open_devices(engine, "all", cuda_graph=False) as runtime:
        monkeypatch.setattr(TensorRTRuntime, "fetch", fetch_late)
        next(c for c in machine.contexts if c._device == 1).fail_after = 0
        with pytest.raises(EngineError, match="a test made it fail"):
            list(runtime.map(Source()))
        gc.collect()
    assert queued == [0]


def test_batches_outlive_the_work_on_every_gpu(
    rig: Callable[..., Rig], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that stops first frees no pinned memory while another GPU works: `rig` would find
    it live.
    """
    machine = rig(devices=2)
    first_stopped, waits = threading.Event(), []

    def source() -> Iterator[Batch]:
        for index in range(12):
            yield from batches([4 + index % 2], runtime.allocate)

    def discard(self: TensorRTRuntime) -> None:
        if self._device == 0:
            waits.append(first_stopped.wait(20))
            time.sleep(0.2)  # for what the other thread drops as it ends
            queued = [len(stream.queue) for stream in machine.cudart._streams.values()]
            assert sum(queued) > 0
        original(self)
        first_stopped.set()

    def fetch(self: TensorRTRuntime) -> Any:
        if self._device == 0:
            assert second_ran.wait(20)
            raise EngineError("a test made it fail")
        assert first_has_one.wait(20)  # or this GPU would take them all
        second_ran.set()
        return original_fetch(self)

    def submit(self: TensorRTRuntime, images: Any) -> None:
        original_submit(self, images)
        if self._device == 0:
            first_has_one.set()

    first_has_one, second_ran = threading.Event(), threading.Event()
    original, original_fetch = TensorRTRuntime.discard, TensorRTRuntime.fetch
    original_submit = TensorRTRuntime.submit
    with open_devices(engine, "all", cuda_graph=False) as runtime, monkeypatch.context() as patch:
        patch.setattr(TensorRTRuntime, "discard", discard)
        patch.setattr(TensorRTRuntime, "fetch", fetch)
        patch.setattr(TensorRTRuntime, "submit", submit)
        with pytest.raises(EngineError, match="a test made it fail"):
            list(runtime.map(source()))
    assert waits == [True]


def test_batches_that_wait_are_dropped_when_it_stops(rig: Callable[..., Rig], engine: Path) -> None:
    rig()
    submitted = []

    def submit(self: TensorRTRuntime, images: Any) -> None:
        submitted.append(1)
        original_submit(self, images)

    def fetch(self: TensorRTRuntime) -> Any:
        time.sleep(0.2 if len(submitted) > 3 else 0)  # time for the main thread to leave
        return original_fetch(self)

    original_submit, original_fetch = TensorRTRuntime.submit, TensorRTRuntime.fetch
    with pytest.MonkeyPatch.context() as patch, MultiRuntime([TensorRTRuntime(engine)]) as runtime:
        patch.setattr(TensorRTRuntime, "submit", submit)
        patch.setattr(TensorRTRuntime, "fetch", fetch)
        for _ in runtime.map(batches([4] * 20)):
            break
    assert len(submitted) == 4


def test_memory_is_bounded(rig: Callable[..., Rig], engine: Path) -> None:
    rig(devices=2)
    taken = []

    def source() -> Iterator[Batch]:
        for index, batch in enumerate(batches([2] * 60)):
            taken.append(index)
            yield batch

    with open_devices(engine, "all") as runtime:
        for done, _ in enumerate(runtime.map(source())):
            assert len(taken) - done <= 2 * (3 + 3) + 1
