# SPDX-License-Identifier: Apache-2.0
"""What `trtdet.runtimes.trt` does when TensorRT, CUDA or the user stops it; on stand-ins, needs
no GPU.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standin_cudart import cudaError_t
from trt_rig import SHAPE, Batch, Rig, assert_same, batches, noise, write_engine

from trtdet import cuda
from trtdet.errors import EngineError
from trtdet.runtimes.trt import TensorRTRuntime


def test_error_of_tensorrt_names_batch_images_and_reason(
    rig: Callable[..., Rig], engine: Path
) -> None:
    machine = rig()
    with TensorRTRuntime(engine, cuda_graph=False) as runtime:
        machine.contexts[0].fail_after = 2
        results = []
        with pytest.raises(EngineError) as caught:
            results.extend(runtime.map(batches([2] * 6)))
        assert str(caught.value) == (
            "batch 2: execute_async_v3 failed: IExecutionContext: a test made it fail (images: 2_0.jpg, 2_1.jpg)"
        )
        assert len(runtime._running) == 0
        machine.contexts[0].fail_after = None
        assert_same(runtime.infer(noise(4)), noise(4))  # usable again


def test_wrong_batch_in_the_middle_is_named(rig: Callable[..., Rig], engine: Path) -> None:
    rig()
    source = batches([2, 2, 9, 2])
    with TensorRTRuntime(engine) as runtime:
        with pytest.raises(ValueError, match=r"batch 2: input: expected a batch of 1 to 8, got 9 \(images: 2_0\.jpg, "):  # fmt: skip
            list(runtime.map(source))
        assert len(runtime._running) == 0


def test_asynchronous_fault_is_raised_where_it_is_noticed(
    rig: Callable[..., Rig], engine: Path
) -> None:
    machine = rig()
    runtime = TensorRTRuntime(engine)
    machine.cudart.fail("cudaEventSynchronize", cudaError_t.cudaErrorIllegalAddress, after=1)
    with pytest.raises(EngineError, match=r"^batch 1, or one of the 2 batches after it on its GPU: cudaEventSynchronize: cudaErrorIllegalAddress .*images: 1_0\.jpg"):  # fmt: skip
        list(runtime.map(batches([1] * 5)))
    runtime.close()


def test_nothing_but_the_fault_is_raised_once_the_gpu_has_faulted(
    rig: Callable[..., Rig], engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = rig()

    def source() -> Iterator[Batch]:
        for index, batch in enumerate(batches([1] * 9)):
            if index == 4:
                machine.cudart.fault(cudaError_t.cudaErrorIllegalAddress)
            yield batch

    with (
        pytest.raises(
            EngineError,
            match=r"^batch 1, or one of the 2 batches after it on its GPU: cudaEvent\w+: cudaErrorIllegalAddress .*images: 1_0",
        ),
        TensorRTRuntime(engine) as runtime,
    ):
        for _ in runtime.map(source()):
            pass
    assert [r for r in caplog.records if r.levelno > logging.DEBUG] == []
    machine.cudart.forget()


def test_a_fault_of_a_batch_in_flight_is_not_laid_on_the_one_submitted(
    rig: Callable[..., Rig], engine: Path
) -> None:
    machine = rig()

    def source() -> Iterator[Batch]:
        first, second, third = batches([1, 1, 1])
        yield first
        yield second
        machine.cudart.fail("cudaMemcpyAsync", cudaError_t.cudaErrorIllegalAddress)
        yield third

    with TensorRTRuntime(engine) as runtime:
        with pytest.raises(EngineError, match=r"^batch 2, or one of the 2 batches before it on its GPU: cudaMemcpyAsync"):  # fmt: skip
            list(runtime.map(source()))
        machine.cudart.heal()


def test_a_fault_noticed_by_asking_is_named_too(rig: Callable[..., Rig], engine: Path) -> None:
    machine = rig()
    with TensorRTRuntime(engine) as runtime:
        machine.cudart.fail("cudaEventQuery", cudaError_t.cudaErrorLaunchFailure)
        machine.cudart.fail("cudaEventSynchronize", cudaError_t.cudaErrorLaunchFailure)
        with pytest.raises(EngineError, match=r"^batch 0: cudaEventSynchronize: cudaErrorLaunchFailure .*images: 0_0\.jpg"):  # fmt: skip
            list(runtime.map(batches([1] * 5)))
        machine.cudart.heal()


@pytest.mark.parametrize("capturable", [True, False])
def test_a_fault_is_not_taken_for_work_that_cannot_be_captured(
    rig: Callable[..., Rig],
    tmp_path: Path,
    capturable: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = rig(schedule="early")
    path = write_engine(tmp_path / "model.engine", capturable=capturable)
    begin = machine.cudart.cudaStreamBeginCapture

    def begin_and_fault(stream: Any, mode: Any) -> Any:
        result = begin(stream, mode)
        machine.cudart.fault(cudaError_t.cudaErrorIllegalAddress)
        return result

    monkeypatch.setattr(machine.cudart, "cudaStreamBeginCapture", begin_and_fault)
    with (
        TensorRTRuntime(path) as runtime,
        pytest.raises(EngineError, match=r"^batch 1.*: cuda\w+: cudaErrorIllegalAddress"),
    ):
        list(runtime.map(batches([4] * 8)))
    assert "cannot be captured" not in caplog.text
    machine.cudart.forget()


USED = ["cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaEventRecord", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaStreamWaitEvent", "cudaEventSynchronize", "cudaGraphLaunch", "cudaGetDevice", "cudaGetDeviceProperties"]  # fmt: skip


@pytest.mark.parametrize("function", USED)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_any_failing_call_is_named_and_leaves_nothing_behind(
    rig: Callable[..., Rig], engine: Path, function: str, after: int
) -> None:
    machine = rig()
    machine.cudart.fail(function, cudaError_t.cudaErrorMemoryAllocation, after=after)
    error = None
    try:
        with TensorRTRuntime(engine) as runtime:
            try:
                for batch, outputs in runtime.map(batches([4] * 8)):
                    assert_same(outputs, batch.images)
            finally:
                machine.cudart.heal()  # what is freed next is not what failed
    except EngineError as caught:
        error = str(caught)
    if machine.cudart.calls[function] > after:
        assert error is not None and f"{function}: cudaErrorMemoryAllocation" in error
    else:
        assert error is None
    # the fixture checks that nothing is left


@pytest.mark.parametrize("failure", ["cudaStreamBeginCapture", "cudaGraphInstantiate"])
def test_failing_capture_is_a_warning(
    rig: Callable[..., Rig], engine: Path, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine = rig()
    machine.cudart.fail(failure, cudaError_t.cudaErrorStreamCaptureUnsupported)
    with TensorRTRuntime(engine) as runtime:
        for batch, outputs in runtime.map(batches([4] * 8)):
            assert_same(outputs, batch.images)
    assert caplog.text.count(f"running without: {failure}") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
@pytest.mark.parametrize("place", ["source", "consumer"])
def test_leaving_map_early_leaves_nothing_in_flight(
    rig: Callable[..., Rig], engine: Path, error: type[BaseException], place: str
) -> None:
    rig()

    def source() -> Iterator[Batch]:
        for index, batch in enumerate(batches([4] * 9)):
            if place == "source" and index == 5:
                raise error
            yield batch

    with TensorRTRuntime(engine) as runtime:
        generator = runtime.map(source())
        with pytest.raises(error):
            for index, _ in enumerate(generator):
                if place == "consumer" and index == 3:
                    raise error
        generator.close()
        assert len(runtime._running) == 0
        assert_same(runtime.infer(noise(4)), noise(4))


def test_interrupt_inside_submit_frees_the_slot(
    rig: Callable[..., Rig], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = rig()
    with TensorRTRuntime(engine) as runtime:

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cuda.Stream, "copy_out", interrupt)
            runtime.submit(noise(4))
        assert (len(runtime._running), runtime.depth) == (0, 3)
        assert not any(stream.queue for stream in machine.cudart._streams.values())
        assert_same(runtime.infer(noise(4)), noise(4))


def test_pinned_batches_outlive_the_runtime(rig: Callable[..., Rig], engine: Path) -> None:
    machine = rig()
    with TensorRTRuntime(engine) as runtime:
        kept = runtime.allocate((2, *SHAPE), np.uint8)
    assert machine.cudart.live() == {"pinned buffers": 1}
    kept[:] = 1  # a decoder that is late: no fault
    del kept
    assert machine.cudart.live() == {}


def test_close_twice_and_unfinished_map(rig: Callable[..., Rig], engine: Path) -> None:
    rig()
    runtime = TensorRTRuntime(engine)
    generator = runtime.map(batches([4] * 5))
    next(generator)
    runtime.close()
    runtime.close()
    generator.close()


def test_nothing_grows_with_the_number_of_batches(rig: Callable[..., Rig], engine: Path) -> None:
    machine = rig(schedule="early")
    with TensorRTRuntime(engine) as runtime:
        live = []
        for count in (20, 400):
            for _ in runtime.map(batches([8]) * count):
                pass
            gc.collect()
            live.append(machine.cudart.live())
        assert live[0] == live[1]
