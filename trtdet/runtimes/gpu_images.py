# SPDX-License-Identifier: Apache-2.0
"""Image files -> batches in the memory of a GPU, which decodes and places them itself.

    files       threads     |read|read|read|
    decoder     one thread       |decode 1|decode 2|      nvImageCodec; then one kernel places all
    GPU         one stream            |1      |2      |   images of a chunk in their batches

A chunk is some batches. While the GPU works on one, the next is decoded and the one after that is
read; what comes out is complete, so that whoever takes it has nothing to wait for.

JPEGs that decoders show differently (`trtdet.images.jpeg`) and other kinds of images are decoded on
the CPU, one by one, by the threads that read, and placed by the same kernel. Its arithmetic is that
of `trtdet.images.preprocess`; the pixels of decoded JPEGs differ by one level at most.
"""

import ctypes
import itertools
import logging
import math
import os
import stat
import traceback
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet import cuda
from trtdet.closing import Closing
from trtdet.cuda_kernel import ADDRESS, Kernel, kernel_of
from trtdet.errors import EngineError
from trtdet.files import message_of
from trtdet.geometry import ResizeTransform
from trtdet.images.files import ImageArray, image_size, load_image, most_pixels
from trtdet.images.jpeg import plain_size
from trtdet.images.options import Resample
from trtdet.images.preprocess import ShorterSide, placement_of
from trtdet.machine import available_cores
from trtdet.runtimes import place
from trtdet.runtimes.base import DeviceImages
from trtdet.runtimes.gpu_decoder import INSTALL, Decoder, decoder_of
from trtdet.spec import Preprocessing

logger = logging.getLogger(__name__)

#: Images of a chunk, about: nvImageCodec is fastest with some ten at a time.
CHUNK = 64
#: Bytes of decoded pixels that are asked for at a time.
MOST_PIXEL_BYTES = 1 << 30
#: Images that a thread reads at a time.
SHARE = 8
#: Threads that read, where nobody says otherwise: with more, the decoder waits for Python's lock.
READERS = 1
#: Chunks that are decoded ahead of the one that is handed out.
AHEAD = 2
#: Sizes of images whose place is kept.
KEPT_PLACES = 4096
#: Bytes that are read at once, and of files that are left to the CPU.
USUAL_FILE, LONGEST_FILE = 1 << 17, 1 << 28


@cache
def missing(device: int) -> str:
    """Why images cannot be decoded on this GPU; "" where they can."""
    try:
        decoder_of(device)
        kernel_of(place.SOURCE, place.NAME, device)
    except EngineError as error:
        return f"{error}; {INSTALL}"
    return ""


# ---- batches


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """Some images, ready for the network, in the memory of a GPU: `trtdet.images.batcher.Batch`.

    Valid until it is released, or its batcher is closed.
    """

    images: DeviceImages
    paths: tuple[Path, ...]
    transforms: tuple[ResizeTransform, ...]
    sources: tuple[ImageArray, ...] | None
    _pool: "_Pool" = field(repr=False)
    _buffers: list[cuda.DeviceBuffer] = field(repr=False)

    def __len__(self) -> int:
        """The number of real images."""
        return len(self.paths)

    def release(self) -> None:
        """Give the memory back to be filled again; the images must not be read after this."""
        while self._buffers:
            self._pool.give(self._buffers.pop())


