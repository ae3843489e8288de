# SPDX-License-Identifier: Apache-2.0
"""Decoded images in memory that processes see: who draws on one need not decode it again."""

import math
import mmap
import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.images import files
from trtdet.images.files import ImageArray
from trtdet.machine import part_of_memory
from trtdet.shared_memory import ADDRESSES, SharedMemory

#: Sizes of images are rounded up to this, and large ones to an eighth of the next power of two, so
#: that one finds room where another was.
STEP = 1 << 18
#: Bytes of all images, at most: of those that processes load, and of those that threads do until
#: then; and which part of the machine's memory the former are.
MOST_BYTES, MOST_BYTES_OF_THREADS = 1 << 32, 1 << 30
MOST_OF_MEMORY = 1 / 8
#: Addresses for the threads; all others are for processes.
FOR_THREADS = ADDRESSES // 2


def room_for(nbytes: int) -> int:
    """Bytes that an image of so many gets."""
    step = max(STEP, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return -(-nbytes // step) * step


@dataclass(frozen=True)
class SharedSource:
    """Where an image lies in that memory, for a process."""

    offset: int
    shape: tuple[int, ...]

    def of(self, memory: NDArray[np.uint8]) -> ImageArray:
        """The image itself; `memory` is all of it."""
        return memory[self.offset : self.offset + math.prod(self.shape)].reshape(self.shape)


class Room:
    """Loads images into that memory. Where there is no room, they lie in ordinary memory.

    Threads may load at once.

    Args:
        most_bytes: that it takes of the memory itself; there is also what it is `given`.
    """

    def __init__(self, memory: SharedMemory, most_bytes: int) -> None:
        self._memory = memory
        self._most = most_bytes
        self._taken = 0
        self._lock = threading.Lock()
        self._free: dict[int, deque[int]] = {}  # size -> offsets

    def load(self, path: Path) -> ImageArray:
        """`load_image`, into that memory."""
        image = files.load_image(path)
        offset = self._take(room_for(image.nbytes))
        if offset is None:
            return image
        shared = self.image(SharedSource(offset, image.shape))
        shared[:] = image
        return shared

    def _take(self, size: int) -> int | None:
        with suppress(IndexError, KeyError):
            return self._free[size].pop()
        with self._lock:
            if self._taken + size > self._most:
                return None
            offset = self._memory.take(size)
            if offset is not None:
                self._taken += size
            return offset

    def give(self, offset: int, size: int) -> None:
        """Room that nobody uses any more."""
        self._free.setdefault(size, deque()).append(offset)  # one step: all threads get one deque

    def give_back(self, image: ImageArray) -> None:
        """The room of an image that was loaded in vain; it must not be read after this."""
        if (source := self.where(image)) is not None:
            self.give(source.offset, room_for(image.nbytes))

    def image(self, source: SharedSource) -> ImageArray:
        """The image that lies there."""
        nbytes = math.prod(source.shape)
        return self._memory.view(source.offset, nbytes).reshape(source.shape)

    def where(self, image: ImageArray) -> SharedSource | None:
        """What another process needs to see an image; None: it is in ordinary memory."""
        offset = self._memory.offset_of(image)
        return None if offset < 0 else SharedSource(offset, image.shape)


class SharedSources(Room, Closing):
    """The memory, and what this process loads into it. Other processes may load images too, by
    `room_of_process`.

    The room of an image is used again as soon as its array is gone.

    Raises:
        OSError: no such memory is to be had.
    """

    def __init__(self, most_bytes: int = MOST_BYTES_OF_THREADS) -> None:
        super().__init__(SharedMemory("trtdet-images", addresses=range(FOR_THREADS)), most_bytes)

    @property
    def file(self) -> int:
        """Of the memory."""
        return self._memory.file

    def image(self, source: SharedSource) -> ImageArray:
        """The image that lies there, which this or another process has loaded."""
        nbytes = math.prod(source.shape)
        part = self._memory.view(source.offset, nbytes)
        weakref.finalize(part, self.give, source.offset, room_for(nbytes)).atexit = False
        return part.reshape(source.shape)

    def free_rooms(self, count: int) -> list[tuple[int, int]]:
        """Offset and size of up to `count` rooms that nobody uses, for a process to use them."""
        found: list[tuple[int, int]] = []
        for size, offsets in list(self._free.items()):
            with suppress(IndexError):
                while len(found) < count:
                    found.append((offsets.pop(), size))
        return found

    def close(self) -> None:
        """Images stay; later ones are in ordinary memory."""
        self._most = 0
        self._memory.close()


def room_of_process(file: int, number: int, count: int) -> Room:
    """Room for the images that one of `count` processes loads, in the memory of a file that it
    got.

    Raises:
        OSError: the memory cannot be had.
    """
    each = (ADDRESSES - FOR_THREADS) // count // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY  # fmt: skip
    first = FOR_THREADS + number * each
    memory = SharedMemory("", file=file, addresses=range(first, first + each))
    return Room(memory, int(part_of_memory(MOST_OF_MEMORY, MOST_BYTES)) // count)
