# SPDX-License-Identifier: Apache-2.0
"""Image files -> batches in the memory of a GPU, which decodes and places them itself.

    files       threads     |read|read|read|
    decoder     one thread       |decode 1|decode 2|      nvImageCodec; then one kernel places all
    GPU         one stream            |1      |2      |   images of a chunk in their batches

A chunk is some batches. While the GPU works on one, the next is decoded and the one after that is
read; what comes out is complete, so that whoever takes it has nothing to wait for.

JPEGs that decoders show differently (`trtdet.images.jpeg`) and other kinds of images are decoded on
the CPU, by threads for it, and placed by the same kernel. Its arithmetic is that of
`trtdet.images.preprocess`; on photographs, network inputs were at most two levels apart.
"""

import logging
import math
import os
import stat
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TypeVar

from trtdet import cuda
from trtdet.closing import Closing
from trtdet.cuda_kernel import kernel_of
from trtdet.errors import EngineError
from trtdet.images.files import SOI, most_pixels
from trtdet.images.jpeg import plain_size, without_trailer
from trtdet.images.options import Resample
from trtdet.images.preprocess import ShorterSide
from trtdet.machine import available_cores
from trtdet.runtimes import place
from trtdet.runtimes.gpu_batches import DeviceBatch, Pool, Slot, image_bytes
from trtdet.runtimes.gpu_decoder import INSTALL, decoder_of
from trtdet.runtimes.gpu_filling import (
    MOST_PIXEL_BYTES,
    Encoded,
    Filling,
    Item,
    Settings,
    decode_on_cpu,
)
from trtdet.spec import Preprocessing

logger = logging.getLogger(__name__)

#: Images of a chunk, about: nvImageCodec is fastest with some ten at a time.
CHUNK = 64
#: Bytes of the network inputs of a chunk; one batch may have more.
MOST_INPUT_BYTES = 1 << 29
#: Images that a thread reads at a time.
SHARE = 8
#: Threads that read: with more, the decoder waits for Python's lock.
READERS = 1
#: Chunks that are decoded ahead of the one that is handed out.
AHEAD = 2
#: Bytes that are read at once, and of files that are left to the CPU.
USUAL_FILE, LONGEST_FILE = 1 << 17, 1 << 28

T = TypeVar("T")
#: Images that a thread has read; those that the CPU decodes may not be there yet.
_Part = list[Item | Future[Item]]


@cache
def missing(device: int) -> str:
    """Why images cannot be decoded on this GPU; "" where they can."""
    try:
        decoder_of(device)
        kernel_of(place.SOURCE, place.NAME, device)
    except EngineError as error:
        return f"{error}; {INSTALL}"
    return ""


