# SPDX-License-Identifier: Apache-2.0
"""A model on image files: pictures, TSVs, detections.json; what infer.py does with images on one
machine.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from trtdet import files
from trtdet.images.files import Sources, check_read, find_images, root_of
from trtdet.images.shared_sources import SharedSources
from trtdet.labels import LABELS_FILE, find_classes, read_labels
from trtdet.machine import available_cores
from trtdet.onnx_files import read_onnx
from trtdet.processes import available
from trtdet.results import naming
from trtdet.results.coco import ANNOTATIONS
from trtdet.results.found import Found
from trtdet.results.gallery import Page, write_gallery
from trtdet.results.gallery_items import items_of_run
from trtdet.results.manifest import JOURNAL, MANIFEST, RunFolder
from trtdet.results.naming import planned_files
from trtdet.results.options import DRAW_THRESHOLD, ImageFormat
from trtdet.results.writer import pick_image_ids, result_writer
from trtdet.run.detect import (
    MANY_CORES,
    check_score_threshold,
    decodes_on_gpu,
    find,
    model_identity,
    open_batcher,
    open_model,
    pick_labels,
    progress,
    run_identity,
)
from trtdet.run.earlier import find_kept, in_order, say_stale, saying_what_is_kept
from trtdet.run.options import RunOptions
from trtdet.runtimes.base import Runtime
from trtdet.runtimes.kinds import check_model
from trtdet.runtimes.options import TritonUrl
from trtdet.shared_memory import can_share

logger = logging.getLogger(__name__)

#: From so many images on, and so many cores, writing results is worth processes of its own.
MANY_RESULTS = 2000


@dataclass(frozen=True)
class Outputs:
    """What is written, and how.

    Attributes:
        names: image -> the name of its outputs, relative to `folder`.
        image_ids: image -> its id in detections.json.
        labels: [class_id] -> text.
    """

    folder: Path
    names: Mapping[Path, str]
    image_ids: Mapping[Path, int | str]
    labels: Sequence[str]
    pictures: bool
    draw_threshold: float
    image_format: ImageFormat
    tsv_header: bool

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files of an image."""
        return (".tsv", f".{self.image_format}") if self.pictures else (".tsv",)


def run(
    engine: Path | TritonUrl,
    source: Sources,
    output: Path,
    options: RunOptions,
    *,
    labels: Path | str | None = None,
    annotations: Path | None = None,
    pictures: bool = True,
    draw_threshold: float = DRAW_THRESHOLD,
    image_format: ImageFormat = "png",
    tsv_header: bool = False,
    classes: Sequence[str] | None = None,
    resume: bool = False,
    clean: bool = False,
    report: Path | None = None,
    embed: bool = False,
) -> int:
    """Detect, draw and write.

    Args:
        source: files, folders and globs.
        annotations: give the images their ids.
        resume: go on with a run that was broken off.
        clean: first remove what an earlier run wrote.
        report: a gallery; `embed`: with the pictures in it.

    Returns:
        How many images could not be read.

    Raises:
        ValueError: not one could be read, or options that do not fit the model or the folder.
    """
    if annotations:
        files.check_input(annotations, *ANNOTATIONS)
    if labels is not None:
        read_labels(labels)  # before the model is loaded, which says how many it needs
    paths = find_images(source, recursive=options.recursive, num_images=options.num_images)
    names = name_outputs(paths, source, output, options, pictures=pictures)
    suffixes = (".tsv", f".{image_format}") if pictures else (".tsv",)
    inputs = [engine if isinstance(engine, Path) else None, annotations, *paths]
    planned = planned_files(names.values(), ("any",), suffixes) if report else []
    check_targets(output, planned, report, inputs)
    image_ids = pick_image_ids(paths, root_of(source), annotations)
    graph = None
    if isinstance(engine, Path):
        check_model(engine)
        if engine.suffix.lower() == ".onnx":  # read once: to run it, and to know it again
            graph = read_onnx(engine, weights=False)
    with open_model(engine, options, model=graph) as runtime:
        # of all images: the rest of a run that was broken off may be few
        on_gpu = decodes_on_gpu(runtime, paths, options.decode)
        options = replace(options, decode="gpu" if on_gpu else "cpu")
        threshold = check_score_threshold(options.score_threshold, runtime.spec)
        texts = pick_labels(labels, runtime.spec)
        wanted = None if classes is None else find_classes(classes, texts, runtime.spec.num_classes)
        outputs = Outputs(
            output, names, image_ids, texts, pictures, draw_threshold, image_format, tsv_header
        )
        folder = open_folder(engine, graph, options, wanted, outputs, report)
        say_stale(folder, output, names.values(), clean=clean)
        if folder.broken_off and not (resume or clean):
            logger.warning("%s has a run that was broken off; this one begins anew (--resume goes on with it)", output)  # fmt: skip
        kept = find_kept(folder, output, names, image_ids, outputs.suffixes) if resume else {}
        with saying_what_is_kept(output, resumable=isinstance(engine, Path)):
            failures = detect_and_write(
                runtime,
                paths,
                options,
                outputs,
                folder,
                kept,
                threshold=threshold,
                classes=wanted,
                clean=clean,
            )
    print(output / "detections.json")
    if report:
        shown = {path: name for path, name in names.items() if path not in failures}
        write_report(report, engine.name, shown, source, output, texts, embed=embed)
        folder.list_again()
    return len(failures)


