# SPDX-License-Identifier: Apache-2.0
"""Results that threads write."""

import errno
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtdet.detections import Detections
from trtdet.images.batch import Batch
from trtdet.results import writer
from trtdet.results.found import Found
from trtdet.results.image_files import ImageFiles
from trtdet.results.manifest import RunFolder
from trtdet.results.writer import result_writer
from trtdet.run.detect import find
from trtdet.runtimes.base import Images, Outputs, Runtime
from trtdet.spec import ModelSpec, Nms, Preprocessing

SPEC = ModelSpec("automl", Preprocessing((64, 64)), Nms(), tuple(range(1, 91)))
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


def paths(count: int) -> list[Path]:
    return [Path(f"{number}.jpg") for number in range(count)]


def write(output: Path, batch: int, *, pictures: bool, folder: RunFolder | None = None) -> None:
    """One batch, of images in which nothing is found."""
    images = paths(batch)
    sources = [np.zeros((8, 8, 3), np.uint8)] * batch if pictures else None
    names = {path: path.stem for path in images}
    with result_writer(output, SPEC, names=names, image_ids={}, pictures=pictures, folder=folder) as results:  # fmt: skip
        results.write(Found(images, [NOTHING] * batch, sources))


@pytest.mark.parametrize("batch", [2, 8, 12, 64])
def test_all_threads_draw_whatever_the_batch(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    both = threading.Barrier(2)

    def draw(*_: Any) -> int:
        both.wait(20)
        return 0

    monkeypatch.setattr(writer, "available_cores", lambda: 2)
    monkeypatch.setattr(ImageFiles, "_write_one", draw)
    write(tmp_path, batch, pictures=True)
    assert not both.broken and both.n_waiting == 0


def test_a_journal_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RunFolder, line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "add", full)
    folder = RunFolder(tmp_path, [], (".tsv",), {})
    with pytest.raises(
        OSError, match=r"^--output: cannot write the results of 0\.jpg: no space left"
    ):
        write(tmp_path, 1, pictures=False, folder=folder)
    assert not (tmp_path / "detections.json").exists()


class OneRow(Runtime):
    """Puts out what has no row for an image."""

    spec = SPEC

    def __init__(self, count: Any) -> None:
        self._count = count

    def infer(self, images: Images) -> Outputs:
        boxes, scores = np.zeros((10, 4), np.float32), np.zeros(10, np.float32)
        return {
            "num_detections": self._count,
            "detection_boxes": boxes,
            "detection_scores": scores,
            "detection_classes": scores,
        }

    def close(self) -> None:
        pass


@pytest.mark.parametrize("count", [np.int32(3), np.array(3), np.array([3])])
def test_outputs_without_rows_are_shown_as_they_are(count: Any) -> None:
    """Before a batch is cut to its images."""
    batch = Batch(np.zeros((1, 64, 64, 3), np.uint8), tuple(paths(1)), ())
    with pytest.raises(ValueError, match=r"^outputs: .* 'detection_boxes': \(10, 4\), 'detection_scores': \(10,\)"):  # fmt: skip
        list(find(OneRow(count), [batch]))
