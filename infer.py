# SPDX-License-Identifier: Apache-2.0
"""Find objects in images: one picture and one TSV per image, and detections.json.

    infer.py --engine model.engine --input photos --output found
    infer.py --engine model.onnx --input photo.jpg --output found --score_threshold 0.4
    infer.py --engine model.engine --input photos --benchmark
    infer.py --triton grpc://localhost:8001/model --input photos --output found
    infer.py --engine model.engine --input photos --output found --ray local

The output directory gets, for photos/a.jpg:

    a.png            the image with its detections drawn in
    a.tsv            one line per detection, tab separated: xmin ymin xmax ymax score class;
                     pixels of the source image, class counted from 0
    detections.json  all images, COCO results format. image_id is the number in the file name where
                     every file name is a different number (as COCO's are), else the file name; with
                     --annotations it is the id that file gives the image.

--ray shares the images among the workers of a Ray cluster, one per GPU, or per core (--threads) for an ONNX file. The outputs are the same,
but for the pictures, and detections.parquet has one row per image. A run that was broken off goes on where it was when it is started again.

Memory does not grow with the number of images. Decoded images, height x width x 3 bytes each, are held one per core; to draw pictures on also
those of the batches ahead (two, or two images per core) and in flight (three per GPU), and four per core that wait for the disk: for 16 cores, batches
of 8 and photographs of 12 megapixels 5 GB. --no_images does without them, and --batch_size and --workers make them fewer.

A JPEG that ends too early counts as one that cannot be read. One that is damaged in the middle does not: libjpeg decodes it with wrong pixels from there on,
and says so on stderr ("Corrupt JPEG data") without the name of the file.

Boxes are cut to the image. One that lies outside altogether, in the padding, is left without width or height; it is kept, as COCO's
metric counts it too.

--benchmark reports what trtexec's performance summary reports, under the same names: throughput; minimum, maximum, mean, median and
percentiles of latency (copy in + compute + copy out), enqueue time, H2D, GPU compute and D2H. trtexec's numbers for the same are those of

    trtexec --loadEngine=model.engine --shapes=INPUT:8x512x512x3 --iterations=200 --duration=0 --useCudaGraph

with TensorRT 8.6 to 10, and with --includeDataTransfers --noSpinWait instead of --useCudaGraph from 11 on; for the latencies with --exposeDMA
too, as here they are taken in a pass of their own, one batch after the other. With several GPUs, throughput is that of all together,
latencies and times are those of the first. "End to end from files" adds decoding and resizing.

Exit status: 0 every image is done; 1 an error, or no image could be read; 2 wrong usage;
3 done, but some images could not be read (each is named on stderr).
"""

import argparse
import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import visualize
from image_batcher import Allocate, ImageBatcher, Resample, choose_input, find_images
from trtdet import benchmark, coco, files, outputs, ray_run
from trtdet.cli import (
    ANNOTATIONS,
    SOME_SKIPPED,
    add_size_options,
    check_size_usage,
    positive_float,
    positive_int,
    run_main,
    setup_logging,
    unit_interval,
)
from trtdet.detections import Detections, decode, to_coco_results, write_tsv
from trtdet.labels import COCO_LABELS, read_labels
from trtdet.machine import available_cores, describe_machine
from trtdet.runtimes import Runtime, default_batch_size, open_runtime, run_batches
from trtdet.runtimes.multi import parse_devices
from trtdet.runtimes.triton import TritonUrl, parse_url
from trtdet.sidecar import read_spec
from trtdet.spec import ModelSpec

logger = logging.getLogger(__name__)

#: Below this score a model guesses: its pictures are full of boxes.
CLUTTER_THRESHOLD = 0.05
#: Where --ray keeps what is done so far, in the output directory.
PARTIAL = "detections.partial"
#: --ray hands out images by multiples of --batch_size, or of this.
RAY_BATCH = 8
#: Batches before a benchmark starts to count.
WARMUP = 20

#: Options of what is written, by their names here -> on the command line: a benchmark writes nothing.
NOT_MEASURED = {
    "output": "--output",
    "labels": "--labels",
    "annotations": "--annotations",
    "no_images": "--no_images",
    "tsv_header": "--tsv_header",
    "score_threshold": "--score_threshold",
}

