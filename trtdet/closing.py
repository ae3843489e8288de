# SPDX-License-Identifier: Apache-2.0
"""Things that hold something: use them in a `with` block, or close them by hand."""

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

AnyClosing = TypeVar("AnyClosing", bound="Closing")


class Closing(ABC):
    """A context manager whose end is `close()`."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held; a second call does no harm."""

    def __enter__(self: AnyClosing) -> AnyClosing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def without_interrupt() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a block that does not bear it: of an import of native code,
    which may crash, or take it for a fault of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread alone
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored
        yield
        return
    came: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(signal.SIGINT, came[0])
