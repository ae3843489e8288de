# SPDX-License-Identifier: Apache-2.0
"""TensorRT at full speed: while one batch runs, the next is copied in and the one before is copied
out and decoded.

Streams. One for input copies, one per execution context, one for output copies, joined by events:

    copies in    |in 1|in 2|   |in 3|
    context           |run 1   |run 2   |run 3   |
    copies out                 |out 1|  |out 2|

A GPU has one copy engine per direction, so a stream per direction loses nothing to a stream per
batch, and a batch's own order (in, run, out) is three events. That a batch does not overwrite one
that is still in flight needs no event at all: each has a slot of buffers of its own, and a slot is
used again only after its outputs were fetched.

CUDA graphs. One per slot, as the addresses are part of a graph, captured when a shape comes a
second time in a row: TensorRT must run a new shape once before it can be captured, and a lone last
batch would not earn the capture back. A graph is good only while its context keeps the shape
(NVIDIA/TensorRT issue 3798), so a change of batch or image size drops the context's graphs.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtdet import cuda
from trtdet.errors import EngineError
from trtdet.runtimes.base import (
    AnyBatch,
    BatchTimes,
    Images,
    Outputs,
    Runtime,
    check_batch,
    naming_batch,
)
from trtdet.runtimes.trt_lane import Lane, Slot
from trtdet.runtimes.trt_load import EngineFile, load_engine, pick_profile, read_engine

logger = logging.getLogger(__name__)


class TensorRTRuntime(Runtime):
    """`trtdet.runtimes.base.Runtime` on a TensorRT engine.

    For one thread at a time; several runtimes may share a process and a GPU.

    Args:
        engine: an engine (a raw plan). What it is stands in `<path>.json`, which build_engine.py
            writes. Or what `read_engine` made of it, for several runtimes.
        device: the GPU, counted as nvidia-smi does unless CUDA_VISIBLE_DEVICES says otherwise.
        contexts: execution contexts. Two help where one batch leaves the GPU partly idle (small
            models), at twice the scratch memory.
        depth: batches in flight; default: 3, or 2 per context.
        cuda_graph: replay batches as CUDA graphs where the engine allows it: one launch instead of
            one per kernel.
        plugins: libraries of plugins that the engine needs; its sidecar names them, but is not
            trusted to load them.
        allow_host_code: load an engine that holds code for the CPU (version-compatible ones do).
            Only for files you trust: it runs with your permissions.

    Raises:
        EngineError: the engine does not fit this TensorRT or GPU; says what to rebuild.
    """

    frees_cpu = True
    pins = True

    def __init__(
        self,
        engine: Path | EngineFile,
        *,
        device: int = 0,
        contexts: int = 1,
        depth: int | None = None,
        cuda_graph: bool = True,
        plugins: Sequence[Path] = (),
        allow_host_code: bool = False,
    ) -> None:
        if depth is None:
            depth = max(3, 2 * contexts)
        if not 1 <= contexts <= depth:
            raise ValueError(f"contexts: expected 1 to depth ({depth}), got {contexts}")
        info = cuda.device_info(device)
        cuda.warn_of_old_bindings()
        self._device = self.images_on = device
        self._running: deque[Slot] = deque()
        self._free: deque[Slot] = deque()
        self._last: Slot | None = None
        cuda.use_device(device)
        with ExitStack() as resources:
            file = engine if isinstance(engine, EngineFile) else read_engine(engine)
            self._engine = load_engine(file, info, plugins=plugins, allow_host_code=allow_host_code)
            resources.callback(self._engine.close)
            if contexts > 1 and not self._engine.flavor.contexts_share_profiles:
                raise EngineError(
                    f"contexts: {self._engine.flavor} gives each optimization profile to one context; use 1, or TensorRT 10 or later"
                )
            self._copies_in = resources.enter_context(cuda.Stream())
            self._copies_out = resources.enter_context(cuda.Stream())
            self._origin = resources.enter_context(cuda.Event(timed=True))
            self._lanes = [
                Lane(self._engine, cuda_graph=cuda_graph, resources=resources)
                for _ in range(contexts)
            ]
            for index in range(depth):
                lane = self._lanes[index % contexts]
                self._free.append(Slot(self._engine, lane, self._copies_in, resources))
            self._origin.record(self._copies_in)
            self._resources = resources.pop_all()
        self.spec = self._engine.spec
        self.batch_range: tuple[int, int | None] = self._engine.batch_range
        self.description = f"{self._engine.flavor}, {info}"

    @property
    def preferred_batch(self) -> int:
        """The batch size that the engine was built for."""
        return max(profile.opt[0] for profile in self._engine.profiles)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Memory for batches that the GPU reads in place; other arrays are copied once on the host
        before.

        Such a batch must not change until its outputs are there. Freed with the last array over it.
        """
        cuda.use_device(self._device)  # or CUDA would start on GPU 0 for it
        return cuda.pinned_empty(shape, dtype)

    def pin(self, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See `Runtime.pin`."""
        cuda.use_device(self._device)
        return cuda.pin(memory)

    # --- one batch at a time ----------------------------------------------------------------------

    def infer(self, images: Images) -> Outputs:
        """Run one batch. See `trtdet.runtimes.base.Runtime.infer`."""
        if self._running:
            raise EngineError("infer: batches of map or submit are in flight; fetch them first")
        self.submit(images)
        return self.fetch()

    def infer_timed(self, images: Images) -> BatchTimes:
        """Run one batch; how long its parts took."""
        self.infer(images)
        return self.last_times()

    # --- several in flight ------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """How many batches can be in flight."""
        return len(self._running) + len(self._free)

    def submit(self, images: Images) -> None:
        """Queue one batch on the GPU and return at once. At most `depth` may be in flight.

        Args:
            images: see `infer`. May be changed after the call unless it is memory of `allocate`, or
                on a GPU.
        """
        check_batch(images, self.spec, self.batch_range)
        if not self._free:
            raise EngineError(f"submit: {self.depth} batches are in flight already; fetch one first")  # fmt: skip
        slot = self._free.popleft()
        try:
            cuda.use_device(self._device)
            self._enqueue(slot, images)
        except BaseException:  # Ctrl-C too: part of it may be queued
            self._settle()
            self._release(slot)
            raise
        self._running.append(slot)

    def ready(self) -> bool:
        """Whether `fetch` would return without waiting."""
        try:
            return bool(self._running) and self._running[0].out_end.done()
        except cuda.CudaError:
            return True  # `fetch` raises it, and names the batch

    def fetch(self) -> Outputs:
        """Wait for the oldest batch in flight.

        See `trtdet.runtimes.base.Runtime.infer` for what comes back.
        """
        if not self._running:
            raise EngineError("fetch: no batch is in flight; submit one first")
        slot = self._running.popleft()
        try:
            slot.out_end.synchronize()
            return self._engine.unpack(slot.host_out, slot.batch, slot.count)
        except BaseException:
            self._settle()
            raise
        finally:
            self._release(slot)
            self._last = slot

    def discard(self) -> None:
        """Wait for what is in flight and throw it away."""
        if self._running:
            self._settle()
        while self._running:
            self._release(self._running.popleft())

    def map(self, batches: Iterable[AnyBatch]) -> Iterator[tuple[AnyBatch, Outputs]]:
        """Run batches, up to `depth` in flight: each with its outputs, in order.

        At most one batch more is taken from `batches` than may be in flight, so memory is bounded.
        Leaving the loop early, by break, exception or Ctrl-C, waits for what is in flight and drops
        it.

        Raises:
            EngineError, ValueError: a batch failed; names its number and its images.
        """
        if self._running:
            raise EngineError("map: batches of another map or of submit are in flight")
        waiting: deque[tuple[int, AnyBatch]] = deque()
        # Kept by its name: an error drops a loop's own iterator, and the pinned memory it holds,
        # while the GPU still works.
        source = iter(batches)
        try:
            for index, batch in enumerate(source):
                while waiting and (not self._free or self.ready()):
                    yield self._next(waiting)
                with naming_batch(index, batch, before=len(waiting)):
                    self.submit(batch.images)
                waiting.append((index, batch))
            while waiting:
                yield self._next(waiting)
        finally:
            self.discard()

    def _next(self, waiting: deque[tuple[int, AnyBatch]]) -> tuple[AnyBatch, Outputs]:
        index, batch = waiting.popleft()
        with naming_batch(index, batch, after=len(waiting)):
            return batch, self.fetch()

    # --- times ------------------------------------------------------------------------------------

    def last_times(self) -> BatchTimes:
        """How long the parts of the batch fetched last took. Only until the next `submit`."""
        slot = self._fetched()
        return BatchTimes(
            enqueue_ms=slot.enqueue_ms,
            h2d_ms=slot.in_start.elapsed_ms(slot.in_end),
            compute_ms=slot.run_start.elapsed_ms(slot.run_end),
            d2h_ms=slot.out_start.elapsed_ms(slot.out_end),
        )

    def last_spans(self) -> dict[str, tuple[float, float]]:
        """When the parts of the batch fetched last began and ended: milliseconds on the GPU's
        clock since it was opened.
        """
        slot, since = self._fetched(), self._origin.elapsed_ms
        return {
            "h2d": (since(slot.in_start), since(slot.in_end)),
            "compute": (since(slot.run_start), since(slot.run_end)),
            "d2h": (since(slot.out_start), since(slot.out_end)),
        }

    def _fetched(self) -> Slot:
        if self._last is None or self._last in self._running:
            raise EngineError("times: known only between fetching a batch and submitting the next")
        return self._last

    # --- inside -----------------------------------------------------------------------------------

    def _enqueue(self, slot: Slot, images: Images) -> None:
        slot.count = len(images)
        profile, slot.batch = pick_profile(self._engine.profiles, images.shape)
        lane = slot.lane
        lane.set_shape(profile, (slot.batch, *images.shape[1:]))

        slot.stage(images)
        slot.in_start.record(self._copies_in)
        slot.copy_in(self._copies_in)
        slot.in_end.record(self._copies_in)

        lane.stream.wait(slot.in_end)
        slot.run_start.record(lane.stream)
        start = time.perf_counter()
        lane.run(slot)
        slot.enqueue_ms = (time.perf_counter() - start) * 1000
        slot.run_end.record(lane.stream)

        self._copies_out.wait(slot.run_end)
        slot.out_start.record(self._copies_out)
        nbytes = self._engine.output_layout(slot.batch).nbytes
        self._copies_out.copy_out(slot.host_out[:nbytes], slot.device_out.handle)
        slot.out_end.record(self._copies_out)

    def _release(self, slot: Slot) -> None:
        slot.images = None
        self._free.append(slot)

    def _settle(self) -> None:
        """Wait until the GPU holds nothing of ours.

        After a fault there is nothing to wait for, and waiting fails.
        """
        streams = [self._copies_in, *(lane.stream for lane in self._lanes), self._copies_out]
        for stream in streams:
            try:
                stream.synchronize()
            except EngineError as error:
                logger.debug("while waiting for the GPU: %s", error)

    def close(self) -> None:
        """Wait for the GPU and free everything; once is enough.

        Raises nothing: what led here matters more.
        """
        try:
            cuda.use_device(self._device)
            self._close()
        except EngineError as error:  # the GPU has faulted: not even that is answered
            logger.debug("while closing: %s", error)
            self._close()

    def _close(self) -> None:
        if self._lanes:
            self._settle()
            self.discard()
        self._last = None
        self._free.clear()
        self._lanes.clear()
        self._resources.close()