#: Options that only one of the runtimes has, by their names there -> what they are called here.
ONNX_OPTIONS = {"provider": "--provider", "threads": "--threads"}
ENGINE_OPTIONS = {
    "devices": "--devices",
    "contexts": "--contexts",
    "cuda_graph": "--no_cuda_graph",
    "plugins": "--plugins",
    "allow_host_code": "--allow_host_code",
}
TRITON_OPTIONS = {
    "spec": "--spec",
    "requests": "--requests",
    "timeout": "--timeout",
    "shared_memory": "--no_shared_memory",
}
#: What --engine or --triton is taken for -> in general, and its options.
RUNTIME_OPTIONS = {
    "an engine": ("engines", ENGINE_OPTIONS),
    "an ONNX file": ("ONNX files (.onnx)", ONNX_OPTIONS),
    "a server": ("--triton", TRITON_OPTIONS),
}


def add_model_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--engine and --triton, either of which is `args.engine`."""
    model = parser.add_mutually_exclusive_group(required=required)
    # fmt: off
    model.add_argument("-e", "--engine", type=Path, metavar="FILE", help="a TensorRT engine, or an ONNX file of create_onnx.py (runs on ONNX Runtime)")
    model.add_argument("--triton", dest="engine", type=parse_url, metavar="URL", help="a model on a Triton server instead, served as deploy.py triton configures it: grpc://HOST:8001/MODEL or http://HOST:8000/MODEL")
    # fmt: on


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of everything that runs a model on image files."""
    # fmt: off
    parser.add_argument("-t", "--score_threshold", "--nms_threshold", type=unit_interval, metavar="SCORE", help="leave out detections below this score; the model's own threshold already did, so it can only raise")
    parser.add_argument("--batch_size", type=positive_int, metavar="N", help="images per batch; default: what suits the model and the device")
    parser.add_argument("--recursive", action="store_true", help="look into the folders below --input too")
    parser.add_argument("--resample", choices=("bilinear", "antialias"), help="bilinear as TensorFlow does it, or antialiased as Pillow does it (default: as the model was trained)")
    parser.add_argument("--workers", type=positive_int, metavar="N", help="threads that decode and resize images; default: one per core")
    parser.add_argument("--devices", type=parse_devices, metavar="N,...", help="for an engine: the GPUs that share the images, as in 0,1, or 'all'; default: 0")
    parser.add_argument("--contexts", type=positive_int, metavar="N", help="for an engine: batches that may run at the same time on a GPU, for small models; default: 1")
    parser.add_argument("--no_cuda_graph", dest="cuda_graph", action="store_const", const=False, help="for an engine: launch its kernels one by one")
    parser.add_argument("--plugins", type=Path, nargs="+", action="extend", metavar="LIB.so", help="for an engine: libraries of plugins that it needs; may be given several times. They run with your rights")
    parser.add_argument("--allow_host_code", action="store_const", const=True, help="for an engine: let it run code of its own on the CPU, with your rights (a version-compatible engine does); only for files you trust")
    parser.add_argument("--provider", choices=("auto", "tensorrt", "cuda", "cpu"), help="for an ONNX file: what ONNX Runtime runs it on; default: auto, the first of these that is there")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="for an ONNX file: CPU threads of ONNX Runtime; default: one per core")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="for --triton: the engine's .json or the ONNX file, where the server's config.pbtxt is not of deploy.py")
    parser.add_argument("--requests", type=positive_int, metavar="N", help="for --triton: batches in flight; default: 4")
    parser.add_argument("--timeout", type=positive_float, metavar="SECONDS", help="for --triton: what one request may take; default: 60")
    parser.add_argument("--no_shared_memory", dest="shared_memory", action="store_const", const=False, help="for --triton: send the images in the requests also to a server on this machine")
    parser.add_argument("-v", "--verbose", action="store_true", help="log details")
    # fmt: on
    add_size_options(
        parser,
        size_help="run a model of free input size at this one; default: the size it was exported for, or its engine is tuned for",
    )


