# SPDX-License-Identifier: Apache-2.0
"""Detections to evaluate with COCO's metric, of a model or of a file."""

import importlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from trtdet.detections import to_coco_results
from trtdet.errors import GraphError
from trtdet.images.files import (
    SUFFIXES,
    Sources,
    check_read,
    find_images,
    image_size,
    root_of,
    spread,
)
from trtdet.results import coco
from trtdet.results.categories import match_categories, some
from trtdet.run.detect import (
    check_score_threshold,
    detect,
    open_batcher,
    open_model,
    progress,
)
from trtdet.run.options import RunOptions
from trtdet.runtimes.options import TritonUrl

logger = logging.getLogger(__name__)


#: Above this, a model leaves out detections that the metric would have counted.
HIGH_SCORE_THRESHOLD = 0.01
#: Detections of an image that COCO's metric counts.
COUNTED = 100

#: Of metrics.json.
SCHEMA = 1

AUTOML_CAVEAT = (
    "AutoML's metric looks only at images that have detections: objects in the other images are not "
    "counted as missed, so it can be higher than COCO's"
)


NO_ROTATED_AUTOML = "--automl_path: AutoML's metric knows no rotated boxes; leave it out"


@dataclass(frozen=True)
class Run:
    """Detections to evaluate, and where they come from.

    Attributes:
        image_ids: the images that were looked at.
        skipped: how many of them could not be read.
        report: what metrics.json says besides the metrics.
        category_ids: all that the model can find; empty: not known.
        images: their files, with their ids; empty: not known.
    """

    results: list[coco.Result]
    image_ids: Collection[int]
    skipped: int
    report: dict[str, Any]
    category_ids: Collection[int] = ()
    images: Mapping[Path, int] = field(default_factory=dict)


def run_model(
    engine: Path | TritonUrl, source: Sources, annotations: coco.Annotations, options: RunOptions
) -> Run:
    """Detect in every annotated image of `source`."""
    image_ids = annotated_images(
        source, annotations, recursive=options.recursive, num_images=options.num_images
    )
    with open_model(engine, options) as runtime:
        if runtime.without_value:
            raise GraphError(
                f"{engine}: the weights '{runtime.without_value}' hold NaN, so there is nothing to measure; train or export the model again"
            )
        spec = runtime.spec
        category_ids = match_categories(
            spec.labels, spec.category_ids, annotations.categories, annotations.path
        )
        threshold = check_score_threshold(options.score_threshold, spec)
        kept = max(threshold, spec.nms.score_threshold)
        if kept > HIGH_SCORE_THRESHOLD:
            logger.warning(
                "detections below a score of %g are missing, so AP comes out too low; "
                "convert with create_onnx.py --score_threshold 0.001",
                kept,
            )
        results: list[coco.Result] = []
        start = time.perf_counter()
        with (
            open_batcher(runtime, list(image_ids), options) as batcher,
            closing(detect(runtime, batcher, score_threshold=threshold)) as found,
            closing(progress(found, len(image_ids))) as images,
        ):
            for image in images:
                image_id = image_ids[image.path]
                results += to_coco_results(
                    image.detections,
                    image_id,
                    category_ids,
                    inclusive_corners=spec.inclusive_corners,
                )
            skipped = len(batcher.failures)
            check_read(batcher.failures, len(image_ids) - skipped)
        seconds = time.perf_counter() - start
        report = {
            "engine": engine.name,
            "runtime": runtime.description,
            "score_threshold": kept,
            "seconds": seconds,
        }
    return Run(results, image_ids.values(), skipped, report, category_ids, image_ids)


