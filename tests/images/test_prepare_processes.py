# SPDX-License-Identifier: Apache-2.0
"""Batches that processes fill: those of threads, whatever happens to a process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import ROOT
from numpy.typing import NDArray

from trtdet import machine
from trtdet.images import batcher as batcher_module
from trtdet.images import prepare_processes
from trtdet.images.batcher import ImageBatcher
from trtdet.images.prepare_processes import Rows, SharedBuffers
from trtdet.images.preprocess import ShorterSide
from trtdet.shared_memory import can_share
from trtdet.spec import InputDtype, Layout, Preprocessing

pytestmark = pytest.mark.skipif(not can_share(), reason="this system has no memory to share")

COUNT = 30
#: Images that cannot be read: two in a row, over the border of two messages, and the last.
BROKEN = (3, 4, COUNT - 1)


def as_it_is(memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return memory


def write_images(folder: Path, count: int, broken: Sequence[int], large: Sequence[int] = ()) -> list[Path]:  # fmt: skip
    """Images of several sizes; those that are large are 300x400, those that are broken none."""
    rng = np.random.default_rng(0)
    found = [folder / f"{number:02}.png" for number in range(count)]
    for number, path in enumerate(found):
        height, width = (300, 400) if number in large else rng.integers(20, 90, 2)
        if number in broken:
            path.write_bytes(b"no image")
        else:
            cv2.imwrite(str(path), rng.integers(0, 256, (height, width, 3), np.uint8))
    return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of several sizes, three of which are none."""
    return write_images(tmp_path_factory.mktemp("images"), COUNT, BROKEN)


def batches_of(batcher: ImageBatcher) -> list[tuple[NDArray[Any], tuple[Path, ...], tuple[Any, ...]]]:  # fmt: skip
    """Copies of the batches, whose buffers are given back."""
    found = []
    for batch in batcher:
        found.append((batch.images.copy(), batch.paths, batch.transforms))
        batch.release()
    return found


