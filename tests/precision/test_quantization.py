# SPDX-License-Identifier: Apache-2.0
"""Q/DQ: what is quantized, how exactly, and that TensorRT-RTX builds it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from mobile_network import CHANNELS, SPEC, body, images, mobile_block, run
from onnx import numpy_helper

from trtdet.errors import GraphError
from trtdet.images.batcher import ImageBatcher
from trtdet.images.files import find_images
from trtdet.nms import lowering
from trtdet.precision import quantization
from trtdet.precision.body import Body, block_of
from trtdet.precision.calibration import calibrate
from trtdet.precision.calibration_cache import CalibrationCache
from trtdet.precision.equalization import best_equalization
from trtdet.precision.floats import to_fp16
from trtdet.precision.quantization import (
    QuantizationOptions,
    insert_qdq,
)
from trtdet.precision.scales import FP8, INT8, QuantizedType
from trtdet.spec import ModelSpec


def sqnr(model: onnx.ModelProto, cache: CalibrationCache, **options: Any) -> float:
    """Signal to quantization noise of the output, in decibels."""
    quantized, _ = insert_qdq(body(model), cache, QuantizationOptions(**options))
    feeds = images(8, seed=2)
    (expected,), (found,) = run(model, feeds), run(quantized, feeds)
    return float(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()))


@pytest.fixture(scope="module")
def cache() -> CalibrationCache:
    return calibrate(body(), images(32), "minmax")


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


# ---- what is quantized


def test_layers_know_their_place() -> None:
    layers = {layer.name: layer for layer in body().layers}
    assert [layer.block for layer in layers.values()] == [
        "stem",
        *["blocks_0"] * 4,
        *["box_net"] * 2,
    ]
    assert layers["net/stem/conv"].macs == 4 * 4 * 9 * 256
    assert layers["net/blocks_0/depthwise"].macs == CHANNELS * 9 * 256
    assert [n for n, layer in layers.items() if layer.depthwise] == ["net/blocks_0/depthwise", "box_net/depthwise"]  # fmt: skip
    assert [n for n, layer in layers.items() if layer.pooled] == ["net/blocks_0/se/conv"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("efficientnet-b0/blocks_11/se/conv2d/BiasAdd", "blocks_11"),
        ("efficientnet-b0/stem/tpu_batch_normalization/FusedBatchNormV3", "stem"),
        ("fpn_cells/cell_2/fnode4/op_after_combine9/bn/FusedBatchNormV3", "fpn_cells/cell_2"),
        ("resample_p6/conv2d/BiasAdd", "resample_p6"),
        ("class_net/class-predict_3/BiasAdd", "class_net"),
        ("/model.22/cv2/conv/Conv", "model.22"),
    ],
)
def test_blocks_by_name(name: str, block: str) -> None:
    assert block_of(name) == block


def test_every_convolution_but_squeeze_and_excite_reads_int8(cache: CalibrationCache) -> None:
    model, report = insert_qdq(body(), cache)
    onnx.checker.check_model(model, full_check=True)
    made_by = producers(model)
    weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    for conv in nodes(model, "Conv"):
        makers = [made_by[n].op_type if n in made_by else "weights" for n in conv.input[:2]]
        if conv.name == "net/blocks_0/se/conv":
            assert makers == ["GlobalAveragePool", "weights"]
        else:
            assert makers == ["DequantizeLinear", "DequantizeLinear"], conv.name
    for node in nodes(model, "QuantizeLinear") + nodes(model, "DequantizeLinear"):
        assert weights[node.input[2]].dtype == np.int8
        assert not weights[node.input[2]].any()  # symmetric
    per_channel = [n for n in nodes(model, "DequantizeLinear") if weights[n.input[1]].ndim]
    assert len(per_channel) == 6
    for node in per_channel:
        assert node.attribute[0].i == 0
        stored = weights[node.input[0]]
        assert stored.dtype == np.int8
        assert (np.abs(stored.reshape(len(stored), -1)).max(1) == 127).all()
    se = CHANNELS * CHANNELS
    assert report.mac_share == pytest.approx(1 - se / (se + 256 * (144 + 32 + 72 + 32 + 36 + 16)))
    assert report.kept == {"net/blocks_0/se/conv": "squeeze-and-excite"}
    assert [(b.name, b.int8_convs, b.convs) for b in report.blocks] == [("stem", 1, 1), ("blocks_0", 3, 4), ("box_net", 2, 2)]  # fmt: skip


def test_a_tensor_is_quantized_once(cache: CalibrationCache) -> None:
    model = mobile_block()
    extra = onnx.NodeProto()
    extra.CopyFrom(next(node for node in model.graph.node if node.name == "box_net/depthwise"))
    extra.name, extra.output[0] = "class_net/depthwise", "class_features"
    model.graph.node.append(extra)
    model.graph.output.append(onnx.helper.make_tensor_value_info("class_features", 1, ["N", 4, 16, 16]))  # fmt: skip
    quantized, _ = insert_qdq(body(model), cache)
    made_by = producers(quantized)
    read = [
        node.input[0] for node in nodes(quantized, "Conv") if node.name.endswith("net/depthwise")
    ]
    assert len(read) == 2
    assert len(set(read)) == 1
    assert made_by[made_by[made_by[read[0]].input[0]].input[0]].op_type == "Mul"


def test_patterns_and_missing_scales_keep_convolutions(cache: CalibrationCache) -> None:
    scales = {name: scale for name, scale in cache.scales.items() if name != "h"}
    without = CalibrationCache(scales, cache.channels)
    _, report = insert_qdq(body(), without, QuantizationOptions(keep=("*stem*", "nothing")))
    assert report.kept == {
        "net/stem/conv": "asked for ('*stem*')",
        "net/blocks_0/se/conv": "squeeze-and-excite",
        "box_net/pointwise": "no scale in the calibration cache",
    }
    assert any("asked for ('*stem*')" in line for line in report.lines())
    model = mobile_block()
    named = Body(model, SPEC.replace(sensitive_nodes=("*project",)))
    assert insert_qdq(named, cache)[1].kept["net/blocks_0/project"] == "sensitive ('*project')"
    assert "net/blocks_0/project" not in insert_qdq(body(model), cache)[1].kept
    with pytest.raises(
        GraphError, match=r"no scale in the calibration cache.*calibrate this model"
    ):
        insert_qdq(body(), CalibrationCache({"x": 1.0}))


def test_a_model_with_its_own_pairs_passes_through(cache: CalibrationCache) -> None:
    once, report = insert_qdq(body(), cache)
    twice, report_again = insert_qdq(body(once), cache)
    assert twice is once
    assert report_again.already
    assert report_again.blocks == report.blocks
    assert report_again.kept == {}


def test_own_pairs_in_a_part_of_the_model_are_said(cache: CalibrationCache) -> None:
    """They stay as they are, and so do the others: training left them out on purpose, or it did
    not, which nobody can tell.
    """
    mixed, _ = insert_qdq(body(), cache, QuantizationOptions(keep=("*/stem/*", "box_net/*")))
    again, report = insert_qdq(body(mixed), cache)
    assert again is mixed
    names = ("net/stem/conv", "box_net/depthwise", "box_net/pointwise")
    assert report.kept == dict.fromkeys(names, "no Q/DQ in the model")
    assert report.lines()[-1] == "not in INT8: 3 x no Q/DQ in the model"


def test_residual_additions_stay_in_floating_point(cache: CalibrationCache) -> None:
    plain, _ = insert_qdq(body(), cache)
    assert "x0" in nodes(plain, "Add")[0].input


@pytest.mark.parametrize("to", [INT8, FP8])
def test_type_of_pairs_is_read_from_the_model(to: QuantizedType, cache: CalibrationCache) -> None:
    model, report = insert_qdq(body(), cache, QuantizationOptions(to=to))
    assert quantization.own_type(model) is to
    assert quantization.report_of(body(model)).type_name == report.type_name == to.name
    for weight in list(model.graph.initializer):  # as other exporters have them
        if weight.data_type == to.onnx_type:
            constant = onnx.helper.make_node("Constant", [], [weight.name], value=weight)
            model.graph.node.insert(0, constant)
            model.graph.initializer.remove(weight)
    assert quantization.own_type(model) is to
    assert quantization.own_type(mobile_block()) is None


def test_the_given_model_is_left_alone(cache: CalibrationCache) -> None:
    model = mobile_block()
    before = model.SerializeToString()
    insert_qdq(body(model), cache)
    assert model.SerializeToString() == before


# ---- how well


def test_equalization_saves_channels_beside_an_outlier(cache: CalibrationCache) -> None:
    model = mobile_block()
    backbone = {
        e: sqnr(model, cache, equalize=e, keep=("box_net*",)) for e in ("none", "depthwise")
    }
    assert (
        backbone["none"] < 22
    )  # one scale for a channel 300 times the others: they round to nothing
    assert backbone["depthwise"] > 35
    whole = {e: sqnr(model, cache, equalize=e) for e in ("none", "depthwise", "all")}
    assert whole["none"] < 3
    assert whole["depthwise"] < 3  # the head's pointwise convolution mixes such channels, too
    assert whole["all"] > 30


def test_a_shift_gives_one_sided_activations_the_numbers_below_zero() -> None:
    model = mobile_block(outlier=1.0)
    feeds = [{"images": 4 * feed["images"]} for feed in images(32)]  # swish far from its dip
    own = calibrate(body(model), feeds, "minmax")
    statistics = own.channels["excited"]
    weights = numpy_helper.to_array(
        next(w for w in model.graph.initializer if w.name == "project_w")
    )
    noise = {
        shift: best_equalization(weights.astype(np.float64), statistics, own.scales["excited"], shift=shift)[1]
        for shift in (False, True)
    }  # fmt: skip
    assert noise[True] < 0.9 * noise[False]  # most of it is the weights' error, which stays
    found, _ = insert_qdq(body(model), own)
    assert any(node.name == "excited/shifted" for node in nodes(found, "Sub"))


def test_factors_behind_a_convolution_cost_no_node(cache: CalibrationCache) -> None:
    model, report = insert_qdq(body(), cache)
    assert "in 'box_net/depthwise'" in report.equalized["box_net/pointwise"]
    assert report.equalized["net/blocks_0/depthwise"] == "depthwise"
    multiplied = {node.input[0] for node in nodes(model, "Mul") if node.name.endswith("/scaled")}
    assert "h" not in multiplied
    assert {"e_swish", "x1"} <= multiplied


def test_equalization_is_exact_in_floating_point(cache: CalibrationCache) -> None:
    """With the rounding taken out again, what is left is the model as it was."""
    model, _ = insert_qdq(body(), cache, QuantizationOptions(correct_bias=False))
    feeds = images(2)
    (expected,) = run(mobile_block(), feeds)
    for node in nodes(
        model, "QuantizeLinear"
    ):  # a step of a millionth of the scale, in as many bits as it takes
        node.op_type = "Identity"
        del node.input[1:]
    for node in nodes(model, "DequantizeLinear"):
        if len(node.attribute) == 0:
            node.op_type = "Identity"
            del node.input[1:]
    (found,) = run(model, feeds)
    # Only the weights are rounded now, 1/254 of the largest of their channel at most.
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_bias_takes_up_the_mean_error(cache: CalibrationCache) -> None:
    model = mobile_block()
    feeds = [{"images": feed["images"] + 3} for feed in images(16, seed=3)]  # a mean far from zero
    shifted = calibrate(body(model), feeds, "minmax")
    (expected,) = run(_with_output(mobile_block(), "x0"), feeds, "x0")
    errors = {}
    for correct in (False, True):
        options = QuantizationOptions(correct_bias=correct, keep=("*blocks_0*", "box_net*"))
        (found,) = run(
            _with_output(insert_qdq(body(model), shifted, options)[0], "x0"), feeds, "x0"
        )
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # padding is left aside
        errors[correct] = np.abs((found - expected)[inner].mean((0, 2, 3))).max()
    assert errors[True] < 0.2 * errors[False]


def _with_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    return model


# ---- FP8, float16 scales, and no pairs at all


def test_fp8_pairs(cache: CalibrationCache) -> None:
    options = QuantizationOptions(to=FP8)
    model, report = insert_qdq(body(), cache, options)
    onnx.checker.check_model(model, full_check=True)
    assert report.type_name == "FP8" and report.lines()[0].startswith("FP8: ")
    assert report.equalized == {} and report.mac_share > 0.99
    weights = {w.name: w for w in model.graph.initializer}
    for node in nodes(model, "QuantizeLinear"):
        scale = numpy_helper.to_array(weights[node.input[1]])
        assert scale == pytest.approx(cache.scales[node.input[0]] * 127 / 448)
        assert weights[node.input[2]].data_type == onnx.TensorProto.FLOAT8E4M3FN
    again = quantization.report_of(body(model))
    assert again.already and again.type_name == "FP8" and again.blocks == report.blocks
    # An exponent of its own: the outlier channel costs nothing, as it does where INT8 has no help.
    assert sqnr(mobile_block(), cache, to=FP8) > 22
    assert sqnr(mobile_block(), cache, equalize="none") < 15


def test_scales_of_fp16_are_numbers_of_fp16(cache: CalibrationCache) -> None:
    model, _ = insert_qdq(body(), cache, QuantizationOptions(fp16_scales=True))
    weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    for node in nodes(model, "DequantizeLinear"):
        scale = weights[node.input[1]]
        assert (scale == scale.astype(np.float16)).all()
    assert sqnr(mobile_block(), cache, fp16_scales=True) > sqnr(mobile_block(), cache) - 1


def test_the_rest_becomes_fp16_without_casts_between(cache: CalibrationCache) -> None:
    quantized, _ = insert_qdq(body(), cache, QuantizationOptions(fp16_scales=True))
    narrow, report = to_fp16(quantized)
    onnx.checker.check_model(narrow, full_check=True)
    assert report.casts == 1 and report.kept == ()  # behind the last convolution
    kinds = {w.name: w.data_type for w in narrow.graph.initializer}
    made_by = producers(narrow)
    for node in nodes(narrow, "QuantizeLinear"):  # the input's is float32, as the input is
        wide = node.input[0] == "images"
        assert kinds[node.input[1]] == (onnx.TensorProto.FLOAT if wide else onnx.TensorProto.FLOAT16)  # fmt: skip
    for conv in nodes(narrow, "Conv"):
        for name in conv.input[:2]:
            if name in made_by and made_by[name].op_type == "DequantizeLinear":
                assert kinds[made_by[name].input[1]] == onnx.TensorProto.FLOAT16
    feeds = images(8, seed=2)
    (expected,), (found,) = run(quantized, feeds), run(narrow, feeds)
    assert np.square(found - expected).mean() < 1e-3 * np.square(expected).mean()


def test_convolutions_kept_in_float32_are_float32_beside_fp16(cache: CalibrationCache) -> None:
    options = QuantizationOptions(fp16_scales=True, keep=("net/blocks_0/*",))
    narrow, report = to_fp16(insert_qdq(body(), cache, options)[0], keep_fp32=("net/blocks_0/*",))  # fmt: skip
    onnx.checker.check_model(narrow, full_check=True)
    kinds = {w.name: w.data_type for w in narrow.graph.initializer}
    wide = {n.name for n in nodes(narrow, "Conv") if kinds.get(n.input[1]) == onnx.TensorProto.FLOAT}  # fmt: skip
    assert wide == {f"net/blocks_0/{name}" for name in ("expand", "depthwise", "se/conv", "project")}  # fmt: skip
    assert {n.name for n in report.kept} == wide and all(n.asked for n in report.kept)
    # A convolution in INT8 whose output does not fit FP16 has its pairs in float32, too.
    narrow, report = to_fp16(insert_qdq(body(), cache, QuantizationOptions(fp16_scales=True))[0], ranges={"e": 1e5})  # fmt: skip
    onnx.checker.check_model(narrow, full_check=True)
    made_by = producers(narrow)
    (expand,) = (n for n in nodes(narrow, "Conv") if n.name == "net/blocks_0/expand")
    kinds = {w.name: w.data_type for w in narrow.graph.initializer}
    assert [kinds[made_by[name].input[1]] for name in expand.input[:2]] == [onnx.TensorProto.FLOAT] * 2  # fmt: skip
    assert len(report.warnings()) == 3 and report.casts <= 3


def test_without_pairs_the_rescaled_model_is_the_same_function(cache: CalibrationCache) -> None:
    options = QuantizationOptions(correct_bias=False)
    rescaled, scales, report = quantization.prepare_implicit(body(), cache, options)
    assert not nodes(rescaled, "QuantizeLinear") and not nodes(rescaled, "DequantizeLinear")
    quantized, explicit = insert_qdq(body(), cache, options)
    assert (report.blocks, report.kept, report.equalized) == (explicit.blocks, explicit.kept, explicit.equalized)  # fmt: skip
    feeds = images(8, seed=2)
    (expected,), (found,) = run(mobile_block(), feeds), run(rescaled, feeds)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    # What convolutions read has the scale that its pair would have had.
    weights = {w.name: numpy_helper.to_array(w) for w in quantized.graph.initializer}
    for node in nodes(quantized, "QuantizeLinear"):
        assert scales.scales[node.input[0]] == pytest.approx(float(weights[node.input[1]]), rel=1e-6)  # fmt: skip
    assert cache.scales.items() <= scales.scales.items()
    with pytest.raises(GraphError, match="brings its own Q/DQ, which needs no calibrator"):
        quantization.prepare_implicit(body(quantized), cache)


# ---- a real detector


@pytest.fixture(scope="module")
def tiny_int8(tiny_onnx: Path) -> onnx.ModelProto:
    model = onnx.load(tiny_onnx)
    spec = ModelSpec.from_onnx(model)
    photos = find_images(Path(__file__).resolve().parents[2] / "examples" / "images")
    with ImageBatcher(photos, spec.preprocessing, 4) as batches:
        feeds = ({model.graph.input[0].name: b.images} for b in batches)
        cache = calibrate(Body(model, spec), feeds)
    return insert_qdq(Body(model, spec), cache)[0]


def test_pairs_of_a_real_detector(tiny_int8: onnx.ModelProto) -> None:
    made_by = producers(tiny_int8)
    layers = Body(tiny_int8, ModelSpec.from_onnx(tiny_int8)).layers
    report = quantization.report_of(Body(tiny_int8, ModelSpec.from_onnx(tiny_int8)))
    assert report.mac_share > 0.99
    for layer in layers:
        assert (made_by[layer.input].op_type == "DequantizeLinear") != layer.pooled, layer.name
        assert (layer.weight in made_by) != layer.pooled, layer.name
    (plugin,) = (node for node in tiny_int8.graph.node if node.op_type == lowering.PLUGIN_OP)
    assert {made_by[name].op_type for name in plugin.input[:2]} == {"Concat"}


def test_tensorrt_rtx_builds_it(tiny_int8: onnx.ModelProto) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    messages: list[tuple[Any, str]] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.append((severity, message))

    logger = Log()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(lowering.lower(tiny_int8, "graph").SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]  # fmt: skip
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, *[(n, *network.get_input(0).shape[1:]) for n in (1, 1, 4)])  # fmt: skip
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, messages[-3:]
    complaints = [m for severity, m in messages if "scale" in m.lower() and "missing" in m.lower()]
    assert complaints == []