@dataclass(frozen=True)
class RunOptions:
    """How a model is run over image files: what `add_run_options` reads. None is the runtime's own choice."""

    score_threshold: float | None = None
    recursive: bool = False
    batch_size: int | None = None
    size: tuple[int, int] | None = None
    resize: int | None = None
    max_size: int | None = None
    resample: Resample | None = None
    workers: int | None = None
    provider: str | None = None
    threads: int | None = None
    devices: Sequence[int] | Literal["all"] | None = None
    contexts: int | None = None
    cuda_graph: bool | None = None
    plugins: Sequence[Path] | None = None
    allow_host_code: bool | None = None
    spec: Path | None = None
    requests: int | None = None
    timeout: float | None = None
    shared_memory: bool | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "RunOptions":
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def for_runtime(self, engine: Path | TritonUrl) -> dict[str, Any]:
        """What `open_runtime` is given for `engine`, an engine, an ONNX file, or a model on a server.

        Raises:
            ValueError: an option of another runtime is set.
        """
        if isinstance(engine, TritonUrl):
            kind = "a server"
        else:
            kind = "an ONNX file" if engine.suffix.lower() == ".onnx" else "an engine"
        for other, (wanted, names) in RUNTIME_OPTIONS.items():
            for name, option in names.items():
                if other != kind and getattr(self, name) is not None:
                    raise ValueError(f"{option}: is for {wanted}, {engine} is taken for {kind}; leave it out")  # fmt: skip
        chosen = {name: getattr(self, name) for name in RUNTIME_OPTIONS[kind][1]}
        return {name: value for name, value in chosen.items() if value is not None}


def parse_run_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse what has `add_run_options` and --engine; an option that the engine's runtime does not have is wrong usage."""
    args = parser.parse_args(argv)
    check_size_usage(parser, args)
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
    add_model_options(parser, required=True)
    # fmt: off
    parser.add_argument("-i", "--input", type=Path, metavar="PATH", help="an image, or a directory of images")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where pictures, TSVs and detections.json go; made if missing")
    parser.add_argument("-l", "--labels", metavar="FILE", help="class names, one per line; 'coco' for COCO's; default: those in the model, COCO's for 90 classes")
    parser.add_argument("-a", "--annotations", type=Path, metavar="FILE", help="COCO annotations that give the images their ids in detections.json")
    parser.add_argument("--no_images", action="store_true", help="write no pictures")
    parser.add_argument("--tsv_header", action="store_true", help="TSVs get a first line with the column names and a seventh column with the label")
    parser.add_argument("--benchmark", type=positive_int, nargs="?", const=200, metavar="ITERATIONS", help="measure instead: this many batches (default 200) after a warm-up, in trtexec's terms (above); with --input also from files, decoding included, else on noise")
    parser.add_argument("--benchmark_json", type=Path, metavar="FILE", help="write the benchmark and the machine to this file")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on this Ray cluster (HOST:PORT, or 'auto' on one of its machines), or on one that is started here ('local'); every machine must see model, images and this program under the same paths")
    parser.add_argument("--ray_workers", type=positive_int, metavar="N", help="with --ray: so many workers; default: what fits")
    # fmt: on
    add_run_options(parser)
    args = parse_run_args(parser, argv)
    if args.benchmark:
        given = [option for name, option in NOT_MEASURED.items() if getattr(args, name)]
        if given:
            parser.error(f"--benchmark writes no detections; leave {', '.join(given)} out")
        if args.resize and not args.input:
            parser.error("--benchmark on noise has no images to --resize; give --input, or --size")
    elif not args.input or not args.output:
        parser.error("--input and --output are required (only --benchmark runs without)")
    elif args.benchmark_json:
        parser.error("--benchmark_json needs --benchmark")
    check_ray_usage(parser, args)
    return args


