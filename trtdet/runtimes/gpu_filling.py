# SPDX-License-Identifier: Apache-2.0
"""The part of `trtdet.runtimes.gpu_images` that queues work on the GPU: images are decoded, or
copied there, and the kernel places them in batches.
"""

import ctypes
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtdet import cuda
from trtdet.cuda_kernel import ADDRESS, Kernel
from trtdet.errors import EngineError
from trtdet.files import message_of
from trtdet.geometry import ResizeTransform
from trtdet.images.batch import Lease
from trtdet.images.files import ImageArray, image_size, load_image
from trtdet.images.options import Resample
from trtdet.images.preprocess import ShorterSide, placement_of
from trtdet.runtimes import place
from trtdet.runtimes.base import DeviceImages
from trtdet.runtimes.gpu_batches import DeviceBatch, Pool, Slot, image_bytes
from trtdet.runtimes.gpu_decoder import Decoder
from trtdet.spec import Preprocessing

#: Bytes of decoded pixels of a chunk that are on the GPU at a time; one image may have more.
MOST_PIXEL_BYTES = 1 << 29
#: Sizes of images whose place is kept.
KEPT_PLACES = 4096


@dataclass(frozen=True)
class Settings:
    """What batches are to be, and on which GPU; see `GpuImageBatcher`."""

    preprocessing: Preprocessing
    batch_size: int
    device: int
    resample: Resample | None
    resize: ShorterSide | None
    keep_sources: bool
    pad_to_batch: bool


@dataclass(frozen=True)
class Encoded:
    """A JPEG for the GPU."""

    path: Path
    stream: Any
    size_hw: tuple[int, int]

    @property
    def pixel_bytes(self) -> int:
        """Bytes that it takes on the GPU."""
        return 3 * self.size_hw[0] * self.size_hw[1]


@dataclass(frozen=True)
class Decoded:
    """An image that the CPU has decoded."""

    path: Path
    pixels: ImageArray

    @property
    def pixel_bytes(self) -> int:
        """Bytes that it takes on the GPU."""
        return self.pixels.nbytes


@dataclass(frozen=True)
class Failed:
    """An image that cannot be used."""

    path: Path
    message: str
    pixel_bytes: int = 0


Item = Encoded | Decoded | Failed


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


