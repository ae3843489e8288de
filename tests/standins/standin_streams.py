# SPDX-License-Identifier: Apache-2.0
"""A simulator of CUDA's memory, streams and events on the CPU, for `standin_cudart`.

Work that is queued on a stream runs only when something waits for it (`schedule="late"`), at once
("early"), or at random moments ("random"). A copy or a kernel that was not made to wait for what it
needs works on stale bytes, and the test sees wrong numbers.
"""

import ctypes
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import wraps
from typing import Any, Literal

import numpy as np

POISON = 0xCD  # fresh memory; never what a test expects


class Violation(AssertionError):
    """The code under test did something that CUDA forbids or that loses its asynchrony."""


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureIsolation = 905


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess
INVALID = cudaError_t.cudaErrorInvalidResourceHandle


@dataclass
class Allocation:
    address: int
    data: Any  # np.uint8
    pinned: bool
    device: int
    own: bool = True  # False: it was registered


@dataclass
class Mark:
    """One recording of an event."""

    stream: "Stream"
    passed: bool = False
    time: float = 0.0


@dataclass
class Capture:
    thread: int
    work: list[Callable[[], None]] = field(default_factory=list)
    valid: bool = True


@dataclass
class Stream:
    handle: int
    device: int
    queue: deque[tuple[str, Any]] = field(
        default_factory=deque
    )  # ("run", f), ("wait", m), ("mark", m)
    capture: Capture | None = None


@dataclass
class Event:
    timed: bool
    device: int
    mark: Mark | None = None


@dataclass
class GraphExec:
    device: int
    work: list[Callable[[], None]]
    queued: int = 0


def api(function: Callable[..., Any]) -> Callable[..., Any]:
    """Serialise the calls, count them, let some queued work run first, and fail where a test
    asked for it.
    """

    @wraps(function)
    def wrapper(self: "Simulator", *args: Any) -> tuple[Any, ...]:
        with self._lock:
            name = function.__name__
            self.calls[name] += 1
            if self._fault is not None and name != "cudaGetLastError":
                return (self._fault, None) if name in self.RETURNS_VALUE else (self._fault,)
            self._let_run()
            if name in self._failures:
                left, error = self._failures[name]
                self._failures[name] = (left - 1, error)
                if left <= 0:
                    self._local.last_error = error
                    return (error, None) if name in self.RETURNS_VALUE else (error,)
            result = function(self, *args)
            result = result if isinstance(result, tuple) else (result,)
            if result[0] != OK and name != "cudaGetLastError":
                self._local.last_error = result[0]
            return result

    return wrapper


