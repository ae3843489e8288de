# SPDX-License-Identifier: Apache-2.0
"""A process of this program's own that works for one thread: messages go there, answers come back.

Threads of one process share Python's lock: with many of them, each step waits for the others. A
process has a lock of its own.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from trtdet.closing import Closing

logger = logging.getLogger(__name__)

#: Bytes from which on an array does not go through the pipe.
_LARGE = 1 << 14
#: Bytes of arrays whose memory is kept for the next message.
_MOST_KEPT = 1 << 26
#: What a child process runs: its end of the pipe, and the memory where there is some, are the
#: arguments.
_CODE = (
    "import sys; sys.path[:] = {path!r}; from {module} import serve; serve(*map(int, sys.argv[1:]))"
)


def available() -> bool:
    """Whether this system and this Python can have such processes."""
    return bool(sys.executable) and os.name == "posix"


@dataclass(frozen=True)
class _Failure:
    """The error that ends a child process, instead of an answer."""

    text: str
    traceback: str


class Process(Closing):
    """A child process. For one thread.

    Args:
        module: whose `serve(pipe_file, memory)` the process runs; `answer_all` is the loop for it.
        work: what it does, for messages: "writes results".
        first: the first message.

    Raises:
        OSError: no more processes to be had.
    """

    def __init__(self, module: str, work: str, first: object) -> None:
        self._work = work
        ours, theirs = Pipe()
        self._pipe: Connection | None = ours
        self._arrays = _Arrays()
        code = _CODE.format(path=sys.path, module=module)
        with theirs, ExitStack() as unless_it_starts:
            unless_it_starts.callback(ours.close)
            unless_it_starts.callback(self._arrays.close)
            shared = [theirs.fileno(), *self._arrays.files]
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, *map(str, shared)],
                pass_fds=shared,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the parent's, which ends this process
            )
            unless_it_starts.pop_all()
        try:
            ours.send(first)
        except OSError:
            self._lost()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, as far as that was noticed."""
        return self._pipe is None

    def wait_until_ready(self) -> None:
        """Return once it has started, which takes a third of a second, or is gone. To be called
        once, before `ask`.
        """
        if self._pipe is not None:
            try:
                answer = self._pipe.recv()
            except (OSError, EOFError):
                self._lost()
            else:
                self._check(answer)

    def ask(self, message: object) -> Any:
        """The answer to a message; None where the process is gone."""
        if self._pipe is None:
            return None
        try:
            self._pipe.send_bytes(self._arrays.pack(message))
            answer = self._pipe.recv()
        except (OSError, EOFError):
            self._lost()
            return None
        self._arrays.shrink()
        return self._check(answer)

    def _check(self, answer: Any) -> Any:
        """The answer; None where it is the process's last one."""
        if not isinstance(answer, _Failure):
            return answer
        logger.debug("%s", answer.traceback)
        self._lost(answer.text)
        return None

    def _lost(self, reason: str = "") -> None:
        """Go on without it."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        self._arrays.close()
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            self.close()
            status = self._process.returncode
        logger.warning("a process that %s has ended (%s); the run goes on without it", self._work, reason or f"exit status {status}")  # fmt: skip

    def close(self) -> None:
        """End the process at once: what it is at is wanted no more."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        self._arrays.close()
        self._process.kill()
        self._process.wait()


class _Arrays(Closing):
    """The large arrays of messages, in memory that both processes see: through a pipe they would be
    copied in small pieces.

    Without a name, so that nothing is left of it, whatever ends the processes. Where the system has
    no such memory, or no more of it, arrays go through the pipe.

    Attributes:
        files: the memory, for the child.
    """

    def __init__(self) -> None:
        self.files: list[int] = []
        if hasattr(os, "memfd_create"):  # Linux
            with suppress(OSError):
                self.files.append(os.memfd_create("trtdet"))

    def pack(self, message: object) -> bytes:
        """What goes through the pipe; the arrays are where `unpack` finds them."""
        if self.files:
            try:
                return self._in_memory(message)
            except OSError as error:
                logger.debug("large arrays go through the pipe: %s", error)
                self.close()
        return pickle.dumps((pickle.dumps(message, 5), []))

    def _in_memory(self, message: object) -> bytes:
        large: list[memoryview] = []

        def stays(buffer: pickle.PickleBuffer) -> bool:
            if (raw := buffer.raw()).nbytes < _LARGE:
                return True
            large.append(raw)
            return False

        data = pickle.dumps(message, 5, buffer_callback=stays)
        sizes = [raw.nbytes for raw in large]
        for raw, start in zip(large, _starts(sizes), strict=False):
            done = 0
            while done < raw.nbytes:  # 2 GiB at most at a time
                done += os.pwrite(self.files[0], raw[done:], start + done)
        return pickle.dumps((data, sizes))

    def shrink(self) -> None:
        """Give much memory back, once the message is answered."""
        if self.files and os.fstat(self.files[0]).st_size > _MOST_KEPT:
            os.ftruncate(self.files[0], 0)

    def close(self) -> None:
        while self.files:
            os.close(self.files.pop())


def unpack(packed: bytes, memory: int | None) -> Any:
    """The message that `_Arrays.pack` made; its arrays are read-only, and good until the next
    one.
    """
    data, sizes = pickle.loads(packed)
    if memory is None or not sizes:
        return pickle.loads(data)
    seen = memoryview(mmap.mmap(memory, 0, access=mmap.ACCESS_READ))
    parts = zip(_starts(sizes), sizes, strict=False)
    return pickle.loads(data, buffers=[seen[start : start + size] for start, size in parts])


def _starts(sizes: Sequence[int]) -> Iterator[int]:
    """Where arrays of these bytes lie, each at a place that suits every type."""
    return itertools.accumulate((-(-size // 64) * 64 for size in sizes), initial=0)


def answer_all(
    prepare: Callable[[Any], Callable[[Any], object]], pipe_file: int, memory: int | None = None
) -> None:
    """What the process does until the other end of the pipe is closed.

    Args:
        prepare: makes, of the first message, what makes an answer of each message after it.
        pipe_file, memory: what `serve` gets.
    """
    with Connection(pipe_file) as pipe:
        try:
            answer = prepare(pipe.recv())
            pipe.send(True)
            while True:
                pipe.send(answer(unpack(pipe.recv_bytes(), memory)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # of any kind: the other end says it, and does the work itself
            text = f"{type(error).__name__}: {error}"
            with suppress(OSError):
                pipe.send(_Failure(text, traceback.format_exc()))
