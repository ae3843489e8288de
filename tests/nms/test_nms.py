# SPDX-License-Identifier: Apache-2.0
"""Every form of the NMS against the NumPy reference, on ONNX Runtime; the graph form also
through TensorRT-RTX's builder.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from trtdet.errors import GraphError
from trtdet.graph.builder import PLUGIN_DOMAIN
from trtdet.nms import lowering, suppression
from trtdet.nms.lowering import GRAPH_ROUNDS, PLUGIN_OP, lower
from trtdet.nms.plugin import DECODED_NAMES, insert_decoded, insert_legacy, insert_plugin
from trtdet.nms.reference import decode_boxes, reference
from trtdet.spec import OUTPUT_NAMES, ModelSpec, Nms, Preprocessing

FORMS = ("onnx", "settled", "graph")
PLAIN = Nms(score_threshold=0.1, max_output_boxes=10, score_activation=False, box_coding=0)


def heads_model(boxes, scores, *, batch="N", opset=17, elem_type=TensorProto.FLOAT):
    """A model that hands on its two inputs as the heads `raw_boxes` and `raw_scores`, shaped
    like the given arrays.
    """
    names = {"boxes_in": "raw_boxes", "scores_in": "raw_scores"}
    shapes = [[batch, *array.shape[1:]] for array in (boxes, scores)]
    graph = helper.make_graph(
        [helper.make_node("Identity", [i], [o], o) for i, o in names.items()],
        "heads",
        *(
            [
                helper.make_tensor_value_info(n, elem_type, s)
                for n, s in zip(side, shapes, strict=True)
            ]
            for side in (names.keys(), names.values())
        ),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def plugin_model(boxes, scores, nms, anchors=None, **options):
    model = heads_model(boxes, scores, **options)
    batch = options.get("batch", "N")
    insert_plugin(
        model, boxes="raw_boxes", scores="raw_scores", anchors=anchors, nms=nms, batch=batch
    )
    return model


def run(model, boxes, scores):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    feed = {"boxes_in": boxes, "scores_in": scores}
    return dict(zip(names, session.run(None, feed), strict=True))


def assert_equal_outputs(actual, expected):
    assert list(actual) == list(OUTPUT_NAMES)
    for name in OUTPUT_NAMES:
        assert actual[name].dtype == expected[name].dtype, name
        assert actual[name].shape == expected[name].shape, name
    for name in ("num_detections", "detection_classes"):
        np.testing.assert_array_equal(actual[name], expected[name], name)
    np.testing.assert_allclose(
        actual["detection_scores"], expected["detection_scores"], rtol=1e-5, atol=1e-7
    )
    # exp differs by a last bit between NumPy and ONNX Runtime
    np.testing.assert_allclose(
        actual["detection_boxes"], expected["detection_boxes"], rtol=1e-5, atol=1e-4
    )


# ---- the forms equal the reference ---------------------------------------------------------------

#: What a case is about -> (anchors, classes, changes to Nms, candidates). None: drawn at random.
KINDS = {
    "any": (None, None, {}, 5000),
    "ties": (None, None, {}, 5000),
    "empty": (None, None, {"score_threshold": 0.999}, 5000),
    "full": (48, 2, {"max_output_boxes": 5, "score_threshold": 0.0}, 5000),
    "one class": (None, 1, {}, 5000),
    "90 classes": (7, 90, {}, 5000),
    "more slots than candidates": (3, 2, {"max_output_boxes": 20}, 5000),
    "fewer candidates than pairs": (60, 4, {"score_threshold": 0.0}, 37),
    "fewer candidates than anchors, ties": (60, 4, {"score_threshold": 0.001}, 25),
    "everything overlaps": (40, 3, {"iou_threshold": 0.05}, 5000),
    "corners out of order": (40, 2, {"box_coding": 0, "iou_threshold": 0.3}, 5000),
}
CASES = 200


def random_case(seed):
    """Inputs of `reference` and the number of candidates, the kinds taking turns."""
    rng = np.random.default_rng(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    num_anchors, num_classes, changes, candidates = KINDS[kind]
    num_anchors = num_anchors or int(rng.integers(1, 50))
    num_classes = num_classes or int(rng.integers(2, 8))
    n = int(rng.integers(1, 4))
    values = {
        "score_threshold": float(rng.choice([0.0, 0.001, 0.4])),
        "iou_threshold": float(rng.choice([0.3, 0.5, 0.7])),
        "max_output_boxes": int(rng.choice([1, 10, 100])),
        "background_class": int(rng.choice([-1, -1, 0, num_classes - 1])),
        "score_activation": bool(rng.integers(2)),
        "class_agnostic": bool(rng.integers(2)),
        "box_coding": int(rng.integers(2)),
        **changes,
    }
    nms = Nms(**values)
    scores = rng.normal(-1, 2, (n, num_anchors, num_classes))
    corners = rng.uniform(0, 60, (n, num_anchors, 2))
    corners = np.concatenate([corners, corners + rng.uniform(5, 40, corners.shape)], -1)
    if "ties" in kind:  # whole numbers: equal scores, equal boxes, IoUs that equal the threshold
        scores, corners = np.round(scores), np.round(corners / 8) * 8
    if not nms.score_activation:
        scores = 1 / (1 + np.exp(-scores))
    if kind == "corners out of order":
        swapped = rng.integers(2, size=(n, num_anchors)).astype(bool)
        corners[swapped] = corners[swapped][:, [2, 1, 0, 3]]
    boxes, anchors = corners, None
    if nms.box_coding == 1:
        size = corners[..., 2:] - corners[..., :2]
        boxes = np.concatenate([corners[..., :2] + size / 2, size], -1)
    if rng.integers(3):  # in two of three cases the box decoder takes part
        anchors = boxes[:1]
        spread = 0.0 if "ties" in kind else 0.3 if nms.box_coding else 5.0
        boxes = rng.normal(0, 1, boxes.shape) * spread
    return (
        boxes.astype(np.float32),
        scores.astype(np.float32),
        nms,
        None if anchors is None else anchors.astype(np.float32),
        candidates,
    )


@pytest.mark.parametrize("seed", range(CASES))
def test_forms_equal_reference(seed):
    boxes, scores, nms, anchors, candidates = random_case(seed)
    expected = reference(boxes, scores, nms, anchors, candidates=candidates)
    batch = len(boxes) if seed % 4 == 0 else "N"
    opset = (11, 13, 17, 18, 21)[seed % 5]
    model = plugin_model(boxes, scores, nms, anchors, batch=batch, opset=opset)
    for form in FORMS:
        lowered = lower(model, form, candidates=min(candidates, 3840))
        assert_equal_outputs(run(lowered, boxes, scores), expected)


@pytest.mark.parametrize("form", ["onnx", "settled", "settled one by one"])
@pytest.mark.parametrize("seed", range(CASES))
def test_candidates_by_threshold_equal_reference(seed, form, monkeypatch):
    """Without a number of candidates: those below the threshold are left out."""
    boxes, scores, nms, anchors, candidates = random_case(seed)
    expected = reference(boxes, scores, nms, anchors, candidates=candidates)
    opset = (12, 13, 17, 18, 21)[seed % 5]
    model = plugin_model(boxes, scores, nms, anchors, opset=opset)
    monkeypatch.setattr(lowering, "PLUGIN_CANDIDATES", candidates)
    if form == "settled one by one":
        monkeypatch.setattr(suppression, "MOST_PAIRS", np.int64(0))
    lowered = lower(model, form.split()[0])
    onnx.checker.check_model(lowered, full_check=True)
    assert_equal_outputs(run(lowered, boxes, scores), expected)


@pytest.mark.parametrize("most_pairs", [0, 2 * 50**2, 2 * 50**2 + 1])
def test_images_whose_matrices_are_large_are_settled_one_by_one(most_pairs, monkeypatch):
    """Two images of 50 candidates in a row, each of which overlaps the next alone: half of them
    survive, after 50 rounds.
    """
    monkeypatch.setattr(suppression, "MOST_PAIRS", np.int64(most_pairs))
    left = np.arange(50) * 3.0
    row = np.stack([np.zeros(50), left, np.full(50, 10.0), left + 10], axis=1)
    boxes = np.stack([row, row[::-1]]).astype(np.float32)
    scores = np.linspace(0.9, 0.5, 50, dtype=np.float32)[None, :, None].repeat(2, 0)
    nms = Nms(0.1, 0.5, 50, score_activation=False, box_coding=0)
    lowered = lower(plugin_model(boxes, scores, nms), "settled")
    lowered.graph.output.append(helper.make_tensor_value_info("nms/is_small", TensorProto.BOOL, []))
    outputs = run(lowered, boxes, scores)
    assert outputs.pop("nms/is_small") == (most_pairs > 2 * 50**2)
    assert outputs["num_detections"].tolist() == [[25], [25]]
    assert_equal_outputs(outputs, reference(boxes, scores, nms))


@pytest.mark.parametrize(
    ("reaching", "columns", "anchors"),
    [((0, 0), 4, 4), ((3, 1), 4, 4), ((7, 9), 9, 5), ((250, 2), 200, 200)],
)
def test_there_are_as_many_candidates_as_some_image_needs(reaching, columns, anchors, monkeypatch):
    """Scores that reach the threshold in two images of 300 anchors and 5 classes, the limit being
    200 candidates; pairs, and the anchors that have one.
    """
    boxes = np.random.default_rng(0).uniform(0, 60, (2, 300, 4)).astype(np.float32)
    scores = np.full((2, 300, 5), 0.1, np.float32)
    for image, count in enumerate(reaching):
        for number in range(count):  # several classes of an anchor, every third anchor
            anchor, class_id = divmod(number, 2) if count < 100 else (number, 0)
            scores[image, 3 * anchor % 300 + 3 * anchor // 300, class_id] = 0.5 + number / 1000
    nms = Nms(0.5, 0.6, 4, score_activation=False, box_coding=0)
    monkeypatch.setattr(lowering, "PLUGIN_CANDIDATES", 200)
    lowered = lower(plugin_model(boxes, scores, nms), "onnx")
    for name in ("candidates/values", "best_anchors_in_order/values"):
        lowered.graph.output.append(helper.make_tensor_value_info(f"nms/{name}", TensorProto.FLOAT, None))  # fmt: skip
    outputs = run(lowered, boxes, scores)
    assert outputs.pop("nms/candidates/values").shape == (2, columns)
    assert outputs.pop("nms/best_anchors_in_order/values").shape == (2, anchors)
    assert_equal_outputs(outputs, reference(boxes, scores, nms, None, candidates=200))


def test_cases_cover_what_they_are_for():
    """Between them the cases reach every limit; else the test above would prove less than it
    says.
    """
    seen = set()
    for seed in range(CASES):
        boxes, scores, nms, anchors, candidates = random_case(seed)
        counts = reference(boxes, scores, nms, anchors, candidates=candidates)["num_detections"]
        unlimited = reference(boxes, scores, nms, anchors)["num_detections"]
        seen |= {"empty image"} if (counts == 0).any() else set()
        seen |= {"full image"} if (counts == nms.max_output_boxes).any() else set()
        seen |= (
            {"partly filled"} if ((counts > 0) & (counts < nms.max_output_boxes)).any() else set()
        )
        seen |= {"candidate limit"} if (counts != unlimited).any() else set()
        seen |= {"slots to spare"} if scores[0].size < nms.max_output_boxes else set()
        seen |= {"batch"} if len(boxes) > 1 else set()
        seen |= {"background"} if nms.background_class >= 0 else set()
        seen |= {
            f"agnostic {nms.class_agnostic}, decoder {anchors is not None}, coding {nms.box_coding}"
        }
    assert len(seen) == 7 + 8, sorted(seen)


@pytest.mark.parametrize("form", FORMS)
def test_thresholds_are_inclusive(form):
    """IoU and score equal to their thresholds: the plugin suppresses and passes, ONNX's
    operators alone would not.
    """
    boxes = np.array([[[0, 0, 2, 2], [0, 0, 2, 1], [8, 8, 9, 9], [5, 5, 6, 6]]], np.float32)
    scores = np.array([[[0.75], [0.5], [0.25], [0.2499]]], np.float32)
    for iou_threshold, kept in ((0.5, [0.75, 0.25]), (0.50001, [0.75, 0.5, 0.25])):
        nms = Nms(0.25, iou_threshold, 10, score_activation=False, box_coding=0)
        outputs = run(lower(plugin_model(boxes, scores, nms), form), boxes, scores)
        assert outputs["detection_scores"][0, : len(kept) + 1].tolist() == [*kept, 0]


@pytest.mark.parametrize("form", FORMS)
def test_boxes_of_4_dimensions_and_anchors_per_image(form):
    rng = np.random.default_rng(0)
    boxes = rng.normal(0, 0.3, (2, 12, 1, 4)).astype(np.float32)
    scores = rng.normal(0, 2, (2, 12, 3)).astype(np.float32)
    anchors = rng.uniform(10, 50, (2, 12, 4)).astype(np.float32)
    nms = Nms(score_threshold=0.1, max_output_boxes=10)
    model = plugin_model(boxes, scores, nms, anchors[0])
    stored = next(c for c in model.graph.initializer if c.name == "nms/anchors")
    stored.CopyFrom(onnx.numpy_helper.from_array(anchors, "nms/anchors"))
    outputs = run(lower(model, form), boxes, scores)
    assert_equal_outputs(outputs, reference(boxes, scores, nms, anchors))
    assert (outputs["num_detections"] > 3).all()


@pytest.mark.parametrize("form", FORMS)
def test_fp16_graph_is_computed_in_fp32(form):
    """The plugin's boxes and scores have the type of its inputs; lowered, they are FP32 inside
    and rounded at the end.
    """
    rng = np.random.default_rng(1)
    boxes = rng.uniform(0, 300, (1, 20, 2))
    boxes = np.concatenate([boxes, boxes + 300], -1).astype(np.float16)
    scores = rng.uniform(0, 1, (1, 20, 2)).astype(np.float16)
    model = plugin_model(boxes, scores, PLAIN)
    for value in [*model.graph.input, *model.graph.value_info, *model.graph.output[1:3]]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    lowered = lower(model, form)
    onnx.checker.check_model(lowered, full_check=True)
    expected = reference(boxes, scores, PLAIN)
    for name in OUTPUT_NAMES[1:3]:
        expected[name] = expected[name].astype(np.float16)
    assert_equal_outputs(run(lowered, boxes, scores), expected)


# ---- rounds of the graph form --------------------------------------------------------------------


def chain(length):
    """Boxes 10 wide, 3 apart: each overlaps only its neighbours (IoU 7/13), so each suppresses
    the next and none other.
    """
    left = 3 * np.arange(length, dtype=np.float32)
    boxes = np.stack([0 * left, left, 0 * left + 10, left + 10], -1)[None]
    scores = np.linspace(0.9, 0.5, length, dtype=np.float32)[None, :, None]
    return boxes, scores


def kept_in_chain(length, rounds):
    boxes, scores = chain(length)
    nms = Nms(0.1, 0.5, length, score_activation=False, box_coding=0)
    model = lower(plugin_model(boxes, scores, nms), "graph", rounds=rounds)
    outputs = run(model, boxes, scores)
    n = outputs["num_detections"][0, 0]
    return set((outputs["detection_boxes"][0, :n, 1] / 3).astype(int).tolist())


def test_chain_is_exact_with_as_many_rounds_as_links():
    survivors = set(range(0, 40, 2))
    assert kept_in_chain(40, rounds=39) == survivors
    assert kept_in_chain(40, rounds=38) == survivors | {39}  # the bound is tight


@pytest.mark.parametrize("rounds", [1, 2, 7, 8])
def test_too_few_rounds_err_on_the_side_of_their_parity(rounds):
    kept, truth = kept_in_chain(30, rounds), set(range(0, 30, 2))
    settled = set(range(rounds + 1))
    assert kept & settled == truth & settled
    if rounds % 2:
        assert kept == truth & settled  # loses the unsettled survivors, adds none
    else:
        assert kept == truth | set(range(rounds + 1, 30))  # keeps every unsettled box


def test_default_rounds_settle_a_chain_of_33_boxes():
    assert GRAPH_ROUNDS == 32
    assert kept_in_chain(33, GRAPH_ROUNDS) == set(range(0, 33, 2))


def test_clusters_settle_in_one_round():
    """200 boxes over each other are a chain of 200 by order of score, but the best one settles
    all.
    """
    rng = np.random.default_rng(2)
    boxes = (np.array([0, 0, 100, 100]) + rng.uniform(-5, 5, (1, 200, 4))).astype(np.float32)
    scores = rng.uniform(0.2, 0.9, (1, 200, 1)).astype(np.float32)
    outputs = run(lower(plugin_model(boxes, scores, PLAIN), "graph", rounds=1), boxes, scores)
    assert_equal_outputs(outputs, reference(boxes, scores, PLAIN))
    assert outputs["num_detections"].tolist() == [[1]]


def test_fewer_candidates_lose_only_the_tail():
    """Detections are those of the full search as far as they go, and all of them where the slots
    fill up.
    """
    rng = np.random.default_rng(3)
    boxes = rng.uniform(0, 200, (1, 300, 2))
    boxes = np.concatenate([boxes, boxes + 20], -1).astype(np.float32)
    scores = rng.uniform(0.2, 0.9, (1, 300, 1)).astype(np.float32)
    many = Nms(0.1, 0.3, 100, score_activation=False, box_coding=0)
    full = reference(boxes, scores, many)
    cut = run(lower(plugin_model(boxes, scores, many), "graph", candidates=60), boxes, scores)
    n = cut["num_detections"][0, 0]
    assert 10 < n < full["num_detections"][0, 0]
    for name in OUTPUT_NAMES[1:]:
        np.testing.assert_array_equal(cut[name][:, :n], full[name][:, :n])
    few = Nms(0.1, 0.3, 10, score_activation=False, box_coding=0)
    cut = run(lower(plugin_model(boxes, scores, few), "graph", candidates=60), boxes, scores)
    assert_equal_outputs(cut, reference(boxes, scores, few))


# ---- the files -----------------------------------------------------------------------------------

BOXES = np.zeros((1, 6, 4), np.float32)
SCORES = np.zeros((1, 6, 3), np.float32)
ANCHORS = np.arange(24, dtype=np.float32).reshape(6, 4) + 1


def dims(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("batch", ["N", 4])
def test_plugin_file(batch):
    nms = Nms(0.25, 0.5, 7, 2, class_agnostic=True)
    model = plugin_model(BOXES, SCORES, nms, ANCHORS, batch=batch)
    onnx.checker.check_model(model, full_check=True)
    node = model.graph.node[-1]
    assert (node.op_type, node.name, node.domain) == (PLUGIN_OP, "nms/EfficientNMS", PLUGIN_DOMAIN)
    assert list(node.input) == ["raw_boxes", "raw_scores", "nms/anchors"]
    assert {a.name: helper.get_attribute_value(a) for a in node.attribute} == {
        "plugin_version": b"1",
        "score_threshold": 0.25,
        "iou_threshold": 0.5,
        "max_output_boxes": 7,
        "background_class": 2,
        "score_activation": 1,
        "class_agnostic": 1,
        "box_coding": 1,
    }
    anchors = onnx.numpy_helper.to_array(model.graph.initializer[-1])
    np.testing.assert_array_equal(anchors, ANCHORS[None])
    outputs = [(o.name, o.type.tensor_type.elem_type, dims(o)) for o in model.graph.output]
    assert outputs == [
        ("num_detections", TensorProto.INT32, [batch, 1]),
        ("detection_boxes", TensorProto.FLOAT, [batch, 7, 4]),
        ("detection_scores", TensorProto.FLOAT, [batch, 7]),
        ("detection_classes", TensorProto.INT32, [batch, 7]),
    ]


@pytest.mark.parametrize("form", FORMS)
def test_lowered_file(form):
    model = plugin_model(BOXES, SCORES, PLAIN, ANCHORS)
    model.metadata_props.add(key="trtdet.model_spec", value="{}")
    before = model.SerializeToString()
    lowered = lower(model, form)
    assert model.SerializeToString() == before
    assert lowered.metadata_props == model.metadata_props
    assert lowered.graph.output == model.graph.output
    assert [o.domain for o in lowered.opset_import] == [""]
    onnx.checker.check_model(lowered, full_check=True)
    new = [node for node in lowered.graph.node if node.name not in ("raw_boxes", "raw_scores")]
    assert all(node.name.startswith("nms/") for node in new)
    assert len({node.name for node in new}) == len(new)
    assert lower(model, form) == lowered  # the same names every time
    assert lower(lowered, form) == lowered  # nothing left to do
    ops = {node.op_type for node in new}
    assert ("NonMaxSuppression" in ops) == (form == "onnx")
    if form == "graph":  # no loop, nothing whose shape depends on the data
        assert not ops & {"Loop", "Scan", "If", "NonZero", "ScatterND", "Unique", "Compress"}


@pytest.mark.parametrize("form", FORMS)
def test_node_as_other_tools_write_it(form):
    """Domain "", no `class_agnostic`, no shapes behind the heads' makers: NVIDIA's own sample."""
    rng = np.random.default_rng(4)
    boxes = rng.normal(0, 0.3, (2, 6, 4)).astype(np.float32)
    scores = rng.normal(0, 2, (2, 6, 3)).astype(np.float32)
    nms = Nms(score_threshold=0.4, max_output_boxes=10)
    model = plugin_model(boxes, scores, nms, ANCHORS)
    node = model.graph.node[-1]
    node.domain = ""
    kept = [a for a in node.attribute if a.name not in ("class_agnostic", "plugin_version")]
    del node.attribute[:]
    node.attribute.extend(kept)
    del model.opset_import[1:]
    del model.graph.value_info[:]
    outputs = run(lower(model, form), boxes, scores)
    assert_equal_outputs(outputs, reference(boxes, scores, nms, ANCHORS[None]))


@pytest.mark.parametrize("form", FORMS)
def test_two_nodes(form):
    """Both are replaced, under different names."""
    rng = np.random.default_rng(5)
    boxes, _, _, _, _ = random_case(0)
    scores = rng.uniform(0, 1, (*boxes.shape[:2], 3)).astype(np.float32)
    model = plugin_model(boxes, scores, PLAIN)
    second = model.graph.node.add()
    second.CopyFrom(model.graph.node[-2])
    second.name = "other"
    second.output[:] = ["n2", "b2", "s2", "c2"]
    lowered = lower(model, form)
    lowered.graph.output.add().CopyFrom(lowered.graph.output[2])
    lowered.graph.output[-1].name = "s2"
    outputs = run(lowered, boxes, scores)
    np.testing.assert_array_equal(outputs["s2"], outputs["detection_scores"])
    assert not lowering.has_plugin(lowered)
    assert lowering.has_plugin(model)


def test_decoded_file():
    rng = np.random.default_rng(6)
    boxes = rng.normal(0, 0.3, (2, 6, 4)).astype(np.float32)
    scores = rng.normal(0, 2, (2, 6, 3)).astype(np.float32)
    model = heads_model(boxes, scores)
    insert_decoded(model, boxes="raw_boxes", scores="raw_scores", anchors=ANCHORS, nms=Nms())
    onnx.checker.check_model(model, full_check=True)
    assert [(o.name, dims(o)) for o in model.graph.output] == [
        ("boxes", ["N", 6, 4]),
        ("scores", ["N", 6, 3]),
    ]
    outputs = run(model, boxes, scores)
    np.testing.assert_allclose(
        outputs["boxes"], decode_boxes(boxes, 1, ANCHORS), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(outputs["scores"], 1 / (1 + np.exp(-scores)), rtol=1e-5)


def test_decoded_file_of_heads_that_are_decoded():
    rng = np.random.default_rng(7)
    boxes, scores = rng.uniform(0, 1, (2, 1, 6, 4)).astype(np.float32)
    model = heads_model(boxes, scores)
    insert_decoded(model, boxes="raw_boxes", scores="raw_scores", anchors=None, nms=PLAIN)
    outputs = run(model, boxes, scores)
    assert list(outputs) == list(DECODED_NAMES)
    np.testing.assert_array_equal(outputs["boxes"], boxes)
    np.testing.assert_array_equal(outputs["scores"], scores)


@pytest.mark.parametrize(("batch", "op"), [("N", "BatchedNMSDynamic_TRT"), (1, "BatchedNMS_TRT")])
def test_legacy_file(batch, op):
    nms = Nms(0.25, 0.5, 5)
    model = heads_model(BOXES, SCORES, batch=batch, opset=11)
    options = {"anchors": ANCHORS, "nms": nms, "batch": batch}
    insert_legacy(model, boxes="raw_boxes", scores="raw_scores", **options)
    onnx.checker.check_model(model, full_check=True)
    (node,) = (node for node in model.graph.node if node.domain == PLUGIN_DOMAIN)
    assert node.op_type == op
    assert {a.name: helper.get_attribute_value(a) for a in node.attribute} == {
        "plugin_version": b"1",
        "shareLocation": 1,
        "backgroundLabelId": -1,
        "numClasses": 3,
        "topK": 6,
        "keepTopK": 5,
        "scoreThreshold": 0.25,
        "iouThreshold": 0.5,
        "isNormalized": 1,
        "clipBoxes": 0,
    }
    assert [(o.name, dims(o)) for o in model.graph.output] == [
        ("num_detections", [batch, 1]),
        ("detection_boxes", [batch, 5, 4]),
        ("detection_scores", [batch, 5]),
        ("detection_classes", [batch, 5]),
    ]


class StandInBatchedNMS(OpRun):
    """Stands in for the plugin BatchedNMSDynamic_TRT, which exists on no CPU: no NMS, it keeps
    its inputs and answers one detection.
    """

    op_domain = PLUGIN_DOMAIN
    inputs: tuple = ()

    @staticmethod
    def op_name():
        return "BatchedNMSDynamic_TRT"

    def _run(self, boxes, scores, **attributes):
        type(self).inputs = (boxes, scores)
        num = np.array([[1]], np.int32)
        first_and_empty = np.stack([boxes[0, :1, 0], 0 * boxes[0, :1, 0]], 1)
        class_ids = np.array([[2, -1]], np.float32)
        return num, first_and_empty, np.array([[0.5, 0]], np.float32), class_ids


StandInBatchedNMS.__name__ = StandInBatchedNMS.op_name()  # ONNX's evaluator goes by the class name


def test_legacy_file_around_the_plugin():
    """The plugin is fed decoded boxes and probabilities; of its answer, the class -1 of an empty
    slot becomes 0.
    """
    rng = np.random.default_rng(8)
    boxes = rng.normal(0, 0.3, (1, 6, 4)).astype(np.float32)
    scores = rng.normal(0, 2, (1, 6, 3)).astype(np.float32)
    model = heads_model(boxes, scores, opset=11)
    nms = Nms(max_output_boxes=2)
    insert_legacy(model, boxes="raw_boxes", scores="raw_scores", anchors=ANCHORS, nms=nms)
    evaluator = ReferenceEvaluator(model, new_ops=[StandInBatchedNMS])
    results = evaluator.run(None, {"boxes_in": boxes, "scores_in": scores})
    outputs = dict(zip(OUTPUT_NAMES, results, strict=True))

    decoded = decode_boxes(boxes, 1, ANCHORS)
    fed_boxes, fed_scores = StandInBatchedNMS.inputs
    assert fed_boxes.shape == (1, 6, 1, 4)
    np.testing.assert_allclose(fed_boxes[:, :, 0], decoded, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fed_scores, 1 / (1 + np.exp(-scores)), rtol=1e-5)
    assert outputs["num_detections"].tolist() == [[1]]
    assert outputs["detection_classes"].tolist() == [[2, 0]]
    assert outputs["detection_classes"].dtype == np.int32
    assert outputs["detection_scores"].tolist() == [[0.5, 0]]
    np.testing.assert_allclose(outputs["detection_boxes"][0, 0], decoded[0, 0], rtol=1e-5)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchors": ANCHORS[:5]}, r"expected anchors \[1, 6, 4\].*found \[1, 5, 4\]"),
        ({"boxes": "nowhere"}, r"boxes 'nowhere'.*found no shape"),
        ({"scores": "raw_boxes", "boxes": "raw_scores"}, r"found \[N, 6, 3\] and \[N, 6, 4\]"),
    ],
)
@pytest.mark.parametrize("insert", [insert_plugin, insert_legacy, insert_decoded])
def test_heads_that_do_not_fit(insert, changes, message):
    model = heads_model(BOXES, SCORES)
    arguments = {"boxes": "raw_boxes", "scores": "raw_scores", "anchors": ANCHORS}
    with pytest.raises(GraphError, match=message):
        insert(model, **{**arguments, **changes}, nms=Nms(max_output_boxes=5))


def test_fp16_heads_are_refused_on_disk():
    model = heads_model(BOXES, SCORES, elem_type=TensorProto.FLOAT16)
    with pytest.raises(GraphError, match="expected float32 heads, found 'raw_boxes' of float16"):
        insert_plugin(model, boxes="raw_boxes", scores="raw_scores", anchors=ANCHORS, nms=Nms())


def test_output_name_that_is_taken():
    model = heads_model(BOXES, SCORES)
    model.graph.node.append(helper.make_node("Identity", ["raw_boxes"], ["detection_boxes"]))
    with pytest.raises(GraphError, match=r"'detection_boxes': expected one node.*found 2"):
        insert_plugin(model, boxes="raw_boxes", scores="raw_scores", anchors=ANCHORS, nms=Nms())


def test_legacy_with_fewer_anchors_than_slots():
    with pytest.raises(GraphError, match="number of anchors, 6, found 100"):
        insert_legacy(
            heads_model(BOXES, SCORES),
            boxes="raw_boxes",
            scores="raw_scores",
            anchors=ANCHORS,
            nms=Nms(),
        )


def test_old_opset():
    with pytest.raises(GraphError, match="expected opset 11 or later, found 10"):
        plugin_model(BOXES, SCORES, PLAIN, ANCHORS, opset=10)


def test_node_without_a_required_attribute():
    model = plugin_model(BOXES, SCORES, PLAIN, ANCHORS)
    node = model.graph.node[-1]
    node.attribute.remove(next(a for a in node.attribute if a.name == "iou_threshold"))
    with pytest.raises(GraphError, match=r"'nms/EfficientNMS'.*found no iou_threshold"):
        lower(model, "onnx")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("anchors", [1, 40, 3000])
def test_free_number_of_anchors(form, anchors):
    """The same file takes any number of anchors, fewer and more than there are candidates, and
    finds what the reference does.
    """
    rng = np.random.default_rng(anchors)
    nms = Nms(0.3, 0.5, 20, score_activation=False, class_agnostic=anchors == 40)
    boxes = rng.uniform(4, 300, (2, anchors, 4)).astype(np.float32)
    scores = rng.uniform(size=(2, anchors, 3)).astype(np.float32) ** 3
    model = heads_model(boxes, scores)
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.shape.dim[1].dim_param = "A"
    insert_plugin(model, boxes="raw_boxes", scores="raw_scores", anchors=None, nms=nms)
    lowered = lower(model, form, candidates=512)
    onnx.checker.check_model(lowered, full_check=True)
    assert_equal_outputs(run(lowered, boxes, scores), reference(boxes, scores, nms))


def test_heads_that_do_not_belong_together():
    model = plugin_model(BOXES, SCORES, PLAIN)
    for value in [*model.graph.input, *model.graph.value_info]:
        if "scores" in value.name:
            value.type.tensor_type.shape.dim[2].dim_param = "C"
    with pytest.raises(
        GraphError, match=r"known number of classes, found \[N, \d+, 4\] and \[N, \d+, C\]"
    ):
        lower(model, "graph")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "got 0 and 32"),
        ({"rounds": 0}, "got 2048 and 0"),
        ({"candidates": 3841}, "at most 3840"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        lower(plugin_model(BOXES, SCORES, PLAIN), "graph", **options)


# ---- TensorRT-RTX --------------------------------------------------------------------------------


@pytest.mark.parametrize("agnostic", [False, True])
def test_tensorrt_rtx_builds_the_graph_form(agnostic):
    """A real build for compute capability 8.9, dynamic batch, EfficientDet-D0's size; everything
    real-valued stays FP32.
    """
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    boxes = np.zeros((1, 49104, 4), np.float32)
    scores = np.zeros((1, 49104, 90), np.float32)
    nms = Nms(class_agnostic=agnostic, background_class=0)
    model = lower(plugin_model(boxes, scores, nms, boxes[0] + 1), "graph")

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [
        parser.get_error(i).desc() for i in range(parser.num_errors)
    ]
    types = {
        layer.get_output(i).dtype
        for layer in map(network.get_layer, range(network.num_layers))
        for i in range(layer.num_outputs)
    }
    assert types == {trt.float32, trt.int32, trt.int64, trt.bool}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for name, array in (("boxes_in", boxes), ("scores_in", scores)):
        profile.set_shape(name, *([n, *array.shape[1:]] for n in (1, 4, 8)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    assert 1e5 < plan.nbytes < 2e7


@pytest.mark.parametrize(
    ("cuda", "classes", "agnostic", "form"),
    [
        (True, 90, False, "settled"),
        (True, 9, False, "settled"),
        (True, 8, False, "onnx"),
        (True, 90, True, "onnx"),  # all classes are one
        (False, 90, False, "onnx"),
    ],
)
def test_the_form_that_onnx_runtime_is_fast_with(cuda, classes, agnostic, form):
    nms = Nms(class_agnostic=agnostic)
    spec = ModelSpec("toy", Preprocessing((8, 8)), nms, tuple(range(1, classes + 1)))
    assert lowering.fast_form(spec, cuda=cuda) == form
