# SPDX-License-Identifier: Apache-2.0
"""Image files -> batches, decoded and placed by a pool of threads, or of processes."""

import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.geometry import ResizeTransform
from trtdet.images.batch import Batch, BufferPool, Lease
from trtdet.images.files import ImageArray, image_size
from trtdet.images.options import Resample
from trtdet.images.prepare import Preparer, Result
from trtdet.images.prepare_processes import (
    AT_ONCE,
    SHARES,
    SHARES_WITH_SOURCES,
    Pin,
    PreparingProcesses,
)
from trtdet.images.preprocess import ShorterSide
from trtdet.images.shared_sources import SharedSources
from trtdet.machine import available_cores, part_of_memory
from trtdet.processes import Answer
from trtdet.spec import Preprocessing

logger = logging.getLogger(__name__)

#: (shape, dtype) -> array: where batches are written. A runtime hands in one that returns pinned
#: memory.
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]

#: Bytes of the batches that processes fill, and which part of the machine's memory: pinned memory
#: is lost to all others.
MOST_AHEAD_BYTES, MOST_OF_MEMORY = 1 << 30, 1 / 16


def most_ahead_bytes() -> float:
    """Bytes of the batches that processes may fill on this machine."""
    return part_of_memory(MOST_OF_MEMORY, MOST_AHEAD_BYTES)


class _OpenCVThreads:
    """Keeps OpenCV from starting threads of its own inside each worker, while any batcher runs."""

    _lock = threading.Lock()
    _users: ClassVar[int] = 0
    _before: ClassVar[int] = 0

    @classmethod
    @contextmanager
    def single(cls) -> Iterator[None]:
        with cls._lock:
            if cls._users == 0:
                cls._before = cv2.getNumThreads()
                cv2.setNumThreads(1)
            cls._users += 1
        try:
            yield
        finally:
            with cls._lock:
                cls._users -= 1
                if cls._users == 0:
                    cv2.setNumThreads(cls._before)


class _Filling:
    """A buffer that workers write images into, and what came of each.

    One lock for all of its images: whoever finishes the last one releases it.

    Attributes:
        memory: what `buffer` lies in, from the pool.
        results: one per path, complete after `wait`.
        asked: shares that processes do: the first row, and what comes of them.
    """

    def __init__(self, paths: Sequence[Path], buffer: NDArray[Any], memory: NDArray[Any]) -> None:
        self.paths = paths
        self.buffer = buffer
        self.memory = memory
        self.results: list[Result] = [""] * len(paths)
        self.asked: list[tuple[int, Answer[Any]]] = []
        self._finished = count(1)  # next() of it is one step: no two threads get the same number
        self._complete = threading.Lock()
        self._complete.acquire()

    def finish(self, row: int, result: Result) -> None:
        """Note what came of the image that belongs in `row`. Called by a worker, once per row."""
        self.results[row] = result
        if next(self._finished) == len(self.paths):
            self._complete.release()

    def wait(self) -> None:
        """Return once every image is finished. For one caller, once."""
        self._complete.acquire()


#: An image that is in a batch: its file, the way back, the source where it is kept.
_Done = tuple[Path, ResizeTransform, ImageArray | None]
_Todo: TypeAlias = "SimpleQueue[tuple[_Filling, int] | None]"  # a row of a batch