def check_targets(
    output: Path, planned: Sequence[str], report: Path | None, inputs: Sequence[Path | None]
) -> None:
    """Find out before the model is loaded whether the files of a run can be written, and that its
    page replaces none of them, and nothing that is read.

    Args:
        planned: files of the run, relative to `output`.

    Raises:
        OSError, ValueError: names what is in the way.
    """
    files.check_folder(output)
    for name in ("detections.json", LABELS_FILE, JOURNAL):
        files.check_writable(output / name)
    if report:
        own = [output / name for name in (*planned, MANIFEST, JOURNAL)]
        files.check_outputs([report], [*inputs, *own])


def open_folder(
    engine: Path | TritonUrl,
    graph: onnx.ModelProto | None,
    options: RunOptions,
    classes: Sequence[int] | None,
    outputs: Outputs,
    report: Path | None,
) -> RunFolder:
    """The output folder, and what its files are made with."""
    made_with = run_identity(
        model_identity(engine, graph) if isinstance(engine, Path) else str(engine),
        options,
        classes,
        labels=outputs.labels,
        pictures=outputs.pictures,
        draw_threshold=outputs.draw_threshold,
        image_format=outputs.image_format,
        tsv_header=outputs.tsv_header,
    )
    planned = planned_files(outputs.names.values(), outputs.labels, outputs.suffixes)
    if report is not None and report.absolute().is_relative_to(outputs.folder.absolute()):
        planned.append(report.absolute().relative_to(outputs.folder.absolute()).as_posix())
    return RunFolder(outputs.folder, planned, outputs.suffixes, made_with)


