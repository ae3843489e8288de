# SPDX-License-Identifier: Apache-2.0
"""Decoded images that processes load into memory that all of them see."""

import os
import signal
import threading
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_prepare_processes import as_it_is, wait_until_ready, write_images

from trtdet.images import prepare_processes
from trtdet.images.batch import Batch
from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import load_image
from trtdet.images.prepare import Preparer
from trtdet.images.prepare_processes import Rows, SharedBuffers
from trtdet.images.preprocess import ShorterSide
from trtdet.images.shared_sources import FOR_THREADS, STEP, SharedSource, SharedSources, room_for
from trtdet.run import detect
from trtdet.run.options import RunOptions
from trtdet.runtimes.base import Runtime
from trtdet.shared_memory import ADDRESSES, can_share
from trtdet.spec import ModelSpec, Nms, Preprocessing

pytestmark = pytest.mark.skipif(not can_share(), reason="this system has no memory to share")

PREPROCESSING = Preprocessing((64, 64), "NHWC", "uint8")
COUNT = 60
#: Files that hold no image.
BROKEN = (3, 4, 17, COUNT - 1)
#: Addresses of each of two processes.
EACH = (ADDRESSES - FOR_THREADS) // 2


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of up to one step of memory; each tenth takes two."""
    return write_images(tmp_path_factory.mktemp("images"), COUNT, BROKEN, range(9, COUNT, 10))


@pytest.fixture(scope="module")
def whole(paths: list[Path]) -> list[Path]:
    """Those that take one step."""
    return [path for number, path in enumerate(paths) if number not in BROKEN and number % 10 != 9]


def open_batcher(paths: list[Path], sources: SharedSources, batch_size: int = 4) -> ImageBatcher:
    """Two processes, which have started, and two threads for what they leave."""
    batcher = ImageBatcher(paths, PREPROCESSING, batch_size, workers=2, pin=as_it_is, shared=sources)  # fmt: skip
    wait_until_ready(batcher)
    return batcher


def offsets_of(batch: Batch[Any], sources: SharedSources) -> list[int]:
    """Where each image lies; -1: there was no room. What is there is what `load_image` gives."""
    assert batch.sources is not None
    found = []
    for path, image in zip(batch.paths, batch.sources, strict=True):
        place = None if image is None else sources.where(image)
        if place is not None:
            assert image is not None and np.array_equal(image, load_image(path))
        found.append(-1 if place is None else place.offset)
    return found


def plain(paths: list[Path], batch_size: int = 4) -> tuple[list[Batch[Any]], list[tuple[Path, str]]]:  # fmt: skip
    """The batches that threads make without sources, and what was skipped."""
    with ImageBatcher(paths, PREPROCESSING, batch_size, workers=2) as batcher:
        return list(batcher), batcher.failures


def assert_equal(batch: Batch[Any], wanted: Batch[Any]) -> None:
    assert np.array_equal(batch.images, wanted.images)
    assert (batch.paths, batch.transforms) == (wanted.paths, wanted.transforms)


@pytest.fixture
def threads_load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: SharedSources, path: Path) -> None:
        raise AssertionError(f"{path} was loaded here")

    monkeypatch.setattr(SharedSources, "load", refuse)


@pytest.mark.usefixtures("threads_load_nothing")
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_batches_hold_what_processes_loaded(batch_size: int, paths: list[Path]) -> None:
    """As long as somebody has it, nothing else lies there; broken images are skipped."""
    expected, failures = plain(paths, batch_size)
    with SharedSources() as sources, open_batcher(paths, sources, batch_size) as batcher:
        batches = list(batcher)
        assert batcher.failures == failures and len(failures) == len(BROKEN)
        taken: list[tuple[int, int]] = []
        for batch, wanted in zip(batches, expected, strict=True):
            assert_equal(batch, wanted)
            offsets = offsets_of(batch, sources)
            sizes = [room_for(image.nbytes) for image in batch.sources or () if image is not None]
            taken += [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
    assert len(taken) == COUNT - len(BROKEN)
    assert {end - start for start, end in taken} == {STEP, 2 * STEP}
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))
    assert taken[0][0] == FOR_THREADS  # and those of the other process are its own
    assert FOR_THREADS + EACH in {start for start, _ in taken}
    assert {(start - FOR_THREADS) // EACH for start, _ in taken} == {0, 1}


@pytest.mark.usefixtures("threads_load_nothing")
def test_rooms_are_used_again(whole: list[Path]) -> None:
    """There are as many as images are ahead, or with the consumer: at a time, not in all."""
    many = whole * 6
    with SharedSources() as sources, open_batcher(many, sources) as batcher:
        assert (batcher._ahead, len(many)) == (3, 306)
        seen: set[int] = set()
        for turn in range(2):
            for batch in batcher:
                seen.update(offsets_of(batch, sources))
                batch.release()
            del batch
            blocks = os.fstat(sources.file).st_blocks * 512
            assert blocks == len(seen) * STEP, turn
            # Those ahead, those just asked for, those that the consumer had when it asked.
            assert len(seen) <= (3 + 1 + 1) * 4
    assert -1 not in seen


def test_rooms_of_threads_are_used_again(whole: list[Path]) -> None:
    """By processes."""
    with SharedSources() as sources:
        held = [sources.load(path) for path in whole]
        del held
        assert len(whole) == 51
        with open_batcher(whole, sources) as batcher:
            for batch in batcher:
                assert max(offsets_of(batch, sources)) < 51 * STEP
                batch.release()
        assert os.fstat(sources.file).st_blocks * 512 == 51 * STEP


@pytest.fixture
def small_rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two processes has room for two images."""
    code = f"import trtdet.images.shared_sources as s\ns.MOST_BYTES = {4 * STEP}\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))