class GpuImageBatcher(Closing):
    """`trtdet.images.batcher.ImageBatcher` on a GPU: the same order, the same batches, the same
    way with images that cannot be read.

    Batches are handed out complete. One thread at a time may iterate.

    Args:
        device: the GPU.
        workers: threads that decode what the GPU does not; None: one per core.
        keep_sources: copy the decoded images to the host too.

    Raises:
        EngineError: nvImageCodec or NVRTC is not there; `missing` says so before.

    Attributes:
        failures: (path, message) of the images left out in the latest iteration.
        on_cpu: images of the latest iteration that the CPU decoded.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        device: int = 0,
        resample: Resample | None = None,
        resize: ShorterSide | None = None,
        workers: int | None = None,
        keep_sources: bool = False,
        pad_to_batch: bool = False,
    ) -> None:
        self.paths = list(paths)
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.failures: list[tuple[Path, str]] = []
        self.on_cpu = 0
        self._settings = Settings(
            preprocessing, batch_size, device, resample, resize, keep_sources, pad_to_batch
        )
        self._workers = workers or available_cores()
        self._decoder = decoder_of(device)
        self._kernel = kernel_of(place.SOURCE, place.NAME, device)
        largest = (
            preprocessing.at(resize.largest_canvas(preprocessing)) if resize else preprocessing
        )
        nbytes = image_bytes(largest)
        self._chunk = batch_size * max(1, min(CHUNK, MOST_INPUT_BYTES // nbytes) // batch_size)
        self._running: weakref.WeakSet[Generator[DeviceBatch, None, None]] = weakref.WeakSet()
        self._free: deque[Slot] = deque()
        cuda.use_device(device)
        self._resources = ExitStack()
        with ExitStack() as unless_it_is_ready:
            unless_it_is_ready.callback(self._resources.close)
            self._stream = self._resources.enter_context(cuda.Stream())
            self._pool = self._resources.enter_context(Pool(batch_size * nbytes))
            for _ in range(AHEAD + 2):
                self._free.append(Slot(self._chunk, self._resources))
            unless_it_is_ready.pop_all()

    def close(self) -> None:
        """End iterations that were left before their end, and free the GPU's memory."""
        for iteration in list(self._running):
            iteration.close()
        if self._free:
            self._stream.wait_quietly()
            for slot in self._free:
                slot.images.clear()
            self._stream.wait_quietly()  # decoded images go in the stream's order
            self._free.clear()
        self._resources.close()

    def __iter__(self) -> Iterator[DeviceBatch]:
        self.failures = []
        self.on_cpu = 0
        iteration = self._iterate()
        self._running.add(iteration)
        return iteration

    def _iterate(self) -> Generator[DeviceBatch, None, None]:
        decoding: deque[Future[Slot]] = deque()
        device = (self._settings.device,)
        readers = ThreadPoolExecutor(READERS, "gpu-images-reader")
        cpu = ThreadPoolExecutor(self._workers, "gpu-images-cpu")
        decoder = ThreadPoolExecutor(1, "gpu-images-decoder", cuda.use_device, device)
        filling = Filling(
            self._settings, self._decoder, self._kernel, self._stream, self._pool, cpu
        )
        try:
            read = ahead(self._chunks(readers, cpu), deque())
            decoded = (decoder.submit(self._decode, filling, parts) for parts in read)
            for slot in ahead(decoded, decoding):
                yield from self._finished(slot.result())
            yield from filling.rest()
            if self.on_cpu:
                logger.info("%d of %d images were decoded on the CPU", self.on_cpu, len(self.paths))
        finally:
            for pool in (readers, cpu, decoder):
                pool.shutdown(cancel_futures=True)
            self._stream.wait_quietly()
            for future in decoding:
                if not future.cancelled() and future.exception() is None:
                    self._take_back(future.result())
            filling.discard()

    def _chunks(self, readers: Executor, cpu: Executor) -> Iterator[list[Future[_Part]]]:
        """Start to read one chunk after the other, in parts."""
        for start in range(0, len(self.paths), self._chunk):
            paths = self.paths[start : start + self._chunk]
            parts = [paths[at : at + SHARE] for at in range(0, len(paths), SHARE)]
            yield [readers.submit(self._read, part, cpu) for part in parts]

    def _finished(self, slot: Slot) -> Iterator[DeviceBatch]:
        """The batches of a chunk, once they are complete."""
        try:
            slot.end.synchronize()
            for path, message in slot.failed:
                logger.warning("skipped: %s", message)
                self.failures.append((path, message))
            self.on_cpu += slot.on_cpu
            done, slot.done = deque(slot.done), []
        finally:
            self._take_back(slot)
        try:
            while done:
                yield done.popleft()
        finally:
            for batch in done:  # the iteration was left
                batch.release()

    def _take_back(self, slot: Slot) -> None:
        slot.empty()
        if sum(image.capacity for image in slot.images) > MOST_PIXEL_BYTES:
            slot.images.clear()
        self._free.append(slot)

    def _decode(self, filling: Filling, parts: Sequence[Future[_Part]]) -> Slot:
        """What the thread that decodes does with a chunk."""
        read = [item for part in parts for item in part.result()]
        items = [item.result() if isinstance(item, Future) else item for item in read]
        slot = self._free.popleft()
        try:
            filling.add(items, slot)
        except BaseException:
            self._free.append(slot)
            raise
        return slot

    def _read(self, paths: Sequence[Path], cpu: Executor) -> _Part:
        """What a thread that reads does."""
        return [self._read_one(path) or cpu.submit(decode_on_cpu, path) for path in paths]

    def _read_one(self, path: Path) -> Encoded | None:
        """A file for the GPU; None: it is left to the CPU."""
        try:
            data = read_whole(path)
            size_hw = plain_size(data)
            if size_hw is None and data[:2] == SOI:
                data = without_trailer(data)
                size_hw = plain_size(data)
            if size_hw is not None and math.prod(size_hw) <= most_pixels():
                return Encoded(path, self._decoder.stream_of(data), size_hw)
        except (OSError, ValueError):
            pass  # `load_image` says what it is
        return None


def ahead(started: Iterable[T], waiting: deque[T]) -> Iterator[T]:
    """What is started, in order, while `AHEAD` more of it are under way, in `waiting`."""
    for one in started:
        waiting.append(one)
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def read_whole(path: Path) -> bytes:
    """The bytes of a regular file that is not too long; b"" for another. A FIFO is not waited for.

    Three calls of the system for most photographs: after each one the decoder's thread has to give
    up Python's lock.

    Raises:
        OSError: it cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        data = os.read(file, USUAL_FILE)
        if len(data) < USUAL_FILE:
            return data
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LONGEST_FILE:
            return b""
        return data + os.read(file, found.st_size - len(data))
    finally:
        os.close(file)
