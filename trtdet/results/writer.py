# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for each image: a picture, a TSV, and its part of detections.json."""

import logging
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from trtdet import files
from trtdet.detections import Detections, coco_text, write_tsv
from trtdet.labels import LABELS_FILE
from trtdet.machine import available_cores
from trtdet.results import coco, draw, naming
from trtdet.results.manifest import RunFolder
from trtdet.results.options import DRAW_THRESHOLD, ImageFormat
from trtdet.spec import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageResult:
    """One image and what was found in it.

    Attributes:
        source: (h, w, 3) uint8 RGB; None where the batcher does not keep it.
    """

    path: Path
    detections: Detections
    source: NDArray[np.uint8] | None


ImageResults = Generator[ImageResult, None, None]


class ResultWriter:
    """Writes TSVs and, of results that have their `source`, pictures on a thread pool, and
    detections.json in the order of the images. Made by `result_writer`.
    """

    #: Results per thread that may wait: `write` blocks when the disk is slower than the runtime, so
    #: memory stays flat.
    PENDING_PER_THREAD = 4

    def __init__(
        self,
        output: Path,
        pool: ThreadPoolExecutor,
        json_file: TextIO,
        *,
        limit: int,
        spec: ModelSpec,
        names: Mapping[Path, Path],
        image_ids: Mapping[Path, int | str],
        labels: Sequence[str],
        tsv_header: bool,
        draw_threshold: float,
        folder: RunFolder | None,
        image_format: ImageFormat,
    ) -> None:
        self._output = output
        self._folder = folder
        self._pool = pool
        self._json = json_file
        self._limit = limit
        self._spec = spec
        self._names = names
        self._image_ids = image_ids
        self._labels = labels
        self._tsv_header = tsv_header
        self._draw_threshold = draw_threshold
        self._image_format = image_format
        self._lock = threading.Lock()
        #: Detections that pictures do not show.
        self.undrawn = 0
        self._pending: deque[Future[str]] = deque()  # in the order of the images
        self._separator = "["

    def write(self, result: ImageResult) -> None:
        """Queue one result.

        Raises:
            OSError: an earlier result could not be written.
        """
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._limit):
            self._collect()
        self._pending.append(self._pool.submit(self._write_one, result))

    def keep(self, text: str) -> None:
        """Queue what an earlier run has for detections.json."""
        one: Future[str] = Future()
        one.set_result(text)
        self._pending.append(one)

    def finish(self) -> None:
        """Wait for all that is queued and end detections.json.

        Raises:
            OSError: a result could not be written.
        """
        while self._pending:
            self._collect()
        with naming_json(self._output):
            self._json.write("\n]\n" if self._separator == "," else "[]\n")
            self._json.flush()

    def check_output(self) -> None:
        """Raise FileNotFoundError where the output folder is no longer the one of the start:
        earlier results are gone.
        """
        if not Path(self._json.name).exists():
            raise FileNotFoundError(
                f"--output: {self._output} has disappeared during the run; its results are lost, run again"
            )

    def _collect(self) -> None:
        """Wait for the oldest result and append it to detections.json."""
        text = self._pending.popleft().result()
        if text:
            with naming_json(self._output):
                self._json.write(f"{self._separator}\n{text}")
            self._separator = ","

    def _write_one(self, result: ImageResult) -> str:
        """Write one image's files; returns its part of detections.json. Runs on the pool."""
        self.check_output()
        name = self._output / self._names[result.path]
        try:
            write_tsv(
                naming.with_suffix_added(name, ".tsv"),
                result.detections,
                labels=self._labels if self._tsv_header else (),
                header=self._tsv_header,
            )
            if result.source is not None:
                picture = draw.draw(
                    result.source,
                    result.detections,
                    self._labels,
                    score_threshold=self._draw_threshold,
                )
                shown = len(result.detections.above(self._draw_threshold))
                with self._lock:
                    self.undrawn += len(result.detections) - shown
                naming.write_picture(
                    naming.with_suffix_added(name, f".{self._image_format}"), picture
                )
        except OSError as error:
            self.check_output()  # says it better, where that is the reason
            raise OSError(
                f"--output: cannot write the results of {result.path}: {error}"
            ) from error
        text = self._json_text(result)
        if self._folder is not None:
            image_id = self._image_ids.get(result.path)
            self._folder.add(result.path, self._names[result.path], image_id, text)
        return text

    def _json_text(self, result: ImageResult) -> str:
        """One image's part of detections.json."""
        if result.path not in self._image_ids:
            return ""
        return coco_text(
            result.detections,
            self._image_ids[result.path],
            self._spec.category_ids,
            inclusive_corners=self._spec.inclusive_corners,
        )