def check_ray_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 for options that --ray does not go with."""
    if args.ray and (args.benchmark or isinstance(args.engine, TritonUrl)):
        parser.error("--ray: needs --engine, and does not go with --benchmark")
    if args.ray and args.devices:
        parser.error("--devices: Ray hands out the GPUs; leave it out, or limit --ray_workers")
    if args.ray_workers and not args.ray:
        parser.error("--ray_workers needs --ray")


def open_model(engine: Path | TritonUrl, options: RunOptions) -> Runtime:
    """Open an engine, an ONNX file, or a model on a server.

    Raises:
        ValueError: an option that its runtime does not have.
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
    batch_size = pick_batch_size(runtime, options)
    preprocessing, resize = choose_input(
        runtime.spec.preprocessing,
        size=options.size,
        resize=options.resize,
        max_size=options.max_size,
    )
    return ImageBatcher(
        paths,
        preprocessing,
        batch_size,
        resample=options.resample,
        resize=resize,
        workers=options.workers,
        keep_sources=keep_sources,
        pad_to_batch=runtime.batch_range[0] > 1,  # the last batch may be short
        allocate=allocator(runtime),
    )


def pick_batch_size(runtime: Runtime, options: RunOptions) -> int:
    """Images per batch: those asked for, or what suits the runtime.

    Raises:
        ValueError: the model does not take so many.
    """
    smallest, largest = runtime.batch_range
    batch_size = options.batch_size or default_batch_size(runtime)
    if batch_size < smallest or batch_size > (largest or batch_size):
        raise ValueError(
            f"--batch_size: the model takes {smallest} to {largest or 'any number of'} images, "
            f"got {batch_size}; leave it out, or build the engine for it"
        )
    return batch_size


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
        size_hw = runtime.spec.preprocessing.size_of(batch.images.shape[1:])
        images = decode(found, runtime.spec, batch.transforms, size_hw=size_hw)
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
        with naming_json(self._output):
            self._json.write("\n]\n" if self._separator == "," else "[]\n")
            self._json.flush()

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
            with naming_json(self._output):
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
            result.detections,
            self._image_ids[result.path],
            self._spec.category_ids,
            inclusive_corners=self._spec.inclusive_corners,
        )
        return ",\n".join(json.dumps(entry) for entry in entries)


