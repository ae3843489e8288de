# SPDX-License-Identifier: Apache-2.0
"""Worker processes of `ImageBatcher`, which decode into memory that they share with it.

Threads of one process share Python's lock. With many of them, each step between decoding and
resizing waits for the others; a process has a lock of its own. The memory has no name
(`memfd_create`), so that nothing is left of it, whoever is killed.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.images.prepare import Preparer, Result
from trtdet.processes import Process, answer_all

#: Memory that a process keeps. Batches that are given back need less; of others, the oldest is let
#: go.
_KEPT = 64
Value = TypeVar("Value")


def keep(known: OrderedDict[int, Value], number: int, value: Value) -> None:
    """Note what is new, and drop the oldest of too many.

    Both ends do it alike, so that each knows what the other has.
    """
    known[number] = value
    if len(known) > _KEPT:
        known.popitem(last=False)


class SharedMemory:
    """Memory for batches that worker processes can write into: what `ImageBatcher` takes as
    `allocate`.
    """

    def __init__(self) -> None:
        self._numbers = count()
        self._known: dict[int, tuple[int, int]] = {}  # address -> number of the memory, its file

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array in memory of its own, which lives as long as the array and its views."""
        size = max(1, math.prod(shape) * dtype.itemsize)
        file = os.memfd_create("trtdet", os.MFD_CLOEXEC)
        os.ftruncate(file, size)
        array = np.frombuffer(mmap.mmap(file, size), dtype).reshape(shape)
        self._known[array.ctypes.data] = next(self._numbers), file
        weakref.finalize(array, self._forget, array.ctypes.data)
        return array

    def find(self, array: NDArray[Any]) -> tuple[int, int]:
        """The number of the memory of an array that `allocate` gave, and its file."""
        return self._known[array.ctypes.data]

    def _forget(self, address: int) -> None:
        os.close(self._known.pop(address)[1])


class Worker(Closing):
    """A process that prepares images. For one thread.

    Raises:
        OSError: no more processes to be had.
    """

    def __init__(self, preparer: Preparer, memory: SharedMemory) -> None:
        self._memory = memory
        self._known: OrderedDict[int, None] = OrderedDict()  # memory that the process has
        self._process = Process(__name__, "decodes images", preparer)

    def ready(self) -> bool:
        """Whether it has started."""
        return self._process.ready()

    def prepare(
        self, paths: Sequence[Path], buffer: NDArray[Any], memory: NDArray[Any], start: int
    ) -> list[Result] | None:
        """Images into rows of `buffer` from `start` on, which begins where `memory` does.

        None where the process is gone.
        """
        number, file = self._memory.find(memory)
        is_new = number not in self._known
        task = (number, is_new, memory.nbytes, buffer.dtype.str, buffer.shape, start, list(paths))
        results: list[Result] | None = self._process.ask(task, file=file if is_new else None)
        if is_new:
            keep(self._known, number, None)
        return results

    def close(self) -> None:
        """End the process at once: what it is at is wanted no more."""
        self._process.close()


def serve(pipe_file: int) -> None:
    """What the process does."""
    cv2.setNumThreads(1)
    answer_all(pipe_file, _Memories)


class _Memories:
    """The memory that a process has, and what it writes there."""

    def __init__(self, preparer: Preparer) -> None:
        self._preparer = preparer
        self._known: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()

    def __call__(self, task: tuple[Any, ...], pipe: Connection) -> list[Result]:
        number, is_new, size, dtype, shape, start, paths = task
        if is_new:
            own = reduction.recv_handle(pipe)
            keep(self._known, number, np.frombuffer(mmap.mmap(own, size), np.uint8))
            os.close(own)
        taken = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = self._known[number][:taken].view(dtype).reshape(shape)
        return [self._preparer.prepare(path, buffer[start + i]) for i, path in enumerate(paths)]
