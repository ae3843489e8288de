# SPDX-License-Identifier: Apache-2.0
"""A process of this program's own that works for one thread: messages go there, answers come back.

Threads of one process share Python's lock: with many of them, each step waits for the others. A
process has a lock of its own.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from trtdet.closing import Closing

logger = logging.getLogger(__name__)

#: What a child process runs: its end of the pipe is the argument.
_CODE = "import sys; sys.path[:] = {path!r}; from {module} import serve; serve(int(sys.argv[1]))"


def available() -> bool:
    """Whether this system and this Python can have such processes."""
    return bool(sys.executable) and os.name == "posix"


class Process(Closing):
    """A child process. For one thread.

    Args:
        module: whose `serve(pipe_file)` the process runs; `answer_all` is the loop for it.
        work: what it does, for messages: "writes results".
        first: the first message.

    Raises:
        OSError: no more processes to be had.
    """

    def __init__(self, module: str, work: str, first: object) -> None:
        self._work = work
        ours, theirs = Pipe()
        self._pipe: Connection | None = ours
        code = _CODE.format(path=sys.path, module=module)
        with theirs, ExitStack() as unless_it_starts:
            unless_it_starts.callback(ours.close)
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
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
                self._pipe.recv()
            except (OSError, EOFError):
                self._lost()

    def ask(self, message: object) -> Any:
        """The answer to a message; None where the process is gone."""
        if self._pipe is None:
            return None
        try:
            self._pipe.send(message)
            return self._pipe.recv()
        except (OSError, EOFError):
            self._lost()
            return None

    def _lost(self) -> None:
        """Go on without it."""
        self._pipe = None
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            self.close()
            status = self._process.returncode
        logger.warning("a process that %s has ended (exit status %d); the run goes on without it", self._work, status)  # fmt: skip

    def close(self) -> None:
        """End the process at once: what it is at is wanted no more."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        self._process.kill()
        self._process.wait()


def answer_all(pipe_file: int, prepare: Callable[[Any], Callable[[Any], object]]) -> None:
    """What the process does until the other end of the pipe is closed.

    Args:
        prepare: makes, of the first message, what makes an answer of each message after it.
    """
    with Connection(pipe_file) as pipe:
        try:
            answer = prepare(pipe.recv())
            pipe.send(True)
            while True:
                pipe.send(answer(pipe.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
