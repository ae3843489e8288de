# SPDX-License-Identifier: Apache-2.0
"""YOLO's heads: told apart, described, and selected from as their own post-processing does, here
read again in NumPy.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yolo_networks as networks
from onnx import helper, numpy_helper

from trtdet.commands import create_onnx
from trtdet.errors import GraphError
from trtdet.families import yolo, yolo_conventions
from trtdet.families.base import Hints
from trtdet.geometry import box_iou
from trtdet.images.preprocess import preprocess
from trtdet.labels import COCO_80_IDS, COCO_80_LABELS
from trtdet.nms import lowering
from trtdet.sources.base import run_onnx
from trtdet.sources.onnx_file import OnnxSource
from trtdet.spec import OUTPUT_NAMES, ModelSpec

HEIGHT, WIDTH, CLASSES = networks.HEIGHT, networks.WIDTH, networks.CLASSES
SCORE_THRESHOLD = 0.3

NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "raw": networks.v8,
    "rotated": lambda: networks.v8(task="obb"),
    "objectness": networks.v5,
    "grid": networks.yolox,
    "end_to_end": lambda: networks.v8(end="topk"),
    "end_to_end_rotated": lambda: networks.v8(task="obb", end="topk"),
    "nms_inside": lambda: networks.v8(end="nms"),
}
every_head = pytest.mark.parametrize("kind", NETWORKS)


def source_of(model: onnx.ModelProto, folder: Path) -> OnnxSource:
    return OnnxSource(networks.save(folder / "source.onnx", model))


def convert(kind: str, folder: Path, *options: str) -> onnx.ModelProto:
    """The network of one kind through create_onnx.py, verified, NCHW."""
    networks.save(folder / "source.onnx", NETWORKS[kind]())
    paths = ["--source_onnx", str(folder / "source.onnx"), "--onnx", str(folder / "out.onnx")]
    shape = [
        "--input_format",
        "NCHW",
        "--input_dtype",
        "float32",
        "--score_threshold",
        str(SCORE_THRESHOLD),
    ]
    assert create_onnx.main([*paths, *shape, *options]) == 0
    return onnx.load(folder / "out.onnx")


def detect(model: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    """The four outputs for images [n, 3, h, w], RGB 0-255."""
    lowered = lowering.lower(model, "onnx") if lowering.has_plugin(model) else model
    return run_onnx(lowered, OUTPUT_NAMES, {"input": images})


def noise(count: int = 1, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, HEIGHT, WIDTH)).astype(np.float32)


# ---- the heads, read again


def rows_of(kind: str, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes x1 y1 x2 y2 (angle) [A, 4 or 5] and scores [A, C] of one image, from the outputs of
    the network as it was exported.
    """
    fed = image[None, ::-1] if kind == "grid" else image[None] / np.float32(255)
    name = "output" if kind == "grid" else "output0"
    (head,) = run_onnx(NETWORKS[kind](), [name], {"images": np.ascontiguousarray(fed)})
    if kind.startswith("end_to_end"):
        scores = np.zeros((networks.K, CLASSES), np.float32)
        scores[np.arange(networks.K), head[0, :, 5].astype(int)] = head[0, :, 4]
        if kind == "end_to_end":
            return head[0, :, :4], scores
        return np.concatenate([corners(head[0, :, :4]), head[0, :, 6:7]], 1), scores
    if kind in ("raw", "rotated"):
        rows = head[0].T
        boxes = corners(rows[:, :4])
        if kind == "rotated":
            boxes = np.concatenate([boxes, rows[:, 7:8]], 1)
        return boxes, rows[:, 4 : 4 + CLASSES]
    rows = head[0]
    scores = rows[:, 4:5] * rows[:, 5:]
    if kind == "grid":
        x, y, stride = networks._grid().T.astype(np.float32)
        centre = (rows[:, :2] + np.stack([x, y], 1)) * stride[:, None]
        rows = np.concatenate([centre, np.exp(rows[:, 2:4]) * stride[:, None]], 1)
        scores = np.where(scores == scores.max(1, keepdims=True), scores, 0)
    return corners(rows[:, :4]), scores


def corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)


