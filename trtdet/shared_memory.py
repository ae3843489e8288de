# SPDX-License-Identifier: Apache-2.0
"""Memory without a name that processes of this program see too: nothing is left of it, whatever
ends them.
"""

import logging
import mmap
import os
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet import processes
from trtdet.closing import Closing

logger = logging.getLogger(__name__)

#: Addresses, of which memory takes up those alone that are in use.
ADDRESSES = 1 << 37


def can_share() -> bool:
    """Whether this system has such memory, and processes."""
    return processes.available() and hasattr(os, "memfd_create")


class SharedMemory(Closing):
    """Memory that is taken in parts. A process that gets the file sees it by `attach`, and can take
    parts of its own.

    Args:
        file: of memory that is there; None: of new memory.
        addresses: those from which parts are taken, for no other to take parts there.

    Attributes:
        file: its number; -1 once closed. What was taken stays.

    Raises:
        OSError: none is to be had.
    """

    def __init__(
        self, name: str, *, file: int | None = None, addresses: range = range(ADDRESSES)
    ) -> None:
        self._next, self._end = addresses.start, addresses.stop
        self.file = os.memfd_create(name) if file is None else file
        try:
            if file is None:
                os.truncate(self.file, ADDRESSES)
            # One mapping for all parts: each mapping holds a file open.
            self._all = mmap.mmap(self.file, ADDRESSES)
        except BaseException:
            self.close()
            raise
        self._address = np.frombuffer(self._all, np.uint8, 1).ctypes.data

    def take(self, nbytes: int) -> int | None:
        """Where a part begins that was never taken, at a page; None: there is no more memory."""
        offset = self._next
        if offset + nbytes > self._end:
            return None
        try:
            # Without this, a lack of memory would end the process that writes, by SIGBUS.
            os.posix_fallocate(self.file, offset, nbytes)
        except OSError as error:
            logger.debug("%d bytes that processes see: %s", nbytes, error)
            return None
        self._next += -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return offset

    def view(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """A part as an array; views of it keep it alive."""
        return np.frombuffer(self._all, np.uint8, nbytes, offset)

    def free(self, offset: int, nbytes: int) -> None:
        """Give the memory of a part back. Its addresses are not used again: a process may be
        writing there.
        """
        with suppress(OSError):
            self._all.madvise(mmap.MADV_REMOVE, offset, nbytes)

    def offset_of(self, array: NDArray[Any]) -> int:
        """Where the first byte of an array lies; -1: elsewhere than in this memory."""
        offset = int(array.ctypes.data) - self._address
        return offset if 0 <= offset < ADDRESSES else -1

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def attach(file: int) -> NDArray[np.uint8]:
    """All of the memory of a file, in a process that got it."""
    return np.frombuffer(mmap.mmap(file, 0), np.uint8)
