# SPDX-License-Identifier: Apache-2.0
"""Worker processes of `ImageBatcher`, which decode into memory that they share with it.

Threads of one process share Python's lock. With many of them, each step between decoding and
resizing waits for the others; a process has a lock of its own. The memory has no name
(`memfd_create`), so that nothing is left of it, whoever is killed.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.images.prepare import Preparer, Result

logger = logging.getLogger(__name__)

#: What a child process runs: its end of the pipe is the argument.
_CODE = "import sys; sys.path[:] = {path!r}; from trtdet.images.processes import serve; serve(int(sys.argv[1]))"


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


def available() -> bool:
    """Whether this system and this Python can have such processes."""
    return bool(sys.executable) and hasattr(os, "memfd_create") and hasattr(reduction, "send_handle")  # fmt: skip


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
        self._is_ready = False
        ours, theirs = Pipe()
        self._pipe: Connection | None = ours
        code = _CODE.format(path=sys.path)
        with theirs, ExitStack() as unless_it_starts:
            unless_it_starts.callback(ours.close)
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the parent's, which ends this process
            )
            unless_it_starts.pop_all()
        self._send(preparer)

    def ready(self) -> bool:
        """Whether it has started: that takes as long as some hundred images, and the caller can
        do these meanwhile.
        """
        if not self._is_ready and self._pipe is not None:
            try:
                self._is_ready = self._pipe.poll() and bool(self._pipe.recv())
            except (OSError, EOFError):
                self._lost()
        return self._is_ready

    def prepare(
        self, paths: Sequence[Path], buffer: NDArray[Any], memory: NDArray[Any], start: int
    ) -> list[Result] | None:
        """Images into rows of `buffer` from `start` on, which begins where `memory` does.

        None where the process is gone.
        """
        if self._pipe is None:
            return None
        try:
            number, file = self._memory.find(memory)
            is_new = number not in self._known
            task = (number, is_new, memory.nbytes, buffer.dtype.str, buffer.shape, start, list(paths))  # fmt: skip
            self._pipe.send(task)
            if is_new:
                reduction.send_handle(self._pipe, file, self._process.pid)
                keep(self._known, number, None)
            results: list[Result] = self._pipe.recv()
        except (OSError, EOFError):
            self._lost()
            return None
        return results

    def _send(self, what: object) -> None:
        try:
            if self._pipe is not None:
                self._pipe.send(what)
        except OSError:
            self._lost()

    def _lost(self) -> None:
        """Go on without it."""
        self._is_ready = False
        self._pipe = None
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            self.close()
            status = self._process.returncode
        logger.warning("a process that decodes images has ended (exit status %d); the run goes on without it", status)  # fmt: skip

    def close(self) -> None:
        """End the process at once: what it is at is wanted no more."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        self._process.kill()
        self._process.wait()


def serve(pipe_file: int) -> None:
    """What the process does until the other end of the pipe is closed."""
    cv2.setNumThreads(1)
    memories: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
    with Connection(pipe_file) as pipe:
        try:
            preparer: Preparer = pipe.recv()
            pipe.send(True)
            while True:
                number, is_new, size, dtype, shape, start, paths = pipe.recv()
                if is_new:
                    own = reduction.recv_handle(pipe)
                    keep(memories, number, np.frombuffer(mmap.mmap(own, size), np.uint8))
                    os.close(own)
                taken = math.prod(shape) * np.dtype(dtype).itemsize
                buffer = memories[number][:taken].view(dtype).reshape(shape)
                pipe.send([preparer.prepare(path, buffer[start + i]) for i, path in enumerate(paths)])  # fmt: skip
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
