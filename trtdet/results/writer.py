# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for each image: a picture, a TSV, and its part of detections.json."""

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, TypeAlias

from trtdet import files
from trtdet.images.shared_sources import SharedSources
from trtdet.labels import LABELS_FILE
from trtdet.machine import available_cores
from trtdet.processes import Answer, Processes
from trtdet.results import coco
from trtdet.results.found import Found
from trtdet.results.image_files import ImageFiles, Sent, Task, Written
from trtdet.results.manifest import RunFolder
from trtdet.results.options import DRAW_THRESHOLD, ImageFormat
from trtdet.spec import ModelSpec

logger = logging.getLogger(__name__)


#: Images that a process gets at a time, about: without pictures and with them.
SHARE, SHARE_PICTURES = 32, 8
#: Images that a thread gets at a time, at most. Without pictures, large shares save more than more
#: threads would; with them, each thread has one share while another waits.
THREAD_SHARE, THREAD_SHARE_PICTURES = 8, 2
#: Processes: of those that write TSVs alone, more do not bring more; those that draw take a core
#: each, and 10 MiB.
MOST_PROCESSES, MOST_PROCESSES_PICTURES = 6, 32


#: Of a thread, or of a process; None: the process has ended.
AnyAnswer: TypeAlias = Future[Written | None] | Answer[Written | None]


