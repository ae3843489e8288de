# SPDX-License-Identifier: Apache-2.0
"""A model on a video: an annotated video, one TSV, one JSON file in COCO's results format."""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trtdet import files
from trtdet.detections import TSV_ANGLE, TSV_COLUMNS, Detections, to_coco_results, tsv_text
from trtdet.images.preprocess import choose_input
from trtdet.labels import find_classes, read_labels
from trtdet.results import draw
from trtdet.results.found import ImageResult
from trtdet.results.options import DRAW_THRESHOLD
from trtdet.results.writer import write_labels
from trtdet.run.detect import (
    check_score_threshold,
    detect,
    open_model,
    pick_batch_size,
    pick_labels,
)
from trtdet.run.options import RunOptions
from trtdet.runtimes.base import Runtime
from trtdet.runtimes.options import TritonUrl
from trtdet.spec import ModelSpec
from trtdet.terminal import no_bar
from trtdet.video.batches import FrameBatcher
from trtdet.video.options import Video, VideoOptions, check_output, named_video
from trtdet.video.sink import VideoSink
from trtdet.video.source import Open, Source, load_av, open_av

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """What is written.

    Attributes:
        tsv, json: detections, the latter in COCO's results format.
        video: the annotated one; None: none.
        labels: the folder that gets the class names; None: they are not written.
    """

    tsv: Path
    json: Path
    video: Path | None
    labels: Path | None


@dataclass(frozen=True)
class Drawing:
    """How results are written.

    Attributes:
        pictures: write an annotated video.
        threshold: score from which it shows detections.
        tsv_header: the TSV has column names, and the names of the classes.
    """

    pictures: bool = True
    threshold: float = DRAW_THRESHOLD
    tsv_header: bool = False


def plan_targets(output: Path, video: Video, *, pictures: bool) -> Targets:
    """Where results go: the folder `found` gets clip.mp4, clip.tsv, detections.json and labels.txt;
    beside the video `found/x.mp4` come x.tsv and x.json alone.

    Raises:
        ValueError: the annotated video would replace the one that is read, or has a name that does
            not go.
    """
    check_output(output, pictures=pictures)
    if named_video(output):
        targets = Targets(output.with_suffix(".tsv"), output.with_suffix(".json"), output, None)
    else:
        name = video.stem if isinstance(video, Path) else video.name
        drawn = output / f"{name}.mp4" if pictures else None
        targets = Targets(output / f"{name}.tsv", output / "detections.json", drawn, output)
    if isinstance(video, Path) and targets.video and os.path.realpath(targets.video) == os.path.realpath(video):  # fmt: skip
        raise ValueError(f"--output: {targets.video} is the video that is read; choose another folder or name")  # fmt: skip
    return targets


def run_video(
    engine: Path | TritonUrl,
    video: Video,
    output: Path,
    options: RunOptions,
    part: VideoOptions,
    drawing: Drawing,
    *,
    labels: Path | str | None = None,
    classes: Sequence[str] | None = None,
    open_video: Open = open_av,
) -> bool:
    """Detect in the frames of a video and write what is found.

    Returns:
        Whether the video came to its end, or to the end that was asked for.

    Raises:
        OSError: it cannot be opened, or a result cannot be written.
        ValueError: no frame of it could be read.
    """
    targets = plan_targets(output, video, pictures=drawing.pictures)
    files.check_folder(targets.tsv.parent)
    inputs = (engine, labels, video)
    files.check_outputs(
        [targets.tsv, targets.json, targets.video],
        [path for path in inputs if isinstance(path, Path)],
    )
    load_av()
    if labels is not None:
        read_labels(labels)  # before the model is loaded, which says how many it needs
    source = Source(video, part, open_video=open_video)
    if source.info.has_audio and targets.video:
        logger.info("the sound is left out of the annotated video")
    with open_model(engine, options) as runtime:
        threshold = check_score_threshold(options.score_threshold, runtime.spec)
        texts = pick_labels(labels, runtime.spec)
        wanted = None if classes is None else find_classes(classes, texts, runtime.spec.num_classes)
        start = time.perf_counter()
        with ExitStack() as stack:
            batcher = stack.enter_context(open_batcher(runtime, source, options))
            writer = _Writer(stack, targets, source, runtime.spec, texts, drawing)
            found = stack.enter_context(closing(detect(runtime, batcher, score_threshold=threshold, classes=wanted)))  # type: ignore[arg-type]  # fmt: skip
            try:
                for result in _with_progress(found, source):
                    writer.write(result, batcher.seconds.pop(int(result.path.name)))
            except KeyboardInterrupt:
                if not source.is_live:
                    raise
                logger.info("interrupted; what there is so far is kept")
            if not writer.frames:
                raise ValueError(f"--input: no frame of {video} could be read; {source.ended or '--start is after its end'}")  # fmt: skip
            writer.finish()
    seconds = time.perf_counter() - start
    if targets.labels:
        write_labels(targets.labels, texts)
    _report(writer, batcher, source, targets, seconds)
    return not source.ended


