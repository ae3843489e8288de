# SPDX-License-Identifier: Apache-2.0
"""Find objects in images: one picture and one TSV per image, and detections.json.

    infer.py --engine model.engine --input photos --output found
    infer.py --engine model.onnx --input photo.jpg --output found --score_threshold 0.4
    infer.py --engine model.engine --input photos --benchmark

The output directory gets, for photos/a.jpg:

    a.png            the image with its detections drawn in
    a.tsv            one line per detection, tab separated: xmin ymin xmax ymax score class;
                     pixels of the source image, class counted from 0
    detections.json  all images, COCO results format. image_id is the number in the file name where
                     every file name is a different number (as COCO's are), else the file name; with
                     --annotations it is the id that file gives the image.

Exit status: 0 every image is done; 1 an error, or no image could be read; 2 wrong usage;
3 done, but some images could not be read (each is named on stderr).
"""

import argparse
import json
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import visualize
from image_batcher import Allocate, ImageBatcher, Resample, find_images
from trtdet import benchmark, coco, files, outputs
from trtdet.cli import SOME_SKIPPED, positive_int, run_main, setup_logging, unit_interval
from trtdet.detections import Detections, decode, to_coco_results, write_tsv
from trtdet.labels import COCO_LABELS, read_labels
from trtdet.machine import available_cores, describe_machine
from trtdet.runtimes import Runtime, default_batch_size, open_runtime, run_batches
from trtdet.runtimes.multi import parse_devices
from trtdet.spec import ModelSpec

logger = logging.getLogger(__name__)

#: Below this score a model guesses: its pictures are full of boxes.
CLUTTER_THRESHOLD = 0.05
#: Batches before a benchmark starts to count.
WARMUP = 20

#: Options that only one of the runtimes has, by their names there -> what they are called here.
ONNX_OPTIONS = {"provider": "--provider", "threads": "--threads"}
ENGINE_OPTIONS = {
    "devices": "--devices",
    "contexts": "--contexts",
    "cuda_graph": "--no_cuda_graph",
    "plugins": "--plugins",
    "allow_host_code": "--allow_host_code",
}


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of everything that runs a model on image files."""
    # fmt: off
    parser.add_argument("-t", "--score_threshold", "--nms_threshold", type=unit_interval, metavar="SCORE", help="leave out detections below this score; the model's own threshold already did, so it can only raise")
    parser.add_argument("--batch_size", type=positive_int, metavar="N", help="images per batch; default: what suits the model and the device")
    parser.add_argument("--recursive", action="store_true", help="look into the folders below --input too")
    parser.add_argument("--resample", choices=("bilinear", "antialias"), default="bilinear", help="bilinear as in AutoML's training (default), or antialiased")
    parser.add_argument("--workers", type=positive_int, metavar="N", help="threads that decode and resize images; default: one per core")
    parser.add_argument("--devices", type=parse_devices, metavar="N,...", help="for an engine: the GPUs that share the images, as in 0,1, or 'all'; default: 0")
    parser.add_argument("--contexts", type=positive_int, metavar="N", help="for an engine: batches that may run at the same time on a GPU, for small models; default: 1")
    parser.add_argument("--no_cuda_graph", dest="cuda_graph", action="store_const", const=False, help="for an engine: launch its kernels one by one")
    parser.add_argument("--plugins", type=Path, nargs="+", metavar="LIB.so", help="for an engine: libraries of plugins that it needs")
    parser.add_argument("--allow_host_code", action="store_const", const=True, help="for an engine: let it run code of its own on the CPU, with your rights (a version-compatible engine does); only for files you trust")
    parser.add_argument("--provider", choices=("auto", "tensorrt", "cuda", "cpu"), help="for an ONNX file: what ONNX Runtime runs it on; default: auto, the first of these that is there")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="for an ONNX file: CPU threads of ONNX Runtime; default: one per core")
    parser.add_argument("-v", "--verbose", action="store_true", help="log details")
    # fmt: on


@dataclass(frozen=True)
class RunOptions:
    """How a model is run over image files: what `add_run_options` reads. None is the runtime's own choice."""

    score_threshold: float | None = None
    recursive: bool = False
    batch_size: int | None = None
    resample: Resample = "bilinear"
    workers: int | None = None
    provider: str | None = None
    threads: int | None = None
    devices: Sequence[int] | Literal["all"] | None = None
    contexts: int | None = None
    cuda_graph: bool | None = None
    plugins: Sequence[Path] | None = None
    allow_host_code: bool | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "RunOptions":
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def for_runtime(self, engine: Path) -> dict[str, Any]:
        """What `open_runtime` is given for `engine`, an engine or an ONNX file.

        Raises:
            ValueError: an option of the other runtime is set.
        """
        if engine.suffix.lower() == ".onnx":
            names, others, wanted, found = ONNX_OPTIONS, ENGINE_OPTIONS, "engines", "an ONNX file"
        else:
            names, others, wanted, found = ENGINE_OPTIONS, ONNX_OPTIONS, "ONNX files (.onnx)", "an engine"  # fmt: skip
        for name, option in others.items():
            if getattr(self, name) is not None:
                raise ValueError(f"{option}: is for {wanted}, {engine} is taken for {found}; leave it out")  # fmt: skip
        chosen = {name: getattr(self, name) for name in names}
        return {name: value for name, value in chosen.items() if value is not None}