def selected(kind: str, boxes: np.ndarray, scores: np.ndarray) -> list[tuple]:
    """(score, class, box) of what is left, best first."""
    pairs = [
        (float(scores[a, c]), int(c), boxes[a]) for a, c in np.argwhere(scores > SCORE_THRESHOLD)
    ]
    pairs.sort(key=lambda pair: -pair[0])
    if kind.startswith("end_to_end"):
        return pairs
    limit = 0.7 if kind in ("raw", "rotated") else 0.45
    kept: list[tuple] = []
    for place, pair in enumerate(pairs):
        # Rotated boxes are judged by all that are better, others by those that are left.
        judges = pairs[:place] if kind == "rotated" else kept
        rivals = [judge[2] for judge in judges if judge[1] == pair[1]]
        overlap = gaussian_overlap if kind == "rotated" else overlap_of
        if all(overlap(rival, pair[2]) < limit for rival in rivals):
            kept.append(pair)
    return kept


def overlap_of(a: np.ndarray, b: np.ndarray) -> float:
    return float(box_iou(a[None], b[None])[0, 0])


def gaussian_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """1 - the Hellinger distance of two normal distributions, from their matrices;
    arXiv:2106.06072, (3) to (6).
    """
    means, matrices = [], []
    for x1, y1, x2, y2, angle in (a.astype(np.float64), b.astype(np.float64)):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        means.append(np.array([x1 + x2, y1 + y2]) / 2)
        matrices.append(turn @ np.diag([(x2 - x1) ** 2, (y2 - y1) ** 2]) @ turn.T / 12)
    middle = sum(matrices) / 2
    apart = means[0] - means[1]
    distance = (
        apart @ np.linalg.solve(middle, apart) / 8
        + np.log(
            np.linalg.det(middle) / np.sqrt(np.linalg.det(matrices[0]) * np.linalg.det(matrices[1]))
        )
        / 2
    )
    return 1 - float(np.sqrt(1 - np.exp(-distance)))


@pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind != "nms_inside"])
def test_detections_are_those_of_the_exported_outputs(kind: str, tmp_path: Path) -> None:
    image = noise()
    count, boxes, scores, classes = (x[0] for x in detect(convert(kind, tmp_path), image))
    expected = selected(kind, *rows_of(kind, image[0]))
    assert len(expected) >= (8 if kind.startswith("end") else 20)
    assert count[0] == len(expected)
    np.testing.assert_allclose(scores[: count[0]], [e[0] for e in expected], atol=1e-5)
    assert classes[: count[0]].tolist() == [e[1] for e in expected]
    np.testing.assert_allclose(boxes[: count[0]], [e[2] for e in expected], atol=1e-3)
    assert boxes[: count[0], 2].max() > HEIGHT + 8  # not square: x goes beyond the height


def test_an_nms_inside_is_replaced_by_the_one_outside(tmp_path: Path) -> None:
    """The same network exported with and without it gives the same detections; with other
    thresholds than the export's too.
    """
    images = noise(2)
    (tmp_path / "raw").mkdir()
    want = detect(convert("raw", tmp_path / "raw"), images)
    got = detect(convert("nms_inside", tmp_path), images)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@every_head
def test_batch_equals_single_images(kind: str, tmp_path: Path) -> None:
    model, images = convert(kind, tmp_path), noise(3)
    together = detect(model, images)
    for row in range(3):
        for batch, single in zip(together, detect(model, images[row : row + 1]), strict=True):
            np.testing.assert_allclose(batch[row], single[0], atol=2e-4)


@every_head
def test_an_empty_image_has_no_detections(kind: str, tmp_path: Path) -> None:
    count, *others = detect(
        convert(kind, tmp_path, "--score_threshold", "0.99"),
        np.full((1, 3, HEIGHT, WIDTH), 114, np.float32),
    )
    assert count.tolist() == [[0]]
    assert all(not values.any() for values in others)


# ---- what is said of the model