@pytest.mark.usefixtures("small_rooms", "threads_load_nothing")
def test_an_image_without_room_is_none(whole: list[Path]) -> None:
    """Its batch is what it is with it, and an image that goes makes room."""
    expected, _ = plain(whole)
    with SharedSources() as sources, open_batcher(whole, sources) as batcher:
        batches = list(batcher)
        for batch, wanted in zip(batches, expected, strict=True):
            assert_equal(batch, wanted)
        offsets = list(chain.from_iterable(offsets_of(batch, sources) for batch in batches))
        rooms = [FOR_THREADS, FOR_THREADS + STEP, FOR_THREADS + EACH, FOR_THREADS + EACH + STEP]
        assert sorted(offset for offset in offsets if offset >= 0) == rooms
        assert offsets.count(-1) == len(whole) - 4
        assert os.fstat(sources.file).st_blocks * 512 == 4 * STEP
        del batches, batch
        again = list(chain.from_iterable(offsets_of(batch, sources) for batch in list(batcher)))
        assert sorted(offset for offset in again if offset >= 0) == rooms


@pytest.mark.parametrize("killed", [1, 2])
def test_a_process_that_is_killed_costs_no_image(killed: int, paths: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """Threads load what it had, and all of them where no process is left."""
    here: list[Path] = []
    load = SharedSources.load

    def note(self: SharedSources, path: Path) -> Any:
        here.append(path)
        return load(self, path)

    monkeypatch.setattr(SharedSources, "load", note)
    many = paths * 3
    expected, failures = plain(many, 1)
    caplog.clear()
    places: list[int] = []
    with SharedSources() as sources, open_batcher(many, sources, 1) as batcher:
        for number, (batch, wanted) in enumerate(zip(batcher, expected, strict=True)):
            if number == 2:
                for pid in batcher._processes._processes.pids[:killed]:  # type: ignore[union-attr]
                    os.kill(pid, signal.SIGKILL)
            assert_equal(batch, wanted)
            places += offsets_of(batch, sources)
            batch.release()
        assert batcher.failures == failures
    assert len(places) == 3 * (COUNT - len(BROKEN)) and -1 not in places
    if killed == 1:
        assert len(here) <= prepare_processes.AT_ONCE  # messages of an image each
    else:
        assert 100 < len(here) < len(many)
    ended = [message for message in caplog.messages if message.startswith("one of the processes that decode images has ended")]  # fmt: skip
    assert len(ended) == killed


def test_threads_load_until_processes_have_started(whole: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    expected, _ = plain(whole)
    collect = prepare_processes.Processes.collect
    with (
        SharedSources() as sources,
        ImageBatcher(whole, PREPROCESSING, 4, workers=2, pin=as_it_is, shared=sources) as batcher,
    ):
        monkeypatch.setattr(prepare_processes.Processes, "collect", lambda *_, **__: None)
        some = iter(batcher)
        batches = [next(some)]  # and three more ahead
        monkeypatch.setattr(prepare_processes.Processes, "collect", collect)
        wait_until_ready(batcher)
        batches += some
        for batch, wanted in zip(batches, expected, strict=True):
            assert_equal(batch, wanted)
        of_processes = [[offset >= FOR_THREADS for offset in offsets_of(batch, sources)] for batch in batches]  # fmt: skip
        assert of_processes == [[False] * 4] * 4 + [[True] * 4] * 8 + [[True] * 3]


def test_there_are_processes_where_sources_are_shared(whole: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Not where there is nothing to pin with, and not where sources are kept elsewhere."""
    how: dict[str, Any] = {"workers": 2}
    with SharedSources() as sources:
        with ImageBatcher(whole, PREPROCESSING, 4, **how, pin=as_it_is, shared=sources) as batcher:
            assert batcher._processes is not None
        for other in ({"shared": sources}, {"pin": as_it_is, "keep_sources": True}):
            with ImageBatcher(whole, PREPROCESSING, 4, **how, **other) as batcher:
                assert batcher._processes is None
                batch = next(iter(batcher))
                assert batch.sources is not None
                for path, image in zip(batch.paths, batch.sources, strict=True):
                    assert image is not None and np.array_equal(image, load_image(path))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("image-batcher")] == []  # fmt: skip


def test_an_image_that_is_refused_leaves_its_room(whole: list[Path]) -> None:
    """One that is larger than its header says: the next one lies where it was."""
    dynamic = Preprocessing((64, 64), "NHWC", "uint8", size_multiple=32, size_range=((32, 32), (128, 128)))  # fmt: skip
    preparer = Preparer(dynamic, resize=ShorterSide(64, 100), keep_sources=True)
    first = prepare_processes._First(preparer, 0, 1)
    texts = [str(path) for path in whole[:4]]
    with SharedSources() as sources, SharedBuffers(as_it_is) as buffers:
        buffers.allocate((4, 128, 128, 3), np.dtype(np.uint8))
        answers = prepare_processes._Answers(first, buffers.file, sources.file)
        small, large = [Rows(texts, 0, 0, (4, side, side, 3), "|u1", ()) for side in (32, 128)]
        for _ in range(3):
            for path, found in zip(texts, answers(small), strict=True):
                assert isinstance(found, str)
                assert found.startswith(f"{path}: expected the size in the file's header, found ")
        assert os.fstat(sources.file).st_blocks * 512 == STEP
        places = [found[1] for found in answers(large) if isinstance(found, tuple)]
        assert places == [SharedSource(FOR_THREADS + n * STEP, load_image(path).shape) for n, path in enumerate(whole[:4])]  # fmt: skip


@pytest.mark.parametrize("pins", [False, True])
def test_processes_fill_no_buffers_that_are_the_runtimes_own(pins: bool, whole: list[Path]) -> None:
    """As of a Triton server, which sees those alone that it was told of."""

    class StandInRuntime(Runtime):
        spec = ModelSpec("toy", PREPROCESSING, Nms(), (1,))
        batch_range: tuple[int, int | None] = (1, None)
        description = "stand-in"

        def infer(self, images: Any) -> Any:
            raise NotImplementedError

        def close(self) -> None: ...

    runtime = StandInRuntime()
    runtime.pins = pins
    with SharedSources() as sources, detect.open_batcher(runtime, whole, RunOptions(workers=2), shared=sources) as batcher:  # fmt: skip
        assert isinstance(batcher, ImageBatcher)
        assert (batcher._processes is not None) == pins
