# SPDX-License-Identifier: Apache-2.0
"""Run two models over the same images and compare tensors, detections and AP."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trtdet.detections import to_coco_results
from trtdet.images.files import Sources, find_images, load_image, root_of, spread
from trtdet.parity.base import Found, Side
from trtdet.parity.detections import ImageComparison, match
from trtdet.parity.options import CompareOptions, limits_for
from trtdet.parity.rows import in_order_of
from trtdet.parity.summary import Comparison, spec_differences
from trtdet.parity.tensors import TensorDifference, TensorStatistics, worst_first
from trtdet.results import coco
from trtdet.results.categories import match_categories
from trtdet.run.detect import pick_labels
from trtdet.spec import ModelSpec
from trtdet.terminal import no_bar

logger = logging.getLogger(__name__)

#: Reference's and candidate's category id -> the annotation file's, negative where it has none.
CategoryMaps = tuple[Mapping[int, int], Mapping[int, int]]


#: Bytes of each model's tensors that are held at a time. Every group of tensors takes a run of both
#: models.
GROUP_BYTES = 2**29
#: Tensors of the first group, whose sizes are not known yet.
FIRST_GROUP = 32


def compare(
    reference: Side,
    candidate: Side,
    source: Sources,
    options: CompareOptions,
    annotations: coco.Annotations | None = None,
) -> Comparison:
    """Run both models over the images of `source`.

    Raises:
        ValueError: no image could be read, nothing was found in any, or annotations that do not
            fit: there is nothing to compare.
    """
    paths = find_images(source, recursive=options.recursive, num_images=options.num_images)
    ids = annotated_ids(paths, source, annotations) if annotations else {}
    categories = categories_of((reference, candidate), annotations) if annotations else None
    threshold = score_threshold(options.score_threshold, reference.info.spec, candidate.info.spec)
    found = [detect_all(side, paths) for side in (reference, candidate)]
    images = [
        compare_image(path, found[0][path], found[1][path], options.iou, threshold)
        for path in paths
        if path in found[0] and path in found[1]
    ]
    if not images:
        raise ValueError(f"--input: none of {len(paths)} images could be read")
    readable = [image.path for image in images]
    tensors = compare_tensors(reference, candidate, spread(readable, options.tensor_images))
    ids = {path: ids[path] for path in readable if path in ids}
    size_hw = candidate.info.spec.preprocessing.size_hw
    compared = set(readable)
    result = Comparison(
        reference.info,
        candidate.info,
        tuple(images),
        limits_for(candidate.info.precision, size_hw, options.limits),
        threshold,
        options.iou,
        tensors=tuple(tensors),
        tensor_images=min(options.tensor_images, len(readable)) if tensors else 0,
        ap=average_precision(images, annotations, ids, (reference, candidate), categories)
        if annotations and categories
        else None,
        ap_images=len(ids),
        skipped=tuple(path.name for path in paths if path not in compared),
    )
    if not result.detections.reference:
        raise ValueError(
            f"--min_score {threshold:g}: the reference finds nothing of this score in {len(images)} images, so nothing "
            "can be compared; give other images, or a lower threshold"
        )
    return result


def score_threshold(wanted: float, *specs: ModelSpec) -> float:
    """From which score on detections are compared: no less than what both models keep."""
    kept = max(spec.nms.score_threshold for spec in specs)
    if kept > wanted:
        logger.warning(
            "--min_score %g: one of the models keeps nothing below %g, so that is compared",
            wanted,
            kept,
        )
    return max(wanted, kept)


def detect_all(side: Side, paths: Sequence[Path]) -> dict[Path, Found]:
    """Detections of every image that can be read."""
    found = {}
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(paths), desc=side.info.name, unit="image", disable=no_bar()) as bar,
    ):
        for path, one in side.detect(paths):
            found[path] = one
            bar.update()
    return found


def compare_image(
    path: Path, reference: Found, candidate: Found, iou: float, threshold: float
) -> ImageComparison:
    (left, transform), (right, _) = reference, candidate
    matching = match(left, right, min_iou=iou, score_threshold=threshold)
    return ImageComparison(path, left, right, matching, transform.scale_xy)


def compare_tensors(
    reference: Side, candidate: Side, paths: Sequence[Path]
) -> list[TensorDifference]:
    """Every floating-point tensor that both have under the same name; of a model as it was trained
    that is the heads.

    Heads whose rows one of the models sorts itself are compared with their rows in any order, all
    other tensors value by value.
    """
    there = set(reference.tensors)
    names = [name for name in candidate.tensors if name in there]
    if not names or not paths:
        logger.info("no tensors to compare: one of the two is an engine, or they share no names")
        return []
    heads = reference.heads | candidate.heads
    statistics = {name: TensorStatistics(name, head=name in heads) for name in names}
    read = [side.tensor_reader(names) for side in (reference, candidate)]
    sizes: dict[str, int] = {}
    is_sorted = reference.sorts_rows or candidate.sorts_rows
    ends = [name for name in names if name in heads] if is_sorted else []
    for path in paths:
        image = load_image(path)
        lefts, rights = (r(ends, image) if ends else [] for r in read)
        for name, left, right in zip(ends, lefts, in_order_of(lefts, rights), strict=True):
            statistics[name].add(left, right)
        rest = [name for name in names if name not in ends]
        while rest:
            some = next_group(rest, sizes)
            rest = rest[len(some) :]
            for name, left, right in zip(some, *(r(some, image) for r in read), strict=True):
                sizes[name] = max(left.nbytes, right.nbytes)
                if left.dtype.kind == right.dtype.kind == "f":
                    statistics[name].add(left, right)
                else:
                    statistics.pop(name, None)
    return [one.result() for one in statistics.values()]


def next_group(names: Sequence[str], sizes: dict[str, int]) -> Sequence[str]:
    """The first of `names`, as many as are held at a time.

    Args:
        sizes: bytes of the tensors that were read before. The others are taken to be as large as
            the last of them: feature maps become smaller along a network.
    """
    guess = next(reversed(sizes.values()), GROUP_BYTES // FIRST_GROUP)
    ends = itertools.accumulate(max(1, sizes.get(name, guess)) for name in names)
    return names[: max(1, sum(end <= GROUP_BYTES for end in ends))]


def annotated_ids(
    paths: Sequence[Path], source: Sources, annotations: coco.Annotations
) -> dict[Path, int]:
    """The ids of the images that are annotated; found before anything is run.

    Says loudly what the AP will leave out.

    Raises:
        ValueError: there is none, or nothing is annotated in them.
    """
    ids = coco.match_images(annotations, paths, root_of(source))
    if not ids:
        raise ValueError(
            f"--annotations: {annotations.path} names none of the {len(paths)} images in {root_of(source)}; give the images it was made for"
        )
    coco.check_objects(annotations, ids.values())
    if len(ids) < len(paths):
        logger.warning("%d of %d images have no annotations: AP is of the other %d alone", len(paths) - len(ids), len(paths), len(ids))  # fmt: skip
    return ids


def categories_of(sides: tuple[Side, Side], annotations: coco.Annotations) -> CategoryMaps:
    """How the annotation file counts the categories of reference and candidate.

    Raises:
        ValueError: the reference can find none of its categories.
    """
    specs = [side.info.spec for side in sides]
    known = [(spec.labels, spec.category_ids) for spec in specs]
    reference = match_categories(*known[0], annotations.categories, annotations.path)
    candidate: Sequence[int] = reference
    if known[1] != known[0]:
        try:
            candidate = match_categories(*known[1], annotations.categories, annotations.path)
        except ValueError as error:  # a fault of the candidate's, which its AP is to show
            logger.warning("the candidate: %s", error)
            candidate = specs[1].category_ids
    return (
        dict(zip(specs[0].category_ids, reference, strict=True)),
        dict(zip(specs[1].category_ids, candidate, strict=True)),
    )


def average_precision(
    images: Sequence[ImageComparison],
    annotations: coco.Annotations,
    ids: Mapping[Path, int],
    sides: tuple[Side, Side],
    categories: CategoryMaps,
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """COCO's metrics of reference and candidate over the images in `ids`, all their detections
    counted.

    Raises:
        ValueError: nothing is annotated in them: those with objects could not be read.
    """
    coco.check_objects(annotations, ids.values())
    results: tuple[list[coco.Result], list[coco.Result]] = ([], [])
    for image in images:
        if image.path not in ids:
            continue
        found_by = (image.reference, image.candidate)
        for found, side, ids_of, rows in zip(found_by, sides, categories, results, strict=True):
            largest = int(found.class_ids.max(initial=0))
            same = [*(ids_of.get(i, i) for i in range(largest + 1)), -1]  # [category id], -1 too
            corners = side.info.spec.inclusive_corners
            rows += to_coco_results(found, ids[image.path], same, inclusive_corners=corners)
    left, right = (coco.evaluate(annotations, rows, ids.values()).metrics for rows in results)
    return left, right


def category_labels(
    comparison: Comparison, annotations: coco.Annotations | None
) -> Mapping[int, str]:
    """Category id -> name: of the annotations, else of a model that has names."""
    if annotations:
        return annotations.categories
    for side in (comparison.candidate, comparison.reference):
        if texts := pick_labels(None, side.spec):
            return dict(zip(side.spec.category_ids, texts, strict=True))
    return {}


def lines(comparison: Comparison) -> list[str]:
    """The result for the reader: what was compared, every limit, the worst tensors, the verdict."""
    d = comparison.detections
    text = [
        f"reference  {comparison.reference.name} ({comparison.reference.kind})",
        f"candidate  {comparison.candidate.name} ({comparison.candidate.kind})",
        f"{len(comparison.images)} images; from a score of {comparison.score_threshold:g} on {d.reference} and {d.candidate} detections, "
        f"{d.matched} matched, {d.missing} missing, {d.extra} extra, {d.class_flips} of another class",
    ]
    if comparison.ap:
        left, right = comparison.ap
        figures = "   ".join(f"{n} {left[n]:.4f} -> {right[n]:.4f}" for n in ("AP", "AP50", "AP75"))
        text.append(f"AP on {comparison.ap_images} of {len(comparison.images)} images: {figures}")
    text += [
        f"{name}: {left} in the reference, {right} in the candidate"
        for name, left, right in spec_differences(
            comparison.reference.spec, comparison.candidate.spec
        )
    ]
    worst = [t for t in worst_first(comparison.tensors) if not t.equal][:5]
    if comparison.tensors:
        text += ["", f"{'worst of ' + str(len(comparison.tensors)) + ' tensors':<48}{'max':>11}{'cosine':>11}{'SQNR':>9}"]  # fmt: skip
        text += ["all equal"] * (not worst)
        text += [f"{t.name[-47:]:<48}{t.maximum:>11.4g}{t.cosine:>11.6f}{t.sqnr_db:>9.1f}" for t in worst]  # fmt: skip
    text += ["", f"{'':<48}{'value':>11}{'limit':>11}"]
    for check in comparison.checks:
        mark = "" if check.passed else "  BROKEN"
        text.append(f"{check.name[:47]:<48}{check.text(check.value):>11}{check.text(check.limit):>11}{mark}")  # fmt: skip
    count = len(comparison.broken)
    verdict = f"{count} of {len(comparison.checks)} limits broken" if count else "within all limits"
    return [*text, "", verdict]