@contextmanager
def naming_json(output: Path) -> Iterator[None]:
    """Let an error of the block say which file could not be written: a full disk names none."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"--output: cannot write {output / 'detections.json'}: {error.strerror or error}; make room, or choose another directory"
        ) from error


def _close(file: TextIO, *, quietly: bool) -> None:
    """Close a file that a full disk may keep from being written out; `quietly` where that was said already."""
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
        )
        try:
            yield writer
            writer.finish()
            writer.check_output()
        finally:
            pool.shutdown(cancel_futures=True)


def run(
    engine: Path | TritonUrl,
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
    if annotations:
        files.check_input(annotations, *ANNOTATIONS)
    if labels is not None:
        read_labels(labels)  # before the model is loaded, which says how many it needs
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


class PathDetector:
    """Detects in some image files at a time, with a model that stays open: what a worker of a Ray cluster does."""

    def __init__(self, engine: Path, options: RunOptions) -> None:
        self._runtime = open_model(engine, options)
        self._options = options

    def __call__(self, paths: Sequence[Path]) -> Sequence[ray_run.Found]:
        threshold = self._options.score_threshold or 0.0
        with (
            open_batcher(self._runtime, paths, self._options) as batcher,
            closing(detect(self._runtime, batcher, score_threshold=threshold)) as results,
        ):
            found = [(result.path, result.detections) for result in results]
        return [*found, *batcher.failures]


def run_on_ray(
    engine: Path,
    source: Path,
    output: Path,
    options: RunOptions,
    *,
    address: str,
    workers: int | None = None,
    labels: str | None = None,
    annotations: Path | None = None,
    tsv_header: bool = False,
) -> int:
    """As `run` without pictures, by the workers of a Ray cluster; detections.parquet too."""
    ray_run.check_installed()
    if annotations:
        files.check_input(annotations, *ANNOTATIONS)
    spec = read_spec(engine)
    paths = find_images(source, recursive=options.recursive)
    image_ids = pick_image_ids(paths, source, annotations)
    texts = pick_labels(labels, spec)
    options = dataclasses.replace(options, score_threshold=check_score_threshold(options.score_threshold, spec))  # fmt: skip
    by_absolute = {path.absolute(): path for path in paths}
    start = time.perf_counter()
    detect_on_ray(engine.absolute(), list(by_absolute), output, options, address, workers)
    count = boxes = skipped = 0
    with (
        ray_run.Results(output / PARTIAL, ray_identity(engine, options)) as done,
        result_writer(
            output,
            spec,
            names=dict(zip(paths, outputs.output_names(paths, source), strict=True)),
            image_ids=image_ids,
            labels=texts,
            tsv_header=tsv_header,
        ) as writer,
    ):
        for path, found in done.write_in_order(list(by_absolute), output / "detections.parquet", spec):  # fmt: skip
            if isinstance(found, str):
                logger.warning("skipped: %s", found)
                skipped += 1
                continue
            writer.write(ImageResult(by_absolute[path], found, None))
            count += 1
            boxes += len(found)
        if not count:
            raise ValueError(f"--input: none of {skipped} images could be read")
    done.remove()
    seconds = time.perf_counter() - start
    logger.info(f"{count} images, {boxes} detections, {skipped} images skipped; {seconds:.1f} s")
    print(output / "detections.json")
    return SOME_SKIPPED if skipped else 0


def ray_identity(engine: Path, options: RunOptions) -> dict[str, Any]:
    """What must not change between a run that was broken off and the one that goes on."""
    kept = ("score_threshold", "batch_size", "resample", "size", "resize", "max_size")
    return {"engine_sha256": files.sha256(engine), **{name: getattr(options, name) for name in kept}}  # fmt: skip


def detect_on_ray(
    engine: Path,
    paths: Sequence[Path],
    output: Path,
    options: RunOptions,
    address: str,
    wanted: int | None,
) -> None:
    """Detect in the images whose results are not in `output` / `PARTIAL` yet, and put them there."""
    is_onnx = engine.suffix.lower() == ".onnx"
    on_gpu = not is_onnx or options.provider in ("cuda", "tensorrt")
    threads = 1 if on_gpu else options.threads or 1
    with ray_run.Results(output / PARTIAL, ray_identity(engine, options)) as done:
        todo = [path for path in paths if str(path) not in done.done]
        if len(todo) < len(paths):
            logger.info("%d of %d images are done already", len(paths) - len(todo), len(paths))
        if not todo:
            return
        with ray_run.connect(address) as resources:
            workers = ray_run.plan_workers(resources, wanted=wanted, threads=threads, on_gpu=on_gpu)
            logger.info("%d workers, each with %d CPU cores and %d GPUs", workers.count, workers.cpus, workers.gpus)  # fmt: skip
            own: dict[str, Any] = {"workers": options.workers or workers.cpus}
            if is_onnx and not on_gpu:
                own |= {"provider": "cpu", "threads": threads}
            make = partial(PathDetector, engine, dataclasses.replace(options, **own))
            batch_size = options.batch_size or RAY_BATCH
            start = time.perf_counter()
            with tqdm(total=len(todo), unit="image", disable=None) as bar:
                for table in ray_run.detect(todo, make, workers, batch_size=batch_size):
                    done.add(table)
                    bar.update(len(table))
            seconds = time.perf_counter() - start
        logger.info(f"workers: {len(todo)} images in {seconds:.1f} s, {len(todo) / seconds:.1f} images/s")  # fmt: skip


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
    engine: Path | TritonUrl,
    source: Path | None,
    options: RunOptions,
    *,
    iterations: int,
    json_path: Path | None = None,
) -> None:
    """Measure the runtime alone and, with images, the whole way from their files to detections."""
    with open_model(engine, options) as runtime:
        batch_size = pick_batch_size(runtime, options)
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
            preprocessing, _ = choose_input(runtime.spec.preprocessing, size=options.size)
            spec = runtime.spec.replace(preprocessing=preprocessing)
            sample = benchmark.noise(spec, batch_size, allocator(runtime))
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
        if args.ray:
            return run_on_ray(
                args.engine,
                args.input,
                args.output,
                options,
                address=args.ray,
                workers=args.ray_workers,
                labels=args.labels,
                annotations=args.annotations,
                tsv_header=args.tsv_header,
            )
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
