# SPDX-License-Identifier: Apache-2.0
"""Results that processes write: the same files as by threads, whatever happens to a process."""

import gc
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from trtdet.detections import Detections
from trtdet.processes import Process, available
from trtdet.results import writer
from trtdet.results.image_files import ImageFiles, Task, _Answers, pack
from trtdet.results.manifest import PARTIAL, RunFolder
from trtdet.results.writer import ImageResult, result_writer
from trtdet.spec import ModelSpec, Nms, Preprocessing

pytestmark = pytest.mark.skipif(not available(), reason="this system has no such processes")

SPEC = ModelSpec("automl", Preprocessing((64, 64)), Nms(), tuple(range(1, 91)))
COUNT = 60


def detections(number: int) -> Detections:
    rng = np.random.default_rng(number)
    count = number % 7
    boxes = np.sort(rng.uniform(0, 64, (count, 2, 2)), axis=1).reshape(count, 4)
    return Detections(
        boxes.astype(np.float32),
        rng.uniform(0, 1, count).astype(np.float32),
        rng.integers(0, 90, count).astype(np.int32),
    )


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{number:03}.jpg" for number in range(COUNT)]
    for path in paths:
        path.write_bytes(b"a picture")
    return paths


def started() -> list[Process]:
    """The processes that run."""
    return [
        cell
        for cell in gc.get_objects()
        if isinstance(cell, Process) and cell._work == "writes results" and not cell.is_gone
    ]


def write(images: list[Path], output: Path, *, processes: bool, kill: bool = False) -> list[Process]:  # fmt: skip
    folder = RunFolder(output, [], (".tsv",), {})
    found: list[Process] = []
    with (
        folder,
        result_writer(
            output,
            SPEC,
            names={path: Path(path.stem) for path in images},
            image_ids={path: int(path.stem) for path in images},
            labels=[f"class {n}" for n in range(90)],
            tsv_header=True,
            folder=folder,
            processes=processes,
        ) as results,
    ):
        folder.start()
        for number, path in enumerate(images):
            results.write(ImageResult(path, detections(number), None))
            if number == COUNT // 2 and processes:
                found = started()
                if kill:
                    for process in found:
                        os.kill(process.pid, signal.SIGKILL)
    return found


def files_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {
        p.name: p.read_bytes() for p in folder.iterdir() if p.name != PARTIAL
    }
    lines = (folder / PARTIAL).read_text().splitlines() if (folder / PARTIAL).exists() else []
    found["lines"] = sorted(
        set(lines)
    )  # a process that is killed may have noted what is written again
    return found


@pytest.mark.parametrize("kill", [False, True])
def test_files_are_those_of_threads(images: list[Path], tmp_path: Path, kill: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(writer, "available_cores", lambda: 2)
    assert write(images, tmp_path / "threads", processes=False) == []
    found = write(images, tmp_path / "processes", processes=True, kill=kill)
    assert len(found) == 2
    assert files_of(tmp_path / "processes") == files_of(tmp_path / "threads")
    text = (tmp_path / "processes" / "detections.json").read_text()
    assert [r["image_id"] for r in json.loads(text)] == [n for n in range(COUNT) for _ in range(n % 7)]  # fmt: skip
    for process in found:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def test_a_journal_that_cannot_be_written_is_an_answer(tmp_path: Path) -> None:
    """Not a traceback of the process, behind which the run goes on without it."""
    (tmp_path / PARTIAL).mkdir()
    image_files = ImageFiles(tmp_path, (), False, 0.3, "png", tuple(range(90)), False, True)
    answer = _Answers(image_files)
    texts, undrawn, error = answer(pack([Task(tmp_path / "1.jpg", Path("1"), 1, detections(1))]))
    assert (texts, undrawn) == ([], 0)
    assert isinstance(error, IsADirectoryError)


def test_an_error_of_a_process_is_raised_here(images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(writer, "available_cores", lambda: 1)
    output = tmp_path / "out"
    names = {path: Path(path.stem) for path in images}
    ids = {path: int(path.stem) for path in images}
    with (
        pytest.raises(OSError, match=r"--output: cannot write the results of .*050\.jpg"),
        result_writer(output, SPEC, names=names, image_ids=ids, processes=True) as results,
    ):
        for number, path in enumerate(images):
            if number == 20:
                assert len(started()) == 1
            if number == 50:
                (output / "050.tsv").mkdir()
            results.write(ImageResult(path, detections(number), None))
    assert not (output / "detections.json").exists()