def detect_and_write(
    runtime: Runtime,
    paths: Sequence[Path],
    options: RunOptions,
    outputs: Outputs,
    folder: RunFolder,
    kept: Mapping[Path, str],
    *,
    threshold: float,
    classes: Sequence[int] | None,
    clean: bool,
) -> set[Path]:
    """Run the images that are not in `kept` and write what is found.

    Returns:
        The images that could not be read.
    """
    todo = [path for path in paths if path not in kept]
    processes = writes_in_processes(runtime, len(todo))
    count = 0
    speed = Speed()
    with (
        folder,
        maybe_shared(processes and outputs.pictures) as shared,
        open_batcher(runtime, todo, options, keep_sources=outputs.pictures and not processes, shared=shared) as batcher,
        result_writer(
            outputs.folder,
            runtime.spec,
            names=outputs.names,
            image_ids=outputs.image_ids,
            labels=outputs.labels,
            tsv_header=outputs.tsv_header,
            pictures=outputs.pictures,
            draw_threshold=outputs.draw_threshold,
            folder=folder,
            image_format=outputs.image_format,
            processes=processes,
            shared=shared,
        ) as writer,
        closing(find(runtime, batcher, score_threshold=threshold, classes=classes)) as found,
        closing(progress(found, len(todo), len)) as results,
    ):  # fmt: skip
        for result in in_order(paths, kept, results):
            if not count:  # outputs that cannot be decoded shall neither begin nor remove anything
                if isinstance(result, Found):
                    result = replace(result, results=result.decoded(runtime.spec))
                try:
                    folder.start(clean=clean, resumed=bool(kept))
                except OSError:
                    writer.check_output()  # says it better, where that is the reason
                    raise
            if isinstance(result, str):
                writer.keep(result)
                count += 1
            else:
                writer.write(result)
                speed.count(len(result), batcher.batch_size)
                count += len(result)
        check_read(batcher.failures, count)
    folder.finish([outputs.names[path] for path, _ in batcher.failures])
    speed.stop()
    skipped = len(batcher.failures)
    logger.info(f"{count} images, {writer.boxes} detections, {skipped} images skipped; {speed}")
    if outputs.pictures and writer.undrawn:
        logger.info(f"pictures show detections from a score of {outputs.draw_threshold:g} on; {writer.undrawn} are below it (--draw_threshold)")  # fmt: skip
    if kept:
        logger.info(f"{len(kept)} of these images were done before; their detections are not counted")  # fmt: skip
    return {path for path, _ in batcher.failures}


def maybe_shared(wanted: bool) -> AbstractContextManager[SharedSources | None]:
    """Memory for the decoded images; None: it is not wanted, or none is to be had."""
    if wanted and can_share():
        try:
            return SharedSources()
        except OSError as error:
            logger.debug("images are decoded once more to draw on them: %s", error)
    return nullcontext()


def writes_in_processes(runtime: Runtime, images: int) -> bool:
    """Whether results come so fast that threads would wait for each other."""
    return runtime.frees_cpu and images >= MANY_RESULTS and available_cores() >= MANY_CORES and available()  # fmt: skip


class Speed:
    """How fast images come.

    The first batch does not count where there are more: a GPU prepares itself with it.
    """

    def __init__(self) -> None:
        self._done = self._first = 0
        self._start = self._warm = self._end = time.perf_counter()

    def count(self, images: int, batch_size: int) -> None:
        """Some more images."""
        self._done += images
        if self._done >= batch_size and not self._first:
            self._first, self._warm = self._done, time.perf_counter()

    def stop(self) -> None:
        """The last one is written."""
        self._end = time.perf_counter()

    def __str__(self) -> str:
        seconds = f"{self._end - self._start:.1f} s"
        if not self._done:
            return seconds
        if self._done > self._first > 0:
            rate = (self._done - self._first) / (self._end - self._warm)
            return f"{seconds}, {rate:.1f} images/s after the first batch"
        return f"{seconds}, {self._done / (self._end - self._start):.1f} images/s"


def write_report(
    report: Path,
    model: str,
    names: Mapping[Path, str],
    source: Sources,
    output: Path,
    labels: Sequence[str],
    *,
    embed: bool,
) -> None:
    """The gallery, of the TSVs that were written."""
    items = items_of_run(output, names, root_of(source))
    page = Page(
        f"{model}: {len(items)} images",
        f"detections of {model}; the TSV files have all of them",
        labels,
    )
    write_gallery(report, items, page, embed=embed)
    print(report)


def name_outputs(
    paths: Sequence[Path], source: Sources, output: Path, options: RunOptions, *, pictures: bool
) -> dict[Path, str]:
    """Image -> the name of its outputs.

    Raises:
        ValueError: a picture would replace an image that is read.
    """
    names = dict(zip(paths, naming.output_names(paths, root_of(source)), strict=True))
    if pictures:
        naming.check_apart(output, names, source, recursive=options.recursive)
    return names
