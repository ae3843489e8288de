# SPDX-License-Identifier: Apache-2.0
"""Batches of images, and the buffers that they lie in."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from trtdet.geometry import ResizeTransform
from trtdet.images.files import ImageArray

AnyImages = TypeVar("AnyImages")
Buffer = TypeVar("Buffer")


@dataclass(frozen=True, eq=False)
class Batch(Generic[AnyImages]):
    """Some images, ready for the network.

    Attributes:
        images: (n, *image_shape) in the network's layout and dtype, C-contiguous: an array, or what
            stands for one on a GPU. n = len(batch), or the batch size with `pad_to_batch`: the rows
            beyond are zero.
        paths: one per real image.
        transforms: one per real image, the way back to source pixels.
        sources: the decoded images, where they were asked for; None in place of one for which there
            was no room.
    """

    images: AnyImages
    paths: tuple[Path, ...]
    transforms: tuple[ResizeTransform, ...]
    sources: tuple[ImageArray | None, ...] | None = None
    lease: "Lease[Any] | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        """The number of real images."""
        return len(self.paths)

    def release(self) -> None:
        """Give the memory of `images` back to be filled again; the arrays must not be read after
        this.

        Optional: a batch that is never released is simply the caller's, and another buffer is
        allocated.
        """
        if self.lease is not None:
            self.lease.release()


class Lease(Generic[Buffer]):
    """The right to give one buffer back to its pool, once."""

    def __init__(self, pool: "BufferPool[Buffer]", buffer: Buffer) -> None:
        self._pool = pool
        self._buffers = [buffer]

    def release(self) -> None:
        while self._buffers:
            self._pool.give(self._buffers.pop())


class BufferPool(Generic[Buffer]):
    """Batch buffers: those given back first, new ones, which `make` makes, where there are none, so
    that taking never waits.

    Threads may take and give at once (a deque's append and pop are atomic).
    """

    def __init__(self, make: Callable[[], Buffer]) -> None:
        self._make = make
        self._free: deque[Buffer] = deque()

    def take(self) -> Buffer:
        try:
            return self._free.pop()
        except IndexError:
            return self._make()

    def give(self, buffer: Buffer) -> None:
        self._free.append(buffer)