class ImageBatcher(Closing):
    """Image files as `Batch`es, decoded and resized by a pool of threads ahead of the consumer.

        with ImageBatcher(find_images(folder), spec.preprocessing, 8) as batches:
            for batch in batches:
                outputs = runtime.infer(batch.images)
                batch.release()

    Order is kept. An image that cannot be read is logged, noted in `failures` and left out; the
    images after it move up, so that every batch but the last is full (with `resize` they stay in
    their batch). Memory is bounded, whatever the number of images: by `prefetch` batches ahead, or
    as many as hold two images per worker, eight where these are processes, four with `shared`; with
    `keep_sources` by their decoded images too. Threads scale with the cores, as OpenCV and Pillow
    release the GIL while they decode and resize, and on many cores processes scale better. Leaving
    a loop early, by break, an exception or Ctrl-C, ends the threads within the time of one image.
    One thread at a time may ask for the next batch.

    Attributes:
        failures: (path, message) of the images left out in the latest iteration.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        resample: Resample | None = None,
        resize: ShorterSide | None = None,
        workers: int | None = None,
        prefetch: int = 2,
        keep_sources: bool = False,
        pad_to_batch: bool = False,
        allocate: Allocate = np.empty,
        load: Callable[[Path], ImageArray] | None = None,
        size: Callable[[Path], tuple[int, int] | None] | None = None,
        pin: Pin | None = None,
        shared: SharedSources | None = None,
    ) -> None:
        """
        Args:
            paths: the image files.
            resize: scale every image by itself, for a model of dynamic input size; each batch has
                the smallest input that holds its images.
            workers: threads; None: one per available core.
            prefetch: batches that are prepared ahead of the consumer.
            keep_sources: keep the decoded images in `Batch.sources`, for drawing on them.
            pad_to_batch: fill a last batch that is not full with zero rows, for models of a fixed
                batch size.
            allocate: makes the batch buffers, (batch_size, *image_shape) each; for example of
                pinned memory, into which the workers then write directly. Where the consumer calls
                `Batch.release`, as many are made as hold the images ahead and the batches in use.
                Their memory must outlive the batches.
            load: what makes an image of a path; None: `load_image`.
            size: its height and width before it is loaded, for `resize`; None: `image_size`, from
                the file's header.
            pin: let processes do the work, as many as `workers`, once they have started, in
                buffers that this makes ready, instead of those of `allocate`. For thousands of
                images: processes take a third of a second to start, and 5 MiB each. Threads do it
                where sources are kept elsewhere than in `shared`, with `load`, and where the
                batches ahead would be more than `most_ahead_bytes`.
            shared: keep the decoded images there, so that processes see them. One for which a
                process finds no room is None.
        """
        if batch_size < 1 or prefetch < 1 or (workers is not None and workers < 1):
            raise ValueError(
                f"batch_size, prefetch, workers: expected at least 1, got {batch_size}, {prefetch}, {workers}"
            )
        if resample not in (None, "bilinear", "antialias"):
            raise ValueError(f"resample: expected bilinear or antialias, got {resample!r}")
        self.paths = list(paths)
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.failures: list[tuple[Path, str]] = []
        if shared is not None:
            keep_sources, load = True, shared.load
        self._shared = shared
        self._resample = resample
        self._workers = workers or available_cores()
        # Every worker needs an image in hand and one to go on with, even where batches are small.
        self._ahead = max(prefetch, -(-2 * self._workers // batch_size))
        self._keep_sources = keep_sources
        self._pad_to_batch = pad_to_batch
        self._resize = resize
        self._load = load
        self._size = size
        self._preparer = Preparer(preprocessing, resample, resize, keep_sources, load)
        self._processes: PreparingProcesses | None = None
        self._share = 0
        shape, dtype = self._buffer_shape(), np.dtype(preprocessing.dtype)
        if pin and (shared or not (keep_sources or load)):
            self._start_processes(pin, math.prod(shape) * dtype.itemsize)
        if self._processes is not None:
            allocate = self._processes.buffers.allocate
        self._pool = BufferPool(partial(allocate, shape, dtype))
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

    def _buffer_shape(self) -> tuple[int, ...]:
        """Of a batch's buffer, which holds images of the largest size."""
        largest = self.preprocessing
        if self._resize:
            largest = largest.at(self._resize.largest_canvas(largest))
        return self.batch_size, *largest.image_shape

    def _ahead_of(self, share: int) -> int:
        """Batches ahead of processes that get `share` images at a time: as many images as they can
        have, and a batch that is waited for.
        """
        return max(self._ahead, -(-share * AT_ONCE * self._workers // self.batch_size) + 1)

    def _share_that_fits(self, nbytes: int) -> int | None:
        """Images of a message to a process, so that the batches ahead, of `nbytes` each, take no
        more than `most_ahead_bytes`; None: even the smallest take more.
        """
        shares = SHARES_WITH_SOURCES if self._shared is not None else SHARES
        fitting = (n for n in shares if self._ahead_of(n) * nbytes <= most_ahead_bytes())
        return next(fitting, None)

    def _start_processes(self, pin: Pin, nbytes: int) -> None:
        """Let processes do the work, in batches of `nbytes` each. Threads do it where these have
        no room, or where there are no more processes, open files or shared memory to be had.
        """
        share = self._share_that_fits(nbytes)
        if share is None:
            return
        try:
            self._processes = PreparingProcesses(self._preparer, self._workers, pin, self._shared)
        except OSError as error:
            logger.info("processes that decode images do not start, and threads do it: %s", error)
            return
        self._share, self._ahead = share, self._ahead_of(share)

    def close(self) -> None:
        """End iterations that were left before their end. Call it from the thread that iterates."""
        for iteration in list(self._running):
            iteration.close()
        if self._processes is not None:
            self._processes.close()

    def __length_hint__(self) -> int:
        """Batches of an iteration, where every image can be read."""
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.failures = []
        iteration = self._iterate()
        self._running.add(iteration)
        return iteration

    def _iterate(self) -> Generator[Batch, None, None]:
        # Plain threads and a queue: at 16 cores, concurrent.futures costs a tenth of the
        # throughput.
        todo: _Todo = SimpleQueue()
        threads: list[threading.Thread] = []
        with _OpenCVThreads.single():
            try:
                for number in range(self._workers):
                    name = f"image-batcher-{number}"
                    thread = threading.Thread(
                        target=self._work, args=(todo,), name=name, daemon=True
                    )
                    thread.start()
                    threads.append(thread)
                yield from self._assemble(self._in_order(todo))
            finally:
                with suppress(Empty):
                    while True:
                        todo.get_nowait()
                for _ in threads:
                    todo.put(None)
                for thread in threads:
                    thread.join()

    def _work(self, todo: _Todo) -> None:
        """What each thread does until it meets None."""
        while (task := todo.get()) is not None:
            filling, row = task
            filling.finish(row, self._preparer.prepare(filling.paths[row], filling.buffer[row]))

    def _in_order(self, todo: _Todo) -> Iterator[_Filling]:
        """Hand out the images to the workers, `_ahead` batches at a time, and yield the finished
        ones in order.
        """
        fillings = self._fillings()
        waiting: deque[_Filling] = deque()

        def hand_out(number: int) -> None:
            for filling in islice(fillings, number):
                waiting.append(filling)
                asked = None
                if self._processes is not None:
                    asked = self._processes.fill(filling.paths, filling.buffer, self._share)
                filling.asked = asked or []
                for row in range(len(filling.paths)) if asked is None else ():
                    todo.put((filling, row))

        hand_out(self._ahead)
        while waiting:
            filling = waiting.popleft()
            hand_out(1)
            if self._processes is not None:
                self._take_answers(self._processes, filling, todo)
            filling.wait()
            yield filling

    def _take_answers(self, processes: PreparingProcesses, filling: _Filling, todo: _Todo) -> None:
        """What processes did; what they did not do is left to the threads."""
        for first, answer in filling.asked:
            number = min(self._share, len(filling.paths) - first)
            for row, result in enumerate(processes.results(answer, number), first):
                if result is None:
                    todo.put((filling, row))
                else:
                    filling.finish(row, result)

    def _fillings(self) -> Iterator[_Filling]:
        """The images of one buffer at a time."""
        for start in range(0, len(self.paths), self.batch_size):
            paths = self.paths[start : start + self.batch_size]
            memory = buffer = self._pool.take()
            if self._resize:
                size_of = self._size or image_size
                sizes = [size for path in paths if (size := size_of(path))]
                canvas = self._resize.canvas(sizes or [(1, 1)], self.preprocessing)
                shape = (self.batch_size, *self.preprocessing.at(canvas).image_shape)
                buffer = memory.reshape(-1)[: math.prod(shape)].reshape(shape)
            yield _Filling(paths, buffer, memory)

    def _assemble(self, fillings: Iterator[_Filling]) -> Generator[Batch, None, None]:
        """Batches out of finished fillings.

        Each image was written where it belongs if none before it failed. After a failure, images
        are copied down into the hole; the row written to never lies behind the row read from, so
        nothing unread is lost.
        """
        done: list[_Done] = []
        target: _Filling | None = None  # the first of the batch, whose buffer it gets
        for filling in fillings:
            for row, (path, result) in enumerate(zip(filling.paths, filling.results, strict=True)):
                if isinstance(result, tuple):
                    target = target or filling
                    if target is not filling or len(done) != row:
                        target.buffer[len(done)] = filling.buffer[row]
                    done.append((path, *result))
                else:
                    self._note(path, result)
                last = row == self.batch_size - 1
                if last and target is not filling:
                    self._pool.give(filling.memory)  # all of its images failed or moved up
                # Images that were resized for another batch have another shape: they do not move
                # up.
                if target and (len(done) == self.batch_size or (last and self._resize)):
                    yield self._batch(target, done)
                    target, done = None, []
        if target is not None:
            yield self._batch(target, done)

    def _note(self, path: Path, result: str | BaseException) -> None:
        """Log an image that is left out; raise an error that is none of its own."""
        if isinstance(result, BaseException):
            raise result
        logger.warning("skipped: %s", result)
        self.failures.append((path, result))

    def _batch(self, target: _Filling, done: Sequence[_Done]) -> Batch:
        images = target.buffer[: len(done)]
        if self._pad_to_batch:
            target.buffer[len(done) :] = 0
            images = target.buffer
        paths, transforms, sources = zip(*done, strict=True)
        kept = sources if self._keep_sources else None
        return Batch(images, paths, transforms, kept, Lease(self._pool, target.memory))
