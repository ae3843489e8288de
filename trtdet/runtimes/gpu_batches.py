# SPDX-License-Identifier: Apache-2.0
"""Memory of `trtdet.runtimes.gpu_images`: batches and their buffers, and what a chunk needs beside
them.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trtdet import cuda
from trtdet.closing import Closing
from trtdet.images.batch import Batch, BufferPool
from trtdet.images.files import ImageArray
from trtdet.runtimes import place
from trtdet.runtimes.base import DeviceImages
from trtdet.spec import Preprocessing

#: A batch in the memory of a GPU: valid until it is released, or its batcher is closed.
DeviceBatch: TypeAlias = Batch[DeviceImages]


class Pool(BufferPool[cuda.DeviceBuffer], Closing):
    """Buffers of one size on the GPU, freed together."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(self._make_one)
        self.nbytes = nbytes
        self._all: list[cuda.DeviceBuffer] = []

    def _make_one(self) -> cuda.DeviceBuffer:
        self._all.append(cuda.DeviceBuffer(self.nbytes))
        return self._all[-1]

    def close(self) -> None:
        self._free.clear()
        while self._all:
            self._all.pop().close()


class Slot:
    """What one chunk needs beside its batches.

    Attributes:
        images: decoded ones, whose memory is filled again.
        done: batches that are complete once `end` has passed.
        failed: (path, message) of images that cannot be used, in their order.
        on_cpu: images that the CPU decoded.
    """

    def __init__(self, rows: int, resources: ExitStack) -> None:
        """
        Args:
            rows: images of the chunk.
            resources: closed when the slot is no longer needed.
        """
        self.end = resources.enter_context(cuda.Event())
        self.rows = cuda.pinned_empty((rows,), place.ROW)
        self.table = resources.enter_context(cuda.DeviceBuffer(rows * place.ROW.itemsize))
        self.images: list[Any] = []
        self.done: list[DeviceBatch] = []
        self.failed: list[tuple[Path, str]] = []
        self.on_cpu = 0
        self._staged = cuda.pinned_empty((0,), np.uint8)
        self._uploaded = resources.enter_context(cuda.DeviceBuffer(0))
        self._outgrown: list[NDArray[np.uint8]] = []  # freed at the end: the GPU would wait for it
        self._resources = resources

    def upload(self, images: Sequence[ImageArray], stream: cuda.Stream) -> list[int]:
        """Queue copies of images to the GPU; their addresses there.

        Those of an earlier call are overwritten: the GPU must be through with them.
        """
        offsets = list(itertools.accumulate((image.nbytes for image in images), initial=0))
        if not images:
            return []
        if self._staged.nbytes < offsets[-1]:
            nbytes = max(offsets[-1], 2 * self._staged.nbytes)
            staged = cuda.pinned_empty((nbytes,), np.uint8)
            self._uploaded = self._resources.enter_context(cuda.DeviceBuffer(nbytes))
            self._outgrown.append(self._staged)
            self._staged = staged
        for image, offset in zip(images, offsets, strict=False):
            target = self._staged[offset : offset + image.nbytes]
            np.copyto(target.reshape(image.shape), image)
        stream.copy_in(self._uploaded.handle, self._staged[: offsets[-1]])
        return [self._uploaded.handle + offset for offset in offsets[:-1]]

    def empty(self) -> None:
        """Make it ready for the next chunk: batches that were not handed out are released."""
        while self.done:
            self.done.pop().release()
        self.failed.clear()
        self.on_cpu = 0


def image_bytes(preprocessing: Preprocessing) -> int:
    """Bytes of one network input."""
    return math.prod(preprocessing.image_shape) * np.dtype(preprocessing.dtype).itemsize
