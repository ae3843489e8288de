# SPDX-License-Identifier: Apache-2.0
"""The images of a page: those of a run by its TSVs, those of an evaluation by results and
annotations.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trtdet.detections import Detections, read_tsv
from trtdet.geometry import xywh_to_xyxy
from trtdet.results.coco import Annotations, Result, ground_truth, relative_name
from trtdet.results.gallery import Item

NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


def items_of_run(output: Path, names: Mapping[Path, str], root: Path) -> list[Item]:
    """Images of a run whose TSVs lie in `output`; `names`: image -> its output name."""
    return [
        Item(path, relative_name(path, root), read_tsv(output / f"{name}.tsv"))
        for path, name in names.items()
    ]


def items_of_evaluation(
    images: Mapping[Path, int], root: Path, annotations: Annotations, results: Sequence[Result]
) -> tuple[list[Item], dict[int, int]]:
    """Images with what was found in them and what is there.

    Args:
        images: path -> image id.

    Returns:
        The images, and category id -> class id of the detections in them: categories counted in the
        order of their ids.
    """
    classes = {category: i for i, category in enumerate(sorted(annotations.categories))}
    by_image: dict[int, list[Result]] = {}
    for result in results:
        if result["category_id"] in classes:
            by_image.setdefault(result["image_id"], []).append(result)
    objects = tuple(entry for entry in annotations.objects if not entry["iscrowd"])
    without_crowds = Annotations(annotations.path, annotations.images, objects, annotations.categories, annotations.image_ids)  # fmt: skip
    truth = ground_truth(without_crowds, classes)
    items = [
        Item(path, relative_name(path, root), _detections(by_image.get(i, []), classes), truth.get(i, NOTHING))
        for path, i in images.items()
    ]  # fmt: skip
    return items, classes


def _detections(results: Sequence[Result], classes: Mapping[int, int]) -> Detections:
    """COCO results of one image, best first; a fifth number of a box is its angle."""
    if not results:
        return NOTHING
    ordered = sorted(results, key=lambda result: -result["score"])
    boxes = np.array([(*result["bbox"], 0.0)[:5] for result in ordered], np.float32)
    rotated = any(len(result["bbox"]) > 4 for result in ordered)
    return Detections(
        xywh_to_xyxy(boxes[:, :4]),
        np.array([result["score"] for result in ordered], np.float32),
        np.array([classes[result["category_id"]] for result in ordered], np.int32),
        boxes[:, 4] if rotated else None,
    )