def parse_run_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse what has `add_run_options` and --engine; an option that the engine's runtime does not have is wrong usage."""
    args = parser.parse_args(argv)
    if args.engine:
        try:
            RunOptions.from_args(args).for_runtime(args.engine)
        except ValueError as error:
            parser.error(str(error))
    return args


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("-e", "--engine", type=Path, required=True, metavar="FILE", help="a TensorRT engine, or an ONNX file of create_onnx.py (runs on ONNX Runtime)")
    parser.add_argument("-i", "--input", type=Path, metavar="PATH", help="an image, or a directory of images")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where pictures, TSVs and detections.json go; made if missing")
    parser.add_argument("-l", "--labels", metavar="FILE", help="class names, one per line; 'coco' for COCO's; default: those in the model, COCO's for 90 classes")
    parser.add_argument("-a", "--annotations", type=Path, metavar="FILE", help="COCO annotations that give the images their ids in detections.json")
    parser.add_argument("--no_images", action="store_true", help="write no pictures")
    parser.add_argument("--tsv_header", action="store_true", help="TSVs get a first line with the column names and a seventh column with the label")
    parser.add_argument("--benchmark", type=positive_int, nargs="?", const=200, metavar="ITERATIONS", help="measure instead: this many batches (default 200) after a warm-up, reported as trtexec does; with --input also from files, decoding included, else on noise")
    parser.add_argument("--benchmark_json", type=Path, metavar="FILE", help="write the benchmark and the machine to this file")
    # fmt: on
    add_run_options(parser)
    args = parse_run_args(parser, argv)
    if args.benchmark:
        if args.output:
            parser.error("--benchmark writes no detections; leave --output out")
    elif not args.input or not args.output:
        parser.error("--input and --output are required (only --benchmark runs without)")
    elif args.benchmark_json:
        parser.error("--benchmark_json needs --benchmark")
    return args


def open_model(engine: Path, options: RunOptions) -> Runtime:
    """Open an engine or an ONNX file.

    Raises:
        ValueError: an option that the file's runtime does not have.
    """
    runtime = open_runtime(engine, **options.for_runtime(engine))
    logger.info("%s: %s", engine, runtime.description)
    return runtime


def open_batcher(
    runtime: Runtime, paths: Sequence[Path], options: RunOptions, *, keep_sources: bool = False
) -> ImageBatcher:
    """An `ImageBatcher` that makes what `runtime` takes.

    Raises:
        ValueError: the model does not take batches of `options.batch_size`.
    """
    smallest, largest = runtime.batch_range
    batch_size = options.batch_size or default_batch_size(runtime)
    if batch_size < smallest or batch_size > (largest or batch_size):
        raise ValueError(
            f"--batch_size: the model takes {smallest} to {largest or 'any number of'} images, "
            f"got {batch_size}; leave it out, or build the engine for it"
        )
    return ImageBatcher(
        paths,
        runtime.spec.preprocessing,
        batch_size,
        resample=options.resample,
        workers=options.workers,
        keep_sources=keep_sources,
        pad_to_batch=smallest > 1,  # the last batch may be short
        allocate=allocator(runtime),
    )


def allocator(runtime: Runtime) -> Allocate:
    """What makes the batches for `runtime`: its own pinned memory, where it has that."""
    allocate: Allocate = getattr(runtime, "allocate", np.empty)
    return allocate


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


def detect(
    runtime: Runtime, batcher: ImageBatcher, *, score_threshold: float = 0.0
) -> ImageResults:
    """Run every batch of `batcher`; one result per image that could be read, in order."""
    for batch, found in run_batches(runtime, batcher):
        images = decode(found, runtime.spec, batch.transforms)
        sources = batch.sources or (None,) * len(batch)
        for path, detections, source in zip(batch.paths, images, sources, strict=True):
            yield ImageResult(path, detections.above(score_threshold), source)
        batch.release()


def check_score_threshold(score_threshold: float | None, spec: ModelSpec) -> float:
    """The threshold to filter with; warns where it lies below what the model itself keeps."""
    kept = spec.nms.score_threshold
    if score_threshold is not None and score_threshold < kept:
        logger.warning(
            "--score_threshold %g: the model keeps nothing below %g; convert it again with create_onnx.py "
            "--score_threshold %g to see more",
            score_threshold,
            kept,
            score_threshold,
        )
    return score_threshold or 0.0


