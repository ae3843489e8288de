# SPDX-License-Identifier: Apache-2.0
"""A CPU stand-in for `cuda.bindings.runtime`: memory is NumPy's, streams are queues that run late
(`standin_streams`).

It stands in where there is no GPU, to find missing synchronisation. What CUDA would let pass in
silence although it is wrong here (pageable copies, memory freed under queued work) raises
`Violation`.

Functions and enumerations are those that `trtdet.cuda` uses, with the signatures of cuda-python
12.9 to 13.4.
"""

import threading
from types import SimpleNamespace
from typing import Any

from standin_streams import (
    INVALID,
    OK,
    POISON,
    Capture,
    Event,
    GraphExec,
    Mark,
    Simulator,
    Stream,
    Violation,
    api,
    cudaError_t,
    cudaMemcpyKind,
    cudaStreamCaptureMode,
)

__all__ = ["POISON", "StandinCudart", "Violation", "cudaError_t"]


class StandinCudart(Simulator):
    """Stands where the module `cuda.bindings.runtime` would."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1
    cudaEventBlockingSync = 1
    cudaEventDisableTiming = 2
    cudaHostAllocPortable = 1
    cudaHostRegisterPortable = 1

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[Any, bytes]:
        return OK, error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[Any, bytes]:
        return OK, b"in words of the stand-in"

    @api
    def cudaGetLastError(self) -> Any:
        error, self._local.last_error = self.last_error(), OK
        return error

    @api
    def cudaGetDeviceCount(self) -> Any:
        return (OK, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, 0)

    @api
    def cudaGetDeviceProperties(self, device: int) -> Any:
        if not 0 <= device < self.devices:
            return cudaError_t.cudaErrorInvalidDevice, None
        major, minor = self.compute_capability
        return OK, SimpleNamespace(
            name=b"CPU stand-in", major=major, minor=minor, totalGlobalMem=self.memory_bytes
        )

    @api
    def cudaGetDevice(self) -> Any:
        return OK, self.current()

    @api
    def cudaSetDevice(self, device: int) -> Any:
        if not 0 <= device < self.devices:
            return cudaError_t.cudaErrorInvalidDevice
        self._local.device = device
        return OK

    @api
    def cudaMemGetInfo(self) -> Any:
        used = sum(len(a.data) for a in self._allocations.values() if not a.pinned)
        return OK, self.memory_bytes - used, self.memory_bytes

    @api
    def cudaMalloc(self, size: int) -> Any:
        return self._allocate(size, pinned=False)

    @api
    def cudaFree(self, devPtr: int) -> Any:
        return self._release(devPtr, pinned=False)

    @api
    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self._allocate(size, pinned=True)

    @api
    def cudaFreeHost(self, ptr: int) -> Any:
        return self._release(ptr, pinned=True)

    @api
    def cudaHostRegister(self, ptr: int, size: int, flags: int) -> Any:
        return self._register(ptr, size)

    @api
    def cudaHostUnregister(self, ptr: int) -> Any:
        return self._release(ptr, pinned=True, own=False)

    @api
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        handle = next(self._handles)
        self._streams[handle] = Stream(handle, self.current())
        return OK, handle

    @api
    def cudaStreamDestroy(self, stream: Any) -> Any:
        if self.stream(stream).queue:
            raise Violation("a stream was destroyed with work in it")
        del self._streams[int(stream)]
        return OK

    @api
    def cudaStreamSynchronize(self, stream: Any) -> Any:
        if self._unsafe_in_capture():
            return cudaError_t.cudaErrorStreamCaptureUnsupported
        self._run(self.stream(stream))
        return OK

    @api
    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> Any:
        target, mark = self.stream(stream), self._events[int(event)].mark
        if target.capture is not None:
            target.capture.valid = False
            return cudaError_t.cudaErrorStreamCaptureIsolation
        if mark is not None:
            target.queue.append(("wait", mark))
        return OK

    @api
    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        handle = next(self._handles)
        timed = not flags & self.cudaEventDisableTiming
        self._events[handle] = Event(timed, self.current())
        return OK, handle

    @api
    def cudaEventDestroy(self, event: Any) -> Any:
        return OK if self._events.pop(int(event), None) is not None else INVALID

    @api
    def cudaEventRecord(self, event: Any, stream: Any) -> Any:
        target, marked = self.stream(stream), self._events[int(event)]
        if marked.device != target.device:
            return INVALID
        marked.mark = Mark(target)
        target.queue.append(("mark", marked.mark))
        if self.schedule == "early":
            self._run(target)
        return OK

    @api
    def cudaEventSynchronize(self, event: Any) -> Any:
        if self._unsafe_in_capture():
            return cudaError_t.cudaErrorStreamCaptureUnsupported
        mark = self._events[int(event)].mark
        if mark is not None:
            self._run(mark.stream, until=mark)
        return OK

    @api
    def cudaEventQuery(self, event: Any) -> Any:
        mark = self._events[int(event)].mark
        return OK if mark is None or mark.passed else cudaError_t.cudaErrorNotReady

    @api
    def cudaEventElapsedTime(self, start: Any, end: Any) -> Any:
        first, last = self._events[int(start)], self._events[int(end)]
        if not (first.timed and last.timed and first.mark and last.mark):
            return INVALID, None
        if not (first.mark.passed and last.mark.passed):
            return cudaError_t.cudaErrorNotReady, None
        return OK, (last.mark.time - first.mark.time) * 1000

    @api
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> Any:
        if kind == cudaMemcpyKind.cudaMemcpyDefault:
            self._enqueue(self.stream(stream), lambda: self._copy_on(dst, src, count))
            return OK
        inward = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        host, device_address = (src, dst) if inward else (dst, src)
        target = self.stream(stream)

        def copy() -> None:
            pinned = self._find(host, count)
            if pinned is None or not pinned.pinned:
                raise Violation("a copy from or to pageable or freed host memory")
            a = pinned.data[host - pinned.address :][:count]
            b = self.memory(device_address, count, device=target.device)
            if inward:
                b[:] = a
            else:
                a[:] = b

        pinned = self._find(host, count)
        if pinned is None or not pinned.pinned:
            raise Violation("a copy from or to pageable or freed host memory")
        self._enqueue(target, copy)
        return OK

    def _copy_on(self, dst: int, src: int, count: int) -> None:
        """Between device addresses, of any GPU."""
        target, source = self._find(dst, count), self._find(src, count)
        if target is None or source is None or target.pinned or source.pinned:
            raise Violation("a copy from or to what is no device memory")
        target.data[dst - target.address :][:count] = source.data[src - source.address :][:count]

    @api
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> Any:
        target = self.stream(stream)
        self._enqueue(target, lambda: self.memory(devPtr, count, device=target.device).fill(value))
        return OK

    @api
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        self.stream(stream).capture = Capture(threading.get_ident())
        return OK

    @api
    def cudaStreamEndCapture(self, stream: Any) -> Any:
        target = self.stream(stream)
        capture, target.capture = target.capture, None
        if capture is None or not capture.valid:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        handle = next(self._handles)
        self._graphs[handle] = capture.work
        return OK, handle

    @api
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        handle = next(self._handles)
        self._execs[handle] = GraphExec(self.current(), self._graphs[int(graph)])
        return OK, handle

    @api
    def cudaGraphDestroy(self, graph: Any) -> Any:
        return OK if self._graphs.pop(int(graph), None) is not None else INVALID

    @api
    def cudaGraphExecDestroy(self, graphExec: Any) -> Any:
        graph = self._execs.pop(int(graphExec))
        if graph.queued:
            raise Violation("a graph was destroyed while its launch is queued")
        return OK

    @api
    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> Any:
        graph, target = self._execs[int(graphExec)], self.stream(stream)
        if not graph.device == target.device == self.current():
            return INVALID
        graph.queued += 1

        def run() -> None:
            graph.queued -= 1
            for work in graph.work:
                work()

        self._enqueue(target, run)
        return OK
