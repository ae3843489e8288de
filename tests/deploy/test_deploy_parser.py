# SPDX-License-Identifier: Apache-2.0
"""The DeepStream parser, compiled against headers of our own, on real outputs: the boxes of
trtdet.detections.decode.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES, ROOT
from deploy_models import D0, YOLO

from trtdet.detections import Detections, decode
from trtdet.geometry import ResizeTransform
from trtdet.images.files import load_image
from trtdet.images.preprocess import preprocess
from trtdet.runtimes.ort import OnnxRuntime
from trtdet.spec import ModelSpec

FLOAT, HALF, INT32 = 0, 1, 3
FUNCTIONS = [("yxyx", False), ("yxyx", True), ("xyxy", False), ("xyxy", True)]


class Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("dims", ctypes.c_int32 * 2),
        ("rank", ctypes.c_int32),
        ("data", ctypes.c_void_p),
    )


@pytest.fixture(scope="module", params=["deepstream_9", "before_deepstream_9"])
def library(request, tmp_path_factory) -> ctypes.CDLL:
    """Parser and harness in one library, without a warning."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    target = tmp_path_factory.mktemp("parser") / "parser.so"
    sources = [
        ROOT / "trtdet/deploy/assets/nvdsinfer_trtdet.cpp",
        ROOT / "tests/parser_harness.cpp",
    ]
    flags = ["-std=c++14", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    if request.param == "before_deepstream_9":
        flags.append("-DSTANDIN_BEFORE_DEEPSTREAM_9")
    include = f"-I{ROOT / 'tests/nvdsinfer_headers'}"
    subprocess.run([compiler, *flags, include, *sources, "-o", target], check=True)
    return ctypes.CDLL(str(target))


def parse(
    library: ctypes.CDLL,
    outputs: Mapping[str, np.ndarray],
    spec: ModelSpec,
    *,
    classes: int | None = None,
    thresholds: np.ndarray | None = None,
) -> np.ndarray | None:
    """One image's outputs through the parser: (n, 7) left top width height score class angle.

    None where it fails.
    """
    types = {"float32": FLOAT, "float16": HALF, "int32": INT32}
    tensors = (Tensor * len(outputs))()
    for tensor, (name, value) in zip(tensors, outputs.items(), strict=True):
        dims = (ctypes.c_int32 * 2)(*value.shape)
        data = value.ctypes.data_as(ctypes.c_void_p)
        tensor.name, tensor.type = name.encode(), types[value.dtype.name]
        tensor.dims, tensor.rank, tensor.data = dims, value.ndim, data
    classes = spec.num_classes if classes is None else classes
    if thresholds is None:
        thresholds = np.zeros(classes, np.float32)
    objects = np.zeros((10_000, 7), np.float32)
    height, width = spec.preprocessing.size_hw
    floats = ctypes.POINTER(ctypes.c_float)
    count = library.parse(
        FUNCTIONS.index((spec.box_order, spec.boxes_normalized)),
        tensors, len(outputs), width, height, classes,
        thresholds.ctypes.data_as(floats), objects.ctypes.data_as(floats),
    )  # fmt: skip
    return None if count < 0 else objects[:count]


def in_source(objects: np.ndarray, transform: ResizeTransform) -> np.ndarray:
    """What nvinfer makes of a parser's objects: boxes in source pixels, right and bottom
    clipped, as the configuration asks.
    """
    corners = np.concatenate([objects[:, :2], objects[:, :2] + objects[:, 2:4]], axis=1)
    return np.column_stack([transform.to_source(corners), objects[:, 4:6]])


def visible(detections: Detections) -> np.ndarray:
    """decode()'s detections that have an area: (n, 6) x1 y1 x2 y2 score class."""
    boxes = detections.boxes_xyxy
    keep = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    return np.column_stack([boxes, detections.scores, detections.class_ids])[keep]


def rows(table: np.ndarray) -> np.ndarray:
    return table[np.all(table[:, 2:4] > table[:, :2], axis=1)]


def hundred_images() -> list[np.ndarray]:
    """The pictures of examples/, cut and rotated in many ways, and ten with nothing in them."""
    rng = np.random.default_rng(0)
    sources = [load_image(path) for path in sorted((EXAMPLES / "images").glob("*.png"))]
    images = list(sources)
    while len(images) < 90:
        image = sources[len(images) % len(sources)]
        height, width = image.shape[:2]
        h, w = rng.integers(height // 3, height + 1), rng.integers(width // 3, width + 1)
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        images.append(np.ascontiguousarray(np.rot90(image[y : y + h, x : x + w], len(images) % 4)))
    blank = [np.full((60, 80, 3), value, np.uint8) for value in range(0, 250, 25)]
    return images + blank


@pytest.fixture(scope="module")
def real_outputs(tiny_onnx: Path):
    """Spec, outputs and transforms of a hundred images; every tenth image is made to have no
    detection at all.
    """
    with OnnxRuntime(tiny_onnx, threads=1) as runtime:
        placed = [preprocess(image, runtime.spec.preprocessing) for image in hundred_images()]
        results = [runtime.infer(pixels[None]) for pixels, _ in placed]
        outputs = {name: np.concatenate([r[name] for r in results]) for name in results[0]}
        outputs["num_detections"][::10] = 0
        return runtime.spec, outputs, [transform for _, transform in placed]


def one(outputs: Mapping[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(value[row]) for name, value in outputs.items()}


def test_same_boxes_as_decode(library, real_outputs):
    spec, outputs, transforms = real_outputs
    assert len(transforms) == 100
    total = empty = 0
    for row, expected in enumerate(decode(outputs, spec, transforms)):
        found = parse(library, one(outputs, row), spec)
        assert found is not None
        np.testing.assert_allclose(
            rows(in_source(found, transforms[row])), visible(expected), atol=1e-3, rtol=1e-6
        )
        total += len(found)
        empty += not len(found)
    assert total > 1000 and empty >= 10


def test_class_ids_above_the_configured_count_are_left_out(library, real_outputs):
    spec, outputs, transforms = real_outputs
    left_out = 0
    for row, expected in enumerate(decode(outputs, spec, transforms)):
        found = parse(library, one(outputs, row), spec, classes=2)
        table = visible(expected)
        np.testing.assert_allclose(
            rows(in_source(found, transforms[row])), table[table[:, 5] < 2], atol=1e-3, rtol=1e-6
        )
        left_out += int((table[:, 5] == 2).sum())
    assert left_out > 100  # and those of lower scores after them are there


def test_every_class_has_its_threshold(library, real_outputs):
    spec, outputs, transforms = real_outputs
    thresholds = np.array([0.9, 0.0, 0.3], np.float32)
    for row, expected in enumerate(decode(outputs, spec, transforms)):
        found = parse(library, one(outputs, row), spec, thresholds=thresholds)
        table = visible(expected)
        keep = table[:, 4] >= thresholds[table[:, 5].astype(int)]
        assert len(rows(in_source(found, transforms[row]))) == keep.sum()


def synthetic(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    slots = spec.nms.max_output_boxes
    height, width = (1, 1) if spec.boxes_normalized else spec.preprocessing.size_hw
    sides = [height, width] if spec.box_order == "yxyx" else [width, height]
    low = rng.uniform(-0.2, 0.8, (slots, 2))
    boxes = np.concatenate([low, low + rng.uniform(0, 0.5, (slots, 2))], axis=1) * (sides * 2)
    return {
        "num_detections": np.array([slots - 5], np.int32),
        "detection_boxes": boxes.astype(np.float32),
        "detection_scores": np.sort(rng.uniform(0, 1, slots).astype(np.float32))[::-1].copy(),
        "detection_classes": rng.integers(0, spec.num_classes, slots, np.int32),
    }


@pytest.mark.parametrize("spec", [D0, YOLO], ids=["automl", "yolo"])
@pytest.mark.parametrize("normalized", [False, True])
def test_every_form_of_boxes(library, spec, normalized):
    spec = spec.replace(boxes_normalized=normalized)
    outputs = synthetic(spec)
    _, transform = preprocess(np.zeros((480, 641, 3), np.uint8), spec.preprocessing)
    (expected,) = decode({k: v[None] for k, v in outputs.items()}, spec, [transform])
    found = rows(in_source(parse(library, outputs, spec), transform))
    np.testing.assert_allclose(found, visible(expected), atol=2e-3, rtol=1e-5)


def test_rotated_boxes_keep_their_angle_and_their_size(library, request):
    outputs = synthetic(D0)
    angles = np.linspace(-1, 1, D0.nms.max_output_boxes, dtype=np.float32)
    outputs["detection_boxes"] = np.column_stack([outputs["detection_boxes"], angles])
    found = parse(library, outputs, D0)
    assert len(found) == D0.nms.max_output_boxes - 5
    if "before" not in request.node.name:
        np.testing.assert_array_equal(found[:, 6], angles[: len(found)])
    assert found[:, 0].min() < 0  # not clipped: that would turn another box


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detection_classes": np.zeros(100, np.float32)}, "detection_classes: expected int32, found data type 0"),
        ({"detection_boxes": np.zeros((100, 4), np.float16)}, "detection_boxes: expected float32, found data type 1"),
        ({"detection_boxes": np.zeros((50, 4), np.float32)}, "expected 100 boxes of 4 or 5 values"),
        ({"detection_scores": None}, "expected an output 'detection_scores', found none"),
    ],
)  # fmt: skip
def test_faults_are_reported_and_do_not_end_the_process(library, capfd, change, message):
    outputs = {k: v for k, v in (synthetic(D0) | change).items() if v is not None}
    assert parse(library, outputs, D0) is None
    assert message in capfd.readouterr().err


def test_odd_values(library):
    outputs = synthetic(D0)
    outputs["detection_boxes"][:] = [10, 20, 30, 40]
    outputs["detection_boxes"][0] = np.nan
    outputs["detection_classes"][1] = -1
    outputs["detection_scores"][2] = 0
    outputs["num_detections"][0] = 4
    assert len(parse(library, outputs, D0)) == 1
    outputs["num_detections"][0] = -3
    assert len(parse(library, outputs, D0)) == 0
    outputs["num_detections"][0] = 10_000  # never beyond the slots there are
    assert len(parse(library, outputs, D0)) == D0.nms.max_output_boxes - 3
