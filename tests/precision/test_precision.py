# SPDX-License-Identifier: Apache-2.0
"""FP16 and BF16 conversion: which nodes, which types, which numbers; ONNX Runtime runs both
forms.
"""

from pathlib import Path

import numpy as np
import onnx.parser
import pytest
import toy_network as toy
from onnx import TensorProto, numpy_helper
from onnx.shape_inference import infer_shapes

from trtdet.errors import GraphError
from trtdet.nms import lowering
from trtdet.precision.floats import activation_ranges, to_bf16, to_fp16
from trtdet.precision.graph_types import raise_opset
from trtdet.sources.base import run_onnx
from trtdet.spec import OUTPUT_NAMES, ModelSpec

HEADS = ("raw_boxes", "class_logits")


def heads(model: onnx.ModelProto, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    boxes, logits = run_onnx(model, list(HEADS), {"input": images})
    return boxes, logits


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor -> element type; refuses a graph in which the types of a node's inputs disagree."""
    bfloat16 = any(t.data_type == TensorProto.BFLOAT16 for t in model.graph.initializer)
    # ONNX has no bfloat16 Conv before opset 22; TensorRT does not mind.
    graph = infer_shapes(model, check_type=not bfloat16, strict_mode=not bfloat16).graph
    infos = [*graph.value_info, *graph.input, *graph.output]
    return {info.name: info.type.tensor_type.elem_type for info in infos}


def node_type(model: onnx.ModelProto) -> dict[str, int]:
    """Node -> element type of its first output."""
    known = types(lowering.lower(model, "graph"))
    return {node.name: known.get(node.output[0], 0) for node in model.graph.node}


def rounding_every_tensor(converted: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 model that computes what an FP16 one does where every node writes FP16, as on a
    GPU.

    ONNX Runtime's CPU provider computes FP16 nodes in float32 and leaves out most of the rounding
    in between.
    """
    model = onnx.ModelProto()
    model.CopyFrom(converted)
    narrow = {name for name, kind in types(converted).items() if kind == TensorProto.FLOAT16}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    nodes = []
    for node in converted.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.op_type == "Cast":  # the rounding below does it
            copy.op_type = "Identity"
            del copy.attribute[:]
        nodes.append(copy)
        for k, name in enumerate(node.output):
            if name in narrow:
                copy.output[k] = f"{name}/exact"
                nodes.append(onnx.helper.make_node("Cast", [f"{name}/exact"], [f"{name}/half"], to=TensorProto.FLOAT16))  # fmt: skip
                nodes.append(onnx.helper.make_node("Cast", [f"{name}/half"], [name], to=TensorProto.FLOAT))  # fmt: skip
    for field in ("node", "value_info"):
        model.graph.ClearField(field)
    model.graph.node.extend(nodes)
    return model


def reasons(report_nodes: tuple) -> dict[str, str]:
    return {node.name: node.reason for node in report_nodes}


@pytest.mark.parametrize(
    ("convert", "narrow"),
    [(to_fp16, TensorProto.FLOAT16), (to_bf16, TensorProto.BFLOAT16)],
)
def test_body_is_narrow_the_ends_are_not(convert, narrow) -> None:  # type: ignore[no-untyped-def]
    model = toy.network()
    before = model.SerializeToString()
    converted, report = convert(model)
    assert model.SerializeToString() == before
    found = node_type(converted)
    assert {name for name, kind in found.items() if kind == narrow} == {
        *toy.BODY, f"normal/{report.precision.lower()}/cast"
    }  # fmt: skip
    assert reasons(report.by_design) == {
        **dict.fromkeys(toy.PREPROCESSING, "preprocessing"),
        "nms/EfficientNMS": "box decoding and NMS",
    }
    assert (report.converted, report.kept, report.flushed, report.casts) == (len(toy.BODY), (), 0, 3)  # fmt: skip
    for old, new in zip(model.graph.output, converted.graph.output, strict=True):
        assert old == new
    assert list(model.graph.input) == list(converted.graph.input)
    assert ModelSpec.from_onnx(converted) == toy.SPEC
    onnx.checker.check_model(converted)
    assert converted.SerializeToString() == convert(model)[0].SerializeToString()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch", ["N", 3])
def test_fp16_computes_nearly_the_same(seed: int, batch: int | str) -> None:
    """Heads: apart by rounding, 2^-11 of the largest number times a few layers, but apart."""
    model = toy.network(seed=seed, with_nms=False, batch=batch)
    converted, report = to_fp16(model)
    images = toy.images(3, seed)
    rounded = heads(rounding_every_tensor(converted), images)
    for want, *both in zip(heads(model, images), heads(converted, images), rounded, strict=True):
        for got in both:
            error = np.abs(got - want).max() / np.abs(want).max()
            assert 1e-5 < error < 2e-3
    assert report.casts == 3  # one behind the preprocessing, one per head


def test_fp16_with_nms_detects_the_same() -> None:
    model = toy.network()
    results = [
        run_onnx(lowering.lower(m, form), list(OUTPUT_NAMES), {"input": toy.images()})
        for m, form in ((model, "onnx"), (to_fp16(model)[0], "onnx"), (to_fp16(model)[0], "graph"))
    ]
    for count, boxes, scores, classes in results[1:]:
        np.testing.assert_array_equal(count, results[0][0])
        np.testing.assert_array_equal(classes, results[0][3])
        np.testing.assert_allclose(scores, results[0][2], atol=2e-3)
        np.testing.assert_allclose(boxes, results[0][1], rtol=5e-3, atol=0.1)


def test_float32_is_kept_for_preprocessing_because_it_matters() -> None:
    """The worst error of (x - mean) * scale in FP16, for x of 0 to 255, is a fifth of a grey
    level; float32's is none.
    """
    x = np.arange(256, dtype=np.float32)
    mean, scale = np.float32(123.675), np.float32(1 / 58.395)
    half = (x.astype(np.float16) - np.float16(mean)) * np.float16(scale)
    wrong_levels = np.abs(half.astype(np.float32) - (x - mean) * scale) / scale
    assert 0.1 < wrong_levels.max() < 0.3


def test_nothing_to_convert_is_said_before_ranges_are_measured() -> None:
    """A session without outputs would say nothing that anybody understands."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[1, 4] input) => (float[1, 4] output) { output = Relu(input) }
    """)
    with pytest.raises(GraphError, match="expected a float32 model with convolutions to convert"):
        activation_ranges(model, [{"input": np.ones((1, 4), np.float32)}])


def test_weights_that_overflow_stay_float32() -> None:
    model = toy.network(with_nms=False)
    toy.set_weight(model, "class_w", toy.weight(model, "class_w") * 1e6)
    ranges = activation_ranges(model, [{"input": toy.images()}])
    converted, report = to_fp16(model, ranges=ranges)
    kept = reasons(report.kept)
    assert "classes" in kept  # behind them: what they make does not fit either
    assert set(reasons(to_fp16(model)[1].kept)) == {"class_0", "class_1"}
    assert kept["class_0"].startswith("weights 'class_w': largest magnitude")
    assert kept["class_0"].endswith("FP16 ends at 6.55e+04")
    assert any("stays float32: Conv 'class_0'" in line for line in report.warnings())
    want, got = heads(model, toy.images())[1], heads(converted, toy.images())[1]
    assert np.isfinite(got).all() and np.abs(got - want).max() < 2e-3 * np.abs(want).max()
    assert types(converted)["c0"] == TensorProto.FLOAT


def test_what_a_node_out_of_range_makes_is_measured_too() -> None:
    """A sigmoid's output always fits; its input, from a node whose weights do not, does not."""
    model = toy.network()
    toy.set_weight(model, "bn_scale", toy.weight(model, "bn_scale") * 1e6)
    _, report = to_fp16(model, ranges=activation_ranges(model, [{"input": toy.images()}]))
    kept = reasons(report.kept)
    assert kept["stem_bn"].startswith("weights 'bn_scale'")
    assert kept["stem_sigmoid"].startswith("activation 'stem_n': largest magnitude")


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_no_numbers_are_reported(value: float) -> None:
    model = toy.network()
    weights = toy.weight(model, "box_w").copy()
    weights[0, 0] = value
    toy.set_weight(model, "box_w", weights)
    assert set(reasons(to_fp16(model)[1].kept)) == {"box_0", "box_1"}


def test_tiny_weights_round_to_zero_beside_large_ones_only() -> None:
    model = toy.network(with_nms=False)
    weights = toy.weight(model, "box_w").copy()
    weights[0, :2] = [[[1e-9]], [[-1e-20]]]
    toy.set_weight(model, "box_w", weights)
    _, report = to_fp16(model)
    assert report.kept == () and report.flushed == 2
    assert "2 weights round to zero" in report.lines()[0]

    toy.set_weight(model, "box_w", toy.weight(model, "box_w") * 1e-7)
    assert set(reasons(to_fp16(model)[1].kept)) == {"box_0", "box_1"}
    ranges = activation_ranges(model, [{"input": toy.images()}])
    converted, report = to_fp16(model, ranges=ranges)
    kept = reasons(report.kept)
    assert "weights 'box_w': largest magnitude" in kept["box_0"] and report.flushed == 0
    assert kept["boxes"].endswith("too small for FP16")  # what they make is too small as well
    want, got = heads(model, toy.images())[0], heads(converted, toy.images())[0]
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()


def test_activations_out_of_range_stay_float32() -> None:
    """Weights that fit, activations that do not."""
    model = toy.network(with_nms=False)
    toy.set_weight(model, "down_w", toy.weight(model, "down_w") * 2e4)
    toy.set_weight(model, "class_w", toy.weight(model, "class_w") * 1e-3)
    toy.set_weight(model, "box_w", toy.weight(model, "box_w") * 1e-3)
    images = toy.images()
    blind = rounding_every_tensor(to_fp16(model)[0])
    assert not all(np.isfinite(values).all() for values in heads(blind, images))

    ranges = activation_ranges(model, [{"input": images}])
    converted, report = to_fp16(model, ranges=ranges)
    kept = reasons(report.kept)
    assert {"down", "upsample", "merge"} <= set(kept)
    assert not {"stem", "stem_bn", "stem_swish", "classes"} & set(kept)
    assert kept["down"] == (
        f"activation 'coarse': largest magnitude {ranges['coarse']:.4g}, FP16 is used up to 1.638e+04"
    )
    for want, got in zip(heads(model, images), heads(converted, images), strict=True):
        assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()


def test_activation_ranges_are_those_of_the_tensors() -> None:
    model = toy.network()
    low, high = toy.images(2, 1), toy.images(3, 2) * 4
    ranges = activation_ranges(model, ({"input": x} for x in (low, high, low)))
    assert ranges.keys() == {
        output for node in model.graph.node if node.name in toy.BODY for output in node.output
    }
    names = sorted(ranges)
    inside = [run_onnx(toy.network(with_nms=False), names, {"input": x}) for x in (low, high)]
    for name, *values in zip(names, *inside, strict=True):
        assert ranges[name] == pytest.approx(max(np.abs(v).max() for v in values), rel=1e-5)
    toy.set_weight(model, "bn_var", np.full(8, -1))  # a square root of it is no number
    ranges = activation_ranges(model, [{"input": low}])
    assert ranges["stem_n"] == ranges["coarse"] == np.inf and ranges["stem"] < 100


def test_names_that_are_asked_for_stay_float32() -> None:
    """Weights and tensors that both kinds of node use exist in both types, with one Cast each
    way.
    """
    converted, report = to_fp16(toy.network(with_nms=False), keep_fp32=["class_1", "stem_b?"])
    assert reasons(report.kept) == {"class_1": "asked for ('class_1')", "stem_bn": "asked for ('stem_b?')"}  # fmt: skip
    weights = {t.name: t.data_type for t in converted.graph.initializer}
    assert weights["class_w"] == TensorProto.FLOAT
    assert weights["class_w/fp16"] == TensorProto.FLOAT16
    casts = {node.output[0] for node in converted.graph.node if node.op_type == "Cast"}
    # around stem_bn, before class_1; behind it its Transpose is no longer fed narrow values
    assert casts >= {"stem", "stem_n/fp16", "coarse", "normal/fp16"}
    want, got = (heads(m, toy.images()) for m in (toy.network(with_nms=False), converted))
    for a, b in zip(want, got, strict=True):
        assert np.abs(a - b).max() < 2e-3 * np.abs(a).max()


def test_resize_scales_stay_float32_and_shapes_integers() -> None:
    converted, _ = to_fp16(toy.network())
    kinds = {t.name: t.data_type for t in converted.graph.initializer}
    assert kinds["twice"] == TensorProto.FLOAT
    assert kinds["box_shape"] == kinds["class_shape"] == TensorProto.INT64
    assert kinds["mean"] == kinds["scale"] == kinds["nms/anchors"] == TensorProto.FLOAT
    assert {kinds[f"bn_{part}"] for part in ("scale", "bias", "mean", "var")} == {TensorProto.FLOAT16}  # fmt: skip


def test_an_inner_tensor_that_is_an_output_keeps_its_type() -> None:
    model = toy.network(with_nms=False)
    model.graph.output.append(onnx.helper.make_tensor_value_info("fine", TensorProto.FLOAT, ["N", 8, 8, 8]))  # fmt: skip
    converted, report = to_fp16(model)
    assert report.casts == 4
    readers = {n.name for n in converted.graph.node if "fine/fp16" in n.input}
    assert readers == {"down", "merge", "fine/cast"}
    want, got = (run_onnx(m, ["fine"], {"input": toy.images()})[0] for m in (model, converted))
    assert got.dtype == np.float32 and 0 < np.abs(got - want).max() < 0.02


def test_subgraphs_see_float32() -> None:
    """An If that reads a tensor and a weight of the body by their outer names."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        branches (float[1, 1, 4, 4] x, bool flag) => (float[1, 1, 4, 4] y)
          <float[1, 1, 1, 1] w = {3.3}>
        {
          [first] a = Conv(x, w)
          [choice] b = If (flag) <
            then_branch = then_g () => (float[1, 1, 4, 4] t) { t = Mul(a, w) },
            else_branch = else_g () => (float[1, 1, 4, 4] e) { e = Identity(a) }>
          [second] y = Conv(b, w)
        }
    """)
    converted, report = to_fp16(model)
    onnx.checker.check_model(converted, full_check=True)
    assert reasons(report.by_design) == {"choice": "no narrow form"} and report.converted == 2
    x = np.linspace(-2, 2, 16, dtype=np.float32).reshape(1, 1, 4, 4)
    for flag, factor in ((True, 3.3), (False, 1)):
        (got,) = run_onnx(converted, ["y"], {"x": x, "flag": np.array(flag)})
        np.testing.assert_allclose(got, factor * 3.3**2 * x, rtol=3e-3)


def test_everything_behind_the_nms_stays_float32() -> None:
    """Also a matrix product without the prefix of our own NMS nodes."""
    model = toy.network()
    model.graph.node.append(onnx.helper.make_node("MatMul", ["detection_scores", "twist"], ["twisted"], "twist"))  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.eye(10, dtype=np.float32), "twist"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("twisted", TensorProto.FLOAT, ["N", 10]))  # fmt: skip
    converted, report = to_fp16(model)
    assert reasons(report.by_design)["twist"] == "box decoding and NMS"
    assert report.converted == len(toy.BODY)
    assert next(t.data_type for t in converted.graph.initializer if t.name == "twist") == TensorProto.FLOAT  # fmt: skip


