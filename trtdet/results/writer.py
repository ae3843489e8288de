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
from queue import Empty, SimpleQueue
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from trtdet import files
from trtdet.detections import Detections
from trtdet.labels import LABELS_FILE
from trtdet.machine import available_cores
from trtdet.processes import Process
from trtdet.results import coco
from trtdet.results.image_files import ImageFiles, Task, Written, pack
from trtdet.results.manifest import RunFolder
from trtdet.results.options import DRAW_THRESHOLD, ImageFormat
from trtdet.spec import ModelSpec

logger = logging.getLogger(__name__)


#: Results that a process gets at a time.
SHARE = 8
#: Processes that write: more do not bring more.
MOST_PROCESSES = 8


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

    With `share` above 1, each thread has a process that does it, and gets so many results at a
    time.
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
        share: int,
        image_files: ImageFiles,
        names: Mapping[Path, Path],
        image_ids: Mapping[Path, int | str],
        folder: RunFolder | None,
        processes: Sequence[Process],
    ) -> None:
        self._output = output
        self._folder = folder
        self._pool = pool
        self._json = json_file
        self._limit = limit
        self._share = share
        self._files = image_files
        self._names = names
        self._image_ids = image_ids
        self._processes: SimpleQueue[Process] = SimpleQueue()
        for process in processes:
            self._processes.put(process)
        self._lock = threading.Lock()
        self._thread = threading.local()
        #: Detections that pictures do not show.
        self.undrawn = 0
        self._waiting: list[Task] = []  # for a share to be full
        self._pending: deque[Future[list[str]]] = deque()  # in the order of the images
        self._separator = "["

    def write(self, result: ImageResult) -> None:
        """Queue one result.

        Raises:
            OSError: an earlier result could not be written.
        """
        output = self._names[result.path]
        image_id = self._image_ids.get(result.path)
        self._waiting.append(Task(result.path, output, image_id, result.detections, result.source))
        if len(self._waiting) >= self._share:
            self._submit()

    def keep(self, text: str) -> None:
        """Queue what an earlier run has for detections.json."""
        self._submit()
        one: Future[list[str]] = Future()
        one.set_result([text])
        self._pending.append(one)

    def finish(self) -> None:
        """Wait for all that is queued and end detections.json.

        Raises:
            OSError: a result could not be written.
        """
        self._submit()
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

    def _submit(self) -> None:
        """Hand the results that wait to a thread."""
        if not self._waiting:
            return
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._limit):
            self._collect()
        tasks, self._waiting = self._waiting, []
        self._pending.append(self._pool.submit(self._write_all, tasks))

    def _collect(self) -> None:
        """Wait for the oldest results and append them to detections.json."""
        for text in filter(None, self._pending.popleft().result()):
            with naming_json(self._output):
                self._json.write(f"{self._separator}\n{text}")
            self._separator = ","

    def _write_all(self, tasks: Sequence[Task]) -> list[str]:
        """Write images' files; returns their parts of detections.json. Runs on the pool."""
        self.check_output()
        process = self._process() if self._share > 1 else None
        answer = None if process is None else process.ask(pack(tasks))
        if answer is None:
            done = self._files.write_all(tasks)
            written = [one for one in done if isinstance(one, Written)]
            if self._folder is not None:
                self._folder.add("".join(one.line for one in written))
            texts, undrawn = [one.text for one in written], sum(one.undrawn for one in written)
            error = done[-1] if isinstance(done[-1], OSError) else None
        else:
            texts, undrawn, error = answer
        if undrawn:
            with self._lock:
                self.undrawn += undrawn
        if error is not None:
            self.check_output()  # says it better, where that is the reason
            path = tasks[len(texts)].path
            raise OSError(f"--output: cannot write the results of {path}: {files.message_of(error)}") from error  # fmt: skip
        return texts

    def _process(self) -> Process | None:
        """A process for this thread; None where there is none left."""
        if not hasattr(self._thread, "process"):
            with suppress(Empty):
                self._thread.process = self._processes.get_nowait()
        found: Process | None = getattr(self._thread, "process", None)
        return found


@contextmanager
def naming_json(output: Path) -> Iterator[None]:
    """Let an error of the block say which file could not be written: a full disk names none."""
    try:
        yield
    except OSError as error:
        files.check_folder(output)  # says it better, where that is the reason
        advice = "; make room, or choose another folder" if error.errno in files.NO_ROOM else ""
        raise OSError(f"--output: cannot write {output / 'detections.json'}: {error.strerror or error}{advice}") from error  # fmt: skip


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


def start_processes(image_files: ImageFiles, count: int, resources: ExitStack) -> list[Process]:
    """Processes that write, until `resources` are closed; fewer where there are no more to be
    had.
    """
    started = []
    try:
        for _ in range(count):
            process = Process("trtdet.results.image_files", "writes results", image_files)
            started.append(resources.enter_context(process))
    except OSError as error:
        logger.warning("a process that writes results does not start: %s", error)
    for process in started:
        process.wait_until_ready()
    return started


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
    processes: bool = False,
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
        processes: let processes do it, for very many results a second without pictures.
    """
    threads = min(available_cores(), MOST_PROCESSES) if processes else available_cores()
    image_files = ImageFiles(
        folder=output.absolute(),
        labels=labels,
        tsv_header=tsv_header,
        draw_threshold=draw_threshold,
        image_format=image_format,
        category_ids=spec.category_ids,
        inclusive_corners=spec.inclusive_corners,
        journal=folder is not None,
    )
    with ExitStack() as resources:
        with naming_json(output):
            temporary = resources.enter_context(files.atomic_path(output / "detections.json"))
            json_file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
        resources.push(lambda *raised: _close(json_file, quietly=raised[0] is not None))
        started = start_processes(image_files, threads, resources) if processes else ()
        pool = resources.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="write"))
        writer = ResultWriter(
            output,
            pool,
            json_file,
            limit=threads * ResultWriter.PENDING_PER_THREAD,
            share=SHARE if processes else 1,
            image_files=image_files,
            names=names,
            image_ids=image_ids,
            folder=folder,
            processes=started,
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
