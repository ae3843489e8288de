# SPDX-License-Identifier: Apache-2.0
"""Rotated boxes: their geometry, and their NMS against the reference and Shapely."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from trtdet.errors import GraphError
from trtdet.geometry import rotated_corners
from trtdet.nms.rotated import insert_rotated_nms
from trtdet.nms.rotated_reference import clip_polygon, iou_exact, iou_odtk, polygon_area, reference
from trtdet.spec import OUTPUT_NAMES, Nms

PLAIN = Nms(score_threshold=0.1, max_output_boxes=30, score_activation=False, box_coding=0)


def rotated_model(boxes, scores, nms=PLAIN, *, batch="N", opset=17, **options):
    """A model that hands its two inputs, shaped like the given arrays, to the NMS."""
    names = {"boxes_in": "raw_boxes", "scores_in": "class_logits"}
    shapes = [[batch, *array.shape[1:]] for array in (boxes, scores)]
    inputs, outputs = (
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(side, shapes, strict=True)]
        for side in (names.keys(), names.values())
    )  # fmt: skip
    nodes = [helper.make_node("Identity", [i], [o], o) for i, o in names.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "heads", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    insert_rotated_nms(
        model, boxes="raw_boxes", scores="class_logits", nms=nms, batch=batch, **options
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model, boxes, scores):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = session.run(list(OUTPUT_NAMES), {"boxes_in": boxes, "scores_in": scores})
    return dict(zip(OUTPUT_NAMES, values, strict=True))


def random_heads(images, anchors, classes, *, seed, columns=5, spread=250.0):
    """Boxes of 5 to 120 pixels at any angle, some of them copies of others, and distinct scores."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(0, spread, (images, anchors, 2))
    size = np.exp(rng.uniform(np.log(5), np.log(120), (images, anchors, 2)))
    angle = rng.uniform(-np.pi, np.pi, (images, anchors, 1))
    length = rng.uniform(0.8, 1.25, (images, anchors, 1))
    boxes = np.concatenate([centre - size / 2, centre + size / 2, angle, length], axis=-1)
    half = anchors // 2  # the second half stands close to the first
    boxes[:, half : 2 * half, :5] = boxes[:, :half, :5] + rng.normal(0, 3, (images, half, 5)) * [
        1,
        1,
        1,
        1,
        0.05,
    ]
    scores = rng.permutation(images * anchors * classes).reshape(images, anchors, classes)
    scores = (scores + 1) / (images * anchors * classes + 1)
    return boxes[..., :columns].astype(np.float32), scores.astype(np.float32)


def assert_equal_outputs(actual, expected):
    for name in OUTPUT_NAMES:
        assert actual[name].dtype == expected[name].dtype, name
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-6, err_msg=name)


# ---- geometry


def test_positive_angles_turn_clockwise_on_the_screen() -> None:
    box = np.array([[10, 20, 50, 40]], np.float32)
    level = rotated_corners(box, np.zeros(1, np.float32))[0]
    assert level.tolist() == [[10, 20], [10, 40], [50, 40], [50, 20]]  # TL, BL, BR, TR
    rotated = rotated_corners(box, np.array([np.pi / 2], np.float32))[0]
    # A quarter clockwise takes the top left corner to the top right of the upright rectangle, 20
    # wide and 40 high.
    np.testing.assert_allclose(rotated, [[40, 10], [20, 10], [20, 50], [40, 50]], atol=1e-5)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([0, 0, 10, 10, 0], 1.0),  # itself
        ([0, 0, 10, 10, np.pi / 2], 1.0),  # a square rotated by a quarter
        ([10, 0, 20, 10, 0], 0.0),  # side by side, touching
        ([5, 0, 15, 10, 0], 1 / 3),  # half over half
        ([2, 2, 8, 8, 0], 0.36),  # inside
        ([0, 0, 10, 10, np.pi / 4], 0.7071067811865476),  # an octagon: 2 (sqrt 2 - 1) of the square
        ([3, -5, 7, 15, np.pi / 2], 2 / 7),  # a cross: 40 of 100 + 80 - 40
        ([3, 4, 3, 9, 0.3], 0.0),  # no width
        ([8, 0, 4, 10, 0], 0.0),  # inside out
    ],
)
def test_overlap_of_known_pairs(other: list[float], expected: float) -> None:
    boxes = np.array([[[0, 0, 10, 10, 0], other]], np.float32)
    assert iou_exact(boxes[0, 0], boxes[0, 1:]).item() == pytest.approx(expected, abs=1e-6)
    assert graph_iou(boxes)[0, 0, 1] == pytest.approx(expected, abs=2e-6)


