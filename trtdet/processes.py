# SPDX-License-Identifier: Apache-2.0
"""Processes of this program's own that work for one thread: messages go there, answers come back.

Threads of one process share Python's lock: with many of them, each step waits for the others. A
process has a lock of its own.

The first of them imports what all of them need, which takes a third of a second, and forks the
others. This program itself is never forked: it has threads, and perhaps a GPU.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from trtdet.closing import Closing

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What the first process runs.
_CODE = (
    "import sys; sys.path[:] = {path!r}; from {module} import serve; "
    "from trtdet.processes import fork_all; fork_all(serve, {control}, {pipes}, {files})"
)
#: Libraries that would start threads, of which the others have no use, as soon as they are
#: imported.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
#: glibc gives memory of the size of an image back to the system each time, and gets it anew, which
#: costs 0.8 ms an image.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}


def available() -> bool:
    """Whether this system and this Python can have such processes.

    Elsewhere than on Linux, a fork of a process that has loaded libraries may not work. A frozen
    program is no Python that could run other code.
    """
    frozen = getattr(sys, "frozen", False)
    return sys.platform == "linux" and bool(sys.executable) and not frozen


class Answer(Generic[T]):
    """What will come of a message: a `Future` of one thread, and so without locks."""

    __slots__ = ("_is_there", "_value")

    def __init__(self) -> None:
        self._is_there = False

    def set_result(self, value: T) -> None:
        self._value = value
        self._is_there = True

    def done(self) -> bool:
        return self._is_there

    def result(self) -> T:
        """Where it is `done`."""
        return self._value


@dataclass(frozen=True)
class _Failure:
    """The error that ends a process, instead of an answer."""

    text: str
    traceback: str


@dataclass(eq=False)
class _Worker:
    """One of `Processes`.

    Attributes:
        number: its place among them.
        pipe: None: it is known to be gone.
        file: of the pipe.
        asked: what waits for its answers, the oldest first.
        pid: 0: it has not started yet.
    """

    number: int
    pipe: Connection | None
    file: int
    asked: deque[Answer[Any]] = field(default_factory=deque)
    pid: int = 0

    def close(self) -> None:
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None


class Processes(Closing):
    """Some processes that do the same work for one thread.

    Answers come in while that thread is in `ask`, `collect` or `wait_for`.

    Args:
        module: whose `serve(pipe_file, *files)` each runs; `answer_all` is the loop for it.
        work: what they do, for messages: "write results".
        firsts: the first message to each; there is a process for each of them.
        files: numbers of open files that each gets.
        at_once: messages that each may have. With more than one, it goes on while its answer waits
            to be read. Messages and answers must then be short: if both ends sent more than a pipe
            holds, each would wait forever for the other to read.

    Raises:
        OSError: there are no more processes or open files to be had.
    """

    def __init__(
        self,
        module: str,
        work: str,
        firsts: Sequence[object],
        *,
        files: Sequence[int] = (),
        at_once: int = 1,
    ) -> None:
        self._work = work
        self._at_once = at_once
        self._workers: list[_Worker] = []
        self._busy: dict[int, _Worker] = {}  # by file
        self._room: deque[_Worker] = deque()  # each once per message that it can still have
        self._waiting: deque[tuple[object, Answer[Any]]] = deque()  # for room
        self._poll = select.poll()
        self._ended: dict[int, str] = {}  # how, by number, as far as it was said
        self._none_began = False
        self._left = self._starting = len(firsts)  # not known to be gone; and that have not started
        with ExitStack() as theirs, ExitStack() as unless_they_start:
            pipes = []
            for number in range(len(firsts)):
                ours, other = Pipe()
                theirs.enter_context(other)
                worker = _Worker(number, ours, ours.fileno())
                unless_they_start.callback(worker.close)
                self._workers.append(worker)
                pipes.append(other.fileno())
            self._control, control = Pipe(duplex=False)
            theirs.enter_context(control)
            unless_they_start.callback(self._control.close)
            self._first = self._start(module, control.fileno(), pipes, files)
            unless_they_start.pop_all()
        for worker, first in zip(self._workers, firsts, strict=True):
            self._expect(worker, Answer())  # that it has started
            self._send(worker, pickle.dumps(first))

    @staticmethod
    def _start(
        module: str, control: int, pipes: Sequence[int], files: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        """The first process.

        It may start in another folder than this one did, and so gets absolute paths, and where this
        package lies.
        """
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        code = _CODE.format(
            path=path, module=module, control=control, pipes=pipes, files=list(files)
        )
        return subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[control, *pipes, *files],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is this process's, which ends the others
            env={**os.environ, **_ONE_THREAD, **_KEEP_MEMORY},
        )

    def __len__(self) -> int:
        """How many are not known to be gone."""
        return self._left

    @property
    def pids(self) -> list[int]:
        """Of those that have started and are not gone."""
        return [worker.pid for worker in self._workers if worker.pid and worker.pipe is not None]

    @property
    def ready(self) -> bool:
        """Whether all of them have started, and some are left."""
        return self._left > 0 == self._starting

    def ask(self, message: object) -> Answer[Any]:
        """Queue a message. Its answer is None where the process that had it is gone, or where none
        is left.
        """
        answer: Answer[Any] = Answer()
        self._waiting.append((message, answer))
        self.collect()
        return answer

    def wait_for(self, answer: Answer[T]) -> T:
        """What `ask` gave, once it is there."""
        while not answer.done():
            self.collect(wait=True)
        return answer.result()

    def collect(self, *, wait: bool = False) -> None:
        """Take the answers that are there, and send what waits; `wait` for one where there is none
        yet.
        """
        for file, _ in self._poll.poll(None if wait and self._busy else 0):
            self._receive(self._busy[file])
        while self._waiting and self._room:
            worker = self._room.popleft()
            message, answer = self._waiting[0]
            if worker.pipe is not None and self._send(worker, pickle.dumps(message, 5)):
                self._waiting.popleft()
                self._expect(worker, answer)
        while self._waiting and not len(self):
            self._waiting.popleft()[1].set_result(None)

    def _send(self, worker: _Worker, packed: bytes) -> bool:
        """False: it is gone."""
        try:
            if worker.pipe is not None:
                worker.pipe.send_bytes(packed)
        except OSError:
            self._lose(worker)
        return worker.pipe is not None

    def _receive(self, worker: _Worker) -> None:
        """Take an answer that is there; the first is to no message, that it has started."""
        answer: Any = None
        try:
            if worker.pipe is not None:
                answer = worker.pipe.recv()
        except (OSError, EOFError):
            self._lose(worker)
            return
        except Exception as error:  # as of an exception that cannot be unpickled
            self._lose(worker, f"{type(error).__name__}: {error}")
            return
        if isinstance(answer, _Failure):
            logger.debug("%s", answer.traceback)
            self._lose(worker, answer.text)
            return
        if not worker.pid:
            worker.pid = answer
            self._starting -= 1
            self._room.extend([worker] * self._at_once)
        else:
            self._room.append(worker)
        worker.asked.popleft().set_result(answer)
        if not worker.asked:
            self._forget(worker)

    def _expect(self, worker: _Worker, answer: Answer[Any]) -> None:
        worker.asked.append(answer)
        if worker.file not in self._busy:
            self._busy[worker.file] = worker
            self._poll.register(worker.file, select.POLLIN)

    def _forget(self, worker: _Worker) -> None:
        """Expect no answer of it."""
        if self._busy.pop(worker.file, None):
            self._poll.unregister(worker.file)

    def _leave(self, worker: _Worker) -> None:
        """Have nothing to do with it any more."""
        self._forget(worker)
        if worker.pipe is not None:
            self._left -= 1
            self._starting -= not worker.pid
        worker.close()
        while worker.asked:
            worker.asked.popleft().set_result(None)

    def _lose(self, worker: _Worker, reason: str = "") -> None:
        """Go on without it."""
        self._leave(worker)
        if reason := reason or self._how_it_ended(worker):
            logger.warning("one of the processes that %s has ended (%s); the run goes on without it", self._work, reason)  # fmt: skip

    def _how_it_ended(self, worker: _Worker) -> str:
        """ "" where this is not to be said: none of them began, which was said once for all."""
        with suppress(OSError, EOFError):
            while worker.number not in self._ended and self._control.poll(1):
                number, how = self._control.recv()
                self._ended[number] = how
        if worker.number in self._ended or self._none_began:
            return self._ended.get(worker.number, "")
        if any(other.pid for other in self._workers):
            return "how is not known"
        self._none_began = True
        status: int | None = None
        with suppress(subprocess.TimeoutExpired):
            status = self._first.wait(1)
        logger.warning("processes that %s do not start (exit status %s); the run goes on without them", self._work, status)  # fmt: skip
        return ""

    def close(self) -> None:
        """End them at once: what they are at is wanted no more. What was asked and is not answered
        has the answer None.
        """
        for worker in self._workers:
            self._leave(worker)
        self.collect()  # what waits for room
        self._first.terminate()
        if self._first.wait():  # it did not end the others, as when it was killed
            with suppress(ProcessLookupError):
                os.killpg(self._first.pid, signal.SIGKILL)
        self._control.close()


def fork_all(
    serve: Callable[..., None],
    control_file: int,
    pipes: Sequence[int],
    files: Sequence[int],
) -> None:
    """What the first process does: one fork after the other, of which each serves; then say how
    each ended. SIGTERM ends them all.

    Args:
        pipes: one for each.
        files: for all of them.
    """
    # Signals wait until they are asked for: a handler would miss a process that is being forked,
    # and a signal that comes just before `waitpid`.
    signals = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for one in signals:
        signal.signal(one, signal.SIG_DFL)  # a program that ignores one hands that on
    running: dict[int, int] = {}  # pid -> number
    gc.freeze()  # so that more memory stays shared
    with Connection(control_file, readable=False) as control, suppress(BrokenPipeError):
        for number, pipe_file in enumerate(pipes):
            try:
                pid = os.fork()
            except OSError as error:
                control.send((number, f"it did not start: {error.strerror}"))
            else:
                if not pid:
                    _serve_in_fork(serve, pipe_file, files, [control_file, *pipes[number + 1 :]])
                running[pid] = number
            os.close(pipe_file)  # or the end of that process would not be noticed
        while running:
            if signal.sigwait(signals) == signal.SIGTERM:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
            while running and (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                pid, status = ended
                control.send((running.pop(pid), f"exit status {os.waitstatus_to_exitcode(status)}"))


def _serve_in_fork(
    serve: Callable[..., None], pipe_file: int, files: Sequence[int], others: Sequence[int]
) -> None:
    """Does not return.

    Args:
        others: files of other processes.
    """
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for file in others:
            os.close(file)
        serve(pipe_file, *files)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def answer_all(prepare: Callable[[Any], Callable[[Any], object]], pipe_file: int) -> None:
    """What the process does until the other end of the pipe is closed.

    Args:
        prepare: makes, of the first message, what makes an answer of each message after it.
        pipe_file: what `serve` gets.
    """
    answer: Callable[[Any], object] | None = None
    with Connection(pipe_file) as pipe, suppress(EOFError, OSError):  # of the pipe alone
        while True:
            packed = pipe.recv_bytes()
            try:
                message = pickle.loads(packed)
                if answer is None:
                    answer = prepare(message)
                    packed = pickle.dumps(os.getpid())
                else:
                    packed = pickle.dumps(answer(message), 5)
            except Exception as error:  # of any kind: the other end says it, and does the work
                pipe.send(_Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))
                return
            pipe.send_bytes(packed)