class ResultWriter:
    """Writes TSVs and, of results that have their `source`, pictures on a thread pool, and detections.json in the order of the images. Made by `result_writer`."""

    #: Results per thread that may wait: `write` blocks when the disk is slower than the runtime, so memory stays flat.
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
    ) -> None:
        self._output = output
        self._pool = pool
        self._json = json_file
        self._limit = limit
        self._spec = spec
        self._names = names
        self._image_ids = image_ids
        self._labels = labels
        self._tsv_header = tsv_header
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

    def finish(self) -> None:
        """Wait for all that is queued and end detections.json.

        Raises:
            OSError: a result could not be written.
        """
        while self._pending:
            self._collect()
        self._json.write("\n]\n" if self._separator == "," else "[]\n")

    def check_output(self) -> None:
        """Raise FileNotFoundError where the output directory is no longer the one of the start: earlier results are gone."""
        if not Path(self._json.name).exists():
            raise FileNotFoundError(
                f"--output: {self._output} has disappeared during the run; its results are lost, run again"
            )

    def _collect(self) -> None:
        """Wait for the oldest result and append it to detections.json."""
        text = self._pending.popleft().result()
        if text:
            self._json.write(f"{self._separator}\n{text}")
            self._separator = ","

    def _write_one(self, result: ImageResult) -> str:
        """Write one image's files; returns its part of detections.json. Runs on the pool."""
        self.check_output()
        name = self._output / self._names[result.path]
        try:
            write_tsv(
                outputs.with_suffix_added(name, ".tsv"),
                result.detections,
                labels=self._labels if self._tsv_header else (),
                header=self._tsv_header,
            )
            if result.source is not None:
                picture = visualize.draw(result.source, result.detections, self._labels)
                outputs.write_png(outputs.with_suffix_added(name, ".png"), picture)
        except OSError as error:
            self.check_output()  # says it better, where that is the reason
            raise OSError(
                f"--output: cannot write the results of {result.path}: {error}"
            ) from error
        if result.path not in self._image_ids:
            return ""
        entries = to_coco_results(
            result.detections, self._image_ids[result.path], self._spec.category_ids
        )
        return ",\n".join(json.dumps(entry) for entry in entries)


@contextmanager
def result_writer(
    output: Path,
    spec: ModelSpec,
    *,
    names: Mapping[Path, Path],
    image_ids: Mapping[Path, int | str],
    labels: Sequence[str] = (),
    tsv_header: bool = False,
) -> Iterator[ResultWriter]:
    """A `ResultWriter`; leaving it waits for every file. detections.json appears only where nothing failed.

    Args:
        output: made if missing.
        names: image -> its output name without suffix, relative to `output`.
        image_ids: image -> its id in detections.json; images that are missing here are left out there.
        labels: [class_id] -> text.
            tsv_header: TSVs get column names and, where there are `labels`, a label column.
    """
    threads = available_cores()
    with (
        files.atomic_path(output / "detections.json") as temporary,
        open(temporary, "w", encoding="utf-8") as json_file,
        ThreadPoolExecutor(threads, thread_name_prefix="write") as pool,
    ):
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
        )
        try:
            yield writer
            writer.finish()
            writer.check_output()
        finally:
            pool.shutdown(cancel_futures=True)


def run(
    engine: Path,
    source: Path,
    output: Path,
    options: RunOptions,
    *,
    labels: str | None = None,
    annotations: Path | None = None,
    pictures: bool = True,
    tsv_header: bool = False,
) -> int:
    """Detect, draw and write; see the module's docstring. Returns the exit status: 0, or `SOME_SKIPPED`."""
    paths = find_images(source, recursive=options.recursive)
    names = dict(zip(paths, outputs.output_names(paths, source), strict=True))
    if pictures:
        written = (outputs.with_suffix_added(output / name, ".png") for name in names.values())
        outputs.check_not_inputs(written, paths)
    image_ids = pick_image_ids(paths, source, annotations)
    count = boxes = 0
    with open_model(engine, options) as runtime:
        threshold = check_score_threshold(options.score_threshold, runtime.spec)
        texts = pick_labels(labels, runtime.spec)
        lowest = max(threshold, runtime.spec.nms.score_threshold)
        if pictures and lowest < CLUTTER_THRESHOLD:
            logger.info(
                "pictures show all from a score of %g on; --score_threshold 0.4 shows what is likely",
                lowest,
            )
        start = time.perf_counter()
        with (
            open_batcher(runtime, paths, options, keep_sources=pictures) as batcher,
            result_writer(
                output,
                runtime.spec,
                names=names,
                image_ids=image_ids,
                labels=texts,
                tsv_header=tsv_header,
            ) as writer,
            closing(detect(runtime, batcher, score_threshold=threshold)) as found,
            closing(progress(found, len(paths))) as results,
        ):
            for result in results:
                writer.write(result)
                count += 1
                boxes += len(result.detections)
            check_read(batcher, count)
        seconds = time.perf_counter() - start
    skipped = len(batcher.failures)
    logger.info(
        f"{count} images, {boxes} detections, {skipped} images skipped; "
        f"{seconds:.1f} s, {count / seconds:.1f} images/s"
    )
    print(output / "detections.json")
    return SOME_SKIPPED if skipped else 0


