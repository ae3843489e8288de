# SPDX-License-Identifier: Apache-2.0
"""Decoded images in memory that processes see: who draws on one need not decode it again."""

import math
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
from trtdet.shared_memory import SharedMemory

#: Sizes of images are rounded up to this, so that one finds room where another was.
STEP = 1 << 18
#: Bytes of all images, at most.
MOST_BYTES = 1 << 31


@dataclass(frozen=True)
class SharedSource:
    """Where an image lies in that memory, for a process."""

    offset: int
    shape: tuple[int, ...]

    def of(self, memory: NDArray[np.uint8]) -> ImageArray:
        """The image itself; `memory` is all of it."""
        return memory[self.offset : self.offset + math.prod(self.shape)].reshape(self.shape)


class SharedSources(Closing):
    """Loads images into that memory. Where there is no room, they lie in ordinary memory.

    Threads may load at once. The room of an image is used again as soon as its array is gone.

    Raises:
        OSError: no such memory is to be had.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._memory = SharedMemory("trtdet-images")
        self._taken = 0
        self._lock = threading.Lock()
        self._free: dict[int, deque[int]] = {}  # size -> offsets

    @property
    def file(self) -> int:
        """Of the memory."""
        return self._memory.file

    def load(self, path: Path) -> ImageArray:
        """`load_image`, into that memory."""
        image = files.load_image(path)
        size = -(-image.nbytes // STEP) * STEP
        free = self._free.setdefault(size, deque())  # one step: no two threads make one each
        offset = self._room(size, free)
        if offset is None:
            return image
        part = self._memory.view(offset, image.nbytes)
        weakref.finalize(part, free.append, offset).atexit = False
        shared = part.reshape(image.shape)
        shared[:] = image
        return shared

    def _room(self, size: int, free: deque[int]) -> int | None:
        with suppress(IndexError):
            return free.pop()
        with self._lock:
            if self._taken + size > self._most:
                return None
            offset = self._memory.take(size)
            if offset is not None:
                self._taken += size
            return offset

    def where(self, image: ImageArray) -> SharedSource | None:
        """What a process needs to see an image; None: it is in ordinary memory."""
        offset = self._memory.offset_of(image)
        return None if offset < 0 else SharedSource(offset, image.shape)

    def close(self) -> None:
        """Images stay; later ones are in ordinary memory."""
        self._most = 0
        self._memory.close()
