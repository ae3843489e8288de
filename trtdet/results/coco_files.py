# SPDX-License-Identifier: Apache-2.0
"""COCO's annotation and results files.

Formats: https://cocodataset.org/#format-data and #format-results. Ids may be written as 1.0; an
image id may be a number in one list and text in the other.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtdet import checks, reading
from trtdet.spec import LARGEST_ID

#: What --annotations takes, for `trtdet.files.check_input`.
ANNOTATIONS = ("--annotations", "COCO annotations, such as instances_val2017.json")

#: One detection of COCO's results format: image_id, category_id, bbox (x y w h; rotated: an angle,
#: and segmentation), score.
Result = dict[str, Any]
ImageId = int | str

_REMEDY = "correct that place in the file"


@dataclass(frozen=True)
class Annotations:
    """A COCO annotation file.

    Attributes:
        objects: the file's "annotations", `area` and `iscrowd` filled in where they were missing.
        categories: category id -> name.
        image_ids: file_name -> image id.
    """

    path: Path
    images: tuple[dict[str, Any], ...]
    objects: tuple[dict[str, Any], ...]
    categories: dict[int, str]
    image_ids: dict[str, Any]


# ---- the forms


@dataclass(frozen=True)
class _Image:
    id: int | float | str
    file_name: str
    width: int | float | None = None
    height: int | float | None = None

    def __post_init__(self) -> None:
        _image_id("id", self.id)
        checks.text("file_name", self.file_name, checks.LONG_TEXT)
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None:
                checks.whole(name, checks.whole_number(name, side), 0, 1_000_000)

    @property
    def entry(self) -> dict[str, Any]:
        image_id = _image_id("id", self.id)
        return {"id": image_id, "file_name": self.file_name, "width": self.width, "height": self.height}  # fmt: skip


@dataclass(frozen=True)
class _Category:
    id: int | float
    name: str | int | float | None = None

    def __post_init__(self) -> None:
        checks.whole("id", checks.whole_number("id", self.id), -LARGEST_ID, LARGEST_ID)
        if self.name is not None:
            checks.text("name", str(self.name), checks.LABEL)


@dataclass(frozen=True)
class _Object:
    """An annotation; many tools leave out `area` and `iscrowd`, which pycocotools needs, some
    `bbox`: then it is that of `segmentation`.
    """

    image_id: int | float | str
    category_id: int | float
    bbox: list[float] | None = None
    area: float | None = None
    iscrowd: int | float | bool | None = None
    segmentation: Any = None

    def __post_init__(self) -> None:
        _image_id("image_id", self.image_id)
        category = checks.whole_number("category_id", self.category_id)
        checks.whole("category_id", category, -LARGEST_ID, LARGEST_ID)
        _check_box(self.box, lowest_side=0)
        if self.area is not None:
            checks.finite("area", self.area, 0, 1e12)
        if len(self.box) == 5 and self.segmentation:
            _check_segmentation(self.segmentation)

    @property
    def box(self) -> list[float]:
        return self.bbox if self.bbox else _box_of(self.segmentation)

    @property
    def entry(self) -> dict[str, Any]:
        box = self.box
        area = box[2] * box[3] if self.area is None else self.area
        entry = {"category_id": int(self.category_id), "bbox": box, "area": area, "iscrowd": int(bool(self.iscrowd))}  # fmt: skip
        return entry | ({"segmentation": self.segmentation} if self.segmentation else {})


@dataclass(frozen=True)
class _AnnotationFile:
    images: list[_Image]
    annotations: list[_Object]
    categories: list[_Category]


@dataclass(frozen=True)
class _Detection:
    image_id: int | float | str
    category_id: int | float
    bbox: list[float]
    score: float
    segmentation: Any = None

    def __post_init__(self) -> None:
        _image_id("image_id", self.image_id)
        category = checks.whole_number("category_id", self.category_id)
        checks.whole("category_id", category, -LARGEST_ID, LARGEST_ID)
        _check_box(self.bbox, lowest_side=-1e6)
        checks.finite("score", self.score)
        if len(self.bbox) == 5 and self.segmentation:
            _check_segmentation(self.segmentation)

    @property
    def entry(self) -> Result:
        entry = {"category_id": int(self.category_id), "bbox": self.bbox, "score": self.score}
        rotated = len(self.bbox) == 5 and self.segmentation
        return entry | ({"segmentation": self.segmentation} if rotated else {})


@dataclass(frozen=True)
class _DetectionFile:
    """A results file of ODTK."""

    annotations: list[_Detection]


# ---- reading


def read_annotations(path: Path) -> Annotations:
    """Read a COCO annotation file ("instances_val2017.json").

    Raises:
        ValueError: not JSON, a part missing, or an object without image, category or box; names the
            place.
    """
    remedy = f"give COCO annotations, with images, annotations and categories, or {_REMEDY}"
    found: _AnnotationFile = reading.read(path, _AnnotationFile, remedy=remedy)
    images = tuple(image.entry for image in found.images)
    for key in ("file_name", "id"):
        counts = Counter(str(image[key]) for image in images)
        value, count = counts.most_common(1)[0] if images else ("", 0)
        if count > 1:
            raise ValueError(f"{path}: images: expected every one once, found {count} with the {key} {checks.shown(value)}; {_REMEDY}")  # fmt: skip
    known = {str(image["id"]): image["id"] for image in images}
    objects = tuple({"image_id": _known(known, o.image_id), **o.entry} for o in found.annotations)
    categories = {int(c.id): str(c.id if c.name is None else c.name) for c in found.categories}
    for entry in objects:  # pycocotools would leave out objects of a category that is not listed
        categories.setdefault(entry["category_id"], str(entry["category_id"]))
    image_ids = {image["file_name"]: image["id"] for image in images}
    return Annotations(path, images, objects, categories, image_ids)


def read_results(path: Path, annotations: Annotations) -> list[Result]:
    """Read a COCO results file, or one of ODTK (an object with the list under "annotations");
    images named by file name get the id of the annotation file.

    Raises:
        ValueError: not a list of detections; names the place.
    """
    remedy = f"give COCO results, a JSON list of detections, or {_REMEDY}"
    found: list[_Detection] | _DetectionFile = reading.read(
        path, list[_Detection] | _DetectionFile, remedy=remedy
    )
    entries = found.annotations if isinstance(found, _DetectionFile) else found
    known = {str(image_id): image_id for image_id in annotations.image_ids.values()}
    known |= annotations.image_ids
    return [{"image_id": _known(known, e.image_id), **e.entry} for e in entries]


def is_rotated(entry: Mapping[str, Any]) -> bool:
    """Whether the bbox of an annotation or a detection has an angle."""
    return len(entry["bbox"]) == 5


def _known(known: Mapping[str, ImageId], given: int | float | str) -> ImageId:
    """The id of an image under which the annotation file lists it; another one as it is."""
    image_id = _image_id("image_id", given)
    return known.get(str(image_id), image_id)


def _image_id(name: str, given: int | float | str) -> ImageId:
    if isinstance(given, str):
        checks.text(name, given, checks.LONG_TEXT)
        return given
    return checks.whole_number(name, given)


def _box_of(segmentation: Any) -> list[float]:
    """The bbox around a segmentation: polygons, or a mask in COCO's run-length encoding.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(segmentation, dict) and {"counts", "size"} <= segmentation.keys():
        return _box_of_mask(segmentation["counts"], *segmentation["size"])
    if not segmentation:
        raise ValueError("bbox: expected x, y, width, height, or a segmentation, found neither")
    _check_segmentation(segmentation)
    xs = [x for polygon in segmentation for x in polygon[::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    return [float(min(xs)), float(min(ys)), float(max(xs) - min(xs)), float(max(ys) - min(ys))]


def _box_of_mask(counts: Any, height: int, width: int) -> list[float]:
    """The bbox of a mask in COCO's run-length encoding: lengths of zeros and ones in turn,
    column by column.
    """
    lengths = _lengths(counts) if isinstance(counts, str) else [int(n) for n in counts]
    if sum(lengths) != height * width:
        raise ValueError(f"segmentation: expected runs of {height} x {width} pixels, found {sum(lengths)} pixels")  # fmt: skip
    rows, columns, start = [], [], 0
    for number, length in enumerate(lengths):
        if number % 2 and length:
            first, last = start, start + length - 1
            columns += [first // height, last // height]
            # A run over the end of a column touches both borders.
            whole = first // height != last // height
            rows += [0, height - 1] if whole else [first % height, last % height]
        start += length
    if not rows:
        raise ValueError("segmentation: expected a mask with pixels, found an empty one")
    x, y = min(columns), min(rows)
    return [float(x), float(y), float(max(columns) - x + 1), float(max(rows) - y + 1)]


def _lengths(text: str) -> list[int]:
    """The lengths of a compressed encoding: five bits a character, from the third on the
    difference to the one before the last.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths


def _check_box(box: Sequence[float], *, lowest_side: float) -> None:
    if len(box) not in (4, 5):
        raise ValueError(f"bbox: expected four numbers, or five with an angle, found {len(box)}")
    for value in box:
        checks.finite("bbox", value)
    for side in box[2:4]:
        checks.finite("bbox: width, height", side, lowest_side)


def _check_segmentation(given: Any) -> None:
    """By it overlaps of rotated boxes are measured.

    Raises:
        ValueError: not polygons of at least three points.
    """
    polygons = given if isinstance(given, list) else [None]
    for polygon in polygons:
        numbers = polygon if isinstance(polygon, list) else []
        if len(numbers) < 6 or len(numbers) % 2 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):  # fmt: skip
            raise ValueError(f"segmentation: expected a list of polygons, each of at least three x y, found {checks.shown(polygon)}")  # fmt: skip
        for value in numbers:
            checks.finite("segmentation", value)


def polygons_of(entry: Mapping[str, Any]) -> list[list[float]] | None:
    """The polygons of an annotation or a detection.

    None where it has none, or a mask in another form.
    """
    given: list[list[float]] | None = entry.get("segmentation")
    try:
        _check_segmentation(given)
    except ValueError:
        return None
    return given
