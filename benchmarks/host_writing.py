# SPDX-License-Identifier: Apache-2.0
"""What infer.py does around a model: files to detections, TSVs, detections.json and pictures,
with a stand-in for the engine or with a model.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet.closing import Closing
from trtdet.results import coco, naming
from trtdet.results.manifest import RunFolder
from trtdet.results.options import ImageFormat
from trtdet.results.writer import result_writer
from trtdet.run.detect import find, open_batcher, open_model
from trtdet.run.infer import maybe_shared, writes_in_processes
from trtdet.run.options import RunOptions
from trtdet.runtimes.base import Outputs, Runtime
from trtdet.spec import ModelSpec, Nms, Preprocessing

#: What is written -> pictures as what; None: none.
WRITTEN: dict[str, ImageFormat | None] = {"no pictures": None, "PNG": "png", "JPEG": "jpg"}
ROWS = 100  # detections per image, as NMS leaves them


class StandInEngine(Runtime, Closing):
    """Finds the same `boxes` objects and 100 - `boxes` unlikely ones in every image, in no time."""

    batch_range: tuple[int, int | None] = (1, None)
    description = "stand-in engine"
    frees_cpu = pins = True  # as an engine does

    def __init__(self, preprocessing: Preprocessing, boxes: int) -> None:
        self.spec = ModelSpec("automl", preprocessing, Nms(), tuple(range(1, 91)))
        random = np.random.default_rng(0)
        corners = np.sort(random.uniform(0, 1, (ROWS, 2, 2)), axis=1).reshape(ROWS, 4)
        likely = np.sort(random.uniform(0.3, 1, boxes))[::-1]
        unlikely = np.sort(random.uniform(0.001, 0.29, ROWS - boxes))[::-1]
        self._rows: Outputs = {
            "num_detections": np.array([ROWS], np.int32),
            "detection_boxes": corners.astype(np.float32),
            "detection_scores": np.concatenate([likely, unlikely]).astype(np.float32),
            "detection_classes": random.integers(0, 90, ROWS).astype(np.int32),
        }

    def infer(self, images: NDArray[Any]) -> Outputs:
        return {name: np.repeat(rows[None], len(images), axis=0) for name, rows in self._rows.items()}  # fmt: skip

    def close(self) -> None: ...


def detect_files(
    runtime: Runtime,
    paths: Sequence[Path],
    output: Path,
    image_format: ImageFormat | None,
    options: RunOptions,
) -> None:
    """What infer.py does once the model is open."""
    root = paths[0].parent
    names = dict(zip(paths, naming.output_names(paths, root), strict=True))
    folder = RunFolder(output, [], (".tsv",), {})
    pictures = image_format is not None
    processes = writes_in_processes(runtime, len(paths))
    with (
        folder,
        maybe_shared(pictures and processes) as shared,
        open_batcher(
            runtime, paths, options, keep_sources=pictures and not processes, shared=shared
        ) as batcher,
        result_writer(
            output,
            runtime.spec,
            names=names,
            image_ids=coco.name_images(paths, root),
            pictures=pictures,
            folder=folder,
            image_format=image_format or "png",
            processes=processes,
            shared=shared,
        ) as writer,
    ):
        folder.start()
        for found in find(runtime, batcher):
            writer.write(found)
    folder.finish()


def candidates(
    runtime: Runtime, paths: Sequence[Path], options: RunOptions
) -> dict[str, Callable[[], float]]:
    """By what is written: a run that says how many images a second it did."""

    def run(image_format: ImageFormat | None) -> float:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            detect_files(runtime, paths, Path(folder), image_format, options)
            return len(paths) / (time.perf_counter() - start)

    return {name: (lambda kind=kind: run(kind)) for name, kind in WRITTEN.items()}  # type: ignore[misc]


def measure(
    runtime: Runtime, paths: Sequence[Path], options: RunOptions, rounds: int
) -> dict[str, float]:
    """Images per second by what is written, the best of the rounds, in turn, after a warm-up."""
    runs = candidates(runtime, paths, options)
    best = dict.fromkeys(runs, 0.0)
    for number in range(rounds + 1):
        for name, run in runs.items():
            rate = run()
            if number:
                best[name] = max(best[name], rate)
    return best


def lines(what: str, rates: dict[str, float]) -> list[str]:
    """The rows to print: rate, and its share of that without pictures."""
    without = rates["no pictures"]
    return [f"{what}, {name}".ljust(44) + f"{rate:>9.1f}{rate / without:>10.3f}" for name, rate in rates.items()]  # fmt: skip


def unlike_names(paths: Sequence[Path], folder: Path, count: int) -> list[Path]:
    """`count` links to the images, each with a name of its own: results of the same image twice
    would be one file.
    """
    found = []
    for number in range(count):
        source = paths[number % len(paths)]
        link = folder / f"{number:05d}{source.suffix}"
        link.symlink_to(source.resolve())
        found.append(link)
    return found


def open_or_stand_in(model: Path | None, preprocessing: Preprocessing, boxes: int) -> Runtime:
    """The model, or a stand-in where there is none."""
    if model is None:
        return StandInEngine(preprocessing, boxes)
    return open_model(model, RunOptions())