def _report(writer: "_Writer", batcher: FrameBatcher, source: Source, targets: Targets, seconds: float) -> None:  # fmt: skip
    logger.info(f"{writer.frames} frames, {writer.boxes} detections; {seconds:.1f} s, {writer.frames / seconds:.1f} frames/s")  # fmt: skip
    if writer.undrawn:
        logger.info(f"the video shows detections from a score of {writer.threshold:g} on; {writer.undrawn} are below it (--draw_threshold)")  # fmt: skip
    if batcher.dropped:
        logger.warning("%d frames were dropped, because they came faster than they were looked at", batcher.dropped)  # fmt: skip
    if source.ended:
        logger.warning("%s", source.ended)
    for path in filter(None, (targets.video, targets.tsv, targets.json)):
        print(path)


def open_batcher(runtime: Runtime, source: Source, options: RunOptions) -> FrameBatcher:
    """Batches of frames that `runtime` takes.

    Raises:
        ValueError: the model does not take batches of `options.batch_size`.
    """
    batch_size, smallest = pick_batch_size(runtime, options), runtime.batch_range[0]
    if runtime.one_size and source.expected:
        batch_size = max(smallest, min(batch_size, source.expected))
    preprocessing, resize = choose_input(runtime.spec.preprocessing, size=options.size, resize=options.resize, max_size=options.max_size)  # fmt: skip
    return FrameBatcher(
        source,
        preprocessing,
        batch_size,
        resample=options.resample,
        resize=resize,
        workers=options.workers,
        pad_to_batch=smallest > 1 or runtime.one_size,
    )


def _with_progress(found: Iterator[ImageResult], source: Source) -> Iterator[ImageResult]:
    with logging_redirect_tqdm(), tqdm(total=source.expected, unit="frame", disable=no_bar()) as bar:  # fmt: skip
        for result in found:
            yield result
            bar.update()


class _Writer:
    """The three outputs, frame by frame; they appear when all is done."""

    def __init__(
        self, stack: ExitStack, targets: Targets, source: Source, spec: ModelSpec, labels: Sequence[str], drawing: Drawing
    ) -> None:  # fmt: skip
        self._spec, self._labels, self._drawing = spec, labels, drawing
        self._tsv = self._open(stack, targets.tsv)
        self._json = self._open(stack, targets.json)
        self._sink = stack.enter_context(VideoSink(targets.video, source.info.rate)) if targets.video else None  # fmt: skip
        self._separator = "["
        self._has_header = not drawing.tsv_header
        self.frames = self.boxes = self.undrawn = 0

    @staticmethod
    def _open(stack: ExitStack, path: Path) -> TextIO:
        temporary = stack.enter_context(files.atomic_path(path))
        return stack.enter_context(open(temporary, "w", encoding="utf-8"))

    def write(self, result: ImageResult, seconds: float) -> None:
        """One frame; `result.path` is its number."""
        number = int(result.path.name)
        self._tsv.write(self._tsv_text(result.detections, number, seconds))
        rows = to_coco_results(result.detections, number, self._spec.category_ids, inclusive_corners=self._spec.inclusive_corners)  # fmt: skip
        for row in rows:
            self._json.write(f"{self._separator}\n{json.dumps(row)}")
            self._separator = ","
        if self._sink is not None and result.source is not None:
            picture = draw.draw(result.source, result.detections, self._labels, score_threshold=self._drawing.threshold)  # fmt: skip
            self.undrawn += len(result.detections) - len(result.detections.above(self._drawing.threshold))  # fmt: skip
            self._sink.write(picture, seconds)
        self.frames += 1
        self.boxes += len(result.detections)

    def _tsv_text(self, detections: Detections, number: int, seconds: float) -> str:
        """The lines of a frame: its number and time, then as for an image."""
        head = ""
        if not self._has_header:
            rotated = [TSV_ANGLE] if detections.angles is not None else []
            head = "\t".join(["frame", "seconds", *TSV_COLUMNS, *rotated, *(["label"] if self._labels else [])]) + "\n"  # fmt: skip
            self._has_header = True
        labels = self._labels if self._drawing.tsv_header else ()
        lines = tsv_text(detections, labels=labels).splitlines()
        return head + "".join(f"{number}\t{seconds:.3f}\t{line}\n" for line in lines)

    @property
    def threshold(self) -> float:
        """Score from which the video shows detections."""
        return self._drawing.threshold

    def finish(self) -> None:
        self._json.write("\n]\n" if self._separator == "," else "[]\n")