@pytest.mark.parametrize(
    ("kind", "selection", "iou", "limit", "bgr", "anchored"),
    [
        ("raw", "nms", 0.7, 300, False, False),
        ("rotated", "rotated_nms", 0.7, 300, False, False),
        ("objectness", "nms", 0.45, 300, False, False),
        ("grid", "nms", 0.45, 300, True, True),
        ("end_to_end", "topk", 1.0, networks.K, False, False),
        ("end_to_end_rotated", "rotated_nms", 1.0, networks.K, False, False),  # suppresses nothing
        ("nms_inside", "nms", 0.7, 300, False, False),
    ],
)
def test_spec(
    kind: str, selection: str, iou: float, limit: int, bgr: bool, anchored: bool, tmp_path: Path
) -> None:
    source = source_of(NETWORKS[kind](), tmp_path)
    assert yolo.matches(source)
    spec = yolo.read(source).spec
    assert (spec.selection, spec.anchored, spec.box_order) == (selection, anchored, "xyxy")
    assert (spec.nms.score_threshold, spec.nms.iou_threshold) == (0.001, iou)
    assert (spec.nms.max_output_boxes, spec.nms.score_activation) == (limit, False)
    seen = spec.preprocessing
    assert seen.dtype == "uint8"
    assert (seen.size_hw, seen.pad_rgb, seen.bgr) == ((HEIGHT, WIDTH), (114, 114, 114), bgr)
    if bgr:
        assert (seen.std, seen.placement, seen.rounding) == ((1, 1, 1), "top_left", "floor")
        assert spec.labels == ()
    else:
        assert (seen.std, seen.placement, seen.rounding) == ((255, 255, 255), "center", "round")
        assert spec.labels == ("circle", "square", "triangle")
    assert spec.category_ids == (1, 2, 3)


def test_resize_mode_is_taken_from_the_command_line(tmp_path: Path) -> None:
    source = source_of(networks.v8(), tmp_path)
    assert yolo.read(source, Hints(resize="stretch")).spec.preprocessing.resize == "stretch"


def dynamic_size(model: onnx.ModelProto) -> onnx.ModelProto:
    for dimension, name in zip(
        model.graph.input[0].type.tensor_type.shape.dim[2:], "HW", strict=True
    ):
        dimension.dim_param = name
    return model


def test_a_free_size_is_that_of_the_export_in_steps_of_the_largest_stride(tmp_path: Path) -> None:
    reading = yolo.read(source_of(dynamic_size(networks.v8()), tmp_path))
    assert reading.spec.preprocessing.size_hw == (HEIGHT, WIDTH)  # imgsz
    assert reading.size_multiple == 32


def test_a_free_size_without_metadata_is_asked_for_and_fixed_by_the_grid(tmp_path: Path) -> None:
    source = source_of(dynamic_size(networks.yolox()), tmp_path)
    with pytest.raises(GraphError, match="give --size H,W"):
        yolo.read(source)
    reading = yolo.read(source, Hints(size_hw=(HEIGHT, WIDTH)))
    assert reading.size_multiple is None
    assert reading.anchors is not None
    assert reading.anchors[[0, 1, 8, 32, 41]].tolist() == [
        [0, 0, 8, 8], [8, 0, 8, 8], [0, 8, 8, 8], [0, 0, 16, 16], [32, 0, 32, 32],
    ]  # fmt: skip


def test_coco_names_have_coco_ids(tmp_path: Path) -> None:
    model = networks.v8()
    names = dict(enumerate(COCO_80_LABELS))
    metadata = {prop.key: prop.value for prop in model.metadata_props} | {"names": str(names)}
    helper.set_model_props(model, metadata)
    assert yolo.read_metadata(model).names == COCO_80_LABELS
    assert yolo_conventions.category_ids_of(COCO_80_LABELS, 80) == COCO_80_IDS
    assert (COCO_80_IDS[0], COCO_80_IDS[11], COCO_80_IDS[79]) == (1, 13, 90)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [((), COCO_80_IDS), (COCO_80_LABELS, COCO_80_IDS), (tuple(f"part {i}" for i in range(80)), tuple(range(1, 81)))],
)  # fmt: skip
def test_80_classes_of_other_names_are_not_cocos(
    labels: tuple[str, ...],
    expected: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networks, "CLASSES", 80)
    model = networks.v5()
    del model.metadata_props[:]
    spec = yolo.read(source_of(model, tmp_path), Hints(labels=labels)).spec
    assert (spec.category_ids, spec.labels) == (expected, labels or COCO_80_LABELS)


