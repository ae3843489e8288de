# SPDX-License-Identifier: Apache-2.0
"""Biases that ONNX Runtime's WeightBiasQuantization cannot hold."""

from typing import Any

import numpy as np
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from trtdet import sessions
from trtdet.precision import floats
from trtdet.precision.body import Body
from trtdet.precision.equalization import Equalization, Weights, undo_in
from trtdet.precision.large_biases import add_large_biases
from trtdet.precision.pairs import NewConv, round_weights, write_convs
from trtdet.precision.scales import INT8
from trtdet.spec import ModelSpec, Nms, Preprocessing

CHANNELS = 32


def quantized(
    shift: float, *, bias: float = 0.0, scale: float = 1.0, after: str = "Relu", fp16: bool = True
) -> onnx.ModelProto:
    """Two pointwise convolutions in INT8, the first behind nodes that shift its input.

    Args:
        shift: of all channels, which go from 0 to 1.
        bias: of the first convolution.
        scale: of its weights, which are about 1.
        after: the operator between the two.
        fp16: the rest in FP16.
    """
    model = onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["": 19]>
        g (float[1, {CHANNELS}, 8, 8] x) => (float[1, {CHANNELS}, 8, 8] y) {{
          ["in"] in_range = Sigmoid(x)
          ["first"] made = Conv(in_range, w, b)
          ["after"] passed = {after}(made)
          ["second"] again = Conv(passed, w, b)
          ["out"] y = Softsign(again)
        }}
    """)
    random = np.random.default_rng(0)
    values = np.abs(random.normal(size=(CHANNELS, CHANNELS, 1, 1)))
    for name, array in {"w": values, "b": np.ones(CHANNELS)}.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    spec = ModelSpec("toy", Preprocessing((8, 8), layout="NCHW"), Nms(), (1,))
    layers = {layer.name: layer for layer in Body(model, spec).layers}
    change = Equalization(np.ones(CHANNELS), np.full(CHANNELS, shift))
    first = undo_in(Weights(values * scale, np.full(CHANNELS, bias)), change, depthwise=False)
    second = Weights(random.normal(size=values.shape) / CHANNELS, np.zeros(CHANNELS))
    convs = {
        "first": NewConv(layers["first"], first, round_weights(first.values, INT8, fp16=fp16), 1 - shift, change),
        "second": NewConv(layers["second"], second, round_weights(second.values, INT8, fp16=fp16), CHANNELS * scale + bias),
    }  # fmt: skip
    found, _ = write_convs(model, convs, INT8, pairs=True, fp16_scales=fp16)
    return floats.to_fp16(found, keep_fp32=[], ranges=None)[0] if fp16 else found


def run(model: onnx.ModelProto, *, integer_kernels: bool) -> NDArray[np.float32]:
    session = sessions.open_session(model, "toy", threads=1, integer_kernels=integer_kernels)
    x = np.random.default_rng(1).normal(size=(1, CHANNELS, 8, 8)).astype(np.float32)
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 0.5},
        {"shift": 0.5, "after": "Clip"},
        {"shift": 0.5, "after": "Identity"},
        {"shift": 0.0, "bias": 2.0, "scale": 1e-2},
        {"shift": 0.0, "bias": 2.0, "scale": 1e-7, "fp16": False},
    ],
    ids=["shift", "before a Clip", "before an Identity", "small weights", "weights of almost 0"],
)
def test_integer_kernels_give_what_the_graph_says(options: dict[str, Any]) -> None:
    pytest.importorskip("onnxruntime")
    model = quantized(**options)
    found = add_large_biases(model)
    onnx.checker.check_model(found, full_check=True)
    assert [n.op_type for n in found.graph.node if n not in model.graph.node] == ["Conv", "Add"]
    assert len(found.graph.initializer) == len(model.graph.initializer)  # the bias has moved
    written = run(model, integer_kernels=False)
    assert np.abs(run(model, integer_kernels=True) - written).max() > 0.5  # of numbers below 1
    np.testing.assert_array_equal(run(found, integer_kernels=False), written)
    np.testing.assert_allclose(run(found, integer_kernels=True), written, atol=5e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 0.1},
        {"shift": 0.5, "after": "Sigmoid"},
        {"shift": 0.5, "fp16": False},
        {"shift": 0.0, "bias": 2.0, "scale": 1e-2, "fp16": False},
    ],
    ids=["a small shift", "before no QuantizeLinear", "FP32", "small weights, FP32"],
)
def test_biases_that_fit_stay(options: dict[str, Any]) -> None:
    pytest.importorskip("onnxruntime")
    model = quantized(**options)
    assert add_large_biases(model) is model
    found = [run(model, integer_kernels=kernels) for kernels in (True, False)]
    np.testing.assert_allclose(*found, atol=2e-2)


def test_names_that_are_taken_and_scales_that_fp16_does_not_hold() -> None:
    model = quantized(0.5)
    for tensor in model.graph.initializer:
        if tensor.name == "first/weight/scale":  # products of 0 in FP16
            tensor.CopyFrom(numpy_helper.from_array(np.full(CHANNELS, 6e-8, np.float16), tensor.name))  # fmt: skip
        if tensor.name == "first/bias":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(CHANNELS, np.float16), tensor.name))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "made/bias"))
    found = add_large_biases(model)
    add = next(node for node in found.graph.node if node.op_type == "Add")
    assert [add.name, *add.input, *add.output] == ["made/bias_", "made/without_bias", "made/bias/constant", "made"]  # fmt: skip
    constant = next(w for w in found.graph.initializer if w.name == "made/bias/constant")
    assert list(constant.dims) == [1, CHANNELS, 1, 1]