def read_detections(
    path: Path, source: Sources | None, annotations: coco.Annotations, options: RunOptions
) -> Run:
    """Detections from a file, of the images in `source` or else of all that are annotated."""
    image_ids: Collection[int] = annotations.image_ids.values()
    images: dict[Path, int] = {}
    if source is not None:
        images = annotated_images(
            source, annotations, recursive=options.recursive, num_images=options.num_images
        )
        image_ids = images.values()
    results = coco.read_results(path, annotations)
    wanted = set(image_ids)
    strangers = {result["image_id"] for result in results} - wanted
    kept = [result for result in results if result["image_id"] in wanted]
    if results and not kept:
        raise ValueError(
            f"--detections: none of the image ids in {path} ({some(strangers)}) is among those evaluated ({some(wanted)}); "
            "give the detections of these images, or run infer.py with --annotations"
        )
    if strangers:
        logger.warning(
            "%s: left out %d images that are not evaluated (%s)",
            path,
            len(strangers),
            some(strangers),
        )
    # An image with as many as COCO counts says nothing of those that a threshold has left out.
    counts = Counter(result["image_id"] for result in kept)
    open_ended = (r["score"] for r in kept if counts[r["image_id"]] < COUNTED)
    lowest = min(open_ended, default=0.0)
    if lowest > HIGH_SCORE_THRESHOLD:
        logger.warning(
            "%s has no detection below a score of %g, so AP comes out too low; detect without --score_threshold, with a model converted with "
            "create_onnx.py --score_threshold 0.001",
            path,
            lowest,
        )
    without = len(wanted - {result["image_id"] for result in kept})
    if without > len(wanted) / 2:
        logger.warning(
            "%s has no detections for %d of %d images, all their objects count as missed; --input names the images it was made of",
            path,
            without,
            len(wanted),
        )
    if coco.ids_differ_from_names(annotations):
        logger.warning(
            "the annotated files are named by numbers that are not their image ids; if infer.py wrote %s without --annotations, "
            "its ids are the names: run it again with --annotations",
            path,
        )
    return Run(kept, image_ids, 0, {"detections": path.name}, images=images)


def annotated_images(
    source: Sources,
    annotations: coco.Annotations,
    *,
    recursive: bool,
    num_images: int | None = None,
) -> dict[Path, int]:
    """The images of `source` that are annotated, with their ids; at most `num_images` of them,
    evenly spread.

    Raises:
        ValueError: there is none.
    """
    paths = find_images(source, recursive=recursive)
    root = root_of(source)
    image_ids = coco.match_images(annotations, paths, root)
    if not image_ids:
        raise ValueError(
            f"--annotations: {annotations.path} names none of the {len(paths)} images in {root} (first: {paths[0].name}; "
            f"annotated: {some(annotations.image_ids)}); give the images it was made for"
        )
    check_kinds(root, annotations)
    check_sizes(image_ids, annotations)
    missing = len(annotations.image_ids) - len(image_ids)
    if missing:
        logger.warning("%d annotated images are not in %s: not evaluated", missing, root)
    if len(paths) > len(image_ids):
        logger.warning("%d images have no annotations: not run", len(paths) - len(image_ids))
    return {path: image_ids[path] for path in spread(list(image_ids), num_images)}


def check_sizes(image_ids: dict[Path, int], annotations: coco.Annotations) -> None:
    """Width and height that the annotation file says against those of the upright pictures.

    Raises:
        ValueError: boxes lie outside of an upright picture whose width and height are swapped:
            labels of the stored pixels.
    """
    said = {i["id"]: (i.get("height"), i.get("width")) for i in annotations.images}
    boxes: dict[int, list[list[float]]] = {}
    for entry in annotations.objects:
        boxes.setdefault(entry["image_id"], []).append(entry["bbox"])
    other: list[str] = []
    swapped: list[str] = []
    for path, image_id in image_ids.items():
        size_hw = image_size(path)
        if size_hw is None or None in said[image_id] or size_hw == said[image_id]:
            continue
        text = f"{path.name} is {size_hw[1]}x{size_hw[0]} (width x height), the file says {said[image_id][1]}x{said[image_id][0]}"
        is_swapped = size_hw == said[image_id][::-1]
        (swapped if is_swapped else other).append(text)
        beyond = any(
            x + w > size_hw[1] + 1 or y + h > size_hw[0] + 1
            for x, y, w, h, *_ in boxes.get(image_id, [])
        )
        if is_swapped and beyond:
            raise ValueError(
                f"--annotations: {annotations.path}: {text}: the picture is upright by its EXIF orientation, the labels are of the stored pixels and lie "
                "outside of it; make the labels of upright pictures, or store the pictures upright without that tag"
            )
    for texts, why in (
        (
            swapped,
            "the labels may be of the stored pixels, not of the upright picture (EXIF orientation)",
        ),
        (other, "the labels may be of pictures of another size"),
    ):
        if texts:
            logger.warning(
                "%s: %d pictures of another size: %s, first: %s",
                annotations.path,
                len(texts),
                why,
                texts[0],
            )


