# SPDX-License-Identifier: Apache-2.0
"""Decoded images in memory that processes see."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT

from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import load_image
from trtdet.images.shared_sources import STEP, SharedSource, SharedSources
from trtdet.shared_memory import attach, can_share
from trtdet.spec import Preprocessing

pytestmark = pytest.mark.skipif(not can_share(), reason="this system has no memory to share")

#: Height and width: one, one, and two steps of memory.
SIZES = ((20, 30), (70, 50), (400, 500))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    found = [folder / f"{height}x{width}.png" for height, width in SIZES]
    for path, size in zip(found, SIZES, strict=True):
        cv2.imwrite(str(path), rng.integers(0, 256, (*size, 3), np.uint8))
    return found


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