def assert_equal(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for (images, paths, transforms), (images_, paths_, transforms_) in zip(found, expected, strict=True):  # fmt: skip
        assert np.array_equal(images, images_)
        assert (paths, transforms) == (paths_, transforms_)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images each message had."""
    found: list[int] = []
    ask = prepare_processes.Processes.ask

    def note(self: prepare_processes.Processes, rows: Rows) -> Any:
        found.append(len(rows.paths))
        return ask(self, rows)

    monkeypatch.setattr(prepare_processes.Processes, "ask", note)
    yield found


def wait_until_ready(batcher: ImageBatcher) -> None:
    assert batcher._processes is not None
    while not batcher._processes._processes.ready:
        batcher._processes._processes.collect(wait=True)


@pytest.mark.parametrize(
    ("dtype", "layout", "batch_size", "resize", "expected_messages"),
    [
        ("uint8", "NHWC", 6, None, [6] * 5),
        ("float32", "NCHW", 10, None, [8, 2] * 3),
        ("uint8", "NHWC", 4, ShorterSide(64, 100), [4] * 7 + [2]),
        ("float32", "NHWC", 1, None, [1] * COUNT),
    ],
)
def test_batches_are_those_of_threads(dtype: InputDtype, layout: Layout, batch_size: int, resize: ShorterSide | None, expected_messages: list[int], paths: list[Path], messages: list[int]) -> None:  # fmt: skip
    preprocessing = Preprocessing((64, 96), layout, dtype, size_multiple=32 if resize else 1, size_range=((32, 32), (128, 128)) if resize else None)  # fmt: skip
    how: dict[str, Any] = {"resize": resize, "pad_to_batch": True, "workers": 2}
    with ImageBatcher(paths, preprocessing, batch_size, **how) as threads:
        expected = batches_of(threads)
    assert sum(len(paths) for _, paths, _ in expected) == COUNT - len(BROKEN)
    with ImageBatcher(paths, preprocessing, batch_size, **how, pin=as_it_is) as processes:
        wait_until_ready(processes)
        for _ in range(2):  # in the same buffers
            messages.clear()
            assert_equal(batches_of(processes), expected)
            assert messages == expected_messages
            assert processes.failures == threads.failures


def test_threads_begin_until_processes_have_started(paths: list[Path], messages: list[int], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    preprocessing = Preprocessing((64, 64), "NHWC", "uint8")
    paths = paths * 2
    with ImageBatcher(paths, preprocessing, 4, workers=2) as threads:
        expected = batches_of(threads)
    collect = prepare_processes.Processes.collect
    with ImageBatcher(paths, preprocessing, 4, workers=2, pin=as_it_is) as processes:
        monkeypatch.setattr(prepare_processes.Processes, "collect", lambda *_, **__: None)
        some = iter(processes)
        first = next(some)  # of two batches of files, with nine more ahead: all for threads
        assert_equal([(first.images, first.paths, first.transforms)], expected[:1])
        assert messages == []
        monkeypatch.setattr(prepare_processes.Processes, "collect", collect)
        wait_until_ready(processes)
        assert_equal([(b.images, b.paths, b.transforms) for b in some], expected[1:])
        assert messages == [4] * 4


@pytest.mark.parametrize("killed", [1, 2])
def test_a_process_that_is_killed_costs_no_image(killed: int, paths: list[Path], caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    preprocessing = Preprocessing((64, 64), "NHWC", "uint8")
    paths = paths * 4  # more than are asked for at the start
    with ImageBatcher(paths, preprocessing, 1, workers=2) as threads:
        expected = batches_of(threads)
    caplog.clear()
    with ImageBatcher(paths, preprocessing, 1, workers=2, pin=as_it_is) as processes:
        wait_until_ready(processes)
        found = []
        for batch in processes:
            if len(found) == 2:
                for pid in processes._processes._processes.pids[:killed]:  # type: ignore[union-attr]
                    os.kill(pid, signal.SIGKILL)
            found.append((batch.images.copy(), batch.paths, batch.transforms))
            batch.release()
    assert_equal(found, expected)
    ended = [message for message in caplog.messages if message.startswith("one of the processes that decode images has ended")]  # fmt: skip
    assert len(ended) == killed


def test_a_loop_that_is_left_leaves_no_process(paths: list[Path]) -> None:
    preprocessing = Preprocessing((64, 64), "NHWC", "uint8")
    with ImageBatcher(paths, preprocessing, 4, workers=2, pin=as_it_is) as batches:
        wait_until_ready(batches)
        for batch in batches:
            kept = batch.images
            break
        copy = kept.copy()
        pids = batches._processes._processes.pids  # type: ignore[union-attr]
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert np.array_equal(kept, copy)  # a batch that was not given back stays its owner's


@pytest.mark.parametrize(
    ("memory", "most"), [(7.5, 503316480), (16.0, 1 << 30), (64.0, 1 << 30), (None, 1 << 30)]
)
def test_batches_ahead_take_a_small_part_of_the_memory(memory: float | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(machine, "memory_gib", lambda: memory)
    assert batcher_module.most_ahead_bytes() == most


@pytest.mark.parametrize("reason", ["sources", "load", "memory"])
def test_threads_do_what_processes_cannot(reason: str, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    how: dict[str, Any] = {"keep_sources": reason == "sources"}
    if reason == "load":
        how["load"] = lambda path: np.zeros((8, 8, 3), np.uint8)
    if reason == "memory":
        monkeypatch.setattr(batcher_module, "MOST_AHEAD_BYTES", 5 * 4 * 64 * 64 * 3 - 1)
    preprocessing = Preprocessing((64, 64), "NHWC", "uint8")
    with ImageBatcher(paths, preprocessing, 4, workers=2, pin=as_it_is, **how) as batches:
        assert batches._processes is None
        assert len(batches_of(batches)) == (8 if reason == "load" else 7)
    if reason == "memory":
        monkeypatch.setattr(batcher_module, "MOST_AHEAD_BYTES", 5 * 4 * 64 * 64 * 3)
        with ImageBatcher(paths, preprocessing, 4, workers=2, pin=as_it_is) as batches:
            assert batches._processes is not None and batches._share == 4
        monkeypatch.setattr(batcher_module, "MOST_AHEAD_BYTES", 9 * 4 * 64 * 64 * 3)
        with ImageBatcher(paths, preprocessing, 4, workers=2, pin=as_it_is) as batches:
            assert batches._processes is not None and batches._share == 8


def test_a_buffer_that_finds_no_memory_is_filled_by_threads(paths: list[Path], messages: list[int], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    preprocessing = Preprocessing((64, 64), "NHWC", "uint8")
    with ImageBatcher(paths, preprocessing, 4, workers=2) as threads:
        expected = batches_of(threads)
    given: list[int] = []

    def give_two(file: int, offset: int, length: int) -> None:
        given.append(offset)
        if len(given) > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", give_two)
    with ImageBatcher(paths, preprocessing, 4, workers=2, pin=as_it_is) as processes:
        wait_until_ready(processes)
        assert_equal(batches_of(processes), expected)
    assert given == [0, 49152] + [98304] * 6  # a try for each buffer
    assert messages == [4, 4]  # the first two


def test_an_error_of_any_kind_is_raised_here(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """It is met again by a thread, and so has its traceback."""
    # Both sides import it from there.
    (tmp_path / "sitecustomize.py").write_text(
        "import trtdet.images.files as files\n"
        "load = files.load_image\n"
        "def fail(path):\n"
        "    if path.stem == '07':\n"
        "        raise MemoryError('for 07')\n"
        "    return load(path)\n"
        "files.load_image = fail\n"
    )
    code = f"""
import sys, sitecustomize
from pathlib import Path
from trtdet.images.batcher import ImageBatcher
from trtdet.spec import Preprocessing
paths = sorted(Path({str(paths[0].parent)!r}).iterdir())
batches = ImageBatcher(paths, Preprocessing((64, 64), "NHWC", "uint8"), 4, workers=1, pin=lambda m: m)
while not batches._processes._processes.ready:
    batches._processes._processes.collect(wait=True)
try:
    print(sum(len(batch) for batch in batches))
except MemoryError as error:
    print(error, len(batches.failures))
"""

    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert (done.stdout, done.returncode) == ("for 07 2\n", 0), done.stderr


def test_buffers_are_seen_by_who_has_the_file() -> None:
    pinned: list[int] = []

    def pin(memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        pinned.append(memory.nbytes)
        return memory

    with SharedBuffers(pin) as buffers:
        first = buffers.allocate((2, 3, 5), np.dtype(np.float32))
        second = buffers.allocate((4, 1000, 3), np.dtype(np.uint8))
        assert pinned == [120, 12000]
        assert [buffers.offset_of(first), buffers.offset_of(second)] == [0, 4096]
        second[:] = 7
        first[1, 2, 4] = 0.5
        assert os.pread(buffers.file, 12000, 4096) == b"\x07" * 12000
        assert os.pread(buffers.file, 4, 116) == np.float32(0.5).tobytes()
    assert second.sum() == 7 * 12000  # alive without the file


def allocated(buffers: SharedBuffers) -> int:
    """Bytes of memory."""
    return os.fstat(buffers.file).st_blocks * 512


def test_buffers_cost_memory_alone_and_that_until_they_are_gone() -> None:
    """No open files either, of which a process may have 1024."""
    with SharedBuffers(as_it_is) as buffers:
        files = len(os.listdir("/proc/self/fd"))
        many = [buffers.allocate((3, 1000), np.dtype(np.uint8)) for _ in range(100)]
        assert len(os.listdir("/proc/self/fd")) == files
        assert allocated(buffers) == 100 * 4096
        row = many[7].reshape(-1)[:300].reshape(3, 100)[1]
        row[:] = 9
        del many
        assert allocated(buffers) == 4096
        assert row.sum() == 900
        del row
        assert allocated(buffers) == 0


def test_buffers_that_are_closed_touch_no_file_of_others(tmp_path: Path) -> None:
    """One that was opened since, and so got the number of theirs."""
    with SharedBuffers(as_it_is) as buffers:
        number = buffers.file
        buffers.close()
        with open(tmp_path / "other", "w+b") as other:
            assert other.fileno() == number
            buffer = buffers.allocate((10, 1000), np.dtype(np.uint8))
            buffer[:] = 1
            buffers.close()
            assert buffers.offset_of(buffer) == -1
            assert os.fstat(number).st_size == 0


def test_a_batcher_that_is_closed_goes_on_with_threads(paths: list[Path]) -> None:
    with ImageBatcher(paths, Preprocessing((64, 64), "NHWC", "uint8"), 4, workers=2, pin=as_it_is) as batches:  # fmt: skip
        wait_until_ready(batches)
        expected = batches_of(batches)
        batches.close()
        assert_equal(batches_of(batches), expected)


def test_threads_do_it_where_processes_do_not_start(paths: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    caplog.set_level("INFO")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with ImageBatcher(paths, Preprocessing((64, 64), "NHWC", "uint8"), 4, workers=2, pin=as_it_is) as batches:  # fmt: skip
        assert caplog.messages == ["processes that decode images do not start, and threads do it: [Errno 11] Resource temporarily unavailable"]  # fmt: skip
        assert sum(len(paths) for _, paths, _ in batches_of(batches)) == COUNT - len(BROKEN)
