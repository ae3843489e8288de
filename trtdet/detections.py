# SPDX-License-Identifier: Apache-2.0
"""Detections of one image, how they come out of a model, and the files they are kept in."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtdet import checks, files
from trtdet.geometry import (
    FloatArray,
    ResizeTransform,
    clip_to_sources,
    rotated_corners,
    to_sources,
    xyxy_to_xywh,
    yxyx_to_xyxy,
)
from trtdet.spec import ModelSpec

logger = logging.getLogger(__name__)

TSV_COLUMNS = ("xmin", "ymin", "xmax", "ymax", "score", "class")
#: The column behind them where boxes are rotated.
TSV_ANGLE = "angle"
#: What to do with a model whose outputs are not those of stage 1.
WRITE_AGAIN = "convert the model again with create_onnx.py"


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best first.

    Attributes:
        boxes_xyxy: (n, 4) float32, corners, pixels of the source image.
        scores: (n,) float32, 0 to 1.
        class_ids: (n,) int32, 0-based index into the model's classes.
        angles: (n,) float32, radians, positive clockwise on the screen: `boxes_xyxy` are the boxes
            before rotation about their centres. None: they are not rotated.
    """

    boxes_xyxy: FloatArray
    scores: FloatArray
    class_ids: NDArray[np.int32]
    angles: FloatArray | None = None

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
        if self.angles is not None and self.angles.shape != (n,):
            raise ValueError(f"detections: expected {n} angles, got {self.angles.shape}")

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score_threshold: float) -> "Detections":
        """Those with a score of at least `score_threshold`."""
        keep = self.scores >= score_threshold
        angles = None if self.angles is None else self.angles[keep]
        return Detections(self.boxes_xyxy[keep], self.scores[keep], self.class_ids[keep], angles)

    def of_classes(self, class_ids: Sequence[int]) -> "Detections":
        """Those of these classes."""
        keep = np.isin(self.class_ids, class_ids)
        angles = None if self.angles is None else self.angles[keep]
        return Detections(self.boxes_xyxy[keep], self.scores[keep], self.class_ids[keep], angles)

    @property
    def corners(self) -> FloatArray:
        """(n, 4, 2) float32 x y; see `trtdet.geometry.rotated_corners`."""
        angles = np.zeros(len(self), np.float32) if self.angles is None else self.angles
        return rotated_corners(self.boxes_xyxy, angles)


def decode(
    outputs: Mapping[str, NDArray[Any]],
    spec: ModelSpec,
    transforms: Sequence[ResizeTransform],
    *,
    size_hw: tuple[int, int] | None = None,
) -> list[Detections]:
    """The four outputs of a batch as `Detections` in source pixels.

    Args:
        outputs: by name (`trtdet.spec.OUTPUT_NAMES`), at least `len(transforms)` rows each; rows
            beyond are padding and ignored.
        spec: says the axis order of the boxes and whether they are normalised.
        transforms: one per real image.
        size_hw: height and width of the network input; None: that of the spec.

    Detections of which a number is not finite are left out, with a warning: FP16 that overflows
    makes some.

    Raises:
        ValueError: outputs of other shapes, or a class that the model does not have.
    """
    images = len(transforms)
    check_shapes(outputs, images)
    counts = np.maximum(outputs["num_detections"].reshape(-1)[:images], 0)
    all_scores = outputs["detection_scores"][:images].astype(np.float32)
    all_classes = outputs["detection_classes"][:images].astype(np.int32)
    rows = outputs["detection_boxes"][:images].astype(np.float32)
    # The plugin fills free slots with scores of 0 where its threshold is below 0.007:
    # trtdet.nms.reference.
    is_found = (all_scores > 0) & (np.arange(all_scores.shape[1]) < counts[:, None])
    is_found = _without_infinite(is_found, all_scores, rows)
    _check_classes(all_classes[is_found], spec)
    boxes = rows[..., :4]
    if spec.box_order == "yxyx":
        boxes = yxyx_to_xyxy(boxes)
    if spec.boxes_normalized:
        height, width = size_hw or spec.preprocessing.size_hw
        boxes = boxes * np.array([width, height, width, height], np.float32)
    is_rotated = rows.shape[-1] > 4
    boxes = _to_source(boxes, transforms, spec, rotated=is_rotated)
    results = []
    for row, count in enumerate(counts.tolist()):
        keep: slice | NDArray[np.intp] = slice(count)
        if not is_found[row, :count].all():
            keep = np.flatnonzero(is_found[row])
        angles = rows[row, keep, 4] if is_rotated else None
        results.append(Detections(boxes[row, keep], all_scores[row, keep], all_classes[row, keep], angles))  # fmt: skip
    return results


