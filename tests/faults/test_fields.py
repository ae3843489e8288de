# SPDX-License-Identifier: Apache-2.0
"""Every field of the files in JSON times every wrong value: one line that names the file and the
field, and nothing left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_desk
import onnx
import pytest
import toy_detector

from trtdet.spec import METADATA_KEY, ModelSpec

# ---- wrong values of each type

HUGE, INFINITE, NO_NUMBER = 10**400, float("inf"), float("nan")
LONG = "x" * 5000
#: Ends a line and steers a terminal.
CONTROL = 'a\nbackend: "python"\x1b[31m'

TYPES: dict[str, tuple[Any, ...]] = {
    "whole": (None, "1", [], {}, True, 1.5, HUGE, INFINITE, NO_NUMBER, -(2**70)),
    "count": (None, "1", [], 0, -1, 2**70, HUGE, NO_NUMBER),
    "number": (None, "1", [], {}, True, HUGE, INFINITE, NO_NUMBER, -INFINITE, 1e308),
    "share": (None, "1", [], -0.1, 1.1, HUGE, NO_NUMBER),
    "switch": (None, 0, "true", []),
    "text": (None, 7, [], {}, LONG, CONTROL, "\ud800", "a\u2028b"),
    "word": (None, 7, [], "other", ""),
    "object": (None, 7, "text", []),
    "list": (None, 7, "text", {}),
    "pair": (None, 7, [], [8], [8, 8, 8], ["8", 8], [0, 8], [-8, 8], [8, HUGE], [8, NO_NUMBER], [8, 2**31]),
    "three": (None, 7, [1, 2], [1, 2, 3, 4], ["1", 2, 3], [HUGE, 1, 1], [NO_NUMBER, 1, 1], [INFINITE, 1, 1]),
    "positive three": (None, [0, 1, 1], [-1, 1, 1], [1, 1, 0.0]),
    "names": (None, 7, "text", [7], [None], ["a"], [LONG, "b", "c"], [CONTROL, "b", "c"]),
    "ids": (None, 7, [], ["1"], [None], [1.5], [10**12], [-(10**12)], [HUGE]),
    "hash": (None, 7, "xyz", "A" * 64, CONTROL),
    "version": (None, 10, "", "ten", "10.13\n.1", "-1.2", LONG),
    "schema": (None, "1", 0, 2, 99, True, [], HUGE),
    "box": (None, [], [1, 2, 3], ["1", 2, 3, 4], [1, 2, HUGE, 4], [1, 2, NO_NUMBER, 4], [1, 2, -3, 4], [1, 2, 3, 4, 5, 6]),
    "id": (None, [], {}, True, 1.5, HUGE, NO_NUMBER, CONTROL, LONG),
    "time": (None, "1", -1, HUGE, INFINITE, NO_NUMBER, 1e12),
    "noise": (None, "1", -1, HUGE, INFINITE, NO_NUMBER),
    "range": (5, "text", [1], [[8, 8]], [[0, 0], [64, 64]], [[64, 64], [32, 32]], [[8, 8], [2**31, 64]]),
    "optional whole": ("1", [], True, -1, HUGE, NO_NUMBER),
}  # fmt: skip

SPEC = {
    "schema": "schema", "family": "text", "preprocessing": "object", "preprocessing.size_hw": "pair", "preprocessing.layout": "word",
    "preprocessing.dtype": "word", "preprocessing.mean": "three", "preprocessing.std": "positive three", "preprocessing.pad_rgb": "three",
    "preprocessing.resize": "word", "preprocessing.placement": "word", "preprocessing.rounding": "word", "preprocessing.sampling": "word",
    "preprocessing.antialias": "switch", "preprocessing.bgr": "switch", "preprocessing.longest": "optional whole",
    "preprocessing.size_range": "range", "preprocessing.size_multiple": "count", "nms": "object", "nms.score_threshold": "share",
    "nms.iou_threshold": "share", "nms.max_output_boxes": "count", "nms.background_class": "whole", "nms.score_activation": "switch",
    "nms.class_agnostic": "switch", "nms.box_coding": "whole", "category_ids": "ids", "labels": "names", "box_order": "word",
    "boxes_normalized": "switch", "selection": "word", "rotated_mode": "word", "sensitive_nodes": "list", "source": "object", "evidence": "list",
}  # fmt: skip
SIDECAR = {
    "schema": "schema", "flavor": "text", "version": "version", "precision": "text", "batch": "object", "batch.min": "count",
    "batch.opt": "count", "batch.max": "count", "compute_capabilities": "list", "dla_core": "optional whole", "version_compatible": "switch",
    "stripped": "switch", "plugins": "list", "layers": "object", "int8": "object", "onnx_file": "text", "onnx_sha256": "hash",
    "engine_sha256": "hash", "platform": "text", "tool": "text", "model_spec": "object",
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """A file in JSON.

    Attributes:
        fields: place -> type, a key of `TYPES`.
        required: places that must be there.
        write: how a document becomes the file; None: as it is.
    """

    line: str
    name: str
    fields: dict[str, str]
    required: tuple[str, ...] = ()
    write: Callable[[Path, Any], None] | None = None


def write_metadata(path: Path, spec: Any) -> None:
    """The spec of an ONNX file, in its metadata."""
    model = toy_detector.model()
    (entry,) = (p for p in model.metadata_props if p.key == METADATA_KEY)
    entry.value = json.dumps(spec)
    onnx.save(model, path)


INT8 = "build_engine --model net.onnx --save_onnx out.onnx --precision int8 --int8_share 1 --calib_cache net.cache --calib_method minmax"  # fmt: skip
EVAL = "eval_coco --detections detections.json --annotations annotations.json --json out.json"
OBJECTS = {
    "images": "list", "annotations": "list", "categories": "list", "images.0": "object", "images.0.id": "id", "images.0.file_name": "text",
    "images.0.width": "optional whole", "annotations.0": "object", "annotations.0.image_id": "id", "annotations.0.category_id": "whole",
    "annotations.0.bbox": "box", "annotations.0.area": "optional whole", "categories.0": "object", "categories.0.id": "whole",
}  # fmt: skip
DETECTIONS = {"0": "object", "0.image_id": "id", "0.category_id": "whole", "0.bbox": "list", "0.score": "number"}  # fmt: skip

# fmt: off
FILES = {
    "model spec": File("image_batcher --model model.onnx --input photos --output out", "model.onnx", SPEC, ("schema", "family", "preprocessing", "nms", "category_ids", "preprocessing.size_hw"), write_metadata),
    "sidecar": File("deploy trtexec --model d0.engine --tensorrt_version 10.13", "d0.engine.json", SIDECAR | {f"model_spec.{k}": v for k, v in SPEC.items()}, ("schema", "flavor", "version", "precision", "batch", "model_spec")),
    "annotations": File(EVAL, "annotations.json", OBJECTS, ("images", "annotations", "categories", "images.0.id", "images.0.file_name", "annotations.0.image_id", "annotations.0.category_id", "annotations.0.bbox", "categories.0.id")),
    "results": File(EVAL, "detections.json", DETECTIONS, ("0.image_id", "0.category_id", "0.bbox", "0.score")),
    "times": File("deploy trtexec --parse_times times.json --batch_size 2", "times.json", {f"0.{key}": "time" for key in fault_desk.RECORD}, tuple(f"1.{key}" for key in fault_desk.RECORD)),
    "cache": File(INT8, "net.cache.json", {"schema": "schema", "scales_sha256": "object", "num_images": "count", "method": "word", "seed": "count", "preprocessing": "object", "channels": "object", "channels.x.noise": "noise", "channels.x.values": "word", "costs": "object", "rounding": "object"}, ("schema", "scales_sha256", "model_sha256", "channels")),
    "precision": File(f"{INT8} --precision_json precision.json", "precision.json", {"schema": "schema", "model_sha256": "word", "precision": "word", "keep": "object", "keep.stem": "word"}, ("schema", "model_sha256", "precision", "keep")),
}
# fmt: on

#: (file, place) -> values of the type that are sound there.
SOUND = {("cache", "seed"): 0, ("cache", "num_images"): 0}


def cases() -> list[tuple[str, str, Any]]:
    found = []
    for name, file in FILES.items():
        for place, kind in file.fields.items():
            known = SOUND.get((name, place), ...)
            found += [(name, place, value) for value in TYPES[kind] if value != known]
        found += [(name, place, ...) for place in file.required]
    return found


def label(case: tuple[str, str, Any]) -> str:
    name, place, value = case
    text = "missing" if value is ... else f"{type(value).__name__} {str(value)[:12]!a}"
    return f"{name}-{place}-{text}"


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_desk.make(tmp_path_factory.mktemp("sound"))


def document(sound: Path, name: str) -> Any:
    if name == "model spec":
        return json.loads(json.dumps(ModelSpec.from_onnx(toy_detector.model()).to_dict()))
    return json.loads((sound / FILES[name].name).read_text())


@pytest.mark.parametrize("case", cases(), ids=label)
def test_a_wrong_value_is_one_line(
    case: tuple[str, str, Any], sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, place, value = case
    file = FILES[name]
    desk = fault_desk.copy(sound, tmp_path / "desk")
    damaged = fault_desk.replaced(document(sound, name), place, value)
    (file.write or fault_desk.write_json)(desk / file.name, damaged)
    outcome = fault_desk.run(desk, file.line, capsys)
    fields = [field for field in place.split(".") if not field.isdecimal()]
    line = fault_desk.check_one_line(outcome, 1, re.escape(file.name))
    assert not fields or re.search("|".join(fields[-2:]), line), line
    assert outcome.left == (), outcome.left


#: What is wrong with a document as a whole, in bytes.
DOCUMENTS = {
    "null": b"null", "number": b"7", "text": b'"text"', "true": b"true", "empty list": b"[]", "empty object": b"{}", "list of null": b"[null]",
    "list of lists": b"[[[]]]", "open": b'{"schema": 1,', "deep lists": b"[" * 10**5, "deep and closed": b"[" * 10**5 + b"]" * 10**5,
    "deep objects": b'{"a":' * 10**5, "long number": b"9" * 5000, "two": b"{} {}", "NUL": b"\0", "only a BOM": b"\xef\xbb\xbf",
    "surrogate": b'"\\ud800"', "single quotes": b"{'a': 1}", "comment": b"// x\n{}", "NaN": b"NaN", "1e999": b"1e999",
}  # fmt: skip
#: Documents that are sound: no detections at all.
EMPTY = {("results", "empty list")}


@pytest.mark.parametrize("what", DOCUMENTS)
@pytest.mark.parametrize("name", [name for name in FILES if name != "model spec"])
def test_another_document_is_one_line(
    name: str, what: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = FILES[name]
    desk = fault_desk.copy(sound, tmp_path / "desk")
    (desk / file.name).write_bytes(DOCUMENTS[what])
    outcome = fault_desk.run(desk, file.line, capsys)
    if (name, what) in EMPTY:
        assert outcome.status == 0, outcome.err
        return
    fault_desk.check_one_line(outcome, 1, re.escape(file.name), "expected")
    assert outcome.left == (), outcome.left


@pytest.mark.parametrize("name", [name for name in FILES if name != "model spec"])
def test_a_byte_order_mark_is_no_fault(
    name: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = FILES[name]
    desk = fault_desk.copy(sound, tmp_path / "desk")
    path = desk / file.name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert fault_desk.run(desk, file.line, capsys).status == 0
