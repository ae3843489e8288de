# SPDX-License-Identifier: Apache-2.0
"""Results that processes write: the same files as by threads, whatever happens to a process."""

import gc
import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from trtdet.geometry import ResizeTransform
from trtdet.images.files import ImageArray, load_image
from trtdet.images.shared_sources import SharedSources
from trtdet.processes import Answer, Processes, available
from trtdet.results import writer
from trtdet.results.found import Found, RawResults
from trtdet.results.image_files import ImageFiles, Sent, Task, Written, _Answers
from trtdet.results.manifest import JOURNAL, RunFolder
from trtdet.results.writer import ResultWriter, result_writer
from trtdet.spec import ModelSpec, Nms, Preprocessing

pytestmark = pytest.mark.skipif(not available(), reason="this system has no such processes")

SPEC = ModelSpec("automl", Preprocessing((64, 64)), Nms(), tuple(range(1, 91)))
COUNT, BATCH = 60, 6


def outputs(numbers: Sequence[int]) -> RawResults:
    """Image n has n % 7 detections, in a network input of half its size."""
    arrays = {
        "num_detections": np.array([[n % 7] for n in numbers], np.int32),
        "detection_boxes": np.zeros((len(numbers), 10, 4), np.float32),
        "detection_scores": np.zeros((len(numbers), 10), np.float32),
        "detection_classes": np.zeros((len(numbers), 10), np.int32),
    }
    for row, number in enumerate(numbers):
        rng = np.random.default_rng(number)
        corners = np.sort(rng.uniform(0, 1, (10, 2, 2)), axis=1)
        arrays["detection_boxes"][row] = corners.reshape(10, 4)
        arrays["detection_scores"][row] = np.sort(rng.uniform(0.1, 1, 10))[::-1]
        arrays["detection_classes"][row] = rng.integers(0, 90, 10)
    return RawResults(arrays, [ResizeTransform((128, 128), (0.5, 0.5))] * len(numbers), (64, 64))


def found(images: Sequence[Path], load: Callable[[Path], ImageArray] | None = None) -> Found:
    pixels = [load(path) for path in images] if load else None
    return Found(images, outputs([int(path.stem) for path in images]), pixels)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{number:03}.png" for number in range(COUNT)]
    for path in paths:
        cv2.imwrite(str(path), np.full((128, 128, 3), int(path.stem), np.uint8))
    return paths


def started() -> list[int]:
    """The processes that run, once they have started."""
    found: list[int] = []
    for processes in [cell for cell in gc.get_objects() if isinstance(cell, Processes)]:
        while len(processes) and not processes.ready:
            processes.collect(wait=True)
        found += processes.pids
    return found


