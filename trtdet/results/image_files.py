# SPDX-License-Identifier: Apache-2.0
"""What is written for one image: a TSV, a picture, its part of detections.json. Threads do it, or
processes, which is why nothing here refers to the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trtdet.detections import Detections, coco_text, write_tsv
from trtdet.processes import answer_all
from trtdet.results import draw, naming
from trtdet.results.manifest import journal_line
from trtdet.results.options import ImageFormat


@dataclass(frozen=True)
class Task:
    """One image and what was found in it.

    Attributes:
        name: of its files, without suffix.
        output: the same, relative to the output folder.
        image_id: in detections.json; None: it is left out there.
        source: (h, w, 3) uint8 RGB, to draw on; None: no picture.
    """

    path: Path
    name: Path
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
        labels: [class_id] -> text.
        tsv_header: TSVs get column names and, where there are `labels`, a label column.
        draw_threshold: pictures show detections from this score on.
        image_format: what pictures are written as.
        category_ids, inclusive_corners: of the model, for detections.json.
        journal: whether there are lines to make.
    """

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
        write_tsv(
            naming.with_suffix_added(task.name, ".tsv"),
            task.detections,
            labels=self.labels if self.tsv_header else (),
            header=self.tsv_header,
        )
        undrawn = 0
        if task.source is not None:
            threshold = self.draw_threshold
            picture = draw.draw(task.source, task.detections, self.labels, score_threshold=threshold)  # fmt: skip
            undrawn = len(task.detections) - len(task.detections.above(threshold))
            naming.write_picture(naming.with_suffix_added(task.name, f".{self.image_format}"), picture)  # fmt: skip
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

    def write_all(self, tasks: Sequence[Task], pipe: Connection | None = None) -> list[Written | OSError]:  # fmt: skip
        """Write images' files: for each, what came of it. Not one after an error."""
        done: list[Written | OSError] = []
        for task in tasks:
            try:
                done.append(self.write(task))
            except OSError as error:
                done.append(error)
                break
        return done


def serve(pipe_file: int) -> None:
    """What a process does."""
    answer_all(pipe_file, lambda files: files.write_all)