class Filling:
    """Decodes chunk after chunk into batches. For one thread.

    Args:
        cpu: threads that decode what nvImageCodec turns out not to.
    """

    def __init__(
        self,
        settings: Settings,
        decoder: Decoder,
        kernel: Kernel,
        stream: cuda.Stream,
        pool: Pool,
        cpu: Executor,
    ) -> None:
        self._settings = settings
        self._decoder = decoder
        self._kernel = kernel
        self._stream = stream
        self._pool = pool
        self._cpu = cpu
        self._open: _Open | None = None
        self._places: dict[tuple[Any, ...], tuple[tuple[int, ...], ResizeTransform]] = {}

    def add(self, items: Sequence[Item], slot: Slot) -> None:
        """Queue one chunk on the GPU. After an error the slot is empty."""
        try:
            self._add(items, slot)
        except BaseException as error:
            self._stream.wait_quietly()
            slot.images.clear()
            slot.empty()
            traceback.clear_frames(error.__traceback__)  # they hold images on the GPU too
            raise

    def _add(self, items: Sequence[Item], slot: Slot) -> None:
        settings = self._settings
        first = 0
        # With `resize`, the images of a batch have one network input size: they stay together.
        together = settings.batch_size if settings.resize else 1
        for number, part in enumerate(in_bounds(items, together)):
            if number:
                self._stream.synchronize()  # the memory of the part before is filled again
            sources = self._on_device(part, slot)
            for canvas, group in self._groups(part, sources):
                end = first + len(group)
                slot.rows[first:end] = self._rows(canvas, group, slot)
                self._launch(slot, canvas, first, end)
                first = end
        slot.end.record(self._stream)

    def _rows(
        self, canvas: Preprocessing, group: Sequence[_Source], slot: Slot
    ) -> list[tuple[int, ...]]:
        """Give images of one network input size their places in batches: rows of the kernel's
        table. Batches that get full with them go to the slot.
        """
        rows = []
        for source in group:
            batch = self._batch(canvas)
            rows.append(self._place(source, batch))
            if len(batch.images) == self._settings.batch_size:
                slot.done.append(self._complete(batch))
        if self._settings.resize and self._open is not None:
            slot.done.append(self._complete(self._open))
        return rows

    def rest(self) -> Iterator[DeviceBatch]:
        """The last batch, if it is not full."""
        if self._open is not None:
            cuda.use_device(self._settings.device)
            last = self._complete(self._open)
            self._stream.synchronize()
            yield last

    def discard(self) -> None:
        """Give back the memory of a batch that was begun. The GPU must be through with it."""
        if self._open is not None:
            self._pool.give(self._open.buffer)
            self._open = None

    def _on_device(self, items: Sequence[Item], slot: Slot) -> list[_Source | None]:
        """Images, queued to be on the GPU; None: it failed, which is noted."""
        found: list[_Source | None] = [None] * len(items)
        left = list(items)
        refused = []
        encoded = [(row, item) for row, item in enumerate(items) if isinstance(item, Encoded)]
        if encoded:
            reuse, slot.images = slot.images[: len(encoded)], []
            images = self._decoder.decode([item.stream for _, item in encoded], self._stream, reuse)
            slot.images = [image for image in images if image is not None]
            for (row, item), image in zip(encoded, images, strict=True):
                if image is None:
                    refused.append(row)
                else:
                    found[row] = self._source(item.path, image)
        others = self._cpu.map(decode_on_cpu, [items[row].path for row in refused])
        for row, other in zip(refused, others, strict=True):
            left[row] = other
        slot.failed += [(item.path, item.message) for item in left if isinstance(item, Failed)]
        on_cpu = [(row, item) for row, item in enumerate(left) if isinstance(item, Decoded)]
        slot.on_cpu += len(on_cpu)
        addresses = slot.upload([item.pixels for _, item in on_cpu], self._stream)
        for (row, decoded), address in zip(on_cpu, addresses, strict=True):
            height, width, _ = decoded.pixels.shape
            kept = decoded.pixels if self._settings.keep_sources else None
            found[row] = _Source(decoded.path, address, (height, width), 3 * width, kept)
        return found

    def _source(self, path: Path, image: Any) -> _Source:
        interface = image.__cuda_array_interface__
        height, width, channels = interface["shape"]
        if channels != 3 or interface["typestr"] != "|u1":
            raise EngineError(f"{path}: nvImageCodec made {interface['shape']} {interface['typestr']} of it, expected (h, w, 3) uint8")  # fmt: skip
        strides = interface.get("strides")
        kept = np.asarray(image.cpu()) if self._settings.keep_sources else None
        pitch = strides[0] if strides else 3 * width
        return _Source(path, interface["data"][0], (height, width), pitch, kept)

    def _groups(
        self, items: Sequence[Item], sources: Sequence[_Source | None]
    ) -> Iterator[tuple[Preprocessing, list[_Source]]]:
        """Images that have one network input size: all of them; with `resize`, those of a
        batch.
        """
        settings = self._settings
        if settings.resize is None:
            yield settings.preprocessing, [source for source in sources if source]
            return
        for start in range(0, len(items), settings.batch_size):
            group = slice(start, start + settings.batch_size)
            known = [
                source.size_hw if source else image_size(item.path)
                for item, source in zip(items[group], sources[group], strict=True)
            ]
            sizes = [size for size in known if size] or [(1, 1)]
            canvas = settings.resize.canvas(sizes, settings.preprocessing)
            yield settings.preprocessing.at(canvas), [s for s in sources[group] if s]

    def _batch(self, canvas: Preprocessing) -> _Open:
        if self._open is None:
            self._open = _Open(self._pool.take(), canvas, image_bytes(canvas))
        return self._open

    def _place(self, source: _Source, batch: _Open) -> tuple[int, ...]:
        """Give one image the next place of a batch: its row of the kernel's table."""
        key = (source.size_hw, batch.preprocessing.size_hw)
        known = self._places.get(key)
        if known is None:
            resize = self._settings.resize
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
        settings, count = self._settings, len(batch.images)
        rows = settings.batch_size if settings.pad_to_batch else count
        if rows > count:
            one = batch.image_bytes
            self._stream.clear(batch.buffer.handle + count * one, (rows - count) * one)
        shape = (rows, *batch.preprocessing.image_shape)
        dtype = np.dtype(batch.preprocessing.dtype)
        sources, transforms = zip(*batch.images, strict=True)
        return DeviceBatch(
            DeviceImages(batch.buffer.handle, shape, dtype, settings.device),
            tuple(source.path for source in sources),
            transforms,
            tuple(source.pixels for source in sources) if settings.keep_sources else None,
            Lease(self._pool, batch.buffer),
        )

    def _launch(self, slot: Slot, canvas: Preprocessing, first: int, end: int) -> None:
        """Queue the kernel for some rows of a chunk."""
        if end == first:
            return
        launch = place.Launch.of(canvas, self._settings.resample)
        address = slot.table.handle + first * place.ROW.itemsize
        self._stream.copy_in(address, slot.rows[first:end])
        arguments = [
            (address, ADDRESS),
            *((number, ctypes.c_int) for number in (*launch.size_hw, launch.how)),
            *((level, ctypes.c_float) for level in launch.pad_rgb),
        ]
        self._kernel.launch(self._stream, launch.grid(end - first), place.BLOCK, arguments)


def in_bounds(items: Sequence[Item], together: int) -> Iterator[Sequence[Item]]:
    """Images in parts whose pixels fit into `MOST_PIXEL_BYTES`, `together` of them at least."""
    nbytes = [item.pixel_bytes for item in items]
    if sum(nbytes) <= MOST_PIXEL_BYTES:
        yield items
        return
    start = total = 0
    for at in range(0, len(items), together):
        more = sum(nbytes[at : at + together])
        if at > start and total + more > MOST_PIXEL_BYTES:
            yield items[start:at]
            start, total = at, 0
        total += more
    yield items[start:]


def decode_on_cpu(path: Path) -> Decoded | Failed:
    """An image as `load_image` makes it."""
    try:
        return Decoded(path, np.ascontiguousarray(load_image(path)))
    except (OSError, ValueError) as error:
        return Failed(path, message_of(error))
