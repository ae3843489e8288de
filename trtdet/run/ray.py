# SPDX-License-Identifier: Apache-2.0
"""Detect in many images on a Ray cluster: as a run on one machine, without pictures."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trtdet import files
from trtdet.engine.sidecar import read_sidecar, read_spec
from trtdet.images.files import Sources, find_images, root_of
from trtdet.labels import find_classes
from trtdet.onnx_files import read_onnx
from trtdet.results import naming
from trtdet.results.coco import ANNOTATIONS
from trtdet.results.found import Found
from trtdet.results.manifest import RunFolder
from trtdet.results.writer import pick_image_ids, result_writer
from trtdet.run import ray_cluster
from trtdet.run.detect import (
    check_score_threshold,
    detect,
    model_identity,
    open_batcher,
    open_model,
    pick_labels,
    run_identity,
)
from trtdet.run.earlier import say_stale
from trtdet.run.options import RunOptions
from trtdet.spec import ModelSpec
from trtdet.terminal import no_bar

logger = logging.getLogger(__name__)

#: Where --ray keeps what is done so far, in the output folder.
PARTIAL = "detections.partial"
#: --ray hands out images by multiples of --batch_size, or of this.
RAY_BATCH = 8


class PathDetector:
    """Detects in some image files at a time, with a model that stays open: what a worker of a
    Ray cluster does.
    """

    def __init__(
        self, engine: Path, options: RunOptions, classes: Sequence[int] | None = None
    ) -> None:
        self._runtime = open_model(engine, options)
        self._options = options
        self._classes = classes

    def __call__(self, paths: Sequence[Path]) -> Sequence[ray_cluster.Found]:
        threshold = self._options.score_threshold or 0.0
        with (
            open_batcher(self._runtime, paths, self._options) as batcher,
            closing(
                detect(self._runtime, batcher, score_threshold=threshold, classes=self._classes)
            ) as results,
        ):
            found = [(result.path, result.detections) for result in results]
        return [*found, *batcher.failures]


def run_on_ray(
    engine: Path,
    source: Sources,
    output: Path,
    options: RunOptions,
    *,
    address: str,
    workers: int | None = None,
    labels: Path | str | None = None,
    annotations: Path | None = None,
    tsv_header: bool = False,
    classes: Sequence[str] | None = None,
    clean: bool = False,
) -> int:
    """As infer.py without pictures, by the workers of a Ray cluster; detections.parquet too.

    Returns:
        How many images could not be read.
    """
    ray_cluster.check_installed()
    if annotations:
        files.check_input(annotations, *ANNOTATIONS)
    files.check_folder(output)
    spec, model = read_spec_and_identity(engine)
    paths = find_images(source, recursive=options.recursive, num_images=options.num_images)
    root = root_of(source)
    image_ids = pick_image_ids(paths, root, annotations)
    texts = pick_labels(labels, spec)
    class_ids = None if classes is None else find_classes(classes, texts, spec.num_classes)
    options = dataclasses.replace(options, score_threshold=check_score_threshold(options.score_threshold, spec))  # fmt: skip
    by_absolute = {path.absolute(): path for path in paths}
    start = time.perf_counter()
    identity = run_identity(model, options, class_ids)
    names = dict(zip(paths, naming.output_names(paths, root), strict=True))
    planned = naming.planned_files(names.values(), texts, (".tsv",))
    folder = RunFolder(output, [*planned, "detections.parquet"], (".tsv",), identity)
    say_stale(folder, output, names.values(), clean=clean)
    detect_on_ray(engine.absolute(), list(by_absolute), output, options, address, workers, identity)
    count = boxes = 0
    skipped: list[str] = []
    with (
        ray_cluster.Results(output / PARTIAL, identity) as done,
        result_writer(
            output,
            spec,
            names=names,
            image_ids=image_ids,
            labels=texts,
            tsv_header=tsv_header,
            pictures=False,
        ) as writer,
    ):
        for path, found in done.write_in_order(list(by_absolute), output / "detections.parquet", spec):  # fmt: skip
            if isinstance(found, str):
                logger.warning("skipped: %s", found)
                skipped.append(names[by_absolute[path]])
                continue
            if not count:
                folder.start(clean=clean, partial=False)
            writer.write(Found([by_absolute[path]], [found]))
            count += 1
            boxes += len(found)
        if not count:
            raise ValueError(f"--input: none of {len(skipped)} images could be read")
    done.remove()
    folder.finish(skipped)
    seconds = time.perf_counter() - start
    logger.info(
        f"{count} images, {boxes} detections, {len(skipped)} images skipped; {seconds:.1f} s"
    )
    print(output / "detections.json")
    return len(skipped)


def read_spec_and_identity(engine: Path) -> tuple[ModelSpec, str]:
    """The ModelSpec of a model file and its `model_identity`; an engine, which is held against its
    sidecar, is hashed there and not again.

    Raises:
        FileNotFoundError, GraphError, EngineError: nothing that says what it is.
    """
    if engine.suffix.lower() == ".onnx":
        model = read_onnx(engine, weights=False)
        return ModelSpec.from_onnx(model, engine), model_identity(engine, model)
    info = read_sidecar(engine)
    if info is None:
        return read_spec(engine), model_identity(engine)
    return info.spec, model_identity(engine, engine_sha256=info.engine_sha256)


def detect_on_ray(
    engine: Path,
    paths: Sequence[Path],
    output: Path,
    options: RunOptions,
    address: str,
    wanted: int | None,
    identity: dict[str, Any],
) -> None:
    """Detect in the images whose results are not in `output` / `PARTIAL` yet, and put them
    there.
    """
    is_onnx = engine.suffix.lower() == ".onnx"
    on_gpu = not is_onnx or options.provider in ("cuda", "tensorrt")
    threads = 1 if on_gpu else options.threads or 1
    with ray_cluster.Results(output / PARTIAL, identity) as done:
        todo = [path for path in paths if str(path) not in done.done]
        if len(todo) < len(paths):
            logger.info("%d of %d images are done already", len(paths) - len(todo), len(paths))
        if not todo:
            return
        with ray_cluster.connect(address) as resources:
            workers = ray_cluster.plan_workers(
                resources, wanted=wanted, threads=threads, on_gpu=on_gpu
            )
            logger.info("%d workers, each with %d CPU cores and %d GPUs", workers.count, workers.cpus, workers.gpus)  # fmt: skip
            own: dict[str, Any] = {"workers": options.workers or workers.cpus}
            if is_onnx and not on_gpu:
                own |= {"provider": "cpu", "threads": threads}
            make = partial(
                PathDetector, engine, dataclasses.replace(options, **own), identity["classes"]
            )
            batch_size = options.batch_size or RAY_BATCH
            start = time.perf_counter()
            with tqdm(total=len(todo), unit="image", disable=no_bar()) as bar:
                for table in ray_cluster.detect(todo, make, workers, batch_size=batch_size):
                    done.add(table)
                    bar.update(len(table))
            seconds = time.perf_counter() - start
        logger.info(f"workers: {len(todo)} images in {seconds:.1f} s, {len(todo) / seconds:.1f} images/s")  # fmt: skip