def test_int8_leaves_the_mean_over_bins_alone(tmp_path: Path) -> None:
    """The pattern names the node of the converted file."""
    model = convert("raw", tmp_path)
    (pattern,) = ModelSpec.from_onnx(model).sensitive_nodes
    (node,) = [node for node in model.graph.node if node.name == pattern]
    weight = next(t for t in model.graph.initializer if t.name == node.input[1])
    assert node.op_type == "Conv" and numpy_helper.to_array(weight).ravel().tolist() == [0, 1, 2, 3]


def test_masks_are_left_out_and_said(tmp_path: Path) -> None:
    """A row of a segment model ends in mask coefficients: here the third class takes their
    place.
    """
    model = networks.v8()
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    names = {"task": "segment", "names": "{0: 'circle', 1: 'square'}"}
    helper.set_model_props(model, metadata | names)
    reading = yolo.read(source_of(model, tmp_path))
    assert reading.spec.num_classes == 2
    assert [note.text for note in reading.notes] == [
        "masks of the 'segment' model are left out, its boxes are kept"
    ]


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"names": "{0: 'a', 1: 'b'}"}, {"names": ("a", "b")}),
        ({"names": "['a', 'b']"}, {"names": ("a", "b")}),  # YOLOv5 before 6.2
        ({"stride": "32"}, {"stride": 32}),
        ({"stride": "[8, 16, 32]"}, {"stride": 32}),
        ({"imgsz": "[256, 320]"}, {"size_hw": (256, 320)}),
        ({"task": "obb"}, {"is_rotated": True}),
        ({"end2end": "True"}, {"end_to_end": True}),
        ({"args": "{'nms': True}"}, {"nms_inside": True}),
        ({"args": "{'nms': None}"}, {"nms_inside": False}),
        ({}, {"names": (), "task": "detect", "size_hw": None}),
    ],
)
def test_metadata(properties: dict[str, str], expected: dict[str, object]) -> None:
    model = networks.yolox()
    helper.set_model_props(model, properties)
    found = yolo.read_metadata(model)
    assert {name: getattr(found, name) for name in expected} == expected


def test_another_model_is_not_taken_for_one(tmp_path: Path) -> None:
    model = networks.yolox()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 100  # DETR's queries
    assert not yolo.matches(source_of(model, tmp_path))


# ---- what is refused


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"task": "classify"}, "found a model for the task 'classify'"),
        (
            {"names": "{0: 'a', 2: 'b'}"},
            r"one name for each class id from 0, found the ids \[0, 2\]",
        ),
        ({"names": "{0: 'a'}"}, "one score for each of the 1 class names .* found 7 values"),
        ({"names": "not a dict"}, "metadata 'names': expected a number, list or dictionary"),
        ({"task": "obb"}, r"\(task 'obb'\), found 7 values"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    properties: dict[str, str], message: str, tmp_path: Path
) -> None:
    model = networks.v8()
    kept = {prop.key: prop.value for prop in model.metadata_props}
    helper.set_model_props(model, kept | properties)
    with pytest.raises(GraphError, match=message):
        yolo.read(source_of(model, tmp_path))


def test_levels_that_come_one_by_one_name_the_option_of_the_export(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"exported with its decoding \(YOLOv7: --grid\)"):
        yolo.read(source_of(networks.v5(decoded=False), tmp_path))


def test_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    """An export with half=True: its weights are the numbers of float16, rounded no further."""
    model = networks.yolox()
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            narrow = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    half = source_of(model, tmp_path)
    assert onnx.TensorProto.FLOAT16 not in {t.data_type for t in half.model.graph.initializer}
    image = np.random.default_rng(2).uniform(0, 255, half.graph.image_shape).astype(np.float32)
    reading = yolo.read(half)
    (name,) = reading.heads.values()
    (rows,) = half.run([name], {reading.image_input: image})
    assert rows.dtype == np.float32 and rows.shape[2] == 5 + reading.spec.num_classes


def test_logits_are_refused(tmp_path: Path) -> None:
    model = networks.v8()
    (sigmoid,) = [node for node in model.graph.node if node.op_type == "Sigmoid"]
    sigmoid.op_type = "Identity"
    with pytest.raises(
        GraphError, match=r"expected scores of 0 to 1 .* export the model with its sigmoid"
    ):
        yolo.read(source_of(model, tmp_path))