def spoil(path: Path) -> None:
    """A file that is none of an image any more, of the same size and time, in one step."""
    before = path.stat()
    other = path.with_suffix(".other")
    other.write_bytes(b"x" * before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def write(
    images: list[Path],
    output: Path,
    *,
    processes: bool,
    pictures: bool = False,
    kill: bool = False,
    shared: SharedSources | None = None,
    begin: Callable[[], list[int]] | None = None,
) -> list[int]:
    """Returns the processes, which have started in the middle at the latest; then all are killed if
    `kill`. Files of images that are `shared` are spoilt once they are loaded.

    Args:
        begin: what is done in the middle instead of waiting for them.
    """
    load = shared.load if shared else None if processes or not pictures else load_image
    folder = RunFolder(output, [], (".tsv",), {})
    running: list[int] = []
    with (
        folder,
        result_writer(
            output,
            SPEC,
            names={path: path.stem for path in images},
            image_ids={path: int(path.stem) for path in images},
            labels=[f"class {n}" for n in range(90)],
            tsv_header=True,
            pictures=pictures,
            folder=folder,
            processes=processes,
            shared=shared,
        ) as results,
    ):
        folder.start()
        for start in range(0, COUNT, BATCH):
            batch = images[start : start + BATCH]
            results.write(found(batch, load))
            for path in batch if shared else ():
                spoil(path)
            if start == COUNT // 2 and processes:
                running = (begin or started)()
                if kill:
                    for pid in running:
                        os.kill(pid, signal.SIGKILL)
    return running


def files_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {
        p.name: p.read_bytes() for p in folder.iterdir() if p.name != JOURNAL
    }
    lines = (folder / JOURNAL).read_text().splitlines() if (folder / JOURNAL).exists() else []
    found["lines"] = sorted(
        set(lines)
    )  # a process that is killed may have noted what is written again
    return found


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("pictures", ["no pictures", "read again", "shared"])
def test_files_are_those_of_threads(
    pictures: str, kill: bool, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "available_cores", lambda: 2)
    drawn = pictures != "no pictures"
    assert write(images, tmp_path / "threads", processes=False, pictures=drawn) == []
    with SharedSources() if pictures == "shared" else nullcontext() as shared:
        running = write(
            images, tmp_path / "processes", processes=True, pictures=drawn, kill=kill, shared=shared
        )
    assert len(running) == 2
    files = files_of(tmp_path / "processes")
    assert files == files_of(tmp_path / "threads")
    assert len(files) == (2 if drawn else 1) * COUNT + 4  # detections, labels, manifest, lines
    text = (tmp_path / "processes" / "detections.json").read_text()
    assert [r["image_id"] for r in json.loads(text)] == [
        n for n in range(COUNT) for _ in range(n % 7)
    ]
    for pid in running:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("pictures", ["no pictures", "read again", "shared"])
def test_threads_write_until_processes_have_started(pictures: str, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Those are not waited for."""
    monkeypatch.setattr(writer, "available_cores", lambda: 2)
    drawn = pictures != "no pictures"
    write(images, tmp_path / "threads", processes=False, pictures=drawn)
    by_threads: list[int] = []
    by_processes: list[int] = []
    write_here, ask, collect = ResultWriter._write, Processes.ask, Processes.collect

    def note_here(self: ResultWriter, tasks: Sequence[Task]) -> Written:
        by_threads.extend(int(path.stem) for task in tasks for path in task.found.paths)
        return write_here(self, tasks)

    def note_sent(self: Processes, message: Sequence[Sent]) -> Answer[Any]:
        by_processes.extend(int(Path(path).stem) for one in message for path in one.paths)
        return ask(self, message)

    def begin() -> list[int]:
        monkeypatch.setattr(Processes, "collect", collect)
        return started()

    # A share is a batch, so that threads have those before the processes begin.
    monkeypatch.setattr(writer, "SHARE", BATCH)
    monkeypatch.setattr(writer, "SHARE_PICTURES", BATCH)
    monkeypatch.setattr(ResultWriter, "_write", note_here)
    monkeypatch.setattr(Processes, "ask", note_sent)
    monkeypatch.setattr(Processes, "collect", lambda *_, **__: None)
    with SharedSources() if pictures == "shared" else nullcontext() as shared:
        write(images, tmp_path / "both", processes=True, pictures=drawn, shared=shared, begin=begin)
    half = COUNT // 2 + BATCH
    assert sorted(by_threads) == list(range(half))
    assert by_processes == list(range(half, COUNT))
    assert files_of(tmp_path / "both") == files_of(tmp_path / "threads")


def answers(folder: Path) -> _Answers:
    return _Answers(ImageFiles(folder, SPEC, (), False, 0.3, "png", True))


def sent(outputs: RawResults) -> Sent:
    count = len(outputs)
    paths = [Path(f"{n}.jpg") for n in range(count)]
    return Sent.of(Task(Found(paths, outputs), [path.stem for path in paths], range(count)), None)


def test_a_journal_that_cannot_be_written_is_an_answer(tmp_path: Path) -> None:
    """Not a traceback of the process, behind which the run goes on without it."""
    (tmp_path / JOURNAL).mkdir()
    written = answers(tmp_path)([sent(outputs([1]))])
    assert (written.images, written.text, written.boxes) == (0, b"", 0)
    assert isinstance(written.error, IsADirectoryError)


def test_what_a_process_has_to_say_is_in_its_answer(tmp_path: Path) -> None:
    """Its own stderr is nobody's."""
    some = outputs([6, 5])
    some.arrays["detection_boxes"][0, 1] = np.nan
    written = answers(tmp_path)([sent(some)])
    assert (written.images, written.boxes, written.error) == (2, 10, None)
    assert written.warnings == (
        "1 of 6 detections of an image are left out: their boxes or scores are not finite, as of an FP16 model that overflows",
    )
    some.arrays["detection_classes"][1, 0] = 90
    written = answers(tmp_path)([sent(some)])
    assert str(written.error).startswith("detection_classes: expected 0 to 89, found 90; ")


def test_warnings_of_python_are_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As where threads write: the program keeps them for -v."""
    some = outputs([3])
    some.arrays["detection_classes"] = some.arrays["detection_classes"].astype(np.float32)
    some.arrays["detection_classes"][0, 8] = np.nan  # beyond what was found
    image_files = ImageFiles(tmp_path, SPEC, (), False, 0.3, "png", False)
    with Processes("trtdet.results.image_files", "write results", [image_files]) as processes:
        assert processes.wait_for(processes.ask([sent(some)])).boxes == 3
    assert capfd.readouterr().err == ""


def test_an_image_that_has_gone_has_no_picture(images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """What was found in it is written."""
    images[7].unlink()
    write(images, tmp_path / "out", processes=True, pictures=True)
    assert len(list((tmp_path / "out").glob("*.tsv"))) == COUNT
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {path.stem for path in images} - {"007"}
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"no picture: {images[7]}: ")


def test_an_error_of_a_process_is_raised_here(images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(writer, "available_cores", lambda: 1)
    output = tmp_path / "out"
    names = {path: path.stem for path in images}
    ids = {path: int(path.stem) for path in images}
    with (
        pytest.raises(OSError, match=r"--output: cannot write the results of .*050\.png"),
        result_writer(
            output, SPEC, names=names, image_ids=ids, pictures=False, processes=True
        ) as results,
    ):
        for start in range(0, COUNT, BATCH):
            if start == 18:
                assert len(started()) == 1
            if start == 48:
                (output / "050.tsv").mkdir()
            results.write(found(images[start : start + BATCH]))
    assert not (output / "detections.json").exists()
