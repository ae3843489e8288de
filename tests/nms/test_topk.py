# SPDX-License-Identifier: Apache-2.0
"""The selection without NMS against a NumPy reference, on ONNX Runtime, and through
TensorRT-RTX's builder.
"""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, checker, helper

from trtdet.errors import GraphError
from trtdet.nms.candidates import TENSORRT_TOPK
from trtdet.nms.topk import insert_topk
from trtdet.spec import OUTPUT_NAMES, Nms


def reference(boxes, scores, nms):
    """What trtdet/nms/topk.py promises, for a batch, candidate by candidate."""
    n, num_boxes, num_classes = scores.shape
    k = nms.max_output_boxes
    out = [
        np.zeros(s, t)
        for s, t in (((n, 1), "i4"), ((n, k, 4), "f4"), ((n, k), "f4"), ((n, k), "i4"))
    ]
    for image in range(n):
        candidates = []
        for box in range(num_boxes):
            classes = [c for c in range(num_classes) if c != nms.background_class]
            if nms.class_agnostic:
                classes = [max(classes, key=lambda c: (scores[image, box, c], -c))]
            candidates += [(-scores[image, box, c], box, c) for c in classes]
        for slot, (score, box, class_id) in enumerate(sorted(candidates)[:k]):
            value = np.float32(-score)
            if nms.score_activation:
                value = np.float32(1) / (np.float32(1) + np.exp(-value))
            if not value > np.float32(nms.score_threshold):
                break
            a, b, c, d = boxes[image, box]
            corners = (
                (a, b, c, d)
                if nms.box_coding == 0
                else (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
            )
            out[0][image] += 1
            out[1][image, slot], out[2][image, slot], out[3][image, slot] = corners, value, class_id
    return dict(zip(OUTPUT_NAMES, out, strict=True))


def topk_model(boxes, scores, nms, *, batch="N", opset=17, elem_type=TensorProto.FLOAT):
    """A model that hands on its two inputs as heads, with the selection behind them."""
    names = {"boxes_in": "raw_boxes", "scores_in": "class_logits"}
    sides = [
        [
            helper.make_tensor_value_info(name, elem_type, [batch, *array.shape[1:]])
            for name, array in zip(side, (boxes, scores), strict=True)
        ]
        for side in (names.keys(), names.values())
    ]
    nodes = [helper.make_node("Identity", [i], [o], o) for i, o in names.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "heads", *sides),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    insert_topk(model, boxes="raw_boxes", scores="class_logits", nms=nms, batch=batch)
    return model


def run(model, boxes, scores):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {"boxes_in": boxes, "scores_in": scores})
    return dict(zip(names, values, strict=True))


def assert_equal(actual, expected):
    assert list(actual) == list(OUTPUT_NAMES)
    for name in OUTPUT_NAMES:
        assert actual[name].dtype == expected[name].dtype, name
        assert actual[name].shape == expected[name].shape, name
    for name in ("num_detections", "detection_classes"):
        np.testing.assert_array_equal(actual[name], expected[name], name)
    np.testing.assert_allclose(
        actual["detection_scores"], expected["detection_scores"], rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(actual["detection_boxes"], expected["detection_boxes"], atol=1e-6)


def random_case(seed):
    """Boxes, scores and parameters; every third case is full of equal scores."""
    rng = np.random.default_rng(seed)
    n, num_boxes, num_classes = rng.integers(1, 4), rng.integers(1, 40), rng.integers(2, 9)
    scores = rng.normal(size=(n, num_boxes, num_classes)).astype(np.float32)
    if seed % 3 == 0:
        scores = np.round(scores)
    nms = Nms(
        score_threshold=float(rng.choice([0.0, 0.3, 0.5])),
        max_output_boxes=int(rng.choice([1, 7, 400])),
        background_class=int(rng.choice([-1, num_classes - 1])),
        score_activation=bool(rng.integers(2)),
        class_agnostic=bool(rng.integers(2)),
        box_coding=int(rng.integers(2)),
    )
    return rng.random((n, num_boxes, 4), np.float32), scores, nms


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_reference(seed):
    boxes, scores, nms = random_case(seed)
    assert_equal(run(topk_model(boxes, scores, nms), boxes, scores), reference(boxes, scores, nms))


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_valid_at_every_opset(opset):
    boxes, scores, nms = random_case(7)
    model = topk_model(boxes, scores, nms, opset=opset)
    checker.check_model(model, full_check=True)
    assert_equal(run(model, boxes, scores), reference(boxes, scores, nms))


def test_batch_equals_single_images():
    boxes, scores, nms = random_case(5)
    boxes, scores = np.concatenate([boxes] * 2), np.concatenate([scores, scores[::-1]])
    model = topk_model(boxes, scores, nms)
    batch = run(model, boxes, scores)
    for i in range(len(boxes)):
        single = run(model, boxes[i : i + 1], scores[i : i + 1])
        for name in OUTPUT_NAMES:
            np.testing.assert_array_equal(single[name][0], batch[name][i], name)


def test_nothing_above_the_threshold_is_an_empty_image():
    boxes, scores = np.ones((1, 5, 4), np.float32), np.full((1, 5, 3), 0.5, np.float32)
    nms = Nms(score_threshold=0.5, max_output_boxes=4, score_activation=False, box_coding=0)
    result = run(topk_model(boxes, scores, nms), boxes, scores)
    assert all(not result[name].any() for name in OUTPUT_NAMES)  # 0.5 > 0.5 is false


def test_equal_scores_come_in_the_order_of_box_then_class():
    boxes = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    scores = np.full((1, 3, 2), 0.5, np.float32)
    nms = Nms(score_threshold=0.1, max_output_boxes=5, score_activation=False, box_coding=0)
    result = run(topk_model(boxes, scores, nms), boxes, scores)
    np.testing.assert_array_equal(result["detection_classes"], [[0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(result["detection_boxes"][0, :, 0], [0, 0, 4, 4, 8])


def test_saturated_logits_keep_their_order():
    boxes = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    scores = np.array([[[20.0], [30.0]]], np.float32)  # both 1.0 after the sigmoid
    nms = Nms(score_threshold=0.1, max_output_boxes=2, box_coding=0)
    result = run(topk_model(boxes, scores, nms), boxes, scores)
    np.testing.assert_array_equal(result["detection_boxes"][0, :, 0], [4, 0])


def test_more_than_tensorrt_can_sort_is_refused():
    boxes, scores, _ = random_case(1)
    with pytest.raises(GraphError, match="at most 3840"):
        topk_model(boxes, scores, Nms(max_output_boxes=TENSORRT_TOPK + 1))


def test_heads_of_another_type_are_refused():
    boxes, scores, nms = random_case(1)
    with pytest.raises(GraphError, match="expected float32 heads"):
        topk_model(boxes, scores, nms, elem_type=TensorProto.FLOAT16)
