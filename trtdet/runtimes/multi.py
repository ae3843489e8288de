# SPDX-License-Identifier: Apache-2.0
"""One engine on several GPUs: every batch goes to the first GPU that has room, and the results come
back in order.

One thread per GPU, not one process: what takes the CPU's time is decoding, which happens before and
in threads of its own, and what is left (queueing a batch, waiting for it) leaves Python's lock free
in TensorRT and in cuda-python. So batches are handed over as they are, without pickling or shared
memory; there is one pool of decoders, one pinned buffer serves every GPU, and an error is an
exception.

The batches are made before they are shared out, so every image meets the same neighbours as on one
GPU and the results are the same.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtdet import cuda
from trtdet.errors import EngineError
from trtdet.runtimes.base import AnyBatch, BatchTimes, Images, Outputs, Runtime, naming_batch
from trtdet.runtimes.trt import TensorRTRuntime
from trtdet.runtimes.trt_load import flavor_of, read_engine


def open_devices(
    path: Path, devices: Sequence[int] | Literal["all"] = (0,), **options: Any
) -> Runtime:
    """Open an engine on one or more GPUs.

    Args:
        devices: GPU numbers; "all" is every GPU this process sees.
        options: of `TensorRTRuntime`, the same for each.

    Raises:
        EngineError: a GPU is not there, or does not fit the engine.
    """
    file = read_engine(path)  # once for all
    flavor_of(file)  # a TensorRT that is missing is said before a GPU that is
    count = cuda.device_count()
    numbers = range(count) if devices == "all" else devices
    missing = [number for number in numbers if number >= count]
    if missing:
        here = "GPU 0 alone is" if count == 1 else f"GPUs 0 to {count - 1} are"
        raise EngineError(
            f"--devices: there is no GPU {', '.join(map(str, missing))}: {here} here ({count} in all); choose among these, or give 'all'"
        )
    with ExitStack() as stack:
        opened = [
            stack.enter_context(TensorRTRuntime(file, device=number, **options))
            for number in numbers
        ]
        stack.pop_all()
    return opened[0] if len(opened) == 1 else MultiRuntime(opened)


class MultiRuntime(Runtime):
    """`trtdet.runtimes.base.Runtime` on several GPUs. Owns the runtimes it is given."""

    frees_cpu = True
    pins = True

    def __init__(self, runtimes: Sequence[TensorRTRuntime]) -> None:
        self._runtimes = tuple(runtimes)
        first = self._runtimes[0]
        self.spec = first.spec
        self.batch_range = first.batch_range
        self.images_on = first.images_on  # CUDA copies from there to the others
        self.timed_on = first.description
        self.description = f"{len(self._runtimes)} GPUs: " + "; ".join(
            runtime.description for runtime in self._runtimes
        )

    @property
    def preferred_batch(self) -> int:
        """The batch size that the engine was built for."""
        return self._runtimes[0].preferred_batch

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """See `TensorRTRuntime.allocate`; every GPU can read it."""
        return self._runtimes[0].allocate(shape, dtype)

    def pin(self, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See `Runtime.pin`; every GPU can read it."""
        return self._runtimes[0].pin(memory)

    def infer(self, images: Images) -> Outputs:
        """Run one batch, on the first GPU."""
        return self._runtimes[0].infer(images)

    def infer_timed(self, images: Images) -> BatchTimes:
        """Run one batch, on the first GPU; how long its parts took.

        `timed_on` says so in reports.
        """
        return self._runtimes[0].infer_timed(images)

    def map(self, batches: Iterable[AnyBatch]) -> Iterator[tuple[AnyBatch, Outputs]]:
        """Run batches on every GPU: each with its outputs, in order. See `TensorRTRuntime.map`.

        `batches` is iterated in the calling thread. Memory is bounded: twice as many batches are
        held as the GPUs have in flight.

        Raises:
            EngineError, ValueError: a batch failed; the other GPUs finish what they are at and
                stop.
        """
        # Kept by its name: an error drops a loop's own iterator, and the pinned memory it holds,
        # while the GPUs still work.
        source = iter(batches)
        with _Crew[AnyBatch](self._runtimes) as crew:
            for index, batch in enumerate(source):
                while crew.full() or crew.ready():
                    yield crew.fetch()
                crew.give(index, batch)
            while crew.pending:
                yield crew.fetch()

    def close(self) -> None:
        """Wait for the GPUs and free everything."""
        with ExitStack() as stack:
            for runtime in self._runtimes:
                stack.callback(runtime.close)


class _Crew(Generic[AnyBatch]):
    """One worker thread per runtime; they take from one queue and put into one table.

    Leaving the block stops and joins them.

    Attributes:
        pending: batches given and not fetched.
    """

    def __init__(self, runtimes: Sequence[TensorRTRuntime]) -> None:
        self._limit = 2 * sum(runtime.depth for runtime in runtimes)
        # None tells a worker to stop.
        self._tasks: queue.SimpleQueue[tuple[int, AnyBatch] | None] = queue.SimpleQueue()
        # Held here until fetched: dropped by a worker that stops, pinned memory would be freed
        # while other GPUs still work.
        self._given: dict[int, AnyBatch] = {}
        self._change = threading.Condition()  # guards what follows
        self._done: dict[int, Outputs] = {}
        self._error: BaseException | None = None
        self._stopping = False
        self._next = 0
        self.pending = 0
        self._threads = [
            threading.Thread(target=self._work, args=(runtime,), name=f"gpu-{number}")
            for number, runtime in enumerate(runtimes)
        ]

    def full(self) -> bool:
        """Whether a batch must be fetched before the next is given."""
        return self.pending >= self._limit

    def ready(self) -> bool:
        """Whether `fetch` would return, or raise, without waiting."""
        with self._change:
            return self._next in self._done or self._error is not None

    def give(self, index: int, batch: AnyBatch) -> None:
        """Queue a batch; `index` counts from 0."""
        self.pending += 1
        self._given[index] = batch
        self._tasks.put((index, batch))

    def fetch(self) -> tuple[AnyBatch, Outputs]:
        """Wait for the next batch in order.

        Raises the error of a worker as soon as there is one.
        """
        with self._change:
            self._change.wait_for(lambda: self._next in self._done or self._error is not None)
            if self._error is not None:
                raise self._error
            outputs = self._done.pop(self._next)
        batch = self._given.pop(self._next)
        self._next += 1
        self.pending -= 1
        return batch, outputs

    def _work(self, runtime: TensorRTRuntime) -> None:
        """Keep one GPU busy until told to stop. Runs in its own thread."""
        try:
            self._feed(runtime)
        except BaseException as error:  # handed to the thread that waits for the results
            with self._change:
                self._error = self._error or error
                self._change.notify()
        finally:
            runtime.discard()

    def _feed(self, runtime: TensorRTRuntime) -> None:
        running: deque[tuple[int, AnyBatch]] = deque()
        while not self._stopping:
            if len(running) < runtime.depth:
                try:  # wait for a batch only when there is nothing else to do
                    task = self._tasks.get(block=not running)
                except queue.Empty:
                    pass
                else:
                    if task is None:
                        return
                    with naming_batch(*task, before=len(running)):
                        runtime.submit(task[1].images)
                    running.append(task)
                    continue
            index, batch = running.popleft()
            with naming_batch(index, batch, after=len(running)):
                outputs = runtime.fetch()
            with self._change:
                self._done[index] = outputs
                self._change.notify()

    def __enter__(self) -> "_Crew[AnyBatch]":
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            # No more threads to be had, or Ctrl-C: those that run would wait forever.
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread.ident is not None:  # else it never started
                thread.join()
