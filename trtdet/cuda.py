# SPDX-License-Identifier: Apache-2.0
"""The CUDA runtime as this project uses it: checked calls, and context managers for what must be
freed.

Only cuda-python (`cuda.bindings.runtime`), imported at the first call. The handles are those of
CUDA; nothing is pooled, cached or guessed.
"""

import gc
import importlib
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtdet.closing import Closing
from trtdet.errors import DOCTOR, EngineError
from trtdet.machine import parse_version

logger = logging.getLogger(__name__)


#: What to do about the errors a user can do something about.
HINTS = {
    "cudaErrorMemoryAllocation": "the GPU's memory is full; stop what else runs there, or use a smaller --batch_size",
    "cudaErrorNoDevice": "no NVIDIA GPU is visible here; give the ONNX file to run on the CPU",
    "cudaErrorInsufficientDriver": "no NVIDIA driver, or one older than cuda-python; update it, or give the ONNX file to run on the CPU; "
    + DOCTOR,
    "cudaErrorInvalidDevice": "choose a device that nvidia-smi lists",
    "cudaErrorIllegalAddress": "a kernel read or wrote outside its memory; every later CUDA call of this process fails too",
}

#: Errors of a kernel, noticed by whatever call comes after it; from then on every call of the
#: process fails with them.
FAULTS = {
    "cudaErrorECCUncorrectable",
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchTimeout",
    "cudaErrorAssert",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalInstruction",
    "cudaErrorMisalignedAddress",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
}


class CudaError(EngineError):
    """A CUDA runtime function failed.

    Attributes:
        function: its name, `cudaMalloc`.
        name: CUDA's name of the error, `cudaErrorMemoryAllocation`.
        is_fault: it is of earlier work, not of this call, and stays: one of `FAULTS`.
    """

    def __init__(self, function: str, name: str, text: str) -> None:
        hint = f"; {HINTS[name]}" if name in HINTS else ""
        super().__init__(f"{function}: {name} ({text}){hint}")
        self.function = function
        self.name = name
        self.is_fault = name in FAULTS


#: The first cuda-python that lets other threads run while a call waits for the GPU.
RELEASES_THE_LOCK = (12, 9, 1)


@cache
def cudart() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        EngineError: cuda-python is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(
            f"running an engine needs cuda-python, which does not load here ({error}); "
            "install it with: pip install 'cuda-python>=12.9.1', or give the ONNX file to run on the CPU"
        ) from error


@cache
def warn_of_old_bindings() -> None:
    """Say once where cuda-python is so old that decoding stands still while a batch is waited
    for.
    """
    try:
        text = metadata.version("cuda-bindings")
    except metadata.PackageNotFoundError:  # a conda package, or one of somebody's own
        return
    if parse_version(text) < RELEASES_THE_LOCK:
        logger.warning(
            "cuda-python %s holds Python's lock while it waits for the GPU, so images are not decoded meanwhile; "
            "update it: pip install 'cuda-python>=%s'",
            text,
            ".".join(map(str, RELEASES_THE_LOCK)),
        )


def call(function: str, *args: Any) -> Any:
    """Call a CUDA runtime function by name and check its status.

    Returns:
        What follows the status: nothing (None), one value, or a tuple.

    Raises:
        CudaError: names the function and CUDA's error.
    """
    runtime = cudart()
    status, *values = getattr(runtime, function)(*args)
    if status != runtime.cudaError_t.cudaSuccess:
        raise _error(function, status)
    return values[0] if len(values) == 1 else tuple(values) or None


def _error(function: str, status: Any) -> CudaError:
    runtime = cudart()
    _forget_error()
    _, name = runtime.cudaGetErrorName(status)
    _, text = runtime.cudaGetErrorString(status)
    return CudaError(function, name.decode(), text.decode())


def _forget_error() -> None:
    """Clear CUDA's memory of the last error: the next plugin to ask for it would take ours for
    its own.
    """
    cudart().cudaGetLastError()


