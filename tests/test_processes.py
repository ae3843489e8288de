# SPDX-License-Identifier: Apache-2.0
"""`trtdet.processes`: a child process ends with its parent, and with it alone."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from trtdet.processes import Process, available

pytestmark = pytest.mark.skipif(not available(), reason="this system has no such processes")

START = """
import os, signal, sys, time
from pathlib import Path
from trtdet.processes import Process
from trtdet.results.image_files import ImageFiles
from trtdet.spec import ModelSpec, Nms, Preprocessing
spec = ModelSpec("automl", Preprocessing((64, 64)), Nms(), (1,))
files = ImageFiles(Path(sys.argv[1]), spec, (), False, 0.3, "png", False)
process = Process("trtdet.results.image_files", "writes results", files)
"""


def is_alive(pid: str) -> bool:
    """Whether a process runs: one that has ended and was not waited for does not."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    code = f"{START}\nprocess.wait_until_ready()\nprint(process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == -9, done.stderr
    pid = done.stdout.strip()
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_does_not_reach_one_that_starts(tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of a terminal; the parent alone is to answer."""
    code = f"""
{START}
signal.signal(signal.SIGINT, lambda *_: None)
print("started", flush=True)
process.wait_until_ready()
print("lost" if process.is_gone else "ready", flush=True)
process.close()
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
    assert (output, errors, parent.returncode) == ("ready\n", "", 0)


def test_one_that_does_not_start_is_gone(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with Process("trtdet.no_such_module", "writes results", None) as process:
        process.wait_until_ready()
        assert process.is_gone
        assert process.ask("anything") is None
    assert "a process that writes results has ended (exit status 1); the run goes on without it" in caplog.text  # fmt: skip


ECHO = """
from trtdet.processes import answer_all


def serve(*files):
    answer_all(lambda first: lambda message: [(a.shape, str(a.dtype), a.sum(), a.flags.writeable) for a in message], *files)
"""


@pytest.mark.parametrize("shared", [True, False])
def test_arrays_arrive_whole(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and large ones, in memory that both see where there is such, and again in the same
    memory, which is given back where it is much.
    """
    (tmp_path / "echo_arrays.py").write_text(ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    if not shared:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("this system has no such memory")
    rng = np.random.default_rng(0)
    with Process("echo_arrays", "echoes", None) as process:
        process.wait_until_ready()
        for shapes in (
            [(3, 4)],
            [(100, 100, 3), (2,), (513, 129)],
            [(5000, 6000, 3)],
            [(64, 64, 9)],
        ):
            arrays = [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
            arrays += [array[::2].astype(np.float32) for array in arrays]
            said = process.ask(arrays)
            assert [one[:2] for one in said] == [(a.shape, str(a.dtype)) for a in arrays]
            assert [one[2] for one in said] == [a.sum() for a in arrays]
            large = [a.nbytes >= 1 << 14 for a in arrays]
            assert [one[3] for one in said] == [not (shared and one) for one in large]
            size = os.fstat(process._arrays.files[0]).st_size if shared else 0
            assert size < 1 << 20
    assert process._arrays.files == []


def refused(*_: object) -> int:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("fails", ["memfd_create", "pwrite"])
def test_arrays_arrive_where_there_is_no_memory_that_both_see(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """Not to be had, as in a sandbox; or full."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no such memory")
    (tmp_path / "echo_arrays.py").write_text(ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, fails, refused)
    with Process("echo_arrays", "echoes", None) as process:
        process.wait_until_ready()
        for number in (2, 3):
            array = np.full((300, 400), number, np.int32)
            assert process.ask([array]) == [((300, 400), "int32", 120000 * number, True)]
    assert caplog.messages == []


FAILS = """
from trtdet.processes import answer_all


def fail(message):
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
    with Process("failing", "fails", first) as process:
        process.wait_until_ready()
        assert process.ask("this") is None
        assert process.is_gone
    what = "this" if first == "later" else "at once"
    assert caplog.messages == [f"a process that fails has ended (MemoryError: no room for {what}); the run goes on without it"]  # fmt: skip
    assert capfd.readouterr().err == ""
