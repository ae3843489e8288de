# SPDX-License-Identifier: Apache-2.0
"""`trtdet.cuda` on the CPU stand-in for the CUDA runtime, and the stand-in against the
signatures of the real one.
"""

import gc
import inspect
import logging
import mmap
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from standin_cudart import POISON, StandinCudart, Violation, cudaError_t

from trtdet import cuda
from trtdet.errors import EngineError


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandinCudart]:
    standin = StandinCudart(devices=2)
    monkeypatch.setattr(cuda, "cudart", lambda: standin)
    yield standin
    gc.collect()
    assert standin.live() == {}


def test_standin_has_the_signatures_of_cuda_python() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python (no GPU)")
    ours = {n: f for n, f in vars(StandinCudart).items() if re.fullmatch("cuda[A-Z][a-zA-Z]*[a-z]", n)}  # fmt: skip
    functions = {n: f for n, f in ours.items() if inspect.isfunction(f)}
    assert len(functions) >= 25
    for name, function in functions.items():
        head = getattr(real, name).__doc__.splitlines()[0]  # cudaMalloc(size_t size)
        wanted = [part.split()[-1].split(":")[0] for part in re.sub(r": \w+", "", head[head.index("(") + 1 : head.rindex(")")]).split(",") if part.strip()]  # fmt: skip
        found = list(inspect.signature(function).parameters)[1:]
        assert found == wanted, f"{name}: stand-in {found}, cuda-python {wanted}"


def test_standin_has_the_values_of_cuda_python() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python (no GPU)")
    for enum in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        for member in getattr(StandinCudart, enum):
            assert int(getattr(getattr(real, enum), member.name)) == int(member)
    named = {*cuda.HINTS, *cuda.FAULTS}
    assert {name for name in named if not hasattr(real.cudaError_t, name)} == set()
    for flag in ("cudaStreamNonBlocking", "cudaEventBlockingSync", "cudaEventDisableTiming", "cudaHostAllocPortable", "cudaHostRegisterPortable"):  # fmt: skip
        assert getattr(real, flag) == getattr(StandinCudart, flag)


def test_device_calls_only_what_the_standin_has() -> None:
    source = inspect.getsource(cuda)
    called = set(re.findall(r'"(cuda[A-Z]\w+)"', source)) - set(cuda.HINTS) - cuda.FAULTS
    assert called >= {"cudaMalloc", "cudaMemcpyAsync", "cudaGraphLaunch"}
    assert {name for name in called if not hasattr(StandinCudart, name)} == set()


def test_importing_device_imports_no_cuda() -> None:
    code = "import sys, trtdet.cuda, trtdet.runtimes.trt; print([m for m in sys.modules if m.split('.')[0] in ('cuda', 'tensorrt', 'tensorrt_rtx')])"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_missing_cuda_python_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    cuda.cudart.cache_clear()
    with pytest.raises(EngineError, match=r"needs cuda-python.*pip install"):
        cuda.cudart()
    cuda.cudart.cache_clear()


def test_error_names_function_error_and_next_step(cudart: StandinCudart) -> None:
    cudart.fail("cudaMalloc", cudaError_t.cudaErrorMemoryAllocation)
    with pytest.raises(cuda.CudaError) as caught:
        cuda.DeviceBuffer(100)
    assert (caught.value.function, caught.value.name) == ("cudaMalloc", "cudaErrorMemoryAllocation")  # fmt: skip
    assert "smaller --batch_size" in str(caught.value)


def test_no_gpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cudart", lambda: StandinCudart(devices=0))
    with pytest.raises(cuda.CudaError, match=r"cudaGetDeviceCount: cudaErrorNoDevice .*ONNX file"):  # fmt: skip
        cuda.device_count()


def test_copies_and_events(cudart: StandinCudart) -> None:
    source = cuda.pinned_empty((4, 3), np.float32)
    target = cuda.pinned_empty((48,), np.uint8)
    source[:] = np.arange(12).reshape(4, 3)
    with (
        cuda.Stream() as stream,
        cuda.DeviceBuffer(48) as buffer,
        cuda.Event(timed=True) as start,
        cuda.Event(timed=True) as end,
    ):
        start.record(stream)
        stream.copy_in(buffer.handle, source)
        stream.copy_out(target, buffer.handle)
        end.record(stream)
        assert not end.done()
        assert (target == POISON).all()  # nothing was waited for
        end.synchronize()
        assert end.done()
        assert 0 <= start.elapsed_ms(end) < 1000
    np.testing.assert_array_equal(target.view(np.float32).reshape(4, 3), source)


