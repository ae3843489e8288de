# SPDX-License-Identifier: Apache-2.0
"""Images decoded and placed by processes, straight into batches in memory that all of them see.

Threads of one process do the same (`trtdet.images.batcher`), but each step between two calls into
OpenCV waits for Python's lock: on 16 cores that takes a quarter of their time.
"""

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.images.prepare import Preparer, Result
from trtdet.processes import Answer, Processes, answer_all
from trtdet.shared_memory import SharedMemory, attach

logger = logging.getLogger(__name__)

#: Pins memory that is there already, so that a backend reads it without a copy.
Pin = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

#: Images of a message: as many as memory lets be ahead. With fewer, more messages cost more work.
SHARES = (8, 4)
#: Messages that a process has, so that it goes on while its answer waits.
AT_ONCE = 2


@dataclass(frozen=True)
class Rows:
    """What a process does: rows of a batch buffer, from `first` on.

    Attributes:
        paths: as text, which is pickled in a tenth of the time of a `Path`.
        offset: of the buffer in the memory that is seen by all.
        shape: of the buffer.
    """

    paths: Sequence[str]
    first: int
    offset: int
    shape: tuple[int, ...]
    dtype: str


class SharedBuffers(Closing):
    """Makes batch buffers in memory that processes see.

    Raises:
        OSError: no such memory is to be had.
    """

    def __init__(self, pin: Pin) -> None:
        self._pin = pin
        self._memory = SharedMemory("trtdet-batches")

    @property
    def file(self) -> int:
        """Of the memory."""
        return self._memory.file

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A buffer; its memory is freed with the last array that views it. Where there is no more
        of it, of ordinary memory.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        offset = self._memory.take(nbytes)
        if offset is None:
            memory = np.empty(nbytes, np.uint8)
        else:
            memory = self._memory.view(offset, nbytes)
            weakref.finalize(memory, self._memory.free, offset, nbytes).atexit = False
        return self._pin(memory).view(dtype).reshape(shape)

    def offset_of(self, buffer: NDArray[Any]) -> int:
        """Where a buffer lies; -1: in ordinary memory."""
        return self._memory.offset_of(buffer)

    def close(self) -> None:
        """Buffers stay; later ones are of ordinary memory."""
        self._memory.close()


class PreparingProcesses(Closing):
    """Processes that fill rows of batches, for one thread.

    Raises:
        OSError: no memory that all of them see is to be had.
    """

    def __init__(self, preparer: Preparer, count: int, pin: Pin) -> None:
        with ExitStack() as unless_they_start:
            self.buffers = unless_they_start.enter_context(SharedBuffers(pin))
            self._processes = Processes(
                count,
                "trtdet.images.prepare_processes",
                "decode images",
                replace(preparer),  # without what it has made for itself
                files=[self.buffers.file],
                at_once=AT_ONCE,
            )
            unless_they_start.pop_all()

    def fill(
        self, paths: Sequence[Path], buffer: NDArray[Any], share: int
    ) -> list[tuple[int, Answer[list[Result | None] | None]]] | None:
        """Have images written into the rows of `buffer`, `share` of them by a process.

        Returns:
            For each share its first row, and what will be said of its images. None: not all of
            them have started, none is left, or they do not see `buffer`.
        """
        self._processes.collect()
        offset = self.buffers.offset_of(buffer) if self._processes.ready else -1
        if offset < 0:
            return None
        texts, shape, dtype = [str(path) for path in paths], buffer.shape, buffer.dtype.str
        ask = self._processes.ask
        return [
            (first, ask(Rows(texts[first : first + share], first, offset, shape, dtype)))
            for first in range(0, len(texts), share)
        ]

    def results(
        self, answer: Answer[list[Result | None] | None], count: int
    ) -> Sequence[Result | None]:
        """What came of `count` images, once it is there; None: the caller is to prepare the image
        itself.
        """
        found = self._processes.wait_for(answer)
        return [None] * count if found is None else found

    def close(self) -> None:
        self._processes.close()
        self.buffers.close()


class _Answers:
    """What a process writes into the memory of file number `memory`, and says of it."""

    def __init__(self, preparer: Preparer, memory: int) -> None:
        self._preparer = preparer
        self._memory = attach(memory)

    def __call__(self, rows: Rows) -> list[Result | None]:
        dtype = np.dtype(rows.dtype)
        end = rows.offset + math.prod(rows.shape) * dtype.itemsize
        buffer = self._memory[rows.offset : end].view(dtype).reshape(rows.shape)
        paths = map(Path, rows.paths)
        return [self._prepare(path, buffer[row]) for row, path in enumerate(paths, rows.first)]

    def _prepare(self, path: Path, out: NDArray[Any]) -> Result | None:
        result = self._preparer.prepare(path, out)
        return None if isinstance(result, BaseException) else result


def serve(pipe_file: int, memory: int) -> None:
    """What a process does."""
    cv2.setNumThreads(1)  # there is a process for each core
    logging.captureWarnings(True)  # Python's own, which threads do not show either
    answer_all(lambda preparer: _Answers(preparer, memory), pipe_file)
