# SPDX-License-Identifier: Apache-2.0
"""What is written for one image: a TSV, a picture, its part of detections.json. Threads do it, or
processes, which is why nothing here refers to the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trtdet.detections import Detections, coco_text, write_tsv
from trtdet.processes import answer_all
from trtdet.results import draw, naming
from trtdet.results.manifest import PARTIAL, journal_line
from trtdet.results.options import ImageFormat


@dataclass(frozen=True)
class Task:
    """One image and what was found in it.

    Attributes:
        output: the name of its files, relative to the output folder, without suffix.
        image_id: in detections.json; None: it is left out there.
        source: (h, w, 3) uint8 RGB, to draw on; None: no picture.
    """

    path: Path
    output: Path
    image_id: int | str | None
    detections: Detections
    source: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Written:
    """What came of an image.

    Attributes:
        text: its part of detections.json.
        line: its line of the manifest's journal; "" without one.
        undrawn: detections that the picture does not show.
    """

    text: str
    line: str
    undrawn: int


@dataclass(frozen=True)
class ImageFiles:
    """Writes the files of one image after the other.

    Attributes:
        folder: the output folder.
        labels: [class_id] -> text.
        tsv_header: TSVs get column names and, where there are `labels`, a label column.
        draw_threshold: pictures show detections from this score on.
        image_format: what pictures are written as.
        category_ids, inclusive_corners: of the model, for detections.json.
        journal: whether there are lines to make.
    """

    folder: Path
    labels: Sequence[str]
    tsv_header: bool
    draw_threshold: float
    image_format: ImageFormat
    category_ids: Sequence[int]
    inclusive_corners: bool
    journal: bool

    def write(self, task: Task) -> Written:
        """Write one image's files.

        Raises:
            OSError: one cannot be written.
        """
        name = self.folder / task.output
        write_tsv(
            naming.with_suffix_added(name, ".tsv"),
            task.detections,
            labels=self.labels if self.tsv_header else (),
            header=self.tsv_header,
        )
        undrawn = 0
        if task.source is not None:
            threshold = self.draw_threshold
            picture = draw.draw(task.source, task.detections, self.labels, score_threshold=threshold)  # fmt: skip
            undrawn = len(task.detections) - len(task.detections.above(threshold))
            naming.write_picture(naming.with_suffix_added(name, f".{self.image_format}"), picture)  # fmt: skip
        text = ""
        if task.image_id is not None:
            text = coco_text(
                task.detections,
                task.image_id,
                self.category_ids,
                inclusive_corners=self.inclusive_corners,
            )
        line = journal_line(task.path, task.output, task.image_id, text) if self.journal else ""
        return Written(text, line, undrawn)

    def write_all(self, tasks: Sequence[Task]) -> list[Written | OSError]:
        """Write images' files: for each, what came of it. Not one after an error."""
        done: list[Written | OSError] = []
        for task in tasks:
            try:
                done.append(self.write(task))
            except OSError as error:
                done.append(error)
                break
        return done


def pack(tasks: Sequence[Task]) -> tuple[Any, ...]:
    """Tasks without pictures as a message: a few large parts cost less than many small ones."""
    found = [task.detections for task in tasks]
    angles = [one.angles for one in found if one.angles is not None]
    return (
        [(str(task.path), str(task.output), task.image_id, len(task.detections)) for task in tasks],
        np.concatenate([one.boxes_xyxy for one in found]),
        np.concatenate([one.scores for one in found]),
        np.concatenate([one.class_ids for one in found]),
        np.concatenate(angles) if angles else None,
    )


def unpack(message: tuple[Any, ...]) -> list[Task]:
    """The tasks of a message."""
    named, boxes, scores, class_ids, angles = message
    tasks = []
    start = 0
    for path, output, image_id, count in named:
        part = slice(start, start + count)
        start += count
        own_angles = None if angles is None else angles[part]
        found = Detections(boxes[part], scores[part], class_ids[part], own_angles)
        tasks.append(Task(Path(path), Path(output), image_id, found))
    return tasks


class _Answers:
    """What a process writes, and says of it."""

    def __init__(self, image_files: ImageFiles) -> None:
        self._files = image_files
        self._journal: BinaryIO | None = None

    def __call__(self, message: tuple[Any, ...]) -> tuple[list[str], int, OSError | None]:
        """Write images' files and their lines of the journal.

        Returns:
            Their parts of detections.json, the detections that are not shown, and the error that
            ended it.
        """
        done = self._files.write_all(unpack(message))
        written = [one for one in done if isinstance(one, Written)]
        lines = "".join(one.line for one in written)
        try:
            self._note(lines)
        except OSError as full:
            return [], 0, full
        error = done[-1] if done and isinstance(done[-1], OSError) else None
        return [one.text for one in written], sum(one.undrawn for one in written), error

    def _note(self, lines: str) -> None:
        """Append to the journal, in one piece."""
        if lines and self._journal is None:
            self._journal = open(self._files.folder / PARTIAL, "ab", buffering=0)  # noqa: SIM115
        if self._journal is not None:
            self._journal.write(lines.encode())


def serve(pipe_file: int) -> None:
    """What a process does."""
    answer_all(pipe_file, _Answers)
