# SPDX-License-Identifier: Apache-2.0
"""What is written for some images: TSVs, pictures, their part of detections.json. Threads do it, or
processes, which is why nothing here refers to the run.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

from trtdet.detections import Detections, coco_text, write_tsv
from trtdet.files import message_of
from trtdet.images.files import ImageArray, load_image
from trtdet.images.shared_sources import SharedSource, SharedSources
from trtdet.processes import answer_all
from trtdet.results import draw, naming
from trtdet.results.found import Found
from trtdet.results.manifest import JOURNAL, journal_line
from trtdet.results.options import ImageFormat
from trtdet.shared_memory import attach
from trtdet.spec import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Some images to write the files of.

    Attributes:
        outputs: the names of their files, relative to the output folder, without suffix.
        image_ids: in detections.json; None: the image is left out there.
    """

    found: Found
    outputs: Sequence[str]
    image_ids: Sequence[int | str | None]


@dataclass(frozen=True)
class Sent:
    """A task on its way to a process.

    Attributes:
        task: without paths and decoded images.
        paths: as text, which is pickled in a tenth of the time of a `Path`.
        shared: where the process sees the decoded images; None: it reads one again.
    """

    task: Task
    paths: Sequence[str]
    shared: Sequence[SharedSource | None] | None

    @classmethod
    def of(cls, task: Task, memory: SharedSources | None) -> "Sent":
        paths, sources = task.found.paths, task.found.sources
        where = None
        if sources is not None and memory is not None:
            where = [None if source is None else memory.where(source) for source in sources]
        bare = replace(task, found=replace(task.found, paths=(), sources=None))
        return cls(bare, [str(path) for path in paths], where)

    def received(self, memory: NDArray[np.uint8] | None) -> Task:
        """The task, in a process that sees `memory`."""
        sources = None
        if self.shared is not None and memory is not None:
            sources = [None if where is None else where.of(memory) for where in self.shared]
        paths = [Path(path) for path in self.paths]
        return replace(self.task, found=replace(self.task.found, paths=paths, sources=sources))


@dataclass(frozen=True)
class Written:
    """What came of some tasks.

    Attributes:
        images: how many were written: all, or those before an error.
        text: their part of detections.json, in UTF-8.
        lines: of the manifest's journal; "" without one.
        boxes: detections.
        undrawn: those that the pictures do not show.
        error: what ended it.
        warnings: what a process had to say.
    """

    images: int = 0
    text: bytes = b""
    lines: str = ""
    boxes: int = 0
    undrawn: int = 0
    error: OSError | ValueError | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageFiles:
    """Writes the files of images.

    Attributes:
        folder: the output folder.
        spec: of the model.
        labels: [class_id] -> text.
        tsv_header: TSVs get column names and, where there are `labels`, a label column.
        draw_threshold: pictures show detections from this score on.
        image_format: what pictures are written as.
        journal: whether there are lines to make.
        read_again: where a task has no pixels, read the image again to draw on it. That costs less
            than sending pixels to a process.
    """

    folder: Path
    spec: ModelSpec
    labels: Sequence[str]
    tsv_header: bool
    draw_threshold: float
    image_format: ImageFormat
    journal: bool
    read_again: bool = False

    def write(self, tasks: Sequence[Task]) -> Written:
        """Write the files of one image after the other; none after an error."""
        texts: list[str] = []
        lines: list[str] = []
        boxes = undrawn = 0
        error: OSError | ValueError | None = None
        try:
            for path, output, image_id, detections, source in self._images(tasks):
                undrawn += self._write_one(path, output, detections, source)
                text = "" if image_id is None else self._text(detections, image_id)
                if self.journal:
                    lines.append(journal_line(path, output, image_id, text))
                texts.append(text)
                boxes += len(detections)
        except (OSError, ValueError) as raised:
            error = raised
        together = ",\n".join(filter(None, texts)).encode()
        return Written(len(texts), together, "".join(lines), boxes, undrawn, error)

    def _images(
        self, tasks: Sequence[Task]
    ) -> Iterator[tuple[Path, str, int | str | None, Detections, ImageArray | None]]:
        """The images of tasks, with what is needed of each."""
        for task in tasks:
            found = task.found
            sources = found.sources or [None] * len(found)
            results = found.decoded(self.spec)
            yield from zip(found.paths, task.outputs, task.image_ids, results, sources, strict=True)

    def _write_one(
        self, path: Path, output: str, detections: Detections, source: ImageArray | None
    ) -> int:
        """The files of one image; returns how many detections its picture does not show."""
        write_tsv(
            self.folder / f"{output}.tsv",
            detections,
            labels=self.labels if self.tsv_header else (),
            header=self.tsv_header,
        )
        if source is None and self.read_again:
            source = _read_again(path)
        if source is None:
            return 0
        threshold = self.draw_threshold
        picture = draw.draw(source, detections, self.labels, score_threshold=threshold)
        naming.write_picture(self.folder / f"{output}.{self.image_format}", picture)
        return len(detections) - len(detections.above(threshold))

    def _text(self, detections: Detections, image_id: int | str) -> str:
        return coco_text(
            detections,
            image_id,
            self.spec.category_ids,
            inclusive_corners=self.spec.inclusive_corners,
        )


def _read_again(path: Path) -> ImageArray | None:
    """None: it cannot be read any more, which is said."""
    try:
        return load_image(path)
    except (OSError, ValueError) as error:
        logger.warning("no picture: %s", message_of(error))
        return None


class _Answers:
    """What a process writes, and says of it."""

    def __init__(self, image_files: ImageFiles, memory: NDArray[np.uint8] | None = None) -> None:
        self._files = image_files
        self._memory = memory
        self._journal: BinaryIO | None = None

    def __call__(self, sent: Sequence[Sent]) -> Written:
        """Write images' files and their lines of the journal."""
        with _warnings() as warnings:
            written = self._files.write([one.received(self._memory) for one in sent])
        try:
            self._note(written.lines)
        except OSError as full:
            written = Written(error=full)
        return replace(written, lines="", warnings=tuple(warnings))

    def _note(self, lines: str) -> None:
        """Append to the journal, in one piece."""
        if lines and self._journal is None:
            self._journal = open(self._files.folder / JOURNAL, "ab", buffering=0)  # noqa: SIM115
        if self._journal is not None:
            self._journal.write(lines.encode())


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What is logged in the block, for the process that shows it."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("trtdet")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def serve(pipe_file: int, *memory: int) -> None:
    """What a process does.

    Args:
        memory: the file of `SharedSources`, where there are some.
    """
    cv2.setNumThreads(1)  # there is a process for each core
    logging.captureWarnings(True)  # Python's own, which are not shown where threads write either
    seen = attach(*memory) if memory else None
    answer_all(lambda image_files: _Answers(image_files, seen), pipe_file)
