# SPDX-License-Identifier: Apache-2.0
"""Image files -> batches, decoded and placed by a pool of threads."""

import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.files import message_of
from trtdet.geometry import ResizeTransform
from trtdet.images.files import ImageArray, image_size, load_image
from trtdet.images.options import Resample
from trtdet.images.preprocess import ShorterSide, preprocess
from trtdet.machine import available_cores
from trtdet.spec import Preprocessing

logger = logging.getLogger(__name__)

#: (shape, dtype) -> array: where batches are written. A runtime hands in one that returns pinned memory.
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]


# ---- batches


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images, ready for the network.

    Attributes:
        images: (n, *image_shape) in the network's layout and dtype, C-contiguous. n = len(batch), or the batch size with `pad_to_batch`:
            the rows beyond are zero.
        paths: one per real image.
        transforms: one per real image, the way back to source pixels.
        sources: the decoded images, where they were asked for.
    """

    images: NDArray[Any]
    paths: tuple[Path, ...]
    transforms: tuple[ResizeTransform, ...]
    sources: tuple[ImageArray, ...] | None = None
    lease: "_Lease | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        """The number of real images."""
        return len(self.paths)

    def release(self) -> None:
        """Give the memory of `images` back to be filled again; the arrays must not be read after this.

        Optional: a batch that is never released is simply the caller's, and another buffer is allocated.
        """
        if self.lease is not None:
            self.lease.release()


class _Lease:
    """The right to give one buffer back to its pool, once."""

    def __init__(self, pool: "_BufferPool", buffer: NDArray[Any]) -> None:
        self._pool = pool
        self._buffers = [buffer]

    def release(self) -> None:
        while self._buffers:
            self._pool.give(self._buffers.pop())


class _BufferPool:
    """Batch buffers: those given back first, new ones where there are none, so that taking never waits.

    Threads may take and give at once (a deque's append and pop are atomic).
    """

    def __init__(self, allocate: Allocate, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._allocate, self._shape, self._dtype = allocate, shape, dtype
        self._free: deque[NDArray[Any]] = deque()

    def take(self) -> NDArray[Any]:
        try:
            return self._free.pop()
        except IndexError:
            return self._allocate(self._shape, self._dtype)

    def give(self, buffer: NDArray[Any]) -> None:
        self._free.append(buffer)


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


_Prepared = tuple[ResizeTransform, ImageArray | None]  # the source where it is kept


def _held_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class _Task:
    """One image on its way: what is decoded, into which row, and what came of it."""

    path: Path
    buffer: NDArray[Any]  # (batch, *image_shape)
    row: int
    memory: NDArray[Any]  # what `buffer` lies in, from the pool
    #: Set by the worker: the image, the reason why it cannot be used, or an error that ends the iteration.
    result: _Prepared | str | BaseException | None = None
    #: Held from the start; released by the worker when `result` is set.
    done: threading.Lock = field(default_factory=_held_lock)


class ImageBatcher(Closing):
    """Image files as `Batch`es, decoded and resized by a pool of threads ahead of the consumer.

        with ImageBatcher(find_images(folder), spec.preprocessing, 8) as batches:
            for batch in batches:
                outputs = runtime.infer(batch.images)
                batch.release()

    Order is kept. An image that cannot be read is logged, noted in `failures` and left out; the images after it move up, so that
    every batch but the last is full (with `resize` they stay in their batch). Memory is bounded, whatever the number of images: by
    `prefetch` batches ahead, or as many as hold two images per worker; with `keep_sources` by their decoded images too. Threads scale with
    the cores, as OpenCV and Pillow release the GIL while they decode and resize. Leaving a loop early, by break, an exception or
    Ctrl-C, ends the threads within the time of one image. One thread at a time may ask for the next batch.

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
    ) -> None:
        """
        Args:
            paths: the image files.
            resize: scale every image by itself, for a model of dynamic input size; each batch has the smallest input that holds its images.
            workers: threads; None: one per available core.
            prefetch: batches that are prepared ahead of the consumer.
            keep_sources: keep the decoded images in `Batch.sources`, for drawing on them.
            pad_to_batch: fill a last batch that is not full with zero rows, for models of a fixed batch size.
            allocate: makes the batch buffers, (batch_size, *image_shape) each; for example of pinned memory, into which the workers then
                write directly. Where the consumer calls `Batch.release`, as many are made as hold the images ahead and the batches in use.
                Their memory must outlive the batches.
            load: what makes an image of a path; None: `load_image`.
            size: its height and width before it is loaded, for `resize`; None: `image_size`, from the file's header.
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
        self._resample = resample
        self._workers = workers or available_cores()
        # Every worker needs an image in hand and one to go on with, even where batches are small.
        self._ahead = max(prefetch, -(-2 * self._workers // batch_size))
        self._keep_sources = keep_sources
        self._pad_to_batch = pad_to_batch
        self._resize = resize
        self._load = load
        self._size = size
        if resize:
            largest = preprocessing.at(resize.largest_canvas(preprocessing))
            shape = (batch_size, *largest.image_shape)
        else:
            shape = (batch_size, *preprocessing.image_shape)
        self._pool = _BufferPool(allocate, shape, np.dtype(preprocessing.dtype))
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

    def close(self) -> None:
        """End iterations that were left before their end. Call it from the thread that iterates."""
        for iteration in list(self._running):
            iteration.close()

    def __iter__(self) -> Iterator[Batch]:
        self.failures = []
        iteration = self._iterate()
        self._running.add(iteration)
        return iteration

    def _iterate(self) -> Generator[Batch, None, None]:
        # Plain threads and a queue: at 16 cores, concurrent.futures costs a tenth of the throughput.
        todo: SimpleQueue[_Task | None] = SimpleQueue()
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

    def _work(self, todo: "SimpleQueue[_Task | None]") -> None:
        """What each worker does until it meets None."""
        while (task := todo.get()) is not None:
            try:
                task.result = self._prepare(task.path, task.buffer[task.row])
            except BaseException as error:  # the consumer raises it
                task.result = error
            task.done.release()

    def _prepare(self, path: Path, out: NDArray[Any]) -> _Prepared | str:
        """Decode and resize one image; a text says why it cannot be used."""
        try:
            image = (self._load or load_image)(path)
        except (OSError, ValueError) as error:
            return message_of(error)
        preprocessing, scale = self.preprocessing, None
        if self._resize:
            preprocessing, scale = self._fixed(out.shape), self._resize.scale(image.shape)
            if max(image.shape[:2]) * scale >= max(preprocessing.size_hw) + 1:
                return f"{path}: expected the size in the file's header, found {image.shape[:2]}"
        _, transform = preprocess(
            image, preprocessing, resample=self._resample, scale=scale, out=out
        )
        return transform, image if self._keep_sources else None

    def _in_order(self, todo: "SimpleQueue[_Task | None]") -> Iterator[_Task]:
        """Hand out the images to the workers, `_ahead` batches at a time, and yield the finished tasks in order."""
        batches = self._tasks()
        waiting: deque[list[_Task]] = deque()

        def hand_out(count: int) -> None:
            for batch in islice(batches, count):
                waiting.append(batch)
                for task in batch:
                    todo.put(task)

        hand_out(self._ahead)
        while waiting:
            batch = waiting.popleft()
            hand_out(1)
            for task in reversed(batch):  # the last one first: one wait instead of many
                task.done.acquire()
            yield from batch

    def _tasks(self) -> Iterator[list[_Task]]:
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
            yield [_Task(path, buffer, row, memory) for row, path in enumerate(paths)]

    def _fixed(self, image_shape: tuple[int, ...]) -> Preprocessing:
        """The preprocessing for a network input of this shape, in the network's layout."""
        return self.preprocessing.at(self.preprocessing.size_of(image_shape))

    def _assemble(self, tasks: Iterator[_Task]) -> Generator[Batch, None, None]:
        """Batches out of finished tasks.

        Each image was written where it belongs if none before it failed. After a failure, images are copied down into the hole; the row
        written to never lies behind the row read from, so nothing unread is lost.
        """
        done: list[tuple[Path, ResizeTransform, ImageArray | None]] = []
        target: _Task | None = None  # the first of the batch, whose buffer it gets
        for task in tasks:
            if isinstance(task.result, BaseException):
                raise task.result
            if isinstance(task.result, str):
                logger.warning("skipped: %s", task.result)
                self.failures.append((task.path, task.result))
            elif task.result is not None:
                target = target or task
                if target.buffer is not task.buffer or len(done) != task.row:
                    target.buffer[len(done)] = task.buffer[task.row]
                done.append((task.path, *task.result))
            last = task.row == self.batch_size - 1
            if last and (target is None or task.memory is not target.memory):
                self._pool.give(task.memory)  # all of its images failed or moved up
            # Images that were resized for another batch have another shape: they do not move up.
            if target is not None and (len(done) == self.batch_size or (last and self._resize)):
                yield self._batch(target, done)
                target, done = None, []
        if target is not None:
            yield self._batch(target, done)

    def _batch(
        self,
        target: _Task,
        done: Sequence[tuple[Path, ResizeTransform, ImageArray | None]],
    ) -> Batch:
        images = target.buffer[: len(done)]
        if self._pad_to_batch:
            target.buffer[len(done) :] = 0
            images = target.buffer
        paths, transforms, sources = zip(*done, strict=True)
        kept = sources if self._keep_sources else None
        return Batch(images, paths, transforms, kept, _Lease(self._pool, target.memory))
