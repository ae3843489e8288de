# SPDX-License-Identifier: Apache-2.0
"""Class names: COCO's, and those in a text file."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trtdet import checks, files
from trtdet.spec import MOST_CLASSES

#: Class id -> name.
Labels = Sequence[str] | Mapping[int, str]

#: What a run calls the class names beside its TSVs.
LABELS_FILE = "labels.txt"

#: Names of COCO's classes in darknet's coco.names -> COCO's own.
SYNONYMS = {
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv",
}  # fmt: skip

#: So many names are listed in an error.
SHOWN = 10

#: COCO's 80 object names under their category ids, which run from 1 to 90 with ten gaps.
#: Source: https://cocodataset.org, instances_val2017.json
_COCO_NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train",
    8: "truck", 9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign",
    14: "parking meter", 15: "bench", 16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep",
    21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe", 27: "backpack",
    28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove",
    41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass",
    47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl", 52: "banana", 53: "apple",
    54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog", 59: "pizza",
    60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote",
    76: "keyboard", 77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink",
    82: "refrigerator", 84: "book", 85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear",
    89: "hair drier", 90: "toothbrush",
}  # fmt: skip

#: [class_id] -> name for the 90 outputs of a COCO model of AutoML, where class_id = category_id -
#: 1. The ten outputs that no training image ever used are "unused 12", ..., after their category
#: ids.
COCO_LABELS: tuple[str, ...] = tuple(_COCO_NAMES.get(i, f"unused {i}") for i in range(1, 91))

#: The same for models with one output for each of the 80 names (YOLO): [class_id] -> category id,
#: [class_id] -> name.
COCO_80_IDS: tuple[int, ...] = tuple(_COCO_NAMES)
COCO_80_LABELS: tuple[str, ...] = tuple(_COCO_NAMES.values())


def read_labels(path: Path | str, *, num_classes: int | None = None) -> tuple[str, ...]:
    """Read class names, one per line in class-id order, or a label map (.pbtxt); `coco` stands for
    COCO's 90 names, or 80 where the model has those.

    An empty line is a class without a name and becomes "unused N" (N = class id + 1); empty lines
    at the end are dropped.

    Args:
        path: a UTF-8 text file, or the word "coco".
        num_classes: how many names the model needs; None takes any number.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no names, one of more than 256 characters or with control characters (a tab
            among them), or not `num_classes` of them, or not UTF-8.
    """
    if str(path) == "coco":
        labels = COCO_80_LABELS if num_classes == len(COCO_80_LABELS) else COCO_LABELS
    else:
        files.check_input(
            Path(path), "--labels", "a text file with one class name per line, or the word coco"
        )
        data = files.read_bytes(Path(path))
        if (kind := files.kind_of(data[:512])) in files.OTHER_FILES.values():
            raise ValueError(f"{path}: expected class names, found {kind}")
        try:
            text = data.decode("utf-8-sig")  # some editors on Windows write a BOM
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: expected class names in UTF-8, found other bytes ({error})"
            ) from error
        if _is_json(text):
            raise ValueError(f"{path}: expected class names, one per line, found JSON; write them into a text file")  # fmt: skip
        if Path(path).suffix == ".pbtxt":
            lines = list(parse_label_map(text, path))
        else:
            lines = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
        for number, line in enumerate(lines, 1):
            try:
                checks.text("a class name", line, checks.LABEL)
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}; write it otherwise") from error
        labels = tuple(line or f"unused {number}" for number, line in enumerate(lines, 1))
    expected = "at least one label" if num_classes is None else f"{num_classes} labels"
    if not labels or (num_classes is not None and len(labels) != num_classes):
        raise ValueError(
            f"{path}: expected {expected}, one per line in class-id order, found {len(labels)}; "
            "a class that is not used has an empty line"
        )
    return labels


def _is_json(text: str) -> bool:
    """Whether this is an object or a list, not lines that happen to begin with a bracket."""
    try:
        return text.lstrip()[:1] in ("{", "[") and bool(json.loads(text))
    except ValueError:
        return False


def find_classes(words: Sequence[str], labels: Sequence[str], num_classes: int) -> tuple[int, ...]:
    """The class ids that names, or ids, stand for.

    Args:
        words: names in any case; a number that is no name is a class id, counted from 0.
        labels: [class_id] -> name; () where the model has none.

    Raises:
        ValueError: neither a name nor an id; says which is nearest.
    """
    known: dict[str, list[int]] = {}
    for class_id, name in enumerate(labels):
        known.setdefault(name.casefold(), []).append(class_id)
    found: list[int] = []
    for word in words:
        ids = known.get(word.casefold())
        if ids is None and word.isascii() and word.isdigit() and len(word) < 9:
            ids = [int(word)] if int(word) < num_classes else None
        if ids is None:
            near = difflib.get_close_matches(word.casefold(), known, 1)
            if near:
                advice = f"did you mean {labels[known[near[0]][0]]}?"
            elif labels:
                advice = f"the model has {', '.join(labels[:SHOWN])}{', ...' if len(labels) > SHOWN else ''}"
            else:
                advice = f"the model has no names; give ids, 0 to {num_classes - 1}, or --labels"
            raise ValueError(f"--classes: there is no class '{word[:60]}'; {advice}")
        found += ids
    return tuple(dict.fromkeys(found))


def _items(text: str) -> Iterator[str]:
    """What stands in the braces of each `item { ... }`; of one that is not closed, the rest."""
    for match in re.finditer(r"\bitem\s*\{", text):
        end = text.find("}", match.end())
        yield text[match.end() : end if end >= 0 else len(text)]
        if end < 0:
            return


def parse_label_map(text: str, path: Path | str) -> tuple[str, ...]:
    """Class names of TensorFlow's label map (.pbtxt), [id - 1] -> display_name, else name; ids that
    are left out are "unused N".

    Raises:
        ValueError: an item without a positive id or a name, or an id twice.
    """
    names: dict[int, str] = {}
    for item in _items(re.sub(r"#.*", "", text)):
        number = re.search(r"\bid\s*:\s*(\d{1,7})\b", item)
        quoted = r"""\s*:\s*(?:"([^"]*)"|'([^']*)')"""
        name = re.search(r"\bdisplay_name" + quoted, item) or re.search(r"\bname" + quoted, item)
        if (
            number is None
            or name is None
            or not 1 <= int(number[1]) <= MOST_CLASSES
            or int(number[1]) in names
        ):
            raise ValueError(
                f"{path}: expected items of a label map, each with an id of its own, 1 to {MOST_CLASSES}, and a name, found {' '.join(item.split())[:80]!r}"
            )
        names[int(number[1])] = name[1] or name[2] or ""
    return tuple(names.get(i, f"unused {i}") for i in range(1, max(names, default=0) + 1))