def _free(function: str, handle: Any) -> None:
    """Free a resource.

    A failure is only logged: it repeats the fault of earlier work, and raised it would hide that
    one.
    """
    try:
        call(function, handle)
    except CudaError as error:
        logger.debug("while freeing: %s", error)


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU."""

    index: int
    name: str
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"GPU {self.index} ({self.name}, compute capability {major}.{minor})"


def device_count() -> int:
    """How many GPUs this process sees.

    Raises:
        CudaError: none, or no driver.
    """
    return int(call("cudaGetDeviceCount"))


def device_info(index: int) -> DeviceInfo:
    """What GPU `index` is.

    Raises:
        CudaError: no such device.
    """
    properties = call("cudaGetDeviceProperties", index)
    name = properties.name
    return DeviceInfo(
        index,
        name.decode() if isinstance(name, bytes) else str(name),
        (properties.major, properties.minor),
    )


def free_memory() -> int:
    """Bytes free on the calling thread's current device."""
    free, _ = call("cudaMemGetInfo")
    return int(free)


def use_device(index: int) -> None:
    """Make `index` the calling thread's device, for good.

    It is not put back: cudaSetDevice starts CUDA on the device it names (since CUDA 12), so putting
    back GPU 0, where every thread begins, would take memory on a GPU that nobody asked for.
    """
    if call("cudaGetDevice") != index:
        call("cudaSetDevice", index)


class _Resource(Closing):
    """Something of CUDA's that must be freed once: by `close`, which a `with` block calls."""

    _destroy: str  # the CUDA function that frees it

    def __init__(self, handle: Any) -> None:
        self._handle: Any = handle

    @property
    def handle(self) -> Any:
        """CUDA's handle.

        Raises:
            EngineError: already freed.
        """
        if self._handle is None:
            raise EngineError(f"{type(self).__name__}: used after it was freed")
        return self._handle

    def close(self) -> None:
        """Free it; once is enough, twice does no harm."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            _free(self._destroy, handle)


class Event(_Resource):
    """A point in a stream. Waiting sleeps instead of spinning: the cores belong to the decoders.

    Args:
        timed: keep a time stamp, for `elapsed_ms`; without, recording is cheaper.
    """

    _destroy = "cudaEventDestroy"

    def __init__(self, *, timed: bool = False) -> None:
        runtime = cudart()
        flags = runtime.cudaEventBlockingSync | (0 if timed else runtime.cudaEventDisableTiming)
        super().__init__(call("cudaEventCreateWithFlags", flags))

    def record(self, stream: "Stream") -> None:
        """Mark the end of what `stream` holds now."""
        call("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until the device has passed the mark.

        Errors of the work before it are raised here.
        """
        call("cudaEventSynchronize", self.handle)

    def done(self) -> bool:
        """Whether the device has passed the mark; does not wait."""
        runtime = cudart()
        (status,) = runtime.cudaEventQuery(self.handle)
        if status == runtime.cudaError_t.cudaErrorNotReady:
            _forget_error()
            return False
        if status != runtime.cudaError_t.cudaSuccess:
            raise _error("cudaEventQuery", status)
        return True

    def elapsed_ms(self, end: "Event") -> float:
        """Milliseconds on the device's clock from this mark to `end`; both timed and passed."""
        return float(call("cudaEventElapsedTime", self.handle, end.handle))


class Stream(_Resource):
    """A queue of work on the current device, independent of the default stream."""

    _destroy = "cudaStreamDestroy"

    def __init__(self) -> None:
        super().__init__(call("cudaStreamCreateWithFlags", cudart().cudaStreamNonBlocking))

    def wait(self, event: Event) -> None:
        """Let what is queued from here on wait for `event`; the host does not wait."""
        call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Let the host wait until the queue is empty."""
        call("cudaStreamSynchronize", self.handle)

    def wait_quietly(self) -> None:
        """The same where an error matters more than those of earlier work, which are only
        logged.
        """
        try:
            self.synchronize()
        except EngineError as error:
            logger.debug("while waiting for the GPU: %s", error)

    def clear(self, target: int, nbytes: int) -> None:
        """Queue zeros over the bytes at the device address `target`."""
        call("cudaMemsetAsync", target, 0, nbytes, self.handle)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy between device addresses, which may be on different GPUs."""
        kind = cudart().cudaMemcpyKind.cudaMemcpyDefault
        call("cudaMemcpyAsync", target, source, nbytes, kind, self.handle)

    def copy_in(self, target: int, source: NDArray[Any]) -> None:
        """Queue a copy of `source` (pinned, contiguous) to the device address `target`.

        `source` is read later: keep it.
        """
        address = source.__array_interface__["data"][0]
        kind = cudart().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", target, address, source.nbytes, kind, self.handle)

    def copy_out(self, target: NDArray[np.uint8], source: int) -> None:
        """Queue a copy from the device address `source` over all of `target` (pinned,
        contiguous), written later.
        """
        address = target.__array_interface__["data"][0]
        kind = cudart().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", address, source, target.nbytes, kind, self.handle)