def check_kinds(source: Path, annotations: coco.Annotations) -> None:
    """Warn of annotated files that are there, but of a kind that is not read."""
    root = source if source.is_dir() else source.parent
    unread = [
        name
        for name in annotations.image_ids
        if Path(name).suffix.lower() not in SUFFIXES
        and ((root / name).exists() or (root / Path(name).name).exists())
    ]
    if unread:
        logger.warning(
            "%d annotated files are of a kind that is not read, first %s: not evaluated; convert them to one of %s",
            len(unread), unread[0], " ".join(s[1:] for s in SUFFIXES),
        )  # fmt: skip


def check_matches(run: Run, annotations: coco.Annotations, metrics: dict[str, float]) -> None:
    """Whether an AP of 0 says something of the model, or only that nothing could match.

    Raises:
        ValueError: the model, or where its categories are not known, no detection, has a category
            that the annotations have.
    """
    if metrics.get("AP", -1) > 0 or not run.results:
        return
    found = {r["category_id"] for r in run.results}
    known = {*run.category_ids} or found
    if not known & annotations.categories.keys():
        raise ValueError(
            f"AP is {metrics['AP']:g} because no detection is of the annotated categories: detections have {some(sorted(found))}, "
            f"{annotations.path} has {some(sorted(annotations.categories))}; give the annotations of this model's classes"
        )
    images = set(run.image_ids)
    objects = {o["category_id"] for o in annotations.objects if o["image_id"] in images}
    if not found & objects:
        logger.warning("AP is 0: no detection is of the categories of the objects in these images (%s)", some(sorted(objects)))  # fmt: skip


def automl_metrics(
    checkout: Path, annotations: coco.Annotations, results: Sequence[coco.Result]
) -> dict[str, float]:
    """What google/automl's efficientdet/coco_metric.py says, called as NVIDIA's sample called it.

    Raises:
        ValueError: it is not there, something it needs is missing, or there are no detections, on
            which it fails.
    """
    if not results:
        raise ValueError(
            "--automl_path: AutoML's metric fails where there are no detections at all"
        )
    if any(map(coco.is_rotated, results)):
        raise ValueError(NO_ROTATED_AUTOML)
    by_image: dict[int, list[list[float]]] = {}
    for r in results:
        row = [r["image_id"], *r["bbox"], r["score"], r["category_id"]]
        by_image.setdefault(r["image_id"], []).append(row)
    with _importable(checkout / "efficientdet"), redirect_stdout(StringIO()) as chatter:
        try:
            metric = importlib.import_module("coco_metric")
        except ImportError as error:
            raise ValueError(
                f"--automl_path: {checkout}/efficientdet/coco_metric.py does not import ({error}); "
                "it needs tensorflow and pycocotools"
            ) from error
        evaluation = metric.EvaluationMetric(filename=str(annotations.path))
        for rows in by_image.values():
            evaluation.update_state(None, np.array([rows], np.float64))
        values = evaluation.result(100)
    logger.debug("%s", chatter.getvalue())
    return dict(zip(coco.METRICS, map(float, values), strict=True))


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Python looks for modules in `folder` too, first."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