def fit_labels(labels: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    """COCO's 80 names in place of its 90 for a model of 80 classes; other labels as they are."""
    is_coco = labels == COCO_LABELS and num_classes == len(COCO_80_LABELS)
    return COCO_80_LABELS if is_coco else labels


def are_coco_80(labels: Sequence[str]) -> bool:
    """Whether class names are COCO's 80 in their order, some of them spelled in another way, as
    darknet's coco.names does. 80 other classes share hardly any.
    """
    same = (plain(a) == plain(b) for a, b in zip(labels, COCO_80_LABELS, strict=False))
    return len(labels) == len(COCO_80_LABELS) and 2 * sum(same) > len(labels)


def may_be_coco_80(labels: Sequence[str], num_classes: int) -> bool:
    """Whether classes are taken for COCO's 80: there are 80, and no other names for them."""
    return num_classes == len(COCO_80_LABELS) and (not labels or are_coco_80(labels))


def plain(name: str) -> str:
    """A class name without what differs between the files of one data set."""
    name = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    return SYNONYMS.get(name, name)


def names_of(labels: Sequence[str], num_classes: int) -> Sequence[str]:
    """A model's class names: its own, COCO's where it has COCO's 90 classes and none of its own,
    else none.
    """
    return COCO_LABELS if not labels and num_classes == len(COCO_LABELS) else labels


def label_of(labels: Labels, class_id: int) -> str:
    """The name of a class, or "class 7" where none is known."""
    if isinstance(labels, Mapping):
        return labels.get(class_id, f"class {class_id}")
    return labels[class_id] if 0 <= class_id < len(labels) else f"class {class_id}"