class ResultWriter:
    """Writes TSVs and pictures on a thread pool, and detections.json in the order of the images.
    Made by `result_writer`.

    Where there are `processes`, these do it once they have started, and threads what they leave.
    """

    #: Whether there are processes, and pictures -> images that may wait, per thread or process:
    #: `write` blocks when the disk is slower than the runtime, so memory stays flat. More where
    #: there are processes, as these take a while to start.
    PENDING: ClassVar = {
        (False, True): 4,
        (False, False): 32,
        (True, True): 16,
        (True, False): 512,
    }
    #: Bytes of decoded images that may wait; one batch may have more.
    PENDING_BYTES = 1 << 30

    def __init__(
        self,
        output: Path,
        pool: ThreadPoolExecutor,
        threads: int,
        json_file: BinaryIO,
        *,
        image_files: ImageFiles,
        names: Mapping[Path, str],
        image_ids: Mapping[Path, int | str],
        pictures: bool,
        folder: RunFolder | None,
        processes: Processes | None,
        shared: SharedSources | None,
    ) -> None:
        self._output = output
        self._folder = folder
        self._pool = pool
        self._threads = threads
        self._json = json_file
        self._limit = threads * self.PENDING[processes is not None, pictures]
        self._share_bytes = self.PENDING_BYTES // (4 * threads)  # a share has less than two of it
        self._files = image_files
        self._names = names
        self._image_ids = image_ids
        self._processes = processes
        self._shared = shared
        self._pictures = pictures
        self._share = 0  # of a thread: as its part of a batch comes
        if processes is not None:
            self._share = SHARE_PICTURES if pictures else SHARE
        self._tasks: list[Task] = []  # until they are a share
        self._pending: deque[_Pending] = deque()  # in order
        self._images = self._bytes = 0  # of `_pending`
        self._separator = b"["
        #: Detections that are written; those that pictures do not show. All of them at the end.
        self.boxes = self.undrawn = 0

    def write(self, found: Found) -> None:
        """Queue some images, whose files are written by as many threads as there are.

        Raises:
            OSError, ValueError: files of earlier ones could not be written, or outputs decoded.
        """
        part = self._part_of(found)
        for start in range(0, len(found), part):
            some = found if part >= len(found) else found[start : start + part]
            names = [self._names[path] for path in some.paths]
            ids = [self._image_ids.get(path) for path in some.paths]
            self._tasks.append(Task(some, names, ids))
            images, nbytes = _size_of(self._tasks)
            if images >= self._share or nbytes >= self._share_bytes:
                self._submit()

    def _part_of(self, found: Found) -> int:
        """How many of these images go to a thread together: less where they are large, so that
        there are some for each thread within `PENDING_BYTES`.
        """
        most = self._share or THREAD_SHARE
        if self._pictures and not self._share:
            most = min(-(-len(found) // self._threads), THREAD_SHARE_PICTURES)
        largest = max(_bytes_of(found), default=0)
        return max(1, min(most, self._share_bytes // max(largest, 1)))

    def keep(self, text: str) -> None:
        """Queue what an earlier run has for detections.json."""
        self._submit()
        one: Answer[Written | None] = Answer()
        one.set_result(Written(text=text.encode()))
        self._pending.append(_Pending((), 0, 0, one))

    def finish(self) -> None:
        """Wait for all that is queued and end detections.json.

        Raises:
            OSError, ValueError: see `write`.
        """
        self._submit()
        while self._pending:
            self._collect()
        with naming_json(self._output):
            self._json.write(b"\n]\n" if self._separator == b"," else b"[]\n")
            self._json.flush()

    def check_output(self) -> None:
        """Raise FileNotFoundError where the output folder is no longer the one of the start:
        earlier results are gone.
        """
        if not os.path.exists(self._json.name):
            raise FileNotFoundError(
                f"--output: {self._output} has disappeared during the run; its results are lost, run again"
            )

    def _submit(self) -> None:
        """Hand the tasks over, once not too many images wait."""
        tasks, self._tasks = self._tasks, []
        images, nbytes = _size_of(tasks)
        if self._processes is not None:
            self._processes.collect()
        while self._pending and (
            self._pending[0].written.done()
            or self._images + images > self._limit
            or self._bytes + nbytes > self.PENDING_BYTES
        ):
            self._collect()
        if tasks:
            self._pending.append(_Pending(tasks, images, nbytes, self._start(tasks)))
            self._images += images
            self._bytes += nbytes

    def _start(self, tasks: Sequence[Task]) -> AnyAnswer:
        """Have images' files written. None: by a process that has ended, perhaps in the middle of a
        file.
        """
        if self._processes is not None and self._processes.ready:
            self.check_output()
            return self._processes.ask([Sent.of(task, self._shared) for task in tasks])
        return self._pool.submit(self._write, tasks)

    def _collect(self) -> None:
        """Wait for the oldest images and append them to detections.json."""
        oldest = self._pending.popleft()
        self._images -= oldest.images
        self._bytes -= oldest.nbytes
        if isinstance(oldest.written, Answer) and self._processes is not None:
            self._processes.wait_for(oldest.written)
        written = oldest.written.result()
        if written is None:
            names = {name for task in oldest.tasks for name in task.outputs}
            for folder in {(self._output / name).parent for name in names}:
                files.remove_left_over(folder)
            written = self._pool.submit(self._write, oldest.tasks).result()
        self._check(oldest.tasks, written)
        self.boxes += written.boxes
        self.undrawn += written.undrawn
        if written.text:
            with naming_json(self._output):
                self._json.write(self._separator + b"\n")
                self._json.write(written.text)
            self._separator = b","

    def _write(self, tasks: Sequence[Task]) -> Written:
        """Write images' files. Runs on the pool."""
        self.check_output()
        written = self._files.write(tasks)
        if self._folder is not None:
            try:
                self._folder.add(written.lines)
            except OSError as full:
                return Written(error=full)
        return written

    def _check(self, tasks: Sequence[Task], written: Written) -> None:
        """Say what there is to say of images' files; raise what ended them."""
        for text in written.warnings:
            logger.warning("%s", text)
        error = written.error
        if isinstance(error, OSError):
            self.check_output()  # says it better, where that is the reason
            paths = [path for task in tasks for path in task.found.paths]
            raise OSError(f"--output: cannot write the results of {paths[written.images]}: {files.message_of(error)}") from error  # fmt: skip
        if error is not None:
            raise error


@dataclass(frozen=True)
class _Pending:
    """Tasks that were handed over.

    Attributes:
        images, nbytes: see `_size_of`.
    """

    tasks: Sequence[Task]
    images: int
    nbytes: int
    written: AnyAnswer


def _size_of(tasks: Sequence[Task]) -> tuple[int, int]:
    """Images, and bytes of their decoded images."""
    nbytes = sum(sum(_bytes_of(task.found)) for task in tasks)
    return sum(len(task.found) for task in tasks), nbytes


def _bytes_of(found: Found) -> list[int]:
    """Of each decoded image that there is."""
    return [source.nbytes for source in found.sources or () if source is not None]


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


def _close(file: BinaryIO, *, quietly: bool) -> None:
    """Close a file that a full disk may keep from being written out; `quietly` where that was
    said already.
    """
    with suppress(OSError) if quietly else nullcontext():
        file.close()


def _open_json(output: Path, resources: ExitStack) -> BinaryIO:
    """detections.json under a temporary name, which becomes its own with `resources`."""
    with naming_json(output):
        temporary = resources.enter_context(files.atomic_path(output / "detections.json"))
        json_file = open(temporary, "wb")  # noqa: SIM115 (closed with `resources`)
    resources.push(lambda *raised: _close(json_file, quietly=raised[0] is not None))
    return json_file


def _start_processes(
    image_files: ImageFiles, count: int, shared: SharedSources | None, resources: ExitStack
) -> Processes | None:
    """Processes that write results, ended with `resources`; None: they do not start."""
    seen = [shared.file] if shared else []
    arguments = [image_files] * count
    try:
        started = Processes("trtdet.results.image_files", "write results", arguments, files=seen)
        return resources.enter_context(started)
    except OSError as error:
        logger.warning("processes that write results do not start: %s", error)
        return None


@contextmanager
def result_writer(
    output: Path,
    spec: ModelSpec,
    *,
    names: Mapping[Path, str],
    image_ids: Mapping[Path, int | str],
    labels: Sequence[str] = (),
    tsv_header: bool = False,
    pictures: bool = True,
    draw_threshold: float = DRAW_THRESHOLD,
    folder: RunFolder | None = None,
    image_format: ImageFormat = "png",
    processes: bool = False,
    shared: SharedSources | None = None,
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
        pictures: draw; what is found has its sources for that, in `shared` where there are
            `processes`, which read an image once more that is not there.
        draw_threshold: pictures show detections from this score on.
        folder: told of every image that is written.
        image_format: what pictures are written as.
        processes: let processes do it, for very many results a second.
        shared: what loads the images, so that processes see them.
    """
    threads = available_cores()
    if processes:
        threads = min(threads, MOST_PROCESSES_PICTURES if pictures else MOST_PROCESSES)
    image_files = ImageFiles(
        folder=output.absolute(),
        spec=spec,
        labels=labels,
        tsv_header=tsv_header,
        draw_threshold=draw_threshold,
        image_format=image_format,
        journal=folder is not None,
        read_again=pictures and processes,
    )
    with ExitStack() as resources:
        json_file = _open_json(output, resources)
        started = _start_processes(image_files, threads, shared, resources) if processes else None
        pool = resources.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="write"))
        writer = ResultWriter(
            output,
            pool,
            threads,
            json_file,
            image_files=image_files,
            names=names,
            image_ids=image_ids,
            pictures=pictures,
            folder=folder,
            processes=started,
            shared=shared,
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