def check_shapes(outputs: Mapping[str, NDArray[Any]], images: int) -> None:
    """Find out whether the outputs of a batch have a row for each image, and fit each other.

    Raises:
        ValueError: they do not.
    """
    shapes = {name: values.shape for name, values in outputs.items()}
    rows, slots = (*shapes["detection_scores"], 0, 0)[:2]
    known = [
        {"num_detections": count, "detection_boxes": (rows, slots, box), "detection_scores": (rows, slots), "detection_classes": (rows, slots)}
        for count in ((rows,), (rows, 1))
        for box in (4, 5)
    ]  # fmt: skip
    if rows < images or {name: shapes[name] for name in known[0]} not in known:
        raise ValueError(f"outputs: expected detections of {images} images, [{images}, K] scores and what belongs to them, found {shapes}; {WRITE_AGAIN}")  # fmt: skip


def _check_classes(found: NDArray[np.int32], spec: ModelSpec) -> None:
    """Find out whether the model has all these classes."""
    wrong = found[(found < 0) | (found >= spec.num_classes)]
    if wrong.size:
        raise ValueError(f"detection_classes: expected 0 to {spec.num_classes - 1}, found {wrong[0]}; {WRITE_AGAIN}")  # fmt: skip


def _without_infinite(
    is_found: NDArray[np.bool_], scores: FloatArray, rows: FloatArray
) -> NDArray[np.bool_]:
    """Those of the detections of a batch that have finite numbers alone; the others are set to 0
    and said.
    """
    finite = np.isfinite(scores) & np.isfinite(rows).all(axis=-1)
    if finite.all():
        return is_found
    rows[~finite] = 0
    for found, kept in zip(is_found.sum(axis=1), (is_found & finite).sum(axis=1), strict=True):
        if kept < found:
            logger.warning("%d of %d detections of an image are left out: their boxes or scores are not finite, as of an FP16 model that overflows", found - kept, found)  # fmt: skip
    return is_found & finite


def _to_source(
    boxes: FloatArray, transforms: Sequence[ResizeTransform], spec: ModelSpec, *, rotated: bool
) -> FloatArray:
    """Boxes of a batch, (n, k, 4), in pixels of their source images.

    Rotated ones are not clipped: that would move their centres.
    """
    if rotated:
        return to_sources(boxes, transforms)
    last_pixel = np.array([0, 0, 1, 1], np.float32) * spec.inclusive_corners
    return clip_to_sources(to_sources(boxes - last_pixel, transforms) + last_pixel, transforms)


def write_tsv(
    path: Path, detections: Detections, *, labels: Sequence[str] = (), header: bool = False
) -> None:
    """Write `tsv_text` to a file, whole or not at all."""
    files.write_text(path, tsv_text(detections, labels=labels, header=header))


def tsv_text(detections: Detections, *, labels: Sequence[str] = (), header: bool = False) -> str:
    """One line per detection: xmin ymin xmax ymax score class, tab separated, as NVIDIA's sample
    wrote them; rotated boxes have an angle too.

    Args:
        labels: [class_id] -> text; where given, a last column holds the label.
        header: begin with a line of column names.

    Coordinates have three decimals (a thousandth of a pixel); scores six, finer than float16 at
    1.0; angles, in radians, six.
    """
    rotated = detections.angles is not None
    columns = [*TSV_COLUMNS, *([TSV_ANGLE] if rotated else []), *(["label"] if labels else [])]
    first = "\t".join(columns) + "\n" if header else ""
    line = "\t".join(["%.3f"] * 4 + ["%.6f", "%d"] + ["%.6f"] * rotated + ["%s"] * bool(labels))
    fields: list[list[Any]] = [
        *detections.boxes_xyxy.T.tolist(),
        detections.scores.tolist(),
        detections.class_ids.tolist(),
    ]
    if detections.angles is not None:
        fields.append(detections.angles.tolist())
    if labels:
        fields.append([labels[class_id] for class_id in detections.class_ids])
    return first + _fill(line + "\n", fields)


def _fill(row: str, columns: Sequence[Sequence[Any]]) -> str:
    """`row` % its fields for each row of the columns, in one step: a step for each takes five
    times as long.
    """
    return row * len(columns[0]) % tuple(chain.from_iterable(zip(*columns, strict=True)))