def test_class_ids_without_names_ask_for_labels(tmp_path: Path) -> None:
    """Only the selection is left of the model: no head before it, no names."""
    model = networks.v8(end="topk")
    metadata = {p.key: p.value for p in model.metadata_props if p.key != "names"}
    helper.set_model_props(model, metadata | {"names": "{}"})
    with pytest.raises(
        GraphError, match="holds class ids, found none in the metadata; give --labels"
    ):
        yolo.read(source_of(model, tmp_path))


def test_two_classes_end_to_end_are_no_set_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of six values, which RT-DETR has of two classes, too; the file does not say which."""
    monkeypatch.setattr(networks, "CLASSES", 2)
    model = networks.v8(end="topk")
    metadata = {p.key: p.value for p in model.metadata_props if p.key != "end2end"}
    helper.set_model_props(model, metadata | {"names": "{0: 'circle', 1: 'square'}"})
    source = source_of(model, tmp_path)
    assert not yolo.is_set_prediction(source)
    spec = yolo.read(source).spec
    assert (spec.selection, spec.num_classes, spec.nms.max_output_boxes) == ("topk", 2, networks.K)


def test_detections_that_no_concat_leads_to(tmp_path: Path) -> None:
    """They are taken as they are."""
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1, 3, {HEIGHT}, {WIDTH}] images) => (float[1, 12, 6] output0) {{
          flat = Flatten(images)
          product = MatMul(flat, weight)
          rows = Reshape(product, shape)
          shares = Sigmoid(rows)
          values = Mul(shares, sizes)
          labels = Mul(values, is_label)
          whole = Floor(labels)
          rest = Sub(values, labels)
          output0 = Add(rest, whole)
        }}"""
    )
    rng = np.random.default_rng(5)
    for name, value in (
        ("weight", rng.normal(0, 0.02, (3 * HEIGHT * WIDTH, 72)).astype(np.float32)),
        ("shape", np.array([1, 12, 6])),
        ("sizes", np.array([WIDTH, HEIGHT, WIDTH, HEIGHT, 1, 3], np.float32)),
        ("is_label", np.array([0, 0, 0, 0, 0, 1], np.float32)),
    ):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    helper.set_model_props(model, {"names": networks.NAMES, "stride": "32", "task": "detect"})
    spec = yolo.read(source_of(model, tmp_path)).spec
    assert (spec.selection, spec.num_classes, spec.nms.max_output_boxes) == ("topk", 3, 12)


# ---- images


@pytest.mark.parametrize("source_hw", [(37, 81), (50, 20), (32, 64), (7, 11)])
def test_letterbox_and_the_way_back(source_hw: tuple[int, int], tmp_path: Path) -> None:
    """Centred on grey with rounded sizes; each axis goes back by its own rounded scale."""
    preprocessing = yolo.read(source_of(networks.v8(), tmp_path)).spec.preprocessing
    height, width = source_hw
    seen, transform = preprocess(np.full((height, width, 3), 200, np.uint8), preprocessing)
    ratio = min(HEIGHT / height, WIDTH / width)
    new_h, new_w = round(height * ratio), round(width * ratio)
    top, left = (HEIGHT - new_h) // 2, (WIDTH - new_w) // 2
    expected = np.full((HEIGHT, WIDTH, 3), 114, np.float32)
    expected[top : top + new_h, left : left + new_w] = 200
    np.testing.assert_array_equal(seen, expected)
    whole = np.array([[left, top, left + new_w, top + new_h]], np.float32)
    np.testing.assert_allclose(transform.to_source(whole), [[0, 0, width, height]], atol=1e-4)


# ---- networks that ONNX Runtime cannot run


def with_custom_op(model: onnx.ModelProto) -> onnx.ModelProto:
    """The Relu that stands before everything, as a custom operator."""
    first = helper.make_node("Act", ["images"], ["activated"], "act", domain="mine")
    for node in model.graph.node:
        node.input[:] = ["activated" if name == "images" else name for name in node.input]
    model.graph.node.insert(0, first)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    return model


