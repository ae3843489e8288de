# SPDX-License-Identifier: Apache-2.0
"""COCO's metric, and which image an annotation file means.

Its files are read by `trtdet.results.coco_files`.

The metric is pycocotools', called with its own defaults.

Rotated boxes are in ODTK's form: `bbox` x y w h of the box before rotation, and its angle (radians,
clockwise on the screen), and the four corners as a polygon in `segmentation`. The metric then
compares the polygons (pycocotools' "segm"), as ODTK does.
"""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet import files
from trtdet.detections import Detections
from trtdet.geometry import rotated_corners, xywh_to_xyxy
from trtdet.labels import Labels
from trtdet.results.coco_files import (
    ANNOTATIONS,
    Annotations,
    ImageId,
    Result,
    is_rotated,
    polygons_of,
    read_annotations,
    read_results,
)

logger = logging.getLogger(__name__)

__all__ = ["ANNOTATIONS", "Annotations", "Result", "is_rotated", "read_annotations", "read_results"]


#: Names of pycocotools' twelve figures, in its order, each with what it averages over.
METRICS = {
    "AP": "IoU 0.50:0.95, all sizes, 100 detections",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small objects: area under 32x32 pixels",
    "APm": "medium objects",
    "APl": "large objects: area over 96x96 pixels",
    "AR1": "1 detection per image",
    "AR10": "10 detections per image",
    "AR100": "100 detections per image",
    "ARs": "small objects",
    "ARm": "medium objects",
    "ARl": "large objects",
}


def ids_differ_from_names(annotations: Annotations) -> bool:
    """Whether all annotated files are named by numbers, and not by their image ids: a trap for
    who takes one for the other.
    """
    stems = {Path(name).stem: image_id for name, image_id in annotations.image_ids.items()}
    return all(stem.isascii() and stem.isdigit() for stem in stems) and any(
        int(stem) != image_id for stem, image_id in stems.items()
    )


def match_images(annotations: Annotations, paths: Sequence[Path], root: Path) -> dict[Path, int]:
    """The image id of every path that the annotation file knows.

    A file is known under its path below `root`, or under its bare name where only one annotated
    image and one file have it (annotation files may say "val2017/1.jpg" for `root/1.jpg`).
    """
    bare: dict[str, list[int]] = {}
    for file_name, image_id in annotations.image_ids.items():
        bare.setdefault(Path(file_name).name, []).append(image_id)
    files_named = Counter(path.name for path in paths)
    found = {}
    for path in paths:
        candidates = bare.get(path.name, [])
        name = relative_name(path, root)
        if name in annotations.image_ids:
            found[path] = annotations.image_ids[name]
        elif len(candidates) == 1 and files_named[path.name] == 1:
            found[path] = candidates[0]
    return found


def check_objects(annotations: Annotations, image_ids: Collection[int]) -> None:
    """Find out before long work whether there is anything to find: else AP is -1, and says nothing.

    Raises:
        ValueError: no object, crowds left aside, is annotated in any of these images.
    """
    wanted = set(image_ids)
    if not any(
        entry["image_id"] in wanted and not entry["iscrowd"] for entry in annotations.objects
    ):
        raise ValueError(
            f"--annotations: expected objects to find, {annotations.path} has none in the {len(wanted)} images that are looked at, so there is no AP; "
            "give annotations with objects (a file of image information only has none)"
        )


def relative_name(path: Path, root: Path) -> str:
    """`path` below the input folder with forward slashes; its bare name where the input is one
    file.
    """
    return path.name if path == root else path.relative_to(root).as_posix()


def name_images(paths: Sequence[Path], root: Path) -> dict[Path, int | str]:
    """Image ids without an annotation file: the stems where all are different whole numbers, as
    COCO's are, else the file names, their control characters escaped.
    """
    stems = [path.stem for path in paths]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return dict(zip(paths, numbers, strict=True))
    return {path: files.printable(relative_name(path, root)) for path in paths}


def _polygon(entry: Mapping[str, Any]) -> Any:
    """The `segmentation` of an annotation or a detection; where it has none, the corners of its
    box.

    The last pixel belongs to a rotated box, so ODTK's corners are a pixel short of its width and
    height.
    """
    polygons = polygons_of(entry)
    if polygons:
        return polygons
    x, y, width, height, *angle = entry["bbox"]
    last = len(angle)
    box = np.array([x, y, x + width - last, y + height - last], np.float64)
    return [rotated_corners(box, np.array(sum(angle))).reshape(-1).tolist()]


@dataclass(frozen=True)
class Evaluation:
    """What COCO's metric says.

    Attributes:
        metrics: by the names of `METRICS`; -1 where there is nothing to find (no small object,
            say), as pycocotools has it.
        precision: (10, 101) precision at IoU 0.50, 0.55, ..., 0.95 and recall 0, 0.01, ..., 1,
            averaged over the categories; all sizes, 100 detections.
        iou_type: what overlaps were of: "bbox", or "segm", the polygons of rotated boxes.
        by_category: category id -> its AP and AP50; those without an object are not in it.
    """

    metrics: dict[str, float]
    precision: NDArray[np.float64]
    iou_type: str = "bbox"
    by_category: dict[int, tuple[float, float]] = field(default_factory=dict)


IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