def read_tsv(path: Path) -> Detections:
    """Read what `write_tsv` wrote; a header line and a label column are accepted.

    A seventh column is the angle of rotated boxes where the header says so, or, without a header,
    where it is a number.

    Raises:
        ValueError: a line that does not have six numbers, pixels up to a million; names file and
            line.
    """
    rows: list[list[float]] = []
    rotated: bool | None = None
    try:
        text = files.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected detections in UTF-8, found other bytes ({error}); write them with infer.py"
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split("\t")
        if number == 1 and tuple(fields[: len(TSV_COLUMNS)]) == TSV_COLUMNS:
            rotated = fields[6:7] == [TSV_ANGLE]
            continue
        try:
            if rotated is None:
                rotated = len(fields) > 6 and _is_number(fields[6])
            angle = float(fields[6]) if rotated else 0.0
            rows.append([float(field) for field in fields[:5]] + [int(fields[5]), angle])
            for value in (*rows[-1][:5], angle):
                checks.finite("value", value)
            checks.whole("class", int(fields[5]), 0, 2**31 - 1)
        except (ValueError, IndexError) as error:
            columns = [*TSV_COLUMNS, TSV_ANGLE] if rotated else TSV_COLUMNS
            raise ValueError(
                f"{path}:{number}: expected {' '.join(columns)}, tab separated, numbers up to a million, found {line[:80]!r}"
            ) from error
    table = np.array(rows, np.float64).reshape(-1, 7)
    return Detections(
        table[:, :4].astype(np.float32),
        table[:, 4].astype(np.float32),
        table[:, 5].astype(np.int32),
        table[:, 6].astype(np.float32) if rotated else None,
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_coco_results(
    detections: Detections,
    image_id: int | str,
    category_ids: Sequence[int],
    *,
    inclusive_corners: bool = False,
) -> list[dict[str, Any]]:
    """COCO's results format: one dict per detection, bbox x y w h in source pixels.

    Rotated boxes, as ODTK writes them: bbox x y w h of the box before rotation and the angle, and
    the four corners as `segmentation`, by which COCO's metric compares them.

    Args:
        inclusive_corners: of the model's spec; ODTK counts the last pixel in the bbox of a rotated
            box, not in its corners. Other boxes have it already.

    Source: https://cocodataset.org/#format-results
    """
    boxes = _rounded(xyxy_to_xywh(detections.boxes_xyxy), 3)
    scores = _rounded(detections.scores, 6)
    results: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": category_ids[class_id],
            "bbox": box,
            "score": score,
        }
        for box, score, class_id in zip(boxes, scores, detections.class_ids.tolist(), strict=True)
    ]
    if detections.angles is None:
        return results
    angles = _rounded(detections.angles, 6)
    corners = _rounded(detections.corners.reshape(-1, 8), 3)
    for result, angle, polygon in zip(results, angles, corners, strict=True):
        x, y, width, height = result["bbox"]
        if inclusive_corners:
            width, height = round(width + 1, 3), round(height + 1, 3)
        result["bbox"] = [x, y, width, height, angle]
        result["segmentation"] = [polygon]
    return results


def _rounded(values: NDArray[Any], decimals: int) -> list[Any]:
    """float32 values rounded as `round` does it: in float64, where a float32 times a million has
    no rounding of its own.
    """
    rounded: list[Any] = np.round(values.astype(np.float64), decimals).tolist()
    return rounded


def coco_text(
    detections: Detections,
    image_id: int | str,
    category_ids: Sequence[int],
    *,
    inclusive_corners: bool = False,
) -> str:
    """The text of `to_coco_results`, as `json.dumps` writes it: one line per detection, with a
    comma and an end of line between them.
    """
    if detections.angles is not None:
        results = to_coco_results(
            detections, image_id, category_ids, inclusive_corners=inclusive_corners
        )
        return ",\n".join(json.dumps(result) for result in results)
    name = json.dumps(image_id).replace("%", "%%")
    row = f'{{"image_id": {name}, "category_id": %d, "bbox": [%r, %r, %r, %r], "score": %r}},\n'
    columns = [
        [category_ids[class_id] for class_id in detections.class_ids],
        *_rounded(xyxy_to_xywh(detections.boxes_xyxy).T, 3),
        _rounded(detections.scores, 6),
    ]
    return _fill(row, columns)[:-2]
