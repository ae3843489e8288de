# SPDX-License-Identifier: Apache-2.0
"""`trtdet.processes`: a child process ends with its parent, and with it alone."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from trtdet.processes import Processes, available

pytestmark = pytest.mark.skipif(not available(), reason="this system has no such processes")

START = """
import os, signal, sys, time
from pathlib import Path
from trtdet.processes import Processes
from trtdet.results.image_files import ImageFiles
from trtdet.spec import ModelSpec, Nms, Preprocessing
spec = ModelSpec("automl", Preprocessing((64, 64)), Nms(), (1,))
files = ImageFiles(Path(sys.argv[1]), spec, (), False, 0.3, "png", False)
processes = Processes("trtdet.results.image_files", "write results", [files] * 3)


def wait_until_started():
    while len(processes) and not processes.ready:
        processes.collect(wait=True)
"""


def wait_until_started(processes: Processes) -> None:
    while len(processes) and not processes.ready:
        processes.collect(wait=True)


def is_alive(pid: str) -> bool:
    """Whether a process runs: one that has ended and was not waited for does not."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_alive(str(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_they_end_with_their_parent(tmp_path: Path) -> None:
    """And so does the process that forked them."""
    code = f"{START}\nwait_until_started()\nprint(processes._first.pid, *processes.pids, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == -9, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(set(pids)) == 4
    for pid in pids:
        wait_for_end(pid)


