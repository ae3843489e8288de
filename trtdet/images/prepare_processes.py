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
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.geometry import ResizeTransform
from trtdet.images.files import ImageArray
from trtdet.images.prepare import Preparer, Result
from trtdet.images.shared_sources import Room, SharedSource, SharedSources, room_of_process
from trtdet.processes import Answer, Processes, answer_all
from trtdet.shared_memory import SharedMemory, attach

logger = logging.getLogger(__name__)

#: Pins memory that is there already, so that a backend reads it without a copy.
Pin = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

#: What came of an image, on its way from a process: the way back and where the decoded image is, or
#: the reason why it cannot be used.
Sent: TypeAlias = tuple[ResizeTransform, SharedSource | None] | str
#: Images of a message: as many as memory lets be ahead. With fewer, more messages cost more work.
SHARES = (8, 4)
#: The same where decoded images are kept, of which few may be ahead.
SHARES_WITH_SOURCES = (2, 1)
#: Messages that a process has, so that it goes on while its answer waits.
AT_ONCE = 2


@dataclass(frozen=True)
class Rows:
    """What a process does: rows of a batch buffer, from `first` on.

    Attributes:
        paths: as text, which is pickled in a tenth of the time of a `Path`.
        offset: of the buffer in the memory that is seen by all.
        shape: of the buffer.
        rooms: for decoded images, where these are kept: see `SharedSources.free_rooms`.
    """

    paths: Sequence[str]
    first: int
    offset: int
    shape: tuple[int, ...]
    dtype: str
    rooms: Sequence[tuple[int, int]]


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


@dataclass(frozen=True)
class _First:
    """What a process is told before all: what it does, and which of how many it is."""

    preparer: Preparer
    number: int
    count: int


class PreparingProcesses(Closing):
    """Processes that fill rows of batches, for one thread.

    Args:
        sources: where decoded images are kept; None: they are not.

    Raises:
        OSError: no memory that all of them see is to be had.
    """

    def __init__(
        self, preparer: Preparer, count: int, pin: Pin, sources: SharedSources | None = None
    ) -> None:
        self._sources = sources
        bare = replace(preparer, load=None)  # and without what it has made for itself
        with ExitStack() as unless_they_start:
            self.buffers = unless_they_start.enter_context(SharedBuffers(pin))
            files = [self.buffers.file, *([sources.file] if sources else [])]
            self._processes = Processes(
                "trtdet.images.prepare_processes",
                "decode images",
                [_First(bare, number, count) for number in range(count)],
                files=files,
                at_once=AT_ONCE,
            )
            unless_they_start.pop_all()

    def fill(
        self, paths: Sequence[Path], buffer: NDArray[Any], share: int
    ) -> list[tuple[int, Answer[list[Sent | None] | None]]] | None:
        """Have images written into the rows of `buffer`, `share` of them by a process.

        Returns:
            For each share its first row, and what will be said of its images. None: not all of
            them have started, none is left, or they do not see `buffer`.
        """
        self._processes.collect()
        offset = self.buffers.offset_of(buffer) if self._processes.ready else -1
        if offset < 0:
            return None
        texts, dtype = [str(path) for path in paths], buffer.dtype.str
        asked = []
        for first in range(0, len(texts), share):
            some = texts[first : first + share]
            rooms = self._sources.free_rooms(len(some)) if self._sources else ()
            rows = Rows(some, first, offset, buffer.shape, dtype, rooms)
            asked.append((first, self._processes.ask(rows)))
        return asked

    def results(
        self, answer: Answer[list[Sent | None] | None], count: int
    ) -> Sequence[Result | None]:
        """What came of `count` images, once it is there; None: the caller is to prepare the image
        itself.
        """
        found = self._processes.wait_for(answer)
        return [None] * count if found is None else [self._received(result) for result in found]

    def _received(self, result: Sent | None) -> Result | None:
        if not isinstance(result, tuple):
            return result
        transform, source = result
        if source is None or self._sources is None:
            return transform, None
        return transform, self._sources.image(source)

    def close(self) -> None:
        self._processes.close()
        self.buffers.close()


class _Answers:
    """What a process writes into the memory of file number `memory`, and says of it."""

    def __init__(self, first: _First, memory: int, sources: int | None) -> None:
        self._preparer = first.preparer
        self._room: Room | None = None
        self._loaded: ImageArray | None = None  # into the room, as the latest one
        if sources is not None:
            self._room = room_of_process(sources, first.number, first.count)
            self._preparer = replace(first.preparer, load=partial(self._load, self._room))
        self._memory = attach(memory)

    def __call__(self, rows: Rows) -> list[Sent | None]:
        for room in rows.rooms:
            if self._room is not None:
                self._room.give(*room)
        dtype = np.dtype(rows.dtype)
        end = rows.offset + math.prod(rows.shape) * dtype.itemsize
        buffer = self._memory[rows.offset : end].view(dtype).reshape(rows.shape)
        paths = map(Path, rows.paths)
        return [self._prepare(path, buffer[row]) for row, path in enumerate(paths, rows.first)]

    def _load(self, room: Room, path: Path) -> ImageArray:
        self._loaded = room.load(path)
        return self._loaded

    def _prepare(self, path: Path, out: NDArray[Any]) -> Sent | None:
        self._loaded = None
        result = self._preparer.prepare(path, out)
        if isinstance(result, tuple):
            transform, image = result
            if image is None or self._room is None:
                return transform, None
            return transform, self._room.where(image)
        if self._loaded is not None and self._room is not None:
            self._room.give_back(self._loaded)
        return None if isinstance(result, BaseException) else result


def serve(pipe_file: int, memory: int, sources: int | None = None) -> None:
    """What a process does."""
    cv2.setNumThreads(1)  # there is a process for each core
    logging.captureWarnings(True)  # Python's own, which threads do not show either
    answer_all(lambda first: _Answers(first, memory, sources), pipe_file)
