# SPDX-License-Identifier: Apache-2.0
"""Worker processes of `ImageBatcher`: the same batches, and nothing left of them, whoever is
killed.
"""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import ROOT
from numpy.typing import NDArray

from trtdet.images import batcher, processes
from trtdet.images.batcher import ImageBatcher, worth_processes
from trtdet.images.prepare import Preparer
from trtdet.images.preprocess import ShorterSide
from trtdet.images.processes import SharedMemory, Worker
from trtdet.processes import available
from trtdet.run.detect import open_batcher
from trtdet.run.options import RunOptions
from trtdet.runtimes.base import Outputs, Runtime
from trtdet.spec import ModelSpec, Nms, Preprocessing

pytestmark = pytest.mark.skipif(not available(), reason="this system has no memfd_create")
SMALL = Preprocessing((16, 24), dtype="uint8", pad_rgb=(1, 2, 3))


def write_images(folder: Path, count: int, bad: tuple[int, ...] = ()) -> list[Path]:
    random = np.random.default_rng(count)
    paths = []
    for number in range(count):
        path = folder / f"{number:03d}.jpg"
        cv2.imwrite(str(path), random.integers(0, 256, (10 + number % 5, 12, 3), np.uint8))
        if number in bad:
            path.write_bytes(b"damaged")
        paths.append(path)
    return paths


def children() -> set[int]:
    """Processes that this one has started and that have not been waited for."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == os.getpid():
                found.add(int(folder.name))
    return found


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the processes to start: else the threads do all of a short test's images."""
    ready = Worker.ready

    def wait(worker: Worker) -> bool:
        while not ready(worker) and not worker._process.is_gone:
            time.sleep(0.005)
        return ready(worker)

    monkeypatch.setattr(Worker, "ready", wait)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, patient: None) -> list[int]:
    """How many images each call left to a process."""
    found: list[int] = []
    honest = Worker.prepare

    def prepare(worker: Worker, paths: Any, *rest: Any) -> Any:
        results = honest(worker, paths, *rest)
        found.append(len(paths) if results is not None else 0)
        return results

    monkeypatch.setattr(Worker, "prepare", prepare)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    shared, before = Path("/dev/shm"), children()
    names = sorted(shared.iterdir()) if shared.is_dir() else []
    files = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert children() == before
    assert (sorted(shared.iterdir()) if shared.is_dir() else []) == names
    assert len(os.listdir("/proc/self/fd")) <= files


def contents(batches: ImageBatcher, *, release: bool) -> list[tuple[Any, ...]]:
    found = []
    for batch in batches:
        found.append((batch.paths, batch.transforms, batch.images.copy()))
        if release:
            batch.images[:] = 99
            batch.release()
    return found