@contextmanager
def naming_json(output: Path) -> Iterator[None]:
    """Let an error of the block say which file could not be written: a full disk names none."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        file = next(p for p in (output, *output.parents) if p.exists())
        raise OSError(f"--output: expected a folder, {file} is a file; choose another name") from error  # fmt: skip
    except OSError as error:
        raise OSError(
            f"--output: cannot write {output / 'detections.json'}: {error.strerror or error}; make room, or choose another folder"
        ) from error


def write_labels(output: Path, labels: Sequence[str]) -> None:
    """Leave the class names, where there are any, beside the TSVs, for whoever draws them."""
    if labels:
        text = "".join(f"{' '.join(text.split())}\n" for text in labels)
        files.write_text(output / LABELS_FILE, text)


def _close(file: TextIO, *, quietly: bool) -> None:
    """Close a file that a full disk may keep from being written out; `quietly` where that was
    said already.
    """
    with suppress(OSError) if quietly else nullcontext():
        file.close()


@contextmanager
def result_writer(
    output: Path,
    spec: ModelSpec,
    *,
    names: Mapping[Path, Path],
    image_ids: Mapping[Path, int | str],
    labels: Sequence[str] = (),
    tsv_header: bool = False,
    draw_threshold: float = DRAW_THRESHOLD,
    folder: RunFolder | None = None,
    image_format: ImageFormat = "png",
) -> Iterator[ResultWriter]:
    """A `ResultWriter`; leaving it waits for every file. detections.json appears only where nothing
    failed.

    Args:
        output: made if missing.
        names: image -> its output name without suffix, relative to `output`.
        image_ids: image -> its id in detections.json; images that are missing here are left out
            there.
        labels: [class_id] -> text.
        tsv_header: TSVs get column names and, where there are `labels`, a label column.
        draw_threshold: pictures show detections from this score on.
        folder: told of every image that is written.
        image_format: what pictures are written as.
    """
    threads = available_cores()
    with ExitStack() as resources:
        with naming_json(output):
            temporary = resources.enter_context(files.atomic_path(output / "detections.json"))
            json_file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
        resources.push(lambda *raised: _close(json_file, quietly=raised[0] is not None))
        pool = resources.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="write"))
        writer = ResultWriter(
            output,
            pool,
            json_file,
            limit=threads * ResultWriter.PENDING_PER_THREAD,
            spec=spec,
            names=names,
            image_ids=image_ids,
            labels=labels,
            tsv_header=tsv_header,
            draw_threshold=draw_threshold,
            folder=folder,
            image_format=image_format,
        )
        try:
            yield writer
            writer.finish()
            write_labels(output, labels)
            writer.check_output()
        finally:
            pool.shutdown(cancel_futures=True)


def pick_image_ids(
    paths: Sequence[Path], root: Path, annotations: Path | None
) -> Mapping[Path, int | str]:
    """The image ids of detections.json; with annotations, files that these do not know have
    none.
    """
    if annotations is None:
        return coco.name_images(paths, root)
    known = coco.match_images(coco.read_annotations(annotations), paths, root)
    if len(known) < len(paths):
        logger.warning(
            "%s does not have %d of %d images: they are left out of detections.json",
            annotations,
            len(paths) - len(known),
            len(paths),
        )
    return known