def test_unsynchronised_streams_give_stale_bytes(cudart: StandinCudart) -> None:
    """The stand-in finds what it is there to find: without the event the second stream reads too
    early.
    """
    source, target = (cuda.pinned_empty((8,), np.uint8) for _ in range(2))
    source[:] = 7
    results = []
    for joined in (False, True):
        with (
            cuda.Stream() as first,
            cuda.Stream() as second,
            cuda.DeviceBuffer(8) as buffer,
            cuda.Event() as copied,
        ):
            first.copy_in(buffer.handle, source)
            copied.record(first)
            if joined:
                second.wait(copied)
            second.copy_out(target, buffer.handle)
            second.synchronize()
            results.append(target[0])
            first.synchronize()
    assert results == [POISON, 7]


def test_pageable_copies_are_found(cudart: StandinCudart) -> None:
    pageable = np.zeros(8, np.uint8)
    with (
        cuda.Stream() as stream,
        cuda.DeviceBuffer(8) as buffer,
        pytest.raises(Violation, match="pageable"),
    ):
        stream.copy_in(buffer.handle, pageable)


def test_pinned_memory_lives_as_long_as_its_views(cudart: StandinCudart) -> None:
    array = cuda.pinned_empty((2, 5), np.int16)
    view = array[1:, ::2]
    assert cuda.is_pinned(array) and cuda.is_pinned(view)
    assert not cuda.is_pinned(np.zeros(3))
    assert not cuda.is_pinned(array.copy())
    del array
    assert cudart.live() == {"pinned buffers": 1}
    view[:] = 3
    del view
    assert cudart.live() == {}


def test_empty_arrays_and_buffers(cudart: StandinCudart) -> None:
    assert cuda.pinned_empty((0, 4), np.float32).shape == (0, 4)