def evaluate(
    annotations: Annotations, results: Sequence[Result], image_ids: Collection[int]
) -> Evaluation:
    """COCO's detection metric over `image_ids`: an image without a detection counts, and so does
    one without an object.

    Args:
        results: detections of other images, and of categories that the annotation file lacks, are
            left out.
        image_ids: the images that were looked at.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # Numbered anew for pycocotools, in the order of the ids: it sorts them, and numbers cannot be
    # compared with text.
    in_order = sorted(set(image_ids), key=lambda i: (isinstance(i, str), i))
    wanted: dict[ImageId, int] = {image_id: number for number, image_id in enumerate(in_order)}
    iou_type = "segm" if any(is_rotated(e) for e in (*annotations.objects, *results)) else "bbox"
    images = _image_entries(annotations, wanted, sized=iou_type == "segm")
    chatter = io.StringIO()  # pycocotools prints
    with contextlib.redirect_stdout(chatter):
        truth, found = COCO(), COCO()
        for coco, entries in ((truth, annotations.objects), (found, _with_area(results))):
            coco.dataset = {
                "images": images,
                "categories": [{"id": category_id} for category_id in annotations.categories],
                # Numbered anew: pycocotools takes an object of id 0 for "not matched", and ids are
                # not always unique. Built here rather than by loadRes, which fails on an empty
                # list.
                "annotations": [
                    {
                        **entry,
                        "image_id": wanted[entry["image_id"]],
                        "id": number,
                        **({"segmentation": _polygon(entry)} if iou_type == "segm" else {}),
                    }
                    for number, entry in enumerate(
                        (entry for entry in entries if entry["image_id"] in wanted), 1
                    )
                ],
            }
            coco.createIndex()
        run = COCOeval(truth, found, iouType=iou_type)
        run.evaluate()
        run.accumulate()
        run.summarize()
    logger.debug("%s", chatter.getvalue())
    precision = run.eval["precision"][:, :, :, 0, -1]  # (iou, recall, category), -1: no objects
    there = (precision > -1).any(axis=(0, 1))
    mean = precision[:, :, there].mean(axis=2) if there.any() else np.zeros(precision.shape[:2])
    by_category = {
        int(category): (float(precision[:, :, k].mean()), float(precision[0, :, k].mean()))
        for k, category in enumerate(run.params.catIds)
        if there[k]
    }
    metrics = dict(zip(METRICS, map(float, run.stats), strict=True))
    return Evaluation(metrics, mean, iou_type, by_category)


def _image_entries(
    annotations: Annotations, wanted: Mapping[ImageId, int], *, sized: bool
) -> list[dict[str, Any]]:
    """What pycocotools needs to know of the images; polygons are compared on a grid of the
    image's size.
    """
    if not sized:
        return [{"id": number} for number in wanted.values()]
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in annotations.images}
    entries = []
    for image_id, number in wanted.items():
        height, width = sizes.get(image_id, (None, None))
        if not height or not width or height * width >= 2**32:  # pycocotools counts in 32 bits
            raise ValueError(
                f"{annotations.path}: expected height and width of every image, which rotated boxes need, found {height} and {width} for {image_id!r}"
            )
        entries.append({"id": number, "height": int(height), "width": int(width)})
    return entries


def _with_area(results: Sequence[Result]) -> list[Result]:
    return [r | {"area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0} for r in results]


def metrics_table(metrics: Mapping[str, float]) -> str:
    """One line per figure: name, value, what it averages over."""
    lines = []
    for name, meaning in METRICS.items():
        value = f"{metrics[name]:.4f}" if metrics[name] >= 0 else "none"
        lines.append(f"{name:<6}{value:>7}  {meaning}")
    return "\n".join(lines)


def plot_precision_recall(path: Path, evaluation: Evaluation, *, title: str) -> None:
    """Draw precision over recall, one curve per IoU threshold, to a picture file.

    Raises:
        ValueError: matplotlib is missing, or cannot write this kind of file.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ImportError as error:
        raise ValueError("--plot: needs matplotlib; pip install matplotlib") from error

    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(IOU_THRESHOLDS)))
    for iou, precision, color in zip(IOU_THRESHOLDS, evaluation.precision, colors, strict=True):
        axes.plot(RECALLS, precision, color=color, label=f"{iou:.2f}   {precision.mean():.3f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="IoU    AP", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


# ---- ground truth


def class_ids_of(categories: Mapping[int, str], labels: Labels) -> dict[int, int]:
    """Category id -> class id: by name where the labels have it, else category id - 1, as AutoML
    counts.
    """
    named = labels if isinstance(labels, Mapping) else dict(enumerate(labels))
    by_name = {label: class_id for class_id, label in named.items()}
    return {
        category_id: by_name.get(name, category_id - 1) for category_id, name in categories.items()
    }


def labels_of(categories: Mapping[int, str]) -> dict[int, str]:
    """Class id -> name from an annotation file, class id = category id - 1, as AutoML counts."""
    return {category_id - 1: name for category_id, name in categories.items()}


def ground_truth(annotations: Annotations, class_ids: Mapping[int, int]) -> dict[int, Detections]:
    """Image id -> what is annotated there, as `Detections` of score 1.

    Images without an object are left out.
    """
    objects: dict[int, list[tuple[list[float], int]]] = {}
    for entry in annotations.objects:
        class_id = class_ids[entry["category_id"]]
        objects.setdefault(entry["image_id"], []).append((entry["bbox"], class_id))
    rotated = any(is_rotated(entry) for entry in annotations.objects)
    return {image_id: _annotated(found, rotated=rotated) for image_id, found in objects.items()}


def _annotated(found: Sequence[tuple[list[float], int]], *, rotated: bool) -> Detections:
    """(bbox, class id) of one image as `Detections` of score 1; a bbox without an angle is not
    rotated.
    """
    boxes = np.array([(*bbox, 0.0)[:5] for bbox, _ in found], np.float32)
    return Detections(
        xywh_to_xyxy(boxes[:, :4]),
        np.ones(len(found), np.float32),
        np.array([class_id for _, class_id in found], np.int32),
        boxes[:, 4] if rotated else None,
    )