def test_ctrl_c_does_not_reach_one_that_starts(tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of a terminal; the parent alone is to answer."""
    code = f"""
{START}
signal.signal(signal.SIGINT, lambda *_: None)
print("started", flush=True)
wait_until_started()
print(len(processes), flush=True)
processes.close()
signal.signal(signal.SIGINT, signal.SIG_IGN)
"""
    with subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{code}", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None and parent.stdout.readline() == "started\n"
        while parent.poll() is None:
            os.killpg(parent.pid, signal.SIGINT)
            time.sleep(0.02)
        output, errors = parent.communicate()
    assert (output, errors, parent.returncode) == ("3\n", "", 0)


def test_those_that_do_not_start_are_gone(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with Processes("trtdet.no_such_module", "write results", [None] * 3) as processes:
        assert processes.wait_for(processes.ask("anything")) is None
        assert len(processes) == 0
    said = "processes that write results do not start (exit status 1); the run goes on without them"
    assert caplog.messages == [said]


FAILS = """
from trtdet.processes import answer_all


class OfTwo(ValueError):
    def __init__(self, one, two):
        super().__init__(one + two)


def fail(message):
    if message == "two":
        return OfTwo("no ", "room")
    if message == "end":
        raise EOFError("no more of it")
    raise MemoryError(f"no room for {message}")


def serve(*files):
    answer_all(lambda first: fail if first == "later" else fail(first), *files)
"""


@pytest.mark.parametrize("first", ["later", "at once"])
def test_an_error_of_any_kind_ends_it_in_one_line(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Not in a traceback of its own; who asks does the work, and has the error if it is real."""
    (tmp_path / "failing.py").write_text(FAILS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])  # not those of others
    with Processes("failing", "fail", [first]) as processes:
        assert processes.wait_for(processes.ask("this")) is None
        assert len(processes) == 0
    what = "this" if first == "later" else "at once"
    assert caplog.messages == [f"one of the processes that fail has ended (MemoryError: no room for {what}); the run goes on without it"]  # fmt: skip
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("end", "EOFError: no more of it"),  # of the work, not of the pipe
        ("two", "TypeError: OfTwo.__init__() missing 1 required positional argument: 'two'"),
    ],
)
def test_an_error_that_cannot_be_sent_or_means_another_thing_is_one_like_others(message: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    (tmp_path / "failing.py").write_text(FAILS)
    monkeypatch.syspath_prepend(tmp_path)
    with Processes("failing", "fail", ["later"]) as processes:
        assert processes.wait_for(processes.ask(message)) is None
        assert len(processes) == 0
    assert caplog.messages == [f"one of the processes that fail has ended ({reason}); the run goes on without it"]  # fmt: skip


def test_they_start_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative entry of sys.path is of the folder that is the current one now, and an entry that
    is no text does not count for Python.
    """
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "slow_echo.py").write_text(SLOW_ECHO)
    monkeypatch.chdir(tmp_path)
    python = [path for path in sys.path if Path(path).resolve() not in (ROOT, Path.cwd())]
    monkeypatch.setattr(sys, "path", [*python, "modules", tmp_path])
    with Processes("slow_echo", "echo", [None]) as processes:
        assert processes.wait_for(processes.ask(1))[0] == 1


ENVIRONMENT = """
import os
from trtdet.processes import answer_all


def serve(*files):
    answer_all(lambda first: lambda name: (first, os.environ.get(name)), *files)
"""


def test_their_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one's, but libraries start no threads, and memory is kept, whatever is set for this
    one.
    """
    wanted = {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        "MALLOC_TRIM_THRESHOLD_": "67108864",
        "TRTDET_OF_THE_USER": "x = 1",
    }
    monkeypatch.setenv("TRTDET_OF_THE_USER", "x = 1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    (tmp_path / "environment.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)
    with Processes("environment", "answer", [None]) as processes:
        found = {name: processes.wait_for(processes.ask(name))[1] for name in wanted}
    assert found == wanted
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MALLOC_TRIM_THRESHOLD_"]) == ("7", "131072")
    assert "OPENBLAS_NUM_THREADS" not in os.environ


def test_each_has_a_first_message_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "environment.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)
    with Processes("environment", "answer", ["one", "two", "three"]) as processes:
        assert len(processes) == 3
        wait_until_started(processes)
        answers = [processes.ask("TRTDET_NO_SUCH") for _ in range(3)]  # one for each
        firsts = [processes.wait_for(answer)[0] for answer in answers]
    assert sorted(firsts) == ["one", "three", "two"]


def test_a_frozen_program_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start itself again."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert not available()


SLOW_ECHO = """
import os, time
from trtdet.processes import answer_all


def echo(message):
    time.sleep(message / 1000)
    return message, os.getpid()


def serve(*files):
    answer_all(lambda first: echo, *files)
"""


@pytest.fixture
def echoes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """Two processes that take as many milliseconds for a message as it says."""
    (tmp_path / "slow_echo.py").write_text(SLOW_ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    with Processes("slow_echo", "echo", [None] * 2) as processes:
        assert len(processes) == 2
        yield processes


def test_each_of_some_processes_has_one_message_at_a_time(echoes: Processes) -> None:
    """The answers are those to the messages, whoever is done first."""
    messages = [60, 0, 1, 2, 3, 40, 4, 5]
    answers = [echoes.ask(message) for message in messages]
    found = [echoes.wait_for(answer) for answer in answers]
    assert [message for message, _ in found] == messages
    assert len({pid for _, pid in found}) == 2
    assert found[0][1] not in {pid for _, pid in found[1:5]}  # these did not wait for the first


def test_who_asked_a_process_that_has_ended_hears_so(
    echoes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    """The message that it had is lost; those that waited go to the other, and None is the answer
    where there is no other.
    """
    wait_until_started(echoes)  # or one could answer all three
    pids = {
        echoes.wait_for(answer)[1] for answer in [echoes.ask(50), echoes.ask(50), echoes.ask(50)]
    }
    first, second = sorted(pids)
    os.kill(first, signal.SIGKILL)  # while it is idle
    wait_for_end(first)
    answers = [echoes.ask(message) for message in (200, 0, 1)]
    assert [echoes.wait_for(answer) for answer in answers] == [(200, second), (0, second), (1, second)]  # fmt: skip
    assert len(echoes) == 1
    answers = [echoes.ask(message) for message in (1000, 0)]
    os.kill(second, signal.SIGKILL)
    assert [echoes.wait_for(answer) for answer in answers] == [None, None]
    assert len(echoes) == 0
    assert echoes.wait_for(echoes.ask(1)) is None
    said = "one of the processes that echo has ended (exit status -9); the run goes on without it"
    assert caplog.messages == [said, said]


def test_closing_ends_what_works(echoes: Processes) -> None:
    """At once, and nothing is left of it, not even of the process that forked it."""
    echoes.ask(60_000)
    wait_until_started(echoes)
    first, pids = echoes._first.pid, echoes.pids
    assert sorted(children_of(first)) == sorted(pids)
    start = time.monotonic()
    echoes.close()
    assert time.monotonic() - start < 5
    for pid in [first, *pids]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("started", [1, 2] * 8)
def test_closing_ends_what_works_while_others_start(started: int, echoes: Processes) -> None:
    """What has just been forked too."""
    for _ in range(2):
        echoes.ask(60_000)
    while len(echoes.pids) < started:
        echoes.collect(wait=True)
    start = time.monotonic()
    echoes.close()
    assert time.monotonic() - start < 5


def test_closing_answers_what_was_asked(echoes: Processes) -> None:
    """What was sent and what waits: with None."""
    wait_until_started(echoes)
    answers = [echoes.ask(60_000) for _ in range(3)]
    echoes.close()
    assert [echoes.wait_for(answer) for answer in answers] == [None] * 3


def test_closing_ends_what_works_where_the_first_process_is_gone(echoes: Processes) -> None:
    wait_until_started(echoes)
    pids = echoes.pids
    for _ in pids:
        echoes.ask(60_000)
    os.kill(echoes._first.pid, signal.SIGKILL)
    wait_for_end(echoes._first.pid)
    echoes.close()
    for pid in pids:
        wait_for_end(pid)


def test_signals_that_the_program_does_not_take_do_not_matter(tmp_path: Path) -> None:
    """SIGCHLD ignored: how a process ended is known all the same. SIGTERM blocked: closing ends
    what works.
    """
    (tmp_path / "slow_echo.py").write_text(SLOW_ECHO)
    code = """
import os, signal, sys
from trtdet.processes import Processes
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
with Processes("slow_echo", "echo", [None] * 2) as processes:
    while not processes.ready:
        processes.collect(wait=True)
    answers = [processes.ask(60_000) for _ in range(2)]
    os.kill(processes.pids[0], signal.SIGKILL)
    while len(processes) == 2:
        processes.collect(wait=True)
    print([answer.done() for answer in answers].count(True))
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    said = "one of the processes that echo has ended (exit status -9); the run goes on without it\n"
    assert (done.stdout, done.stderr, done.returncode) == ("1\n", said, 0)


def test_one_that_cannot_be_forked_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """The others do the work."""
    once = """
import os
fork, count = os.fork, 0


def fork_but_second():
    global count
    count += 1
    if count == 2:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()


os.fork = fork_but_second
"""
    (tmp_path / "short_of_processes.py").write_text(once + SLOW_ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    with Processes("short_of_processes", "echo", [None] * 3) as processes:
        answers = [processes.ask(message) for message in range(6)]
        assert [processes.wait_for(answer)[0] for answer in answers] == list(range(6))
        assert len(processes) == 2
    assert caplog.messages == ["one of the processes that echo has ended (it did not start: Resource temporarily unavailable); the run goes on without it"]  # fmt: skip