def compare(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> None:
    assert len(one) == len(other)
    for (paths, transforms, images), (others, other_transforms, other_images) in zip(one, other, strict=True):  # fmt: skip
        assert (paths, transforms) == (others, other_transforms)
        np.testing.assert_array_equal(images, other_images)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(("batch_size", "bad"), [(1, ()), (3, (0, 4, 5, 6)), (7, tuple(range(7, 14)))])  # fmt: skip
def test_batches_are_those_of_threads(
    tmp_path: Path, counted: list[int], batch_size: int, bad: tuple[int, ...], dtype: Any, layout: Any
) -> None:  # fmt: skip
    preprocessing = Preprocessing((16, 24), layout, dtype, pad_rgb=(1, 2, 3))
    paths = write_images(tmp_path, 30, bad)
    expected = contents(ImageBatcher(paths, preprocessing, batch_size), release=True)
    for release in (True, False):
        counted.clear()
        batches = ImageBatcher(paths, preprocessing, batch_size, workers=2, processes=True)
        compare(contents(batches, release=release), expected)
        assert sum(counted) == 30 and max(counted) == min(batch_size, 4)
        assert [path for path, _ in batches.failures] == [paths[number] for number in bad]


def test_images_that_are_scaled_one_by_one(tmp_path: Path, counted: list[int]) -> None:
    preprocessing = Preprocessing((64, 64), dtype="uint8", size_range=((16, 16), (64, 64)), size_multiple=8)  # fmt: skip
    paths = write_images(tmp_path, 12, (5,))
    resize = ShorterSide(20, 40)
    expected = contents(ImageBatcher(paths, preprocessing, 3, resize=resize), release=True)
    batches = ImageBatcher(paths, preprocessing, 3, resize=resize, workers=2, processes=True)
    compare(contents(batches, release=True), expected)
    assert sum(counted) == 12


def test_more_batches_at_once_than_a_process_keeps(tmp_path: Path, counted: list[int]) -> None:
    paths = write_images(tmp_path, 20) * 8
    held = list(ImageBatcher(paths, SMALL, 1, workers=2, processes=True))
    again = ImageBatcher(paths, SMALL, 1)
    for batch, other in zip(held, again, strict=True):
        np.testing.assert_array_equal(batch.images, other.images)
    assert len(held) == sum(counted) == 160 > 2 * processes._KEPT


def test_memory_that_comes_back_after_it_was_let_go(tmp_path: Path, patient: None) -> None:
    path, memory = write_images(tmp_path, 1)[0], SharedMemory()
    arrays = [memory.allocate((1, *SMALL.image_shape), np.dtype("uint8")) for _ in range(processes._KEPT + 3)]  # fmt: skip
    with Worker(Preparer(SMALL), memory) as worker:
        assert worker.ready()
        for array in (*arrays, *arrays[::-1]):
            array[:] = 0
            results = worker.prepare([path], array, array, 0)
            assert results is not None and isinstance(results[0], tuple)
            assert array.any()


def test_threads_go_on_until_their_processes_have_started(tmp_path: Path) -> None:
    paths = write_images(tmp_path, 20)
    expected = contents(ImageBatcher(paths, SMALL, 4), release=True)
    compare(contents(ImageBatcher(paths, SMALL, 4, workers=3, processes=True), release=True), expected)  # fmt: skip


@pytest.mark.parametrize("when", ["starting", "working"])
def test_a_run_goes_on_without_a_process_that_was_killed(
    tmp_path: Path, counted: list[int], caplog: pytest.LogCaptureFixture, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    paths = write_images(tmp_path, 60)
    expected = contents(ImageBatcher(paths * 4, SMALL, 4), release=True)
    before, killed = children(), set()
    if when == "starting":
        starting = Worker.__init__

        def start(worker: Worker, *arguments: Any) -> None:
            starting(worker, *arguments)
            if not killed:
                killed.add(worker._process.pid)
                os.kill(worker._process.pid, signal.SIGKILL)

        monkeypatch.setattr(Worker, "__init__", start)
    found = []
    for batch in ImageBatcher(paths * 4, SMALL, 4, workers=2, processes=True):
        if not killed:
            killed.add(min(children() - before))
            os.kill(min(killed), signal.SIGKILL)
        found.append((batch.paths, batch.transforms, batch.images.copy()))
        batch.release()
    compare(found, expected)
    assert caplog.text.count("has ended (exit status -9); the run goes on without it") == 1
    assert 0 < sum(counted) < 240 or when == "starting"


def test_leaving_early_ends_the_processes(tmp_path: Path) -> None:
    before = children()
    with ImageBatcher(write_images(tmp_path, 20) * 100, SMALL, 4, workers=3, processes=True) as batches:  # fmt: skip
        iteration = iter(batches)
        next(iteration)
        assert len(children() - before) == 3
    assert children() == before


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    write_images(tmp_path, 20)
    code = f"""
import os, signal, sys, time
from pathlib import Path
from trtdet.images.batcher import ImageBatcher
from trtdet.spec import Preprocessing
paths = sorted(Path({str(tmp_path)!r}).glob("*.jpg")) * 1000
for number, batch in enumerate(ImageBatcher(paths, Preprocessing((16, 24)), 4, workers=2, processes=True)):
    batch.release()
    if number == 500:
        ours = [p for p in os.listdir("/proc") if p.isdecimal() and p != str(os.getpid())]
        parents = {{p: open(f"/proc/{{p}}/stat").read().rpartition(")")[2].split()[1] for p in ours if os.path.exists(f"/proc/{{p}}/stat")}}
        print(*(p for p, parent in parents.items() if parent == str(os.getpid())), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    pids = done.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def test_ctrl_c_does_not_reach_processes_that_start(tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of a terminal; the parent alone is to answer."""
    code = """
import signal, time
signal.signal(signal.SIGINT, lambda *_: None)
from trtdet.images.prepare import Preparer
from trtdet.images.processes import SharedMemory, Worker
from trtdet.spec import Preprocessing
with Worker(Preparer(Preprocessing((16, 24))), SharedMemory()) as worker:
    print("started", flush=True)
    while not worker.ready() and not worker._process.is_gone:
        time.sleep(0.01)
    print("ready" if worker.ready() else "lost", flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:  # fmt: skip
        assert parent.stdout is not None and parent.stdout.readline() == "started\n"
        while parent.poll() is None:
            os.killpg(parent.pid, signal.SIGINT)
            time.sleep(0.02)
        output, errors = parent.communicate()
    assert (output, errors, parent.returncode) == ("ready\n", "", 0)


def is_alive(pid: str) -> bool:
    """Whether a process runs: one that has ended and was not waited for does not."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_an_error_of_a_process_is_raised_here(tmp_path: Path, patient: None) -> None:
    memory = SharedMemory()
    wrong = memory.allocate((2, *SMALL.image_shape), np.dtype("float64"))
    paths = write_images(tmp_path, 2)
    with Worker(Preparer(SMALL), memory) as worker:
        assert worker.ready()
        results = worker.prepare(paths, wrong, wrong, 0)
    assert results is not None
    for result in results:
        assert isinstance(result, ValueError) and "out: expected (16, 24, 3) uint8" in str(result)


def test_without_a_process_to_be_had_threads_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", none)
    paths = write_images(tmp_path, 9)
    expected = contents(ImageBatcher(paths, SMALL, 4), release=True)
    compare(contents(ImageBatcher(paths, SMALL, 4, workers=2, processes=True), release=True), expected)  # fmt: skip
    assert caplog.text.count("does not start: no more processes") == 2


class StandInRuntime(Runtime):
    """Is never run."""

    spec = ModelSpec("toy", SMALL, Nms(), (1,))
    batch_range: tuple[int, int | None] = (1, None)
    description = "stand-in"

    def infer(self, images: NDArray[Any]) -> Outputs:
        raise NotImplementedError

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("runtime", "options", "wanted"),
    [
        ({"overlaps": True}, {}, True),
        ({}, {}, False),  # a CPU, which runs the model too
        ({"overlaps": True, "needs_own_memory": True}, {}, False),  # a server on this machine
        ({"overlaps": True}, {"keep_sources": True}, False),
        ({"overlaps": True}, {"load": cv2.imread}, False),
        ({"overlaps": True}, {"allocate": np.zeros}, False),
    ],
)
def test_which_runs_get_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: dict[str, bool], options: dict[str, Any], wanted: bool
) -> None:  # fmt: skip
    paths = write_images(tmp_path, 16)
    with StandInRuntime() as one:
        for name, value in runtime.items():
            setattr(one, name, value)
        monkeypatch.setattr(batcher, "available_cores", lambda: 4)
        monkeypatch.setattr(batcher, "_MANY_WORKERS", 2)
        monkeypatch.setattr(batcher, "_MANY_IMAGES", 8)
        for workers, enough in ((2, True), (1, False), (3, False)):
            made = open_batcher(one, paths, RunOptions(workers=workers), **options)
            assert (made._shared is not None) == (wanted and enough)


@pytest.mark.parametrize(
    "options", [{"keep_sources": True}, {"load": cv2.imread}, {"allocate": np.zeros}]
)
def test_what_goes_with_threads_alone(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="processes: expected no keep_sources, load and allocate"):
        ImageBatcher([], SMALL, 1, processes=True, **options)


@pytest.mark.parametrize(
    ("workers", "images", "worth"),
    [(16, 2048, True), (16, 2047, False), (8, 1024, True), (7, 10**6, False), (None, 2048, True)],
)
def test_when_processes_are_worth_their_start(
    workers: int | None, images: int, worth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "available_cores", lambda: 16)
    assert worth_processes(workers, images) is worth
    monkeypatch.setattr(batcher, "available_cores", lambda: 4)
    assert not worth_processes(workers, images)
    assert batcher._SHARE == 4