class DeviceBuffer(_Resource):
    """Memory of the current device. `handle` is its address, aligned to 256 bytes."""

    _destroy = "cudaFree"

    def __init__(self, nbytes: int) -> None:
        super().__init__(int(call("cudaMalloc", max(nbytes, 1))))
        self.nbytes = nbytes


class Graph(_Resource):
    """Work captured from a stream, launched as one.

    Keep alive whatever memory it was captured with.

    Args:
        stream: captured from; what `enqueue` puts there is recorded, not run.
        enqueue: may call nothing that waits or allocates.

    Raises:
        CudaError: the work cannot be captured. Exceptions of `enqueue` pass through. The stream is
            usable either way.
    """

    _destroy = "cudaGraphExecDestroy"

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        runtime = cudart()
        # Thread-local: other threads of the process may allocate and copy meanwhile.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with _no_garbage_collection():
            call("cudaStreamBeginCapture", stream.handle, mode)
            try:
                enqueue()
            except BaseException:
                status, graph = runtime.cudaStreamEndCapture(stream.handle)
                if status == runtime.cudaError_t.cudaSuccess:
                    _free("cudaGraphDestroy", graph)
                _forget_error()
                raise
            graph = call("cudaStreamEndCapture", stream.handle)
        try:
            super().__init__(call("cudaGraphInstantiate", graph, 0))
        finally:
            _free("cudaGraphDestroy", graph)

    def launch(self, stream: Stream) -> None:
        """Queue one run."""
        call("cudaGraphLaunch", self.handle, stream.handle)


_capturing = threading.Lock()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For a capture: an array of `pinned_empty` that the collector found in this thread would be
    freed, which breaks the capture.

    The collector is the process's, so captures take turns.
    """
    with _capturing:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


class _PinnedMemory:
    """Page-locked host memory that lives as long as the last NumPy array over it.

    Not freed by a `with` block as the rest: an array handed out may still be written to by a
    decoder thread when the runtime closes, and a freed page under it would end the process.
    """

    def __init__(self, nbytes: int) -> None:
        address = int(call("cudaHostAlloc", max(nbytes, 1), cudart().cudaHostAllocPortable))
        self.__array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        # At exit the process frees it; by then another thread may still hold an array.
        weakref.finalize(self, _free, "cudaFreeHost", address).atexit = False


def pinned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An uninitialised array in page-locked memory, which copies asynchronously and at full speed;
    every GPU can use it.

    Freed with the last array that views it.
    """
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    return np.asarray(_PinnedMemory(nbytes)).view(kind).reshape(shape)


class _Registered:
    """Memory of somebody else, page-locked as long as the last NumPy array over it lives."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.__array_interface__ = memory.__array_interface__
        address = memory.ctypes.data
        call("cudaHostRegister", address, memory.nbytes, cudart().cudaHostRegisterPortable)
        weakref.finalize(self, _unregister, address, memory).atexit = False


def _unregister(address: int, _kept: NDArray[np.uint8]) -> None:
    _free("cudaHostUnregister", address)


def pin(memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same memory, page-locked as that of `pinned_empty` is, until the last array that views
    what is returned is gone. Where CUDA cannot lock it, as it is.

    Args:
        memory: C-contiguous.
    """
    try:
        return np.asarray(_Registered(memory))
    except CudaError as error:
        logger.debug("memory that is not page-locked: %s", error)
        return memory


def is_pinned(array: NDArray[Any]) -> bool:
    """Whether `array` is, or views, memory of `pinned_empty` or `pin`."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, (_PinnedMemory, _Registered))
