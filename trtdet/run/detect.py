# SPDX-License-Identifier: Apache-2.0
"""Open a model, make its batches, run it, decode: what every stage that runs a model shares."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trtdet import files, onnx_files
from trtdet.detections import check_shapes
from trtdet.engine.sidecar import sidecar_path
from trtdet.errors import EngineError
from trtdet.images.batch import Batch
from trtdet.images.batcher import Allocate, ImageBatcher
from trtdet.images.files import ImageArray
from trtdet.images.options import Decode
from trtdet.images.preprocess import choose_input
from trtdet.images.shared_sources import SharedSources
from trtdet.labels import names_of, read_labels
from trtdet.machine import available_cores
from trtdet.results.found import Found, ImageResult, ImageResults, RawResults
from trtdet.run.options import RunOptions
from trtdet.runtimes.base import Runtime, default_batch_size
from trtdet.runtimes.kinds import check_model
from trtdet.runtimes.open import open_runtime
from trtdet.runtimes.options import TritonUrl
from trtdet.shared_memory import can_share
from trtdet.spec import ModelSpec
from trtdet.terminal import no_bar

if TYPE_CHECKING:
    import onnx

    from trtdet.runtimes.gpu_images import DeviceBatch, GpuImageBatcher

    AnyBatcher: TypeAlias = ImageBatcher | GpuImageBatcher

logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_model(
    engine: Path | TritonUrl, options: RunOptions, *, model: onnx.ModelProto | None = None
) -> Runtime:
    """Open an engine, an ONNX file, or a model on a server.

    Args:
        model: what `read_onnx(engine, weights=False)` gave, of who has read it.

    Raises:
        ValueError: an option that its runtime does not have.
    """
    if isinstance(engine, Path):
        check_model(engine)
    read = {} if model is None else {"model": model}
    runtime = open_runtime(engine, **options.for_runtime(engine), **read)
    logger.info("%s: %s", engine, runtime.description)
    return runtime


#: Images from which on a GPU is worth its start, where nobody says what decodes.
MANY_IMAGES = 500
#: Images, and cores, from which on decoding in processes is worth their start.
MANY_TO_DECODE, MANY_CORES = 8000, 8


def open_batcher(
    runtime: Runtime,
    paths: Sequence[Path],
    options: RunOptions,
    *,
    keep_sources: bool = False,
    allocate: Allocate | None = None,
    load: Callable[[Path], ImageArray] | None = None,
    size: Callable[[Path], tuple[int, int] | None] | None = None,
    shared: SharedSources | None = None,
) -> AnyBatcher:
    """An `ImageBatcher` that makes what `runtime` takes, or one that does it on a GPU.

    Args:
        allocate: makes the batch buffers; None: the runtime does.
        load, size: what makes an image of a path, and its size before; None: paths are files.
        shared: where images that are decoded on the CPU are kept, by processes; those of a GPU are
            not.

    Raises:
        ValueError: the model does not take batches of `options.batch_size`, or nothing that is on a
            GPU.
        EngineError: images cannot be decoded on the GPU that was asked for.
    """
    batch_size = pick_batch_size(runtime, options)
    smallest = runtime.batch_range[0]
    if runtime.one_size:
        batch_size = max(smallest, min(batch_size, len(paths)))
    preprocessing, resize = choose_input(
        runtime.spec.preprocessing,
        size=options.size,
        resize=options.resize,
        max_size=options.max_size,
    )
    pad_to_batch = smallest > 1 or runtime.one_size  # the last batch may be short
    if not (load or size or allocate) and decodes_on_gpu(runtime, paths, options.decode):
        from trtdet.runtimes.gpu_images import GpuImageBatcher

        return GpuImageBatcher(
            paths,
            preprocessing,
            batch_size,
            device=runtime.images_on or 0,
            resample=options.resample,
            resize=resize,
            workers=options.workers,
            keep_sources=keep_sources,
            pad_to_batch=pad_to_batch,
        )
    # Else the buffers are the runtime's, which processes do not see.
    in_processes = runtime.pins and (
        shared is not None
        or (not (load or allocate or keep_sources) and decodes_in_processes(runtime, len(paths)))
    )
    return ImageBatcher(
        paths,
        preprocessing,
        batch_size,
        resample=options.resample,
        resize=resize,
        workers=options.workers,
        keep_sources=keep_sources,
        pad_to_batch=pad_to_batch,
        allocate=allocate or runtime.allocate,
        load=load,
        size=size,
        pin=runtime.pin if in_processes else None,
        shared=shared,
    )


def decodes_on_gpu(runtime: Runtime, paths: Sequence[Path], decode: Decode) -> bool:
    """Whether a GPU decodes the images: where it is asked to, or where that is worth it.

    Raises:
        ValueError, EngineError: it was asked to and cannot; says why.
    """
    if decode == "cpu":
        return False
    if runtime.images_on is None:
        if decode == "gpu":
            raise ValueError(f"--decode gpu: expected a model on a GPU, found {runtime.description}; leave it out")  # fmt: skip
        return False
    if decode == "auto":
        jpegs = sum(path.suffix.lower() in (".jpg", ".jpeg") for path in paths)
        if len(paths) < MANY_IMAGES or 2 * jpegs < len(paths):
            return False
    from trtdet.runtimes.gpu_images import missing

    preprocessing = runtime.spec.preprocessing
    how = "warped" if preprocessing.is_warped else "interpolated cubically" if preprocessing.sampling == "cubic" else ""  # fmt: skip
    why = f"this model's are {how}, which the GPU's kernel does not do"
    if not how:
        why = missing(runtime.images_on)
    if why and decode == "gpu":
        raise EngineError(f"--decode gpu: {why}")
    if why:
        logger.info("images are decoded on the CPU: %s", why)
    return not why


def decodes_in_processes(runtime: Runtime, images: int) -> bool:
    """Whether processes, not threads, decode images on the CPU: where the runtime may be faster
    than threads are, and so many images are worth the start.
    """
    many = images >= MANY_TO_DECODE and available_cores() >= MANY_CORES
    return many and runtime.frees_cpu and runtime.pins and can_share()


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


def detect(
    runtime: Runtime,
    batcher: AnyBatcher,
    *,
    score_threshold: float = 0.0,
    classes: Sequence[int] | None = None,
) -> ImageResults:
    """Run every batch of `batcher`; one result per image that could be read, in order.

    Args:
        classes: ids of those to keep; None: all.
    """
    for found in find(runtime, batcher, score_threshold=score_threshold, classes=classes):
        sources = found.sources or (None,) * len(found)
        for path, detections, source in zip(found.paths, found.decoded(runtime.spec), sources, strict=True):  # fmt: skip
            yield ImageResult(path, detections, source)


def find(
    runtime: Runtime,
    batcher: AnyBatcher,
    *,
    score_threshold: float = 0.0,
    classes: Sequence[int] | None = None,
) -> Generator[Found, None, None]:
    """Run every batch of `batcher`: what came out for its images, in order, not decoded yet.

    Args:
        classes: ids of those to keep; None: all.
    """
    for batch, outputs in run_batches(runtime, batcher):
        kept = replace(outputs, score_threshold=score_threshold, classes=classes)
        yield Found(batch.paths, kept, batch.sources)


def run_batches(
    runtime: Runtime, batcher: AnyBatcher
) -> Generator[tuple[Batch[Any] | DeviceBatch, RawResults], None, None]:
    """Run every batch of `batcher`: the batch, and what came out for its images.

    A batch is released when the next one is asked for.

    Raises:
        ValueError: outputs of other shapes.
    """
    batches: Iterable[Batch[Any] | DeviceBatch] = batcher
    for batch, arrays in runtime.map(batches):
        check_shapes(arrays, len(batch))
        size_hw = runtime.spec.preprocessing.size_of(batch.images.shape[1:])
        yield batch, RawResults(arrays, batch.transforms, size_hw)[: len(batch)]
        batch.release()


def model_identity(
    path: Path, graph: onnx.ModelProto | None = None, *, engine_sha256: str = ""
) -> str:
    """A hash of a model's file and of those beside it that belong to it: an engine's sidecar, an
    ONNX file's weights.

    Args:
        graph: what stands in an ONNX file, of who has read it.
        engine_sha256: of an engine file, of who has hashed it.
    """
    if path.suffix.lower() == ".onnx":
        return onnx_files.sha256(path, graph)
    digest = engine_sha256 or files.sha256(path)
    if files.is_beside(sidecar_path(path)):
        both = f"{digest} {files.sha256(sidecar_path(path))}"
        digest = hashlib.sha256(both.encode()).hexdigest()
    return digest


def run_identity(
    model: str, options: RunOptions, classes: Sequence[int] | None = None, **more: Any
) -> dict[str, Any]:
    """What must not change between a run that was broken off and the one that goes on; JSON-ready.

    Args:
        model: `model_identity` of the file, or the URL.
        more: what only some runs have.
    """
    kept = (
        "score_threshold",
        "batch_size",
        "resample",
        "decode",
        "size",
        "resize",
        "max_size",
        "provider",
    )
    own = {"model": model, "classes": None if classes is None else list(classes)}
    return {**own, **{name: getattr(options, name) for name in kept}, **more}


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


def progress(
    results: Iterable[T], total: int, images: Callable[[T], int] = lambda _: 1
) -> Generator[T, None, None]:
    """`results` behind a progress bar on stderr, where that is a terminal; log lines stay above
    it.

    Args:
        total: images.
        images: how many one result is of.
    """
    with logging_redirect_tqdm(), tqdm(total=total, unit="image", disable=no_bar()) as bar:
        for result in results:
            yield result
            bar.update(images(result))


def pick_labels(labels: Path | str | None, spec: ModelSpec) -> Sequence[str]:
    """Class names from the option, the model, or COCO where the model has its 90 classes."""
    if labels is not None:
        return read_labels(labels, num_classes=spec.num_classes)
    return names_of(spec.labels, spec.num_classes)