@pytest.mark.parametrize("kind", ["raw", "rotated", "objectness", "grid"])
def test_a_plugin_inside_is_converted_unseen(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ONNX's own operator put back, the file is that of the network which could be looked
    at.
    """
    seen = with_custom_op(NETWORKS[kind]())
    seen.graph.node[0].op_type, seen.graph.node[0].domain = "Relu", ""
    shown = ["--input_format", "NCHW", "--input_dtype", "float32", "--no_verify"]
    models = []
    for model, options in (
        (seen, []),
        (with_custom_op(NETWORKS[kind]()), ["--map_op", "Act=MyPlugin"]),
    ):
        path = networks.save(tmp_path / "source.onnx", model)
        out = tmp_path / "out.onnx"
        arguments = ["--source_onnx", str(path), "--onnx", str(out), *shown, *options]
        assert create_onnx.main(arguments) == 0
        models.append(onnx.load(out))
    expected, found = models
    (plugin,) = [node for node in found.graph.node if node.op_type == "MyPlugin"]
    assert plugin.domain == "trt.plugins"
    plugin.op_type, plugin.domain = "Relu", ""
    del plugin.attribute[:]
    images = noise(2)
    for a, b in zip(detect(expected, images), detect(found, images), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "ONNX Runtime does not know trt.plugins::MyPlugin: " in capsys.readouterr().err
    wanted = ModelSpec.from_onnx(expected)
    unseen = ModelSpec.from_onnx(found)
    assert wanted.replace(source={}, evidence=()) == unseen.replace(source={}, evidence=())


def test_an_nms_inside_behind_a_plugin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="export it with nms=False"):
        yolo.read(source_of(with_custom_op(networks.v8(end="nms")), tmp_path))


def test_unknown_shapes_behind_a_plugin_are_refused(tmp_path: Path) -> None:
    model = with_custom_op(networks.v8())
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "boxes"
    model.graph.node[-1].input.append("activated")  # of no known shape
    with pytest.raises(GraphError, match="expected the shape of 'output0' in the file"):
        yolo.read(source_of(model, tmp_path))


def test_images_of_a_yolox_come_as_yolox_takes_them_and_can_be_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    networks.save(tmp_path / "source.onnx", networks.yolox())
    paths = ["--source_onnx", str(tmp_path / "source.onnx"), "--onnx", str(tmp_path / "out.onnx")]
    assert create_onnx.main(paths) == 0
    evidence = {f.name: f for f in ModelSpec.from_onnx(onnx.load(tmp_path / "out.onnx")).evidence}
    assert evidence["normalisation"].value == "BGR 0-255"
    assert evidence["normalisation"].origin == "convention: YOLOX; the file has none inside"
    assert "normalisation" in capsys.readouterr().err
    said = ["--preprocessor", "unit", "--channel_order", "rgb", "--placement", "center"]
    assert create_onnx.main([*paths, *said]) == 0
    spec = ModelSpec.from_onnx(onnx.load(tmp_path / "out.onnx"))
    seen = spec.preprocessing
    assert (seen.bgr, seen.mean, seen.std) == (False, (0, 0, 0), (255, 255, 255))
    assert (seen.pad_rgb, seen.placement) == ((114, 114, 114), "center")
    origins = {f.name: f.origin for f in spec.evidence}
    assert origins["normalisation"] == "given: --preprocessor unit"
    assert origins["resize"] == "given: --placement"


def test_rows_that_no_framework_is_known_by_do_not_say_how_pictures_are_placed(
    tmp_path: Path,
) -> None:
    """Read as a YOLO on request; where the picture lies in the input is asked for."""
    model = networks.v8()
    del model.metadata_props[:]
    source = source_of(model, tmp_path)
    unit = Hints(preprocessor="unit", channel_order="rgb")
    with pytest.raises(
        GraphError, match=r"--resize_mode stretch, or warp, or letterbox with --placement"
    ):
        yolo.read(source, unit)
    placed = dataclasses.replace(unit, placement="top_left", pad_rgb=(114.0, 114.0, 114.0))
    reading = yolo.read(source, placed)
    facts = {fact.name: fact.origin for fact in reading.facts}
    assert facts["family"] == "given: --family"
    assert facts["resize"] == "given: --placement --pad_color"
    assert reading.spec.preprocessing.placement == "top_left"