class _Pool(Closing):
    """Buffers of one size on the GPU: those given back first, new ones where there are none."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._free: deque[cuda.DeviceBuffer] = deque()
        self._all: list[cuda.DeviceBuffer] = []

    def take(self) -> cuda.DeviceBuffer:
        try:
            return self._free.pop()
        except IndexError:
            self._all.append(cuda.DeviceBuffer(self.nbytes))
            return self._all[-1]

    def give(self, buffer: cuda.DeviceBuffer) -> None:
        self._free.append(buffer)

    def close(self) -> None:
        self._free.clear()
        while self._all:
            self._all.pop().close()


# ---- images


@dataclass(frozen=True)
class _Encoded:
    """A JPEG for the GPU."""

    path: Path
    stream: Any
    size_hw: tuple[int, int]


@dataclass(frozen=True)
class _Decoded:
    """An image that the CPU has decoded."""

    path: Path
    pixels: ImageArray


@dataclass(frozen=True)
class _Failed:
    """An image that cannot be used."""

    path: Path
    message: str


_Item = _Encoded | _Decoded | _Failed


@dataclass(frozen=True)
class _Source:
    """An image on the GPU.

    Attributes:
        pixels: on the host too, where sources are kept.
    """

    path: Path
    address: int
    size_hw: tuple[int, int]
    pitch: int
    pixels: ImageArray | None


@dataclass
class _Open:
    """A batch that is being filled."""

    buffer: cuda.DeviceBuffer
    preprocessing: Preprocessing
    image_bytes: int
    images: list[tuple[_Source, ResizeTransform]] = field(default_factory=list)


class _Slot:
    """What one chunk needs beside its batches.

    Attributes:
        images: decoded ones, whose memory is filled again.
        done: batches that are complete once `end` has passed.
        failed: in their order.
    """

    def __init__(self, rows: int, resources: ExitStack) -> None:
        self.end = resources.enter_context(cuda.Event())
        self.rows = cuda.pinned_empty((rows,), place.ROW)
        self.table = resources.enter_context(cuda.DeviceBuffer(rows * place.ROW.itemsize))
        self.images: list[Any] = []
        self.done: list[DeviceBatch] = []
        self.failed: list[_Failed] = []
        self._staged = cuda.pinned_empty((0,), np.uint8)
        self._uploaded = resources.enter_context(cuda.DeviceBuffer(0))
        self._outgrown: list[NDArray[np.uint8]] = []  # freed at the end: the GPU would wait for it
        self._resources = resources

    def upload(self, images: Sequence[ImageArray], stream: cuda.Stream) -> list[int]:
        """Queue copies of images to the GPU; their addresses there."""
        offsets = list(itertools.accumulate((image.nbytes for image in images), initial=0))
        if not images:
            return []
        if self._staged.nbytes < offsets[-1]:
            self._outgrown.append(self._staged)
            nbytes = max(offsets[-1], 2 * self._staged.nbytes)
            self._staged = cuda.pinned_empty((nbytes,), np.uint8)
            self._uploaded = self._resources.enter_context(cuda.DeviceBuffer(nbytes))
        for image, offset in zip(images, offsets, strict=False):
            target = self._staged[offset : offset + image.nbytes]
            np.copyto(target.reshape(image.shape), image)
        stream.copy_in(self._uploaded.handle, self._staged[: offsets[-1]])
        return [self._uploaded.handle + offset for offset in offsets[:-1]]


class GpuImageBatcher(Closing):
    """`trtdet.images.batcher.ImageBatcher` on a GPU: the same order, the same batches, the same
    way with images that cannot be read.

    Batches are handed out complete. One thread at a time may iterate.

    Args:
        device: the GPU.
        workers: threads that read, and decode what the GPU does not; None: a few.
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
        self._device = device
        self._resample = resample
        self._resize = resize
        self._readers = workers or min(READERS, available_cores())
        self._keep_sources = keep_sources
        self._pad_to_batch = pad_to_batch
        self._decoder: Decoder = decoder_of(device)
        self._kernel: Kernel = kernel_of(place.SOURCE, place.NAME, device)
        largest = (
            preprocessing.at(resize.largest_canvas(preprocessing)) if resize else preprocessing
        )
        nbytes = image_bytes(largest)
        self._chunk = batch_size * max(1, CHUNK // batch_size)
        self._running: weakref.WeakSet[Generator[DeviceBatch, None, None]] = weakref.WeakSet()
        self._free: deque[_Slot] = deque()
        cuda.use_device(device)
        with ExitStack() as resources:
            self._stream = resources.enter_context(cuda.Stream())
            self._pool = resources.enter_context(_Pool(batch_size * nbytes))
            self._resources = resources.pop_all()
        for _ in range(AHEAD + 2):
            self._free.append(_Slot(self._chunk, self._resources))

    def close(self) -> None:
        """End iterations that were left before their end, and free the GPU's memory."""
        for iteration in list(self._running):
            iteration.close()
        if self._free:
            self._wait()
            for slot in self._free:
                slot.images.clear()
            self._wait()  # decoded images go in the stream's order
            self._free.clear()
        self._resources.close()

    def __iter__(self) -> Iterator[DeviceBatch]:
        self.failures = []
        self.on_cpu = 0
        iteration = self._iterate()
        self._running.add(iteration)
        return iteration

    def _iterate(self) -> Generator[DeviceBatch, None, None]:
        reading: deque[list[Future[list[_Item]]]] = deque()
        decoding: deque[Future[_Slot]] = deque()
        filling = _Filling(self)
        readers = ThreadPoolExecutor(self._readers, thread_name_prefix="gpu-images-reader")
        decoder = ThreadPoolExecutor(1, "gpu-images-decoder", cuda.use_device, (self._device,))
        chunks = range(0, len(self.paths), self._chunk)
        try:
            for start in chunks:
                paths = self.paths[start : start + self._chunk]
                parts = [paths[at : at + SHARE] for at in range(0, len(paths), SHARE)]
                reading.append([readers.submit(self._read, part) for part in parts])
                if len(reading) > AHEAD:
                    decoding.append(decoder.submit(filling.add, reading.popleft()))
                if len(decoding) > AHEAD:
                    yield from self._finished(decoding.popleft().result())
            while reading:
                decoding.append(decoder.submit(filling.add, reading.popleft()))
                if len(decoding) > AHEAD:
                    yield from self._finished(decoding.popleft().result())
            while decoding:
                yield from self._finished(decoding.popleft().result())
            yield from filling.rest()
            if self.on_cpu:
                logger.info("%d of %d images were decoded on the CPU", self.on_cpu, len(self.paths))
        finally:
            readers.shutdown(cancel_futures=True)
            decoder.shutdown(cancel_futures=True)
            self._settle(decoding)

    def _settle(self, decoding: Sequence[Future[_Slot]]) -> None:
        """Wait for the GPU, and take back what was not handed out."""
        self._wait()
        for future in decoding:
            if not future.cancelled() and future.exception() is None:
                slot = future.result()
                for batch in slot.done:
                    batch.release()
                self._take_back(slot)

    def _wait(self) -> None:
        """Wait for the GPU. A fault of it was raised before."""
        try:
            self._stream.synchronize()
        except EngineError as error:
            logger.debug("while waiting for the GPU: %s", error)

    def _finished(self, slot: _Slot) -> Iterator[DeviceBatch]:
        """The batches of a chunk, once they are complete."""
        slot.end.synchronize()
        done, failed = list(slot.done), list(slot.failed)
        self._take_back(slot)
        for failure in failed:
            logger.warning("skipped: %s", failure.message)
            self.failures.append((failure.path, failure.message))
        yield from done

    def _take_back(self, slot: _Slot) -> None:
        slot.done.clear()
        slot.failed.clear()
        if sum(image.capacity for image in slot.images) > MOST_PIXEL_BYTES:
            slot.images.clear()
        self._free.append(slot)

    def _read(self, paths: Sequence[Path]) -> list[_Item]:
        """What a thread that reads does."""
        return [self._read_one(path) for path in paths]

    def _read_one(self, path: Path) -> _Item:
        try:
            data = read_whole(path)
            size_hw = plain_size(data)
            if size_hw is not None and math.prod(size_hw) <= most_pixels():
                return _Encoded(path, self._decoder.stream_of(data), size_hw)
        except (OSError, ValueError):
            pass  # `load_image` says what it is
        return decode_on_cpu(path)


class _Filling:
    """Decodes chunk after chunk into batches. For one thread."""

    def __init__(self, batcher: GpuImageBatcher) -> None:
        self._batcher = batcher
        self._open: _Open | None = None
        self._places: dict[tuple[Any, ...], tuple[tuple[int, ...], ResizeTransform]] = {}

    def add(self, parts: Sequence[Future[list[_Item]]]) -> _Slot:
        """Queue one chunk on the GPU."""
        items = [item for part in parts for item in part.result()]
        slot = self._batcher._free.popleft()
        try:
            self._add(items, slot)
        except BaseException as error:
            self._batcher._wait()
            slot.images.clear()
            traceback.clear_frames(error.__traceback__)  # they hold images on the GPU too
            self._batcher._free.append(slot)
            raise
        return slot

    def _add(self, items: Sequence[_Item], slot: _Slot) -> None:
        batcher = self._batcher
        sources = self._on_device(items, slot)
        first = 0
        for canvas, group in self._groups(items, sources):
            rows = []
            for source in group:
                batch = self._batch(canvas)
                rows.append(self._place(source, batch))
                if len(batch.images) == batcher.batch_size:
                    slot.done.append(self._complete(batch))
            if batcher._resize and self._open is not None:
                slot.done.append(self._complete(self._open))
            end = first + len(rows)
            slot.rows[first:end] = rows
            self._launch(slot, canvas, first, end)
            first = end
        slot.end.record(batcher._stream)

    def rest(self) -> Iterator[DeviceBatch]:
        """The last batch, if it is not full."""
        if self._open is not None:
            cuda.use_device(self._batcher._device)
            last = self._complete(self._open)
            self._batcher._stream.synchronize()
            yield last

    def _on_device(self, items: Sequence[_Item], slot: _Slot) -> list[_Source | None]:
        """The images of a chunk, queued to be on the GPU; None: it failed, which is noted."""
        batcher = self._batcher
        found: list[_Source | None] = [None] * len(items)
        left = list(items)
        encoded = [(row, item) for row, item in enumerate(items) if isinstance(item, _Encoded)]
        earlier, slot.images = slot.images, []
        for some in in_bounds(encoded):
            reuse, earlier = earlier[: len(some)], earlier[len(some) :]
            streams = [item.stream for _, item in some]
            images = batcher._decoder.decode(streams, batcher._stream, reuse)
            slot.images += [image for image in images if image is not None]
            for (row, item), image in zip(some, images, strict=True):
                if image is None:
                    left[row] = decode_on_cpu(item.path)
                else:
                    found[row] = self._source(item.path, image)
        slot.failed += [item for item in left if isinstance(item, _Failed)]
        on_cpu = [(row, item) for row, item in enumerate(left) if isinstance(item, _Decoded)]
        batcher.on_cpu += len(on_cpu)
        addresses = slot.upload([item.pixels for _, item in on_cpu], batcher._stream)
        for (row, decoded), address in zip(on_cpu, addresses, strict=True):
            height, width, _ = decoded.pixels.shape
            kept = decoded.pixels if batcher._keep_sources else None
            found[row] = _Source(decoded.path, address, (height, width), 3 * width, kept)
        return found

    def _source(self, path: Path, image: Any) -> _Source:
        interface = image.__cuda_array_interface__
        height, width, channels = interface["shape"]
        if channels != 3 or interface["typestr"] != "|u1":
            raise EngineError(f"{path}: nvImageCodec made {interface['shape']} {interface['typestr']} of it, expected (h, w, 3) uint8")  # fmt: skip
        strides = interface.get("strides")
        kept = np.asarray(image.cpu()) if self._batcher._keep_sources else None
        pitch = strides[0] if strides else 3 * width
        return _Source(path, interface["data"][0], (height, width), pitch, kept)

    def _groups(
        self, items: Sequence[_Item], sources: Sequence[_Source | None]
    ) -> Iterator[tuple[Preprocessing, list[_Source]]]:
        """Images that have one network input size: those of a chunk; with `resize`, those of a
        batch.
        """
        batcher = self._batcher
        if batcher._resize is None:
            yield batcher.preprocessing, [source for source in sources if source]
            return
        for start in range(0, len(items), batcher.batch_size):
            group = slice(start, start + batcher.batch_size)
            known = [
                source.size_hw if source else image_size(item.path)
                for item, source in zip(items[group], sources[group], strict=True)
            ]
            sizes = [size for size in known if size] or [(1, 1)]
            canvas = batcher._resize.canvas(sizes, batcher.preprocessing)
            yield batcher.preprocessing.at(canvas), [s for s in sources[group] if s]

    def _batch(self, canvas: Preprocessing) -> _Open:
        if self._open is None:
            self._open = _Open(self._batcher._pool.take(), canvas, image_bytes(canvas))
        return self._open

    def _place(self, source: _Source, batch: _Open) -> tuple[int, ...]:
        """Give one image the next place of a batch: its row of the kernel's table."""
        key = (source.size_hw, batch.preprocessing.size_hw)
        known = self._places.get(key)
        if known is None:
            resize = self._batcher._resize
            scale = resize.scale(source.size_hw) if resize else None
            placed_hw, transform = placement_of(source.size_hw, batch.preprocessing, scale)
            left, top = (int(offset) for offset in transform.offset_xy)
            first = place.height_first(source.size_hw, placed_hw)
            known = (top, left, *placed_hw, first), transform
            if len(self._places) < KEPT_PLACES:
                self._places[key] = known
        target = batch.buffer.handle + len(batch.images) * batch.image_bytes
        batch.images.append((source, known[1]))
        return (source.address, target, *source.size_hw, source.pitch, *known[0])

    def _complete(self, batch: _Open) -> DeviceBatch:
        self._open = None
        batcher, count = self._batcher, len(batch.images)
        rows = batcher.batch_size if batcher._pad_to_batch else count
        if rows > count:
            one = batch.image_bytes
            batcher._stream.clear(batch.buffer.handle + count * one, (rows - count) * one)
        shape = (rows, *batch.preprocessing.image_shape)
        dtype = np.dtype(batch.preprocessing.dtype)
        sources, transforms = zip(*batch.images, strict=True)
        return DeviceBatch(
            DeviceImages(batch.buffer.handle, shape, dtype, batcher._device),
            tuple(source.path for source in sources),
            transforms,
            tuple(source.pixels for source in sources) if batcher._keep_sources else None,
            batcher._pool,
            [batch.buffer],
        )

    def _launch(self, slot: _Slot, canvas: Preprocessing, first: int, end: int) -> None:
        """Queue the kernel for some rows of a chunk."""
        if end == first:
            return
        batcher = self._batcher
        launch = place.Launch.of(canvas, batcher._resample)
        address = slot.table.handle + first * place.ROW.itemsize
        batcher._stream.copy_in(address, slot.rows[first:end])
        arguments = [
            (address, ADDRESS),
            *((number, ctypes.c_int) for number in (*launch.size_hw, launch.how)),
            *((level, ctypes.c_float) for level in launch.pad_rgb),
        ]
        batcher._kernel.launch(batcher._stream, launch.grid(end - first), place.BLOCK, arguments)


def in_bounds(encoded: Sequence[tuple[int, _Encoded]]) -> Iterator[list[tuple[int, _Encoded]]]:
    """Encoded images in groups whose pixels fit into `MOST_PIXEL_BYTES`; at least one in each."""
    group: list[tuple[int, _Encoded]] = []
    nbytes = 0
    for row, item in encoded:
        more = 3 * math.prod(item.size_hw)
        if group and nbytes + more > MOST_PIXEL_BYTES:
            yield group
            group, nbytes = [], 0
        group.append((row, item))
        nbytes += more
    if group:
        yield group


def image_bytes(preprocessing: Preprocessing) -> int:
    """Bytes of one network input."""
    return math.prod(preprocessing.image_shape) * np.dtype(preprocessing.dtype).itemsize


def decode_on_cpu(path: Path) -> _Decoded | _Failed:
    """An image as `load_image` makes it."""
    try:
        return _Decoded(path, np.ascontiguousarray(load_image(path)))
    except (OSError, ValueError) as error:
        return _Failed(path, message_of(error))


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