def progress(results: ImageResults, total: int) -> ImageResults:
    """`results` behind a progress bar on stderr, where that is a terminal; log lines stay above it."""
    with logging_redirect_tqdm(), tqdm(total=total, unit="image", disable=None) as bar:
        for result in results:
            yield result
            bar.update()


def check_read(batcher: ImageBatcher, count: int) -> None:
    """Raise ValueError where not one image could be read. (The batcher logs each one it skips.)"""
    if not count:
        raise ValueError(
            f"--input: none of {len(batcher.failures)} images could be read; {batcher.failures[0][1]}"
        )


def pick_image_ids(
    paths: Sequence[Path], root: Path, annotations: Path | None
) -> Mapping[Path, int | str]:
    """The image ids of detections.json; with annotations, files that these do not know have none."""
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


def pick_labels(labels: str | None, spec: ModelSpec) -> Sequence[str]:
    """Class names from the option, the model, or COCO where the model has its 90 classes."""
    if labels is not None:
        return read_labels(labels, num_classes=spec.num_classes)
    if spec.labels or spec.num_classes != len(COCO_LABELS):
        return spec.labels
    return COCO_LABELS


def run_benchmark(
    engine: Path,
    source: Path | None,
    options: RunOptions,
    *,
    iterations: int,
    json_path: Path | None = None,
) -> None:
    """Measure the runtime alone and, with images, the whole way from their files to detections."""
    with open_model(engine, options) as runtime:
        batch_size = options.batch_size or default_batch_size(runtime)
        report: dict[str, Any] = {
            "machine": describe_machine(),
            "model": engine.name,
            "runtime": runtime.description,
            "input": "images" if source else "noise",
            "options": {
                field.name: str(value)
                for field in fields(options)
                if (value := getattr(options, field.name)) is not None
            },
        }

        def batches_of(count: int) -> ImageBatcher:
            """`count` batches of the images, over and over."""
            again = list(islice(cycle(paths), count * batch_size))
            return open_batcher(runtime, again, options)

        if source is None:
            sample = benchmark.noise(runtime.spec, batch_size, allocator(runtime))
        else:
            paths = find_images(source, recursive=options.recursive)
            with batches_of(1) as batcher:
                first = next(iter(batcher), None)
                check_read(batcher, len(first or ()))
                sample = benchmark.Sample(first.images if first else np.empty(0))
        measured = benchmark.measure(runtime, sample, iterations=iterations, warmup=WARMUP)
        lines = measured.lines()
        report |= measured.to_dict()
        if source is not None:
            with batches_of(WARMUP + iterations) as batcher:
                rate = images_per_second(detect(runtime, batcher), skip=WARMUP * batch_size)
            share = rate / measured.images_per_second
            lines.append(f"End to end from files: {rate:.6g} images/s, {share:.1%} of the above")
            report["end_to_end"] = {"images_per_second": rate, "share_of_throughput": share}
    print("\n".join(lines))
    if json_path:
        files.write_text(json_path, json.dumps(report, indent=2) + "\n")


def images_per_second(results: Iterator[ImageResult], *, skip: int) -> float:
    """How fast results come, not counting the first `skip` (all count where there are no more than these)."""
    begin = time.perf_counter()
    stamps = [time.perf_counter() for _ in results]
    if len(stamps) <= skip:
        return len(stamps) / (time.perf_counter() - begin)
    return (len(stamps) - skip) / (stamps[-1] - (stamps[skip - 1] if skip else begin))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging(args.verbose)
    options = RunOptions.from_args(args)

    def stage() -> int:
        if not args.benchmark:
            return run(
                args.engine,
                args.input,
                args.output,
                options,
                labels=args.labels,
                annotations=args.annotations,
                pictures=not args.no_images,
                tsv_header=args.tsv_header,
            )
        run_benchmark(
            args.engine,
            args.input,
            options,
            iterations=args.benchmark,
            json_path=args.benchmark_json,
        )
        return 0

    return run_main(stage)


if __name__ == "__main__":
    raise SystemExit(main())