def graph_iou(boxes, mode="exact"):
    """The matrix of overlaps inside the graph; axis 1 the better box."""
    count = boxes.shape[1]
    scores = np.linspace(0.9, 0.2, count, dtype=np.float32)[None, :, None].repeat(len(boxes), 0)
    model = rotated_model(boxes, scores, mode=mode)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("nms/iou", TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (iou,) = session.run(None, {"boxes_in": boxes, "scores_in": scores})
    return iou


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_overlap_in_the_graph_equals_the_reference_and_shapely(scale: float) -> None:
    boxes, _ = random_heads(4, 40, 1, seed=1, spread=60)
    boxes[..., :4] = boxes[..., :4] * scale + 100
    boxes[:, 30:, :] = boxes[:, :10, :]  # ten equal pairs
    boxes[:, 20:30, 4] = boxes[:, :10, 4]  # ten parallel ones
    iou = graph_iou(boxes)
    for image, found in zip(boxes, iou, strict=True):
        for i, box in enumerate(image):
            np.testing.assert_allclose(found[i], iou_exact(box, image), atol=2e-5)
    shapely = pytest.importorskip("shapely", reason="an independent polygon library")
    polygons = shapely.polygons(rotated_corners(boxes[0, :, :4].astype(np.float64), boxes[0, :, 4]))
    shared = shapely.area(shapely.intersection(polygons[:, None], polygons[None]))
    area = shapely.area(polygons)
    np.testing.assert_allclose(iou[0], shared / (area[:, None] + area - shared), atol=2e-5)


def test_clipping_keeps_the_shared_polygon() -> None:
    square = np.array([[0, 0], [0, 2], [2, 2], [2, 0]], float)
    kept = clip_polygon(square + 1, square[::-1])
    assert sorted(map(tuple, kept.tolist())) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert polygon_area(clip_polygon(square + 3, square)) == 0


# ---- NMS


@pytest.mark.parametrize("mode", ["exact", "odtk", "probiou"])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_nms_equals_the_reference_on_200_random_images(mode: str, class_agnostic: bool) -> None:
    boxes, scores = random_heads(200, 40, 2, seed=5, columns=6)
    nms = Nms(0.5, 0.3, 50, score_activation=False, class_agnostic=class_agnostic, box_coding=0)
    actual = run(rotated_model(boxes, scores, nms, mode=mode), boxes, scores)
    expected = reference(boxes, scores, nms, mode=mode)
    assert_equal_outputs(actual, expected)
    assert actual["detection_boxes"].shape == (200, 50, 5)
    suppressed = (scores >= 0.5).sum(axis=(1, 2)) - expected["num_detections"][:, 0]
    assert suppressed.min() >= 1 and suppressed.mean() > 8


def test_modes_differ_where_angles_do() -> None:
    """A narrow box across a wide one: they share little, but ODTK turns both by the angle of the
    worse one.
    """
    boxes = np.array([[[0, 40, 100, 60, 0, 1], [0, 40, 100, 60, np.pi / 2, 1]]], np.float32)
    scores = np.array([[[0.9], [0.8]]], np.float32)
    assert run(rotated_model(boxes, scores), boxes, scores)["num_detections"].item() == 2
    assert run(rotated_model(boxes, scores, mode="odtk"), boxes, scores)["num_detections"] == 1
    assert iou_exact(boxes[0, 0], boxes[0, 1:]).item() == pytest.approx(400 / 3600)
    assert iou_odtk(boxes[0, 0], boxes[0, 1:]).item() == 1


def test_a_longer_sin_and_cos_brings_odtks_centres_closer() -> None:
    boxes = np.array([[[0, 0, 10, 10, 0, 1], [8, 0, 18, 10, 0, 2]]], np.float32)
    assert iou_odtk(boxes[0, 0], boxes[0, 1:]).item() == pytest.approx(60 / 140)  # 8 apart, as if 4
    assert graph_iou(boxes, "odtk")[0, 0, 1] == pytest.approx(60 / 140)


def test_batch_equals_single_images_and_an_empty_one_is_zero() -> None:
    boxes, scores = random_heads(3, 50, 2, seed=7)
    scores[1] = 0.05  # below the threshold
    model = rotated_model(boxes, scores)
    together = run(model, boxes, scores)
    for image in range(3):
        alone = run(model, boxes[image : image + 1], scores[image : image + 1])
        for name in OUTPUT_NAMES:
            np.testing.assert_array_equal(together[name][image : image + 1], alone[name])
    assert together["num_detections"][1] == 0
    assert not any(together[name][1].any() for name in OUTPUT_NAMES)


def test_more_slots_than_boxes_are_filled_with_zeros() -> None:
    boxes, scores = random_heads(1, 6, 1, seed=8)
    outputs = run(rotated_model(boxes, scores), boxes, scores)
    assert_equal_outputs(outputs, reference(boxes, scores, PLAIN))
    assert outputs["detection_boxes"].shape == (1, 30, 5)


def test_opset_11_and_logits() -> None:
    boxes, scores = random_heads(2, 40, 2, seed=9)
    logits = np.log(scores / (1 - scores))
    nms = Nms(0.2, 0.4, 20, box_coding=0)
    assert_equal_outputs(
        run(rotated_model(boxes, logits, nms, opset=11), boxes, logits),
        reference(boxes, logits, nms),
    )


@pytest.mark.parametrize(
    ("columns", "mode", "message"),
    [
        (4, "exact", r"\[N, anchors, 5 or 6\].*found \[N, 8, 4\]"),
        (5, "odtk", r"\[N, anchors, 6\].*needs an export of ODTK itself"),
    ],
)
def test_other_boxes_are_refused(columns: int, mode: str, message: str) -> None:
    boxes, scores = np.zeros((1, 8, columns), np.float32), np.zeros((1, 8, 2), np.float32)
    with pytest.raises(GraphError, match=message):
        rotated_model(boxes, scores, mode=mode)


def test_tensorrt_rtx_builds_it() -> None:
    """A real build for compute capability 8.9, dynamic batch; everything real-valued stays FP32."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    boxes, scores = np.zeros((1, 18414, 5), np.float32), np.zeros((1, 18414, 3), np.float32)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(rotated_model(boxes, scores).SerializeToString()), [
        parser.get_error(i).desc() for i in range(parser.num_errors)
    ]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    types = {layer.get_output(i).dtype for layer in layers for i in range(layer.num_outputs)}
    assert types == {trt.float32, trt.int32, trt.int64, trt.bool}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for name, array in (("boxes_in", boxes), ("scores_in", scores)):
        profile.set_shape(name, *([n, *array.shape[1:]] for n in (1, 4, 8)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None and 1e5 < plan.nbytes < 2e7
