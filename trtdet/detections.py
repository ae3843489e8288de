# SPDX-License-Identifier: Apache-2.0
"""Detections of one image, how they come out of a model, and the files they are kept in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet import files
from trtdet.geometry import FloatArray, ResizeTransform, xyxy_to_xywh, yxyx_to_xyxy
from trtdet.spec import ModelSpec

TSV_COLUMNS = ("xmin", "ymin", "xmax", "ymax", "score", "class")


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best first.

    Attributes:
        boxes_xyxy: (n, 4) float32, corners, pixels of the source image.
        scores: (n,) float32, 0 to 1.
        class_ids: (n,) int32, 0-based index into the model's classes.
    """

    boxes_xyxy: FloatArray
    scores: FloatArray
    class_ids: NDArray[np.int32]

    def __post_init__(self) -> None:
        n = len(self.scores)
        if (
            self.boxes_xyxy.shape != (n, 4)
            or self.scores.shape != (n,)
            or self.class_ids.shape != (n,)
        ):
            raise ValueError(
                f"detections: expected shapes (n, 4), (n,), (n,), got {self.boxes_xyxy.shape}, "
                f"{self.scores.shape}, {self.class_ids.shape}"
            )

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score_threshold: float) -> "Detections":
        """Those with a score of at least `score_threshold`."""
        keep = self.scores >= score_threshold
        return Detections(self.boxes_xyxy[keep], self.scores[keep], self.class_ids[keep])


def decode(
    outputs: Mapping[str, NDArray[Any]], spec: ModelSpec, transforms: Sequence[ResizeTransform]
) -> list[Detections]:
    """The four outputs of a batch as `Detections` in source pixels.

    Args:
        outputs: by name (`trtdet.spec.OUTPUT_NAMES`), at least `len(transforms)` rows each; rows beyond are padding and ignored.
        spec: says the axis order of the boxes and whether they are normalised.
        transforms: one per real image.
    """
    counts = outputs["num_detections"].reshape(-1)
    height, width = spec.preprocessing.size_hw
    results = []
    for row, transform in enumerate(transforms):
        # The plugin fills free slots with scores of 0 where its threshold is below 0.007: trtdet.nms_reference.
        keep = np.flatnonzero(outputs["detection_scores"][row, : int(counts[row])] > 0)
        boxes = outputs["detection_boxes"][row, keep].astype(np.float32)
        if spec.box_order == "yxyx":
            boxes = yxyx_to_xyxy(boxes)
        if spec.boxes_normalized:
            boxes = boxes * np.array([width, height, width, height], np.float32)
        results.append(
            Detections(
                transform.to_source(boxes),
                outputs["detection_scores"][row, keep].astype(np.float32),
                outputs["detection_classes"][row, keep].astype(np.int32),
            )
        )
    return results


def write_tsv(
    path: Path, detections: Detections, *, labels: Sequence[str] = (), header: bool = False
) -> None:
    """Write one line per detection: xmin ymin xmax ymax score class, tab separated, as NVIDIA's sample did.

    Args:
        labels: [class_id] -> text; where given, a seventh column holds the label.
        header: write a first line with the column names.

    Coordinates have three decimals (a thousandth of a pixel); scores six, finer than float16 at 1.0.
    """
    columns = (*TSV_COLUMNS, "label") if labels else TSV_COLUMNS
    lines = ["\t".join(columns)] if header else []
    rows = zip(detections.boxes_xyxy, detections.scores, detections.class_ids, strict=True)
    for box, score, class_id in rows:
        fields = [*(f"{x:.3f}" for x in box), f"{score:.6f}", str(class_id)]
        lines.append("\t".join([*fields, labels[class_id]] if labels else fields))
    files.write_text(path, "".join(line + "\n" for line in lines))


def read_tsv(path: Path) -> Detections:
    """Read what `write_tsv` wrote; a header line and a label column are accepted.

    Raises:
        ValueError: a line that does not have six numbers; names file and line.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("\t")
        if number == 1 and tuple(fields[: len(TSV_COLUMNS)]) == TSV_COLUMNS:
            continue
        try:
            rows.append([float(field) for field in fields[:5]] + [int(fields[5])])
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{path}:{number}: expected {' '.join(TSV_COLUMNS)}, tab separated, found {line[:80]!r}"
            ) from error
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(
        table[:, :4].astype(np.float32),
        table[:, 4].astype(np.float32),
        table[:, 5].astype(np.int32),
    )


def to_coco_results(
    detections: Detections, image_id: int | str, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """COCO's results format: one dict per detection, bbox x y w h in source pixels.

    Source: https://cocodataset.org/#format-results
    """
    boxes = xyxy_to_xywh(detections.boxes_xyxy)
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[class_id],
            "bbox": [round(float(x), 3) for x in box],
            "score": round(float(score), 6),
        }
        for box, score, class_id in zip(boxes, detections.scores, detections.class_ids, strict=True)
    ]