class Simulator:
    """Memory, streams, events; the functions of CUDA come in the derived class.

    Attributes:
        calls: function name -> how often it was called.
        launches: kernels that ran (in graphs too).
    """

    #: Functions that return a value after the status, also when they fail.
    RETURNS_VALUE = ("cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaEventElapsedTime", "cudaGetDeviceCount", "cudaGetDevice")  # fmt: skip

    def __init__(
        self,
        *,
        devices: int = 1,
        schedule: Literal["late", "early", "random"] = "late",
        seed: int = 0,
        compute_capability: tuple[int, int] = (9, 0),
        memory_bytes: int = 1 << 30,
    ) -> None:
        self.devices = devices
        self.schedule = schedule
        self.compute_capability = compute_capability
        self.memory_bytes = memory_bytes
        self.calls: Counter[str] = Counter()
        self.launches = 0
        self._random = np.random.default_rng(seed)
        self._lock = threading.RLock()
        self._local = threading.local()
        self._handles = itertools.count(0x1000)
        self._allocations: dict[int, Allocation] = {}
        self._streams: dict[int, Stream] = {}
        self._events: dict[int, Event] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._execs: dict[int, GraphExec] = {}
        self._fault: cudaError_t | None = None
        self._failures: dict[str, tuple[int, cudaError_t]] = {}

    # --- what tests ask ---------------------------------------------------------------------------

    def fail(self, function: str, error: cudaError_t, *, after: int = 0) -> None:
        """Let every call of `function` fail, after the first `after`."""
        self._failures[function] = (after, error)

    def fault(self, error: cudaError_t) -> None:
        """Let every call fail from now on, as after a kernel that broke the process's hold on
        the GPU.
        """
        self._fault = error

    def heal(self) -> None:
        """Undo `fail`."""
        self._failures.clear()

    def forget(self) -> None:
        """Drop all that is live: what CUDA does with a faulted process at its end."""
        for table in (self._allocations, self._streams, self._events, self._graphs, self._execs):
            table.clear()

    def live(self) -> dict[str, int]:
        """What has been created and not freed; empty is what a test hopes for."""
        counts = {
            "device buffers": sum(not a.pinned for a in self._allocations.values()),
            "pinned buffers": sum(a.pinned for a in self._allocations.values()),
            "streams": len(self._streams),
            "events": len(self._events),
            "graphs": len(self._graphs) + len(self._execs),
        }
        return {name: count for name, count in counts.items() if count}

    # --- what the TensorRT stand-in asks ----------------------------------------------------------

    def memory(self, address: int, nbytes: int, *, device: int) -> Any:
        """The bytes at a device address, as an array.

        Raises:
            Violation: not within one live allocation on `device`.
        """
        found = self._find(address, nbytes)
        if found is None or found.pinned or found.device != device:
            raise Violation(f"{nbytes} bytes at {address:#x} are not device memory of GPU {device}")
        start = address - found.address
        return found.data[start : start + nbytes]

    def stream(self, handle: Any) -> Stream:
        """The stream behind a handle.

        Raises:
            Violation: no live stream; the default stream is none of ours either.
        """
        stream = self._streams.get(int(handle))
        if stream is None:
            raise Violation(f"{handle} is not a live stream")
        return stream

    def launch(self, handle: Any, kernel: Callable[[], None]) -> None:
        """Queue a kernel."""
        with self._lock:

            def run() -> None:
                self.launches += 1
                kernel()

            self._enqueue(self.stream(handle), run)

    def free_in_order(self, address: int, handle: Any) -> None:
        """What cudaFreeAsync does: the memory goes when the stream is there."""
        with self._lock:

            def free() -> None:
                self._allocations.pop(address).data[:] = POISON

            self._enqueue(self.stream(handle), free)

    def last_error(self) -> cudaError_t:
        """What cudaPeekAtLastError would say."""
        error: cudaError_t = getattr(self._local, "last_error", OK)
        return error

    def current(self) -> int:
        """The calling thread's device."""
        return getattr(self._local, "device", 0)

    # --- the simulator ----------------------------------------------------------------------------

    def _find(self, address: int, nbytes: int) -> Allocation | None:
        for a in self._allocations.values():
            if a.address <= address and address + nbytes <= a.address + len(a.data):
                return a
        return None

    def _enqueue(self, stream: Stream, work: Callable[[], None]) -> None:
        if stream.capture is not None:
            stream.capture.work.append(work)
        else:
            stream.queue.append(("run", work))
            if self.schedule == "early":
                self._run(stream)

    def _step(self, stream: Stream, *, force: bool) -> bool:
        """Run the head of a queue. False: it waits for another stream and `force` was not given."""
        kind, item = stream.queue[0]
        if kind == "wait" and not item.passed:
            if not force:
                return False
            self._run(item.stream, until=item)
        stream.queue.popleft()
        if kind == "run":
            item()
        elif kind == "mark":
            item.passed, item.time = True, time.perf_counter()
        return True

    def _run(self, stream: Stream, until: Mark | None = None) -> None:
        while stream.queue and not (until is not None and until.passed):
            self._step(stream, force=True)

    def _let_run(self) -> None:
        if self.schedule != "random":
            return
        for _ in range(int(self._random.integers(0, 3))):
            busy = [s for s in self._streams.values() if s.queue]
            if not busy:
                return
            self._step(busy[int(self._random.integers(len(busy)))], force=False)

    def _unsafe_in_capture(self) -> bool:
        """Invalidate this thread's captures: the call would break them."""
        broken = [
            s.capture
            for s in self._streams.values()
            if s.capture is not None and s.capture.thread == threading.get_ident()
        ]
        for capture in broken:
            capture.valid = False
        return bool(broken)

    def _allocate(self, nbytes: int, *, pinned: bool) -> Any:
        if self._unsafe_in_capture():
            return cudaError_t.cudaErrorStreamCaptureUnsupported, None
        if nbytes > self.memory_bytes:
            return cudaError_t.cudaErrorMemoryAllocation, None
        block = np.full(nbytes + 256, POISON, np.uint8)
        start = -block.__array_interface__["data"][0] % 256  # aligned as CUDA's
        data = block[start : start + nbytes]
        address = data.__array_interface__["data"][0]
        self._allocations[address] = Allocation(address, data, pinned, self.current())
        return OK, address

    def _register(self, address: int, nbytes: int) -> Any:
        """Memory that is somebody else's becomes pinned."""
        if self._unsafe_in_capture():
            return cudaError_t.cudaErrorStreamCaptureUnsupported
        data = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(address)))
        self._allocations[int(address)] = Allocation(int(address), data, True, self.current(), own=False)  # fmt: skip
        return OK

    def _release(self, address: int, *, pinned: bool, own: bool = True) -> Any:
        found = self._allocations.get(int(address))
        if self._unsafe_in_capture():
            return cudaError_t.cudaErrorStreamCaptureUnsupported
        if found is None or (found.pinned, found.own) != (pinned, own):
            raise Violation(f"free of {int(address):#x}, which is not allocated that way")
        for stream in self._streams.values():
            if any(kind == "run" for kind, _ in stream.queue):
                # CUDA would wait here; we want the code to have waited, or a pinned array dies
                # under its copy.
                raise Violation("memory was freed while work is queued")
        if own:
            found.data[:] = POISON
        del self._allocations[int(address)]
        return OK
