# SPDX-License-Identifier: Apache-2.0
"""Decoded images in memory that processes see."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT

from trtdet.images import shared_sources
from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import load_image
from trtdet.images.shared_sources import (
    FOR_THREADS,
    STEP,
    SharedSource,
    SharedSources,
    room_for,
    room_of_process,
)
from trtdet.shared_memory import ADDRESSES, attach, can_share
from trtdet.spec import Preprocessing

pytestmark = pytest.mark.skipif(not can_share(), reason="this system has no memory to share")

#: Height and width: one, one, and three steps of memory.
SIZES = ((20, 30), (70, 50), (400, 500))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    found = [folder / f"{height}x{width}.png" for height, width in SIZES]
    for path, size in zip(found, SIZES, strict=True):
        cv2.imwrite(str(path), rng.integers(0, 256, (*size, 3), np.uint8))
    return found


MIB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "room"),
    [
        (1, STEP),
        (STEP, STEP),
        (STEP + 1, 2 * STEP),
        (2 * MIB, 2 * MIB),
        (2 * MIB + 1, 2 * MIB + MIB // 2),  # from here on, in eighths of 4 MiB
        (3 * MIB, 3 * MIB),
        (3 * MIB + 1, 3 * MIB + MIB // 2),
        (4 * MIB, 4 * MIB),
        (4 * MIB + 1, 5 * MIB),
        (1920 * 1080 * 3, 6 * MIB),
        (4000 * 3000 * 3, 40 * MIB),
        (64 * MIB, 64 * MIB),
        (64 * MIB + 1, 80 * MIB),
    ],
)
def test_room_for_an_image(nbytes: int, room: int) -> None:
    assert room_for(nbytes) == room
    assert room_for(room) == room  # another image of that size finds it


@pytest.mark.parametrize("count", [1, 2, 3, 7, 96])
def test_rooms_of_processes_do_not_meet(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they take."""
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)  # addresses alone
    ends = [FOR_THREADS]
    with SharedSources() as sources:
        for number in range(count):
            memory = room_of_process(sources.file, number, count)._memory
            each = ADDRESSES // 2 // count // 4096 * 4096
            assert memory.take(each + 1) is None
            assert memory.take(each) == ends[-1]
            assert memory.take(1) is None
            ends.append(ends[-1] + each)
        assert ADDRESSES - count * 4096 < ends[-1] <= ADDRESSES
        threads = sources._memory
        assert (threads.take(FOR_THREADS), threads.take(1)) == (0, None)


def test_room_of_a_process_has_a_limit(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its part of what all of them may take; what it is given is more."""
    monkeypatch.setattr(shared_sources, "MOST_BYTES", 9 * STEP)
    with SharedSources() as sources:
        room = room_of_process(sources.file, 1, 3)
        places = [room.where(room.load(paths[0])) for _ in range(4)]
        first = FOR_THREADS + ADDRESSES // 2 // 3 // 4096 * 4096
        assert places == [*(SharedSource(first + n * STEP, (20, 30, 3)) for n in range(3)), None]
        assert os.fstat(sources.file).st_blocks * 512 == 3 * STEP
        room.give(first + STEP, STEP)
        room.give(first, 4 * STEP)
        image = room.load(paths[1])
        assert room.where(image) == SharedSource(first + STEP, (70, 50, 3))
        assert np.array_equal(image, load_image(paths[1]))
        assert room.where(room.load(paths[1])) is None  # the larger one waits for a larger image


def test_rooms_that_nobody_uses_go_to_processes(paths: list[Path]) -> None:
    """Each once, and no more than are asked for."""
    with SharedSources() as sources:
        assert sources.free_rooms(9) == []
        images = [sources.load(path) for path in (*paths, *paths)]
        assert sources.free_rooms(9) == []
        places = [sources.where(image) for image in images]
        del images
        found = [sources.free_rooms(count) for count in (0, 3, 9, 9)]
        assert [len(rooms) for rooms in found] == [0, 3, 3, 0]
        sizes = [STEP, STEP, 3 * STEP] * 2
        rooms = [(place.offset, size) for place, size in zip(places, sizes, strict=True) if place]
        assert sorted(chain.from_iterable(found)) == rooms


def test_a_process_sees_what_was_loaded(paths: list[Path]) -> None:
    with SharedSources() as sources:
        images = [sources.load(path) for path in paths]
        where = [sources.where(image) for image in images]
        shapes = [(*size, 3) for size in SIZES]
        assert where == [SharedSource(n * STEP, shape) for n, shape in enumerate(shapes)]
        for path, image, place in zip(paths, images, where, strict=True):
            assert np.array_equal(image, load_image(path))
            assert place is not None and np.array_equal(place.of(attach(sources.file)), image)
        code = (
            "import sys; from trtdet.images.shared_sources import SharedSource; from trtdet.shared_memory import attach; "
            f"print(int(SharedSource({2 * STEP}, (400, 500, 3)).of(attach({sources.file})).sum()))"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], pass_fds=[sources.file], env=environment, capture_output=True, text=True)  # fmt: skip
        assert done.stdout == f"{int(images[2].sum())}\n", done.stderr


def test_room_is_used_again_once_an_image_is_gone(paths: list[Path]) -> None:
    with SharedSources() as sources:
        first, second = (sources.load(paths[0]) for _ in range(2))
        assert sources.where(second) == SharedSource(STEP, (20, 30, 3))
        row = first[3]
        del first
        assert sources.where(sources.load(paths[1])) == SharedSource(2 * STEP, (70, 50, 3))
        del row  # the last array of the first image
        again = [sources.load(paths[1]) for _ in range(2)]
        assert {place.offset for image in again if (place := sources.where(image))} == {0, 2 * STEP}
        assert os.fstat(sources.file).st_blocks * 512 == 3 * STEP


def test_images_for_which_there_is_no_room_are_in_ordinary_memory(paths: list[Path]) -> None:
    with SharedSources(most_bytes=STEP) as sources:
        first, large = sources.load(paths[0]), sources.load(paths[2])
        assert sources.where(first) is not None and sources.where(large) is None
        assert np.array_equal(large, load_image(paths[2]))
    after = sources.load(paths[1])
    assert sources.where(after) is None and np.array_equal(after, load_image(paths[1]))
    assert np.array_equal(first, load_image(paths[0]))  # alive without the file


def test_batches_hold_them(paths: list[Path]) -> None:
    """Those of a batcher that keeps its sources: the batches are what they are without."""
    preprocessing = Preprocessing((64, 64), "NHWC", "uint8")
    many = paths * 20  # 80 steps of memory
    with (
        SharedSources() as sources,
        ImageBatcher(many, preprocessing, 4, workers=2, shared=sources) as shared,
        ImageBatcher(many, preprocessing, 4) as plain,
    ):
        for batch, wanted in zip(shared, plain, strict=True):
            assert np.array_equal(batch.images, wanted.images)
            for image, path in zip(batch.sources or (), batch.paths, strict=True):
                place = sources.where(image)
                assert place is not None and np.array_equal(image, load_image(path))
            batch.release()
        assert sources._taken <= 50 * STEP  # a part of them at a time