def test_memory_of_others_is_pinned_as_long_as_its_views(
    cudart: StandinCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = mmap.mmap(-1, 4096)
    array = cuda.pin(np.frombuffer(memory, np.uint8))
    view = array[:8].view(np.int16).reshape(2, 2)
    array[:] = 3
    assert memory[:2] == b"\x03\x03" and view[1, 1] == 0x0303
    assert cuda.is_pinned(array) and cuda.is_pinned(view)
    assert cudart.live() == {"pinned buffers": 1}
    with pytest.raises(BufferError):
        memory.close()
    del array, memory
    gc.collect()
    assert view[0, 1] == 0x0303 and cudart.live() == {"pinned buffers": 1}
    del view
    gc.collect()
    assert cudart.live() == {}
    monkeypatch.setattr(cudart, "cudaHostRegister", lambda *_: (cudaError_t.cudaErrorMemoryAllocation,))  # fmt: skip
    one = np.zeros(16, np.uint8)
    assert cuda.pin(one) is one and not cuda.is_pinned(one)
    with cuda.DeviceBuffer(0) as buffer:
        assert buffer.nbytes == 0


def test_use_after_close_and_double_close(cudart: StandinCudart) -> None:
    stream = cuda.Stream()
    stream.close()
    stream.close()
    with pytest.raises(EngineError, match="Stream: used after it was freed"):
        stream.synchronize()
    assert cudart.calls["cudaStreamDestroy"] == 1


def test_a_failing_free_is_logged_and_hides_no_error(
    cudart: StandinCudart, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(KeyError), cuda.Stream():
        cudart.fail("cudaStreamDestroy", cudaError_t.cudaErrorIllegalAddress)
        raise KeyError("the real error")
    assert "while freeing: cudaStreamDestroy: cudaErrorIllegalAddress" in caplog.text
    cudart._streams.clear()  # the failed free left it


def test_graph_replays_what_was_captured(cudart: StandinCudart) -> None:
    source, target = (cuda.pinned_empty((8,), np.uint8) for _ in range(2))
    with cuda.Stream() as stream, cuda.DeviceBuffer(8) as buffer:

        def enqueue() -> None:
            stream.copy_in(buffer.handle, source)
            stream.copy_out(target, buffer.handle)

        with cuda.Graph(stream, enqueue) as graph:
            stream.synchronize()
            assert (target == POISON).all()  # capturing runs nothing
            for value in (1, 2):
                source[:] = value
                graph.launch(stream)
                stream.synchronize()
                assert (target == value).all()
    assert cudart.calls["cudaGraphLaunch"] == 2


def test_garbage_found_during_a_capture_does_not_break_it(cudart: StandinCudart) -> None:
    """A pinned array in a reference cycle: the collector, run by an allocation in the capture,
    would free it there.
    """
    threshold = gc.get_threshold()
    gc.collect()
    with cuda.Stream() as stream, cuda.DeviceBuffer(8) as buffer:

        def enqueue() -> None:
            kept = [[] for _ in range(2000)]
            assert len(kept) == 2000
            stream.clear(buffer.handle, buffer.nbytes)

        try:
            gc.set_threshold(100)
            cycle: list[object] = [cuda.pinned_empty((8,), np.uint8)]
            cycle.append(cycle)
            del cycle
            with cuda.Graph(stream, enqueue):
                pass
            assert gc.isenabled()
            gc.disable()
            with cuda.Graph(stream, enqueue):
                assert not gc.isenabled()  # as it was
        finally:
            gc.enable()
            gc.set_threshold(*threshold)


def test_failed_capture_leaves_the_stream_usable(cudart: StandinCudart) -> None:
    with cuda.Stream() as stream, cuda.DeviceBuffer(8) as buffer:
        with pytest.raises(cuda.CudaError, match="cudaErrorStreamCaptureUnsupported"):
            cuda.Graph(stream, stream.synchronize)  # waiting cannot be captured
        with pytest.raises(KeyError):
            cuda.Graph(stream, lambda: {}["x"])
        with pytest.raises(cuda.CudaError, match="cudaErrorStreamCaptureInvalidated"):
            cudart.fail("cudaStreamEndCapture", cudaError_t.cudaErrorStreamCaptureInvalidated)
            cuda.Graph(stream, lambda: None)
        cudart.heal()
        cudart._streams[stream.handle].capture = None
        assert cudart.last_error() == 0
        stream.clear(buffer.handle, buffer.nbytes)
        stream.synchronize()


def test_the_device_is_the_threads_own_and_stays(cudart: StandinCudart) -> None:
    """Putting back GPU 0 would start CUDA on it."""
    seen = []
    cuda.use_device(1)
    thread = threading.Thread(target=lambda: seen.append(cudart.current()))
    thread.start()
    thread.join()
    assert (cudart.current(), seen) == (1, [0])
    calls = cudart.calls["cudaSetDevice"]
    cuda.use_device(1)
    assert cudart.calls["cudaSetDevice"] == calls  # it is current already
    with pytest.raises(cuda.CudaError, match="cudaErrorInvalidDevice"):
        cuda.use_device(5)


def test_device_info_and_free_memory(cudart: StandinCudart) -> None:
    info = cuda.device_info(1)
    assert str(info) == "GPU 1 (CPU stand-in, compute capability 9.0)"
    before = cuda.free_memory()
    with cuda.DeviceBuffer(4096):
        assert before - cuda.free_memory() == 4096


@pytest.mark.parametrize(
    ("version", "warned"),
    [("12.9.0", True), ("12.8.0", True), ("12.9.1", False), ("13.0.0", False), (None, False)],
)
def test_old_bindings_are_warned_of_once(
    version: str | None,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def version_of(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(cuda.metadata, "version", version_of)
    cuda.warn_of_old_bindings.cache_clear()
    cuda.warn_of_old_bindings()
    cuda.warn_of_old_bindings()
    cuda.warn_of_old_bindings.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        f"cuda-python {version} holds Python's lock while it waits for the GPU, so images are not decoded meanwhile; "
        "update it: pip install 'cuda-python>=12.9.1'"
    ] * warned