def test_constant_nodes_count_as_weights() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        constants (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y)
        {
          w = Constant<value = float[1, 1, 1, 1] {1e6}>()
          half = Constant<value = float[1] {0.5}>()
          [first] a = Conv(x, half_w)
          [middle] b = Mul(a, half)
          [second] y = Conv(b, w)
        }
    """)
    model.graph.initializer.append(numpy_helper.from_array(np.full((1, 1, 1, 1), 2, np.float32), "half_w"))  # fmt: skip
    converted, report = to_fp16(model)
    assert set(reasons(report.kept)) == {"second"} and report.converted == 2
    (y,) = run_onnx(converted, ["y"], {"x": np.ones((1, 1, 4, 4), np.float32)})
    np.testing.assert_array_equal(y, np.full((1, 1, 4, 4), 1e6, np.float32))


def test_bfloat16_rounds_to_nearest_even() -> None:
    model = toy.network()
    step = 2.0**-7  # between bfloat16 numbers from 1 to 2
    values = np.array([1 + step / 2, 1 + step * 1.5, 1 + step * 0.51, -3e38, 1e-40, 0, 65536, 1e-9])
    want = np.array([1, 1 + 2 * step, 1 + step, -3e38, 1e-40, 0, 65536, 1e-9], np.float32)
    toy.set_weight(model, "bn_bias", values)
    converted, report = to_bf16(model)
    tensor = next(t for t in converted.graph.initializer if t.name == "bn_bias")
    bits = np.frombuffer(tensor.raw_data, "<u2").astype(np.uint32) << 16
    np.testing.assert_allclose(bits.view(np.float32), want, rtol=2**-8, atol=1e-40)
    np.testing.assert_array_equal(bits.view(np.float32)[:3], want[:3])
    assert report.kept == ()


@pytest.mark.parametrize("already", [to_fp16, None])
def test_models_that_cannot_be_converted(already) -> None:  # type: ignore[no-untyped-def]
    if already:
        model = already(toy.network())[0]
    else:
        model = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
        )
    with pytest.raises(GraphError, match="FP16: expected a float32 model with convolutions to convert"):  # fmt: skip
        to_fp16(model)


@pytest.mark.parametrize(("opset", "want"), [(13, 19), (17, 19), (19, 19), (21, 21)])
def test_opset_is_raised_without_a_change_of_numbers(opset: int, want: int) -> None:
    axes = "<keepdims = 0>(a, axis)" if opset >= 18 else "<axes = [0], keepdims = 0>(a)"
    parts = "<axis = 1, num_outputs = 2>" if opset >= 18 else "<axis = 1>"
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": {opset}]>
        g (float[2, 4] x) => (float[2] y) <int64[1] axis = {{0}}>
        {{ a, b = Split{parts}(x) c = ReduceMax{axes} d = ReduceSum<keepdims = 0>(b, axis) y = Mul(c, d) }}
    """)
    (before,) = run_onnx(model, ["y"], {"x": np.arange(8, dtype=np.float32).reshape(2, 4)})
    raise_opset(model)
    assert model.opset_import[0].version == want
    onnx.checker.check_model(model, full_check=True)
    (after,) = run_onnx(model, ["y"], {"x": np.arange(8, dtype=np.float32).reshape(2, 4)})
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(after, [4 * 8, 5 * 10])


def test_opset_that_cannot_be_raised() -> None:
    model = toy.network()
    model.opset_import[0].version = 12
    with pytest.raises(GraphError, match="expected opset 13 or later for Q/DQ, found 12; convert"):
        raise_opset(model)
    model.opset_import[0].version = 13
    model.graph.node.append(onnx.helper.make_node("RoiAlign", ["a", "b", "c"], ["d"], name="roi"))
    with pytest.raises(GraphError, match="RoiAlign 'roi': expected opset 16 or later, found 13"):
        raise_opset(model)


def test_real_model(tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    ranges = activation_ranges(model, [{"input": np.random.default_rng(0).uniform(0, 255, (1, 128, 128, 3)).astype(np.float32)}])  # fmt: skip
    converted, report = to_fp16(model, ranges=ranges)
    onnx.checker.check_model(converted)
    assert (report.casts, len(report.by_design), report.kept) == (3, 4, ())
    image = np.random.default_rng(1).uniform(0, 255, (2, 128, 128, 3)).astype(np.float32)
    for want, got in zip(heads(model, image), heads(converted, image), strict=True):
        assert 1e-4 < np.abs(got - want).max() < 0.05
